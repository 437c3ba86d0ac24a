"""Quantised matrices as accelerators hold them: how they come from a checkpoint and go back, and their products."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from jllm_core import ArrayInfo, ModelConfig, Quantization, QuantizedArray, abstract_weights, init_weights
from jllm_core.array_info import array_bytes, named_leaves
from jllm_core.checkpoint import read_manifest, restore_weights, save_checkpoint
from jllm_core.ops.linear import linear
from jllm_core.quantization.arrays import DeviceForm, QuantizationError, abstract_quantized, dequantize, entry
from jllm_core.quantization.device_form import (
    GPU,
    GPU_WITHOUT_TRITON,
    INT8_UNITS,
    TPU_BYTES,
    TPU_INT4,
    device_form,
    held_part,
    held_weights,
    stored_weights,
)
from jllm_core.quantization.grids import quantize
from jllm_core.sharding import Placement

MakeConfig = Callable[..., ModelConfig]

KINDS = ["TPU v2", "TPU v5 lite", "NVIDIA H100 80GB HBM3", "Tesla T4"]
INT8, INT8_G32, INT4_G32, INT4_G64 = Quantization(8), Quantization(8, 32), Quantization(4, 32), Quantization(4, 64)
GRIDS = [INT8, INT8_G32, INT4_G32, INT4_G64, Quantization(4, 32, offsets=True), Quantization(4, 64, offsets=True)]
# Shape, input axes, axes before them, equation, and the logical axes: q, o, w_down, and an embedding as the head.
MATRICES: dict[str, tuple[tuple[int, ...], int, str, tuple[str, ...]]] = {
    "q": ((128, 3, 8), 1, "BTD,DNH->BTNH", ("model", "heads", "head_dim")),
    "o": ((3, 128, 5), 2, "BTNH,NHD->BTD", ("heads", "head_dim", "model")),
    "w_down": ((128, 7), 1, "BTF,FD->BTD", ("ffw", "model")),
    "head": ((128, 7), 1, "...D,DV->...V", ("model", "vocab")),
}


def placed(kind: str, devices: int = 1) -> Placement:
    """One device of a kind that is not there, or several along ``tensor``."""
    device = AbstractDevice(device_kind=kind, platform="", num_cores=1)
    return Placement(AbstractMesh((devices,), ("tensor",), abstract_device=device))


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def held_on(
    kind: str,
    matrix: np.ndarray,
    grid: Quantization,
    inputs: int,
    axes: tuple[str, ...],
    batch: int = 0,
    devices: int = 1,
) -> tuple[QuantizedArray, QuantizedArray]:
    """A quantised matrix as it is stored, and as devices of a kind hold it."""
    infos = abstract_quantized(ArrayInfo(matrix.shape, np.float32, axes), grid, inputs, batch)
    stored = quantize(matrix, grid, inputs, batch)
    held = held_weights(infos, placed(kind, devices))

    def part(name: str) -> Any:
        info, numbers = getattr(held, name), getattr(stored, name)
        if info is None:
            return None
        converted = held_part(name, infos, held, tuple(slice(0, size) for size in info.shape), lambda box: numbers[box])
        assert (converted.shape, converted.dtype) == (info.shape, info.dtype)
        return jnp.asarray(converted)

    return stored, dataclasses.replace(held, values=part("values"), scales=part("scales"), offsets=part("offsets"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
@pytest.mark.parametrize("name", ["q", "o"])
def test_a_held_matrix_is_the_stored_one(kind: str, grid: Quantization, name: str) -> None:
    shape, inputs, _, axes = MATRICES[name]
    stored, held = held_on(kind, random(*shape), grid, inputs, axes)
    assert (held.shape, held.group, held.quantization) == (shape, stored.group, stored.quantization)
    np.testing.assert_array_equal(dequantize(held), dequantize(stored))
    assert held.is_grouped == (grid.group is not None)
    if kind != "TPU v2":
        assert held.values.dtype == (jnp.int4 if grid.bits == 4 else jnp.int8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
@pytest.mark.parametrize("name", MATRICES)
def test_the_product_is_that_of_the_numbers(kind: str, grid: Quantization, name: str) -> None:
    """Whatever the number of rows: group by group, scaled before the product, or without one."""
    shape, inputs, equation, axes = MATRICES[name]
    _, held = held_on(kind, random(*shape), grid, inputs, axes)
    for leading in ((1, 1), (8, 1), (1, 40)):
        x = random(*leading, *shape[:inputs], seed=1)
        expected = np.einsum(equation, x, np.asarray(dequantize(held)))
        got = linear(equation, jnp.asarray(x), held)
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max(), rtol=1e-4)
    rounded = linear(equation, jnp.asarray(x, jnp.bfloat16), held)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(rounded, np.float32), expected, atol=0.03 * np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_is_the_head_of_a_device_too(kind: str) -> None:
    matrix = random(7, 24)
    infos = abstract_quantized(ArrayInfo((7, 24), np.float32, ("vocab", "model")), INT8, batch=1)
    held = held_weights(infos, placed(kind))
    array = dataclasses.replace(jax.tree.map(jnp.asarray, quantize(matrix, INT8, batch=1)), form=held.form)
    for rows in (1, 5):
        x = random(rows, 24, seed=1)
        got = linear("...D,VD->...V", jnp.asarray(x), array)
        np.testing.assert_allclose(got, x @ np.asarray(dequantize(array)).T, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(array.rows(jnp.array([6, 0]), jnp.float32), np.asarray(dequantize(array))[[6, 0]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_an_expert_of_many(kind: str, grid: Quantization) -> None:
    matrix = random(3, 128, 5)
    _, held = held_on(kind, matrix, grid, 1, ("experts", "model", "ffw"), batch=1)
    one, x = entry(held, 2), random(4, 128, seed=1)
    expected = x @ np.asarray(dequantize(held))[2]
    np.testing.assert_allclose(linear("RD,DF->RF", jnp.asarray(x), one), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
@pytest.mark.parametrize("devices", [2, 4])
def test_devices_have_whole_groups(kind: str, grid: Quantization, devices: int) -> None:
    """4 devices share 6 groups of 64, or 12 of 32, out; where a group would be cut, it becomes two."""
    matrix = random(384, 5)
    stored, held = held_on(kind, matrix, grid, 1, ("ffw", "model"), devices=devices)
    np.testing.assert_array_equal(dequantize(held), dequantize(stored))
    if grid.group is not None:
        assert held.values.shape[0] % devices == held.scales.shape[0] % devices == 0
        assert held.group == {(64, 4): 32}.get((grid.group, devices), grid.group)


def test_each_device_reads_its_own_part() -> None:
    infos = abstract_quantized(ArrayInfo((384, 5), np.float32, ("ffw", "model")), INT4_G64)
    stored = quantize(random(384, 5), INT4_G64)
    for kind in KINDS:
        held = held_weights(infos, placed(kind, 4))
        for part in ("values", "scales"):
            shape = getattr(held, part).shape
            boxes: list[tuple[slice, ...]] = []

            def read(box: tuple[slice, ...], part: str = part, boxes: list[Any] = boxes) -> np.ndarray:
                boxes.append(box)
                taken: np.ndarray = getattr(stored, part)[box]
                return taken

            own = [slice(n * shape[0] // 4, (n + 1) * shape[0] // 4) for n in range(4)]
            others = [slice(0, size) for size in shape[1:]]
            pieces = [held_part(part, infos, held, (cut, *others), read) for cut in own]
            whole = held_part(part, infos, held, (slice(0, shape[0]), *others), read)
            np.testing.assert_array_equal(np.concatenate(pieces), whole)
            # A quarter of the rows, and at most the rest of the groups that its ends are in.
            rows, unit = getattr(stored, part).shape[0], 32 if part == "values" else 1
            assert all(box[0].stop - box[0].start <= rows // 4 + unit for box in boxes[:4])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [INT8_G32, GRIDS[-1], Quantization(4, 64, embedding=8)], ids=lambda grid: grid.name)
def test_a_checkpoint_comes_to_a_device_and_back(
    tmp_path: Path, make_config: MakeConfig, kind: str, grid: Quantization
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
    config = make_config(**sizes, num_layers=1, tie_embeddings=grid.embedding is not None)
    weights = init_weights(config, jax.random.key(0), quantization=grid)
    save_checkpoint(tmp_path / "a", config, weights)
    infos = held_weights(abstract_weights(config, quantization=grid), placed(kind, 2))
    held = restore_weights(tmp_path / "a", config, held=infos)
    assert jax.tree.structure(held) == jax.tree.structure(infos)
    for name, array in named_leaves(held).items():
        info = named_leaves(infos)[name]
        assert (array.shape, array.dtype) == (info.shape, info.dtype)
    matrix = held.layers[0].ffw.w_down
    np.testing.assert_array_equal(dequantize(matrix), dequantize(weights.layers[0].ffw.w_down))
    # 192 numbers are 3 groups of 64, and 2 devices have one and a half each.
    assert matrix.group == (32 if grid.group == 64 else grid.group)
    save_checkpoint(tmp_path / "b", config, held)
    assert read_manifest(tmp_path / "b").quantization == grid
    again = named_leaves(restore_weights(tmp_path / "b", config))
    for name, array in named_leaves(weights).items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


def test_a_cpu_holds_what_is_stored(make_config: MakeConfig) -> None:
    config = make_config(hidden_size=64, intermediate_size=64, head_dim=32, num_layers=1)
    infos = abstract_weights(config, quantization=INT4_G32)
    assert held_weights(infos, placed("cpu")) is infos
    assert held_weights(infos, None) is infos
    assert stored_weights(infos) == infos


def test_forms_by_kind() -> None:
    kinds = [None, "cpu", "TPU v3", "TPU v4", "TPU v5", "TPU v6 lite", "TPU7x", "NVIDIA L4", "Tesla V100-SXM2-16GB"]
    forms = [DeviceForm(), DeviceForm(), TPU_BYTES, *[TPU_INT4] * 4, GPU, GPU_WITHOUT_TRITON]
    assert [device_form(kind) for kind in kinds] == forms


def test_bytes_of_int4() -> None:
    assert array_bytes((3, 8), jnp.int4) == ArrayInfo((3, 8), jnp.int4, (None, None)).nbytes == 12
    assert array_bytes((3, 8), jnp.bfloat16) == 48


# ---- Activations in 8 bits.


def with_int8_activations(array: QuantizedArray) -> QuantizedArray:
    return dataclasses.replace(array, form=device_form("TPU v5 lite", "int8"))


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("rows", [1, 9])
def test_rows_are_rounded_to_int8_by_their_largest_number(name: str, rows: int) -> None:
    shape, inputs, equation, axes = MATRICES[name]
    _, held = held_on("TPU v5 lite", random(*shape), INT8, inputs, axes)
    x = random(rows, 1, *shape[:inputs], seed=1) * np.float32(10) ** np.arange(rows).reshape(-1, 1, *[1] * inputs)
    steps = np.abs(x).max(tuple(range(2, x.ndim)), keepdims=True) / np.float32(127)
    exact = np.einsum(equation, np.rint(x / steps).astype(np.int64), np.asarray(held.values, np.int64))
    scales = np.asarray(held.scales).reshape(shape[inputs:])
    expected = exact * steps.reshape(rows, 1, *[1] * (len(shape) - inputs)) * scales
    array = with_int8_activations(held)
    np.testing.assert_allclose(linear(equation, jnp.asarray(x), array), expected, rtol=1e-5)
    assert not np.array_equal(linear(equation, jnp.asarray(x), held), linear(equation, jnp.asarray(x), array))
    assert not np.any(linear(equation, jnp.zeros_like(x), array))


def test_groups_stay_as_they_are_beside_int8_activations() -> None:
    shape, inputs, equation, axes = MATRICES["w_down"]
    _, held = held_on("TPU v5 lite", random(*shape), INT8_G32, inputs, axes)
    x = jnp.asarray(random(9, 1, *shape[:inputs], seed=1))
    np.testing.assert_array_equal(linear(equation, x, held), linear(equation, x, with_int8_activations(held)))


@pytest.mark.parametrize("kind", ["cpu", "TPU v2", "TPU v4", None])
def test_devices_without_int8_units_refuse(kind: str | None) -> None:
    with pytest.raises(QuantizationError, match=r"multiply int8 faster than bfloat16: TPU v5 lite.*; this is"):
        device_form(kind, "int8")
    assert all(device_form(kind, "int8").int8_activations for kind in INT8_UNITS)
