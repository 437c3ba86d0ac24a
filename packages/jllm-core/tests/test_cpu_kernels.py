"""The CPU kernels beside XLA: products, layers, and where they step back."""

import dataclasses
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice
from jllm_core import ModelConfig, MoEConfig, Quantization, Weights
from jllm_core.backends.base import XLA, Backend
from jllm_core.backends.cpu import backend as cpu
from jllm_core.backends.cpu import ffi, ffi_call_frame
from jllm_core.backends.select import select_backend
from jllm_core.model import forward, unembed
from jllm_core.ops.norm import rms_norm
from jllm_core.quantization.arrays import QuantizedArray, dequantize
from jllm_core.quantization.grids import quantize
from jllm_core.quantization.keys_values import QuantizedSlots, quantize_slots
from jllm_core.sharding import Placement

pytest.importorskip("llvmlite")

IN_ORDER, PLACED, PAGED = ORDERS = ("in order", "placed", "paged")
"""Where the slots of a cache stand: at their own numbers, where it says, or in pages."""

KERNELS = cpu.CPUKernels()

MakeConfig = Callable[..., ModelConfig]
MakeWeights = Callable[..., Weights]

QUANTIZATIONS = [
    Quantization(8),
    Quantization(8, 32),
    Quantization(4, 32),
    Quantization(4, 64),
    Quantization(4, 128, offsets=True),
]
KINDS: list[Any] = [*map(jnp.dtype, ("float32", "bfloat16", "float16")), *QUANTIZATIONS]
EMBEDDINGS = KINDS[:4]


def name_of(kind: Any) -> str:
    return str(kind.name)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def make_matrix(kind: Any, inputs: int, outs: int, seed: int = 0) -> tuple[Any, np.ndarray]:
    """A matrix of a kind, and the numbers that it stands for."""
    numbers = random(inputs, outs, seed=seed)
    if isinstance(kind, Quantization):
        array = jax.tree.map(jnp.asarray, quantize(numbers, kind))
        return array, np.asarray(dequantize(array))
    return jnp.asarray(numbers).astype(kind), np.asarray(jnp.asarray(numbers).astype(kind), np.float32)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_products_are_those_of_exact_sums(kind: Any, data: st.DataObject) -> None:
    step = kind.group or 1 if isinstance(kind, Quantization) else 1
    inputs = step * data.draw(st.integers(1, max(1, 300 // step)), "inputs / group")
    rows, outs = data.draw(st.integers(1, 40), "rows"), data.draw(st.integers(1, 300), "outs")
    w, numbers = make_matrix(kind, inputs, outs, seed=inputs + outs)
    x = random(rows, inputs, seed=rows)
    got = np.asarray(cpu.head(jnp.asarray(x), w, transposed=False))
    expected = x.astype(np.float64) @ numbers.astype(np.float64)
    size = np.abs(x).astype(np.float64) @ np.abs(numbers)
    assert (np.abs(got - expected) <= 1e-6 * size + 1e-30).all()


def make_embedding(kind: Any, outs: int, inputs: int, seed: int = 0) -> tuple[Any, np.ndarray]:
    """An embedding ``[V, D]`` of a kind, and the numbers that it stands for."""
    if not isinstance(kind, Quantization):
        return make_matrix(kind, outs, inputs, seed)
    array = jax.tree.map(jnp.asarray, quantize(random(outs, inputs, seed=seed), kind, batch=1))
    return array, np.asarray(dequantize(array))


@pytest.mark.parametrize("kind", EMBEDDINGS, ids=name_of)
@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 40), inputs=st.integers(1, 300), outs=st.integers(1, 300))
def test_products_with_a_tied_embedding(kind: Any, rows: int, inputs: int, outs: int) -> None:
    w, numbers = make_embedding(kind, outs, inputs, seed=inputs)
    x = random(rows, inputs, seed=rows)
    got = np.asarray(cpu.head(jnp.asarray(x), w, transposed=True))
    size = np.abs(x) @ np.abs(numbers).T
    assert (np.abs(got - x.astype(np.float64) @ numbers.T.astype(np.float64)) <= 1e-6 * size).all()


@pytest.mark.parametrize(("kind", "transposed"), [(k, False) for k in KINDS] + [(k, True) for k in EMBEDDINGS])
def test_a_row_has_the_same_bits_alone(kind: Any, transposed: bool) -> None:
    w, _ = make_embedding(kind, 384, 201) if transposed else make_matrix(kind, 384, 201)
    x = jnp.asarray(random(45, 201 if transposed else 384))
    together = np.asarray(cpu.head(x, w, transposed))
    for rows in (1, 2, 3, 7, 9, 16, 17, 40):
        some = np.asarray(cpu.head(x[5 : 5 + rows], w, transposed))
        np.testing.assert_array_equal(some, together[5 : 5 + rows])


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_what_is_not_a_number_stays_so(kind: Any) -> None:
    w, _ = make_matrix(kind, 128, 40)
    x = random(3, 128)
    x[1, 77] = np.nan
    got = np.asarray(cpu.head(jnp.asarray(x), w, transposed=False))
    assert np.isnan(got[1]).all()
    assert np.isfinite(got[[0, 2]]).all()


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=name_of)
def test_scales_of_zero_give_zeros(quantization: Quantization) -> None:
    w, _ = make_matrix(quantization, 128, 40)
    zero = jnp.zeros_like(w.scales)
    w = dataclasses.replace(w, scales=zero, offsets=None if w.offsets is None else zero)
    np.testing.assert_array_equal(cpu.head(jnp.asarray(random(2, 128)), w, transposed=False), 0)


def test_numbers_too_small_to_be_normal() -> None:
    w, x = jnp.full((64, 20), 1e-40), jnp.full((2, 64), 1e-3)
    # XLA's threads may take them for zero; more than their sum is wrong in any case.
    got = np.asarray(cpu.head(x, w, transposed=False))
    assert ((got >= 0) & (got <= 64e-43 * 1.01)).all()


def test_two_threads_at_once() -> None:
    w, _ = make_matrix(KINDS[0], 512, 640)
    run = jax.jit(lambda x, w: cpu.head(x, w, transposed=False))
    inputs = [jnp.asarray(random(3, 512, seed=seed)) for seed in range(2)]
    expected = [np.asarray(run(x, w)) for x in inputs]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(200):
            if not np.array_equal(run(inputs[number], w), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong


# ---- Layers


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Placed:
    """A cache of fixed capacity that says where its slots stand, and lets nobody else write to them."""

    keys: list[Any]
    values: list[Any]

    def append(self, layer: int, k: Any, v: Any, positions: Any) -> tuple[Any, Any, Any, Any]:
        rows, heads = jnp.arange(k.shape[0])[:, None, None], jnp.arange(k.shape[2])[:, None]
        at = positions[:, None, :]
        keys, values = list(self.keys), list(self.values)
        for arrays, new in ((keys, k), (values, v)):
            new = QuantizedSlots(*quantize_slots(new)) if isinstance(arrays[layer], QuantizedSlots) else new
            arrays[layer] = jax.tree.map(
                lambda array, new: array.at[rows, heads, at].set(new.swapaxes(1, 2).astype(array.dtype)),
                arrays[layer],
                new,
            )
        slots = jnp.broadcast_to(jnp.arange(keys[layer].shape[2]), (k.shape[0], keys[layer].shape[2]))
        return dataclasses.replace(self, keys=keys, values=values), keys[layer], values[layer], slots

    def with_slots(self, layer: int, keys: Any, values: Any) -> Any:
        arrays = {"keys": list(self.keys), "values": list(self.values)}
        arrays["keys"][layer], arrays["values"][layer] = keys, values
        return dataclasses.replace(self, **arrays)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots(Placed):
    """A cache of fixed capacity whose slot s is for position s."""

    tables = None

    def append(self, layer: int, k: Any, v: Any, positions: Any) -> tuple[Any, Any, Any, None]:
        return *super().append(layer, k, v, positions)[:3], None

    def slots(self, layer: int) -> tuple[Any, Any]:
        return self.keys[layer], self.values[layer]

    def places(self, positions: Any) -> tuple[Any, Any]:
        return jnp.broadcast_to(jnp.arange(len(positions))[:, None], positions.shape), positions

    def append_in_place(self, layer: int, k: Any, v: Any, positions: Any) -> Any:
        return self.append(layer, k, v, positions)[0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Paged(Slots):
    """A cache whose slots are cut into pages that lie in any order, with one that nobody uses before them."""

    tables: Any = None

    page_size = 64

    @classmethod
    def of(cls, slots: Slots) -> "Paged":
        rows, kv_heads, count, _ = slots.keys[0].shape
        pages = rows * count // cls.page_size
        order = np.random.default_rng(7).permutation(pages)

        def cut(array: jax.Array) -> jax.Array:
            cut = np.asarray(array).reshape(rows, kv_heads, -1, cls.page_size, *array.shape[3:]).swapaxes(1, 2)
            nothing = 99 if array.dtype == np.int8 else np.nan
            pool = np.full((pages + 1, kv_heads, cls.page_size, *array.shape[3:]), nothing, cut.dtype)
            pool[order + 1] = cut.reshape(pages, kv_heads, cls.page_size, *array.shape[3:])
            return jnp.asarray(pool)

        tables = jnp.asarray((order + 1).reshape(rows, -1), jnp.int32)
        return cls(*(jax.tree.map(cut, arrays) for arrays in (slots.keys, slots.values)), tables)

    def append(self, layer: int, k: Any, v: Any, positions: Any) -> tuple[Any, Any, Any, Any]:
        cache = self.append_in_place(layer, k, v, positions)

        def gather(pool: jax.Array) -> jax.Array:
            x = jnp.moveaxis(pool[self.tables], 2, 1)
            return x.reshape(*x.shape[:2], -1, *x.shape[4:])

        keys, values = (jax.tree.map(gather, pool) for pool in cache.slots(layer))
        return cache, keys, values, jnp.broadcast_to(jnp.arange(keys.shape[2]), (k.shape[0], keys.shape[2]))

    def places(self, positions: Any) -> tuple[Any, Any]:
        at = jnp.take_along_axis(self.tables, positions // self.page_size, axis=1)
        return at, positions % self.page_size

    def append_in_place(self, layer: int, k: Any, v: Any, positions: Any) -> Any:
        rows, at = self.places(positions)
        written = (
            KERNELS.write_slots(slots, new, at, rows) for slots, new in zip(self.slots(layer), (k, v), strict=True)
        )
        return self.with_slots(layer, *written)


SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_heads": 6, "num_kv_heads": 2, "head_dim": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "biases and norms": {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "qk_norm": True},
    "windows": {"windows": (None, 100), "rope_layers": (True, False)},
    "experts": {"moe": MoEConfig(num_experts=4, experts_per_token=2, intermediate_size=32)},
    "gates": {"output_gate": True, "centered_norm": True, "qk_norm": True, "rotary_dim": 12},
    "wide heads": {"output_gate": True, "head_dim": 256, "rotary_dim": 64, "num_heads": 5, "num_kv_heads": 1},
    "one head, untied": {"num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "tie_embeddings": False},
}


def decode_both(
    config: ModelConfig, weights: Weights, cache: Placed, positions: np.ndarray, placement: Placement
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a step by the kernels, and by XLA."""
    tokens = np.random.default_rng(3).integers(0, config.vocab_size, positions.shape).astype(np.int32)

    def run(backend: Backend) -> np.ndarray:
        step = jax.jit(
            lambda: forward(jnp.asarray(tokens), jnp.asarray(positions), weights, config, cache, backend=backend)[0]
        )
        return np.asarray(step())

    return run(select_backend(weights, config, placement)), run(XLA(placement))


def make_cache(config: ModelConfig, rows: int, slots: int, dtype: Any, order: str = IN_ORDER) -> Any:
    shape = (rows, config.num_kv_heads, slots, config.head_dim)
    arrays = [jnp.asarray(random(*shape, seed=seed)) for seed in range(2 * config.num_layers)]
    if dtype == np.int8:
        kept = [QuantizedSlots(*quantize_slots(array)) for array in arrays]
    else:
        kept = [array.astype(dtype) for array in arrays]
    if order == PLACED:
        return Placed(kept[::2], kept[1::2])
    cache = Slots(kept[::2], kept[1::2])
    return Paged.of(cache) if order == PAGED else cache


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_that_of_xla(
    family: str, order: str, make_config: MakeConfig, make_weights: MakeWeights, one_cpu: Placement
) -> None:
    config = make_config(**{**SIZES, "context_length": 600, **FAMILIES[family]})
    positions = np.array([[0], [299], [511], [256], [255]], np.int32)
    cache = make_cache(config, 5, 512, np.float32, order)
    got, expected = decode_both(config, make_weights(config), cache, positions, one_cpu)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", ["llama", "windows", "one head, untied"])
def test_a_step_with_keys_and_values_of_8_bits_is_that_of_xla(
    family: str, order: str, make_config: MakeConfig, make_weights: MakeWeights, one_cpu: Placement
) -> None:
    config = make_config(**{**SIZES, "context_length": 600, **FAMILIES[family]})
    positions = np.array([[0], [299], [511], [256], [255]], np.int32)
    cache = make_cache(config, 5, 512, np.int8, order)
    got, expected = decode_both(config, make_weights(config), cache, positions, one_cpu)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, np.float32) for family in FAMILIES),
        *(("windows", kind) for kind in (jnp.bfloat16, np.float16, np.int8)),
    ],
)
def test_a_piece_of_a_prompt_is_that_of_xla(
    family: str, order: str, dtype: Any, make_config: MakeConfig, make_weights: MakeWeights, one_cpu: Placement
) -> None:
    config = make_config(**{**SIZES, "context_length": 600, **FAMILIES[family]})
    positions = np.array([[0], [299]], np.int32) + np.arange(70, dtype=np.int32)
    cache = make_cache(config, 2, 512, dtype, order)
    got, expected = decode_both(config, make_weights(config), cache, positions, one_cpu)
    # XLA's probabilities have the type of the values; of 8 bits, a key may be rounded to the number beside.
    close = {np.float32: 2e-5, np.int8: 5e-3}.get(dtype, 2e-2)
    np.testing.assert_allclose(got, expected, rtol=0, atol=close * np.abs(expected).max())


@pytest.mark.parametrize("head", [5, 16, 40])
def test_keys_of_8_bits_are_written_as_xla_would(head: int) -> None:
    x, new = random(3, 2, 9, head), random(2, 3, 2, head, seed=1)
    new[0, 1, 0], new[1, 2, 1] = 0, 1e-30
    slots = QuantizedSlots(*quantize_slots(jnp.asarray(x)))
    rows, positions = jnp.array([[2, 2, 7], [0, 0, 0]]), jnp.array([[0, 8, 1], [4, 9, -1]])
    written = jax.jit(KERNELS.write_slots, donate_argnums=0)(slots, jnp.asarray(new), positions, rows)
    values, scales = map(np.array, quantize_slots(jnp.asarray(x)))
    for one, (row, at) in (((0, 0), (2, 0)), ((0, 1), (2, 8)), ((1, 0), (0, 4))):  # the others are outside
        new_values, new_scales = quantize_slots(jnp.asarray(new[one]))
        values[row, :, at], scales[row, :, at] = new_values, new_scales
    np.testing.assert_array_equal(written.values, values)
    np.testing.assert_allclose(written.scales, scales, rtol=1e-6)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("place", [3, 17])
def test_keys_of_8_bits_do_not_hide_what_is_not_a_number(wrong: float, place: int) -> None:
    new = random(1, 1, 2, 20)
    new[0, 0, 1, place] = wrong
    slots = QuantizedSlots(jnp.zeros((1, 2, 4, 20), jnp.int8), jnp.zeros((1, 2, 4)))
    scales = np.asarray(KERNELS.write_slots(slots, jnp.asarray(new), jnp.array([[1]])).scales)[0, :, 1]
    assert np.isfinite(scales).tolist() == [True, False]


@pytest.mark.parametrize("quantization", QUANTIZATIONS[:3], ids=name_of)
def test_a_step_of_quantised_weights(
    quantization: Quantization, make_config: MakeConfig, make_weights: MakeWeights, one_cpu: Placement
) -> None:
    config = make_config(**SIZES, tie_embeddings=False)
    weights = quantize_all(make_weights(config), quantization)
    got, expected = decode_both(
        config, weights, make_cache(config, 3, 64, np.float32), np.array([[9], [0], [63]]), one_cpu
    )
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_step_with_an_embedding_of_8_bits(
    dtype: Any, make_config: MakeConfig, make_weights: MakeWeights, one_cpu: Placement
) -> None:
    config = make_config(**SIZES)
    plain = make_weights(config, dtype)
    embedding = jax.tree.map(jnp.asarray, quantize(np.asarray(plain.embedding), Quantization(8), batch=1))
    weights = dataclasses.replace(plain, embedding=embedding)
    cache, positions = make_cache(config, 3, 64, dtype), np.array([[9], [0], [63]])
    got, expected = decode_both(config, weights, cache, positions, one_cpu)
    near = 2e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(got, expected, rtol=0, atol=near * np.abs(expected).max())
    assert got.dtype == np.float32
    exact, _ = decode_both(config, plain, cache, positions, one_cpu)
    assert np.abs(got - exact).max() > 1e-3 * np.abs(exact).max()


def quantize_all(weights: Weights, quantization: Quantization) -> Weights:
    def of(w: Any, inputs: int = 1) -> QuantizedArray:
        array: QuantizedArray = jax.tree.map(jnp.asarray, quantize(np.asarray(w), quantization, inputs))
        return array

    def layer(old: Any) -> Any:
        attn = dataclasses.replace(old.attn, q=of(old.attn.q), k=of(old.attn.k), v=of(old.attn.v), o=of(old.attn.o, 2))
        mlp = dataclasses.replace(old.ffw, w_gate=of(old.ffw.w_gate), w_up=of(old.ffw.w_up), w_down=of(old.ffw.w_down))
        return dataclasses.replace(old, attn=attn, ffw=mlp)

    return dataclasses.replace(weights, layers=[layer(old) for old in weights.layers], lm_head=of(weights.lm_head))


def test_pages_behind_a_text_are_not_read(
    make_config: MakeConfig, make_weights: MakeWeights, one_cpu: Placement
) -> None:
    config = make_config(**SIZES)
    cache = make_cache(config, 2, 256, np.float32, PAGED)
    short = dataclasses.replace(cache, tables=cache.tables.at[0, 1:].set(10_000).at[1, 3:].set(-1))
    weights, tokens, positions = make_weights(config), jnp.array([[1], [2]]), jnp.array([[63], [150]])
    backend = select_backend(weights, config, one_cpu)
    step = jax.jit(lambda cache: forward(tokens, positions, weights, config, cache, backend=backend)[0])
    np.testing.assert_array_equal(step(short), step(cache))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_step_is_nearer_to_float32(
    dtype: Any, make_config: MakeConfig, make_weights: MakeWeights, one_cpu: Placement
) -> None:
    config = make_config(**SIZES)
    small = make_weights(config, dtype)
    cache, positions = make_cache(config, 2, 64, dtype), np.array([[40], [7]])
    got, rounded = decode_both(config, small, cache, positions, one_cpu)
    wide = jax.tree.map(lambda array: array.astype(jnp.float32), (small, cache))
    _, exact = decode_both(config, *wide, positions, one_cpu)
    assert np.abs(got - exact).mean() <= np.abs(rounded - exact).mean()


def test_a_row_of_a_step_has_the_same_bits_alone(
    make_config: MakeConfig, make_weights: MakeWeights, one_cpu: Placement
) -> None:
    config = make_config(**SIZES, context_length=600)
    weights, cache = make_weights(config), make_cache(config, 5, 512, np.float32)
    positions, tokens = np.array([[300], [2], [511], [64], [5]]), np.arange(5)[:, None]
    backend = select_backend(weights, config, one_cpu)
    step = jax.jit(lambda *given: forward(*given[:2], weights, config, given[2], backend=backend)[0])
    together = np.asarray(step(tokens, positions, cache))
    for row in range(5):
        mine = jax.tree.map(lambda array, row=row: array[row : row + 1], cache)
        np.testing.assert_array_equal(step(tokens[row : row + 1], positions[row : row + 1], mine)[0], together[row])


def test_several_tokens_of_a_row(make_config: MakeConfig, make_weights: MakeWeights, one_cpu: Placement) -> None:
    config = make_config(**SIZES)
    positions = np.tile(np.arange(20, 26), (2, 1))
    got, expected = decode_both(config, make_weights(config), make_cache(config, 2, 64, np.float32), positions, one_cpu)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS[:4], ids=name_of)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "experts"])
def test_several_tokens_of_a_row_have_the_bits_of_one_after_another(
    family: str, kind: Any, make_config: MakeConfig, make_weights: MakeWeights, one_cpu: Placement
) -> None:
    """Rows stand at positions of their own, on both sides of the border between two pieces of the cache."""
    config = make_config(**{**SIZES, "context_length": 600, "tie_embeddings": False, **FAMILIES[family]})
    weights = make_weights(config, jnp.float32 if isinstance(kind, Quantization) else kind)
    weights = quantize_all(weights, kind) if isinstance(kind, Quantization) else weights
    cache = make_cache(config, 3, 512, weights.gamma_final.dtype)
    positions = np.array([[0], [253], [400]]) + np.arange(5)
    tokens = np.random.default_rng(5).integers(0, config.vocab_size, positions.shape)
    backend = select_backend(weights, config, one_cpu)
    step = jax.jit(lambda *given: forward(*given[:2], weights, config, given[2], backend=backend))
    together, _ = step(tokens, positions, cache)
    for at in range(5):
        alone, cache = step(tokens[:, at : at + 1], positions[:, at : at + 1], cache)
        np.testing.assert_array_equal(np.asarray(together)[:, at], np.asarray(alone)[:, 0])


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 16), width=st.integers(1, 700))
def test_a_norm_is_that_of_xla(rows: int, width: int) -> None:
    x, gamma = random(rows, width), random(width, seed=1)
    got = cpu.norm(jnp.asarray(x), jnp.asarray(gamma), 1e-5)
    np.testing.assert_allclose(got, rms_norm(jnp.asarray(x), jnp.asarray(gamma), 1e-5), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_cache_is_written_at_each_rows_positions(dtype: str, count: int) -> None:
    slots, new = (jnp.asarray(random(*shape)).astype(dtype) for shape in ((4, 3, 9, 16), (4, count, 3, 16)))
    positions = np.array([[0], [8], [9], [4]]) + np.arange(count)  # those from 9 on are beyond the capacity
    expected = np.array(slots)
    for row, at in np.ndindex(*positions.shape):
        if positions[row, at] < 9:
            expected[row, :, positions[row, at]] = new[row, at]
    written = jax.jit(KERNELS.write_slots, donate_argnums=0)(slots, new, jnp.asarray(positions))
    np.testing.assert_array_equal(np.asarray(written), expected)


def test_what_is_untouched_takes_up_no_memory() -> None:
    shapes = [jax.ShapeDtypeStruct((1 << 30,), jnp.int8), jax.ShapeDtypeStruct((3, 1 << 27), jnp.float32)]
    before = resident_bytes()
    arrays = jax.block_until_ready(jax.jit(lambda: KERNELS.uninitialized(shapes))())
    assert [(array.shape, array.dtype) for array in arrays] == [(shape.shape, shape.dtype) for shape in shapes]
    assert resident_bytes() - before < 1 << 28
    first, second = (array.unsafe_buffer_pointer() for array in arrays)
    assert abs(first - second) >= 1 << 30


@pytest.mark.parametrize("flag", ["jax_debug_nans", "jax_debug_infs"])
def test_what_is_untouched_is_zero_where_jax_looks_at_it(flag: str) -> None:
    shapes = [jax.ShapeDtypeStruct((1 << 20,), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.int8)]
    jax.config.update(flag, True)
    try:
        program = jax.make_jaxpr(lambda: KERNELS.uninitialized(shapes))()
    finally:
        jax.config.update(flag, False)
    assert "ffi_call" not in str(program)
    assert "ffi_call" in str(jax.make_jaxpr(lambda: KERNELS.uninitialized(shapes))())


def resident_bytes() -> int:
    if not Path("/proc/self/statm").exists():
        pytest.skip("the system does not say what memory a process has")
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def embedding_alone(table: jax.Array) -> Weights:
    return Weights(layers=[], embedding=table, gamma_final=jnp.ones(table.shape[1], table.dtype))


def test_rows_of_a_table() -> None:
    table, tokens = jnp.asarray(random(7, 12)).astype(jnp.bfloat16), jnp.array([[3, 0], [6, 6]])
    np.testing.assert_array_equal(KERNELS.embed(tokens, embedding_alone(table)), table[tokens])


# ---- Where XLA computes


def uses_kernels(run: Callable[[], Any]) -> bool:
    return "jllm_" in str(jax.make_jaxpr(run)())


def test_who_computes(make_config: MakeConfig, make_weights: MakeWeights, one_cpu: Placement) -> None:
    config = make_config(**SIZES)
    weights, cache = make_weights(config), make_cache(config, 17, 64, np.float32)

    def step(rows: int, backend: Backend | None) -> Callable[[], Any]:
        some = jax.tree.map(lambda array: array[:rows], cache)
        tokens = jnp.zeros((rows, 1), jnp.int32)
        return lambda: forward(tokens, tokens, weights, config, some, backend=backend)[0]

    assert uses_kernels(step(17, select_backend(weights, config, one_cpu)))
    assert not uses_kernels(step(1, None))
    assert not uses_kernels(step(1, select_backend(weights, config, dataclasses.replace(one_cpu, kernels=False))))
    for elsewhere in (
        jax.sharding.AbstractMesh((2,), ("data",)),
        jax.sharding.AbstractMesh((1,), ("data",), abstract_device=AbstractDevice("cpu", None, "cpu")),
    ):
        assert not isinstance(select_backend(weights, config, Placement(elsewhere)), cpu.CPUKernels)


def test_the_switch_turns_them_off(
    make_config: MakeConfig, make_weights: MakeWeights, one_cpu: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(**SIZES)
    weights = make_weights(config)
    assert isinstance(select_backend(weights, config, one_cpu), cpu.CPULayerKernels)
    monkeypatch.setenv("JLLM_KERNELS", "xla")
    assert not isinstance(select_backend(weights, config, one_cpu), cpu.CPUKernels)


def test_without_a_cache_there_are_gradients(
    make_config: MakeConfig, make_weights: MakeWeights, one_cpu: Placement
) -> None:
    config = make_config(**SIZES)
    tokens = jnp.arange(5)[None]
    loss = jax.grad(lambda weights: forward(tokens, tokens, weights, config, placement=one_cpu)[0].sum())
    assert np.isfinite(np.asarray(loss(make_weights(config)).embedding)).all()


# The package that may not be imported, and what that raises, are put in.
BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise {error}
sys.meta_path.insert(0, Blocker())
import warnings; warnings.simplefilter("error")
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh
from jllm_core import ModelConfig, init_weights
from jllm_core.backends.cpu.backend import CPUKernels
from jllm_core.backends.select import select_backend
from jllm_core.model import unembed
from jllm_core.sharding import Placement
config = ModelConfig(model_type="llama", vocab_size=13, hidden_size=32, intermediate_size=32, num_layers=1,
                     context_length=64, num_heads=2, num_kv_heads=2, head_dim=16)
placement = Placement(Mesh(np.array(jax.devices()[:1]), ("data",)))
weights = init_weights(config, jax.random.key(0))
for _ in range(2):
    backend = select_backend(weights, config, placement)
assert not isinstance(backend, CPUKernels)
run = lambda x: (backend.unembed or unembed)(x, weights)
assert "jllm_" not in str(jax.make_jaxpr(run)(jnp.ones((1, 32))))
print(run(jnp.ones((1, 32))).shape, backend.name)
"""


@pytest.mark.parametrize(
    ("module", "error", "reason"),
    [
        ("llvmlite", "ModuleNotFoundError(name)", "llvmlite is not installed (pip install llvmlite)"),
        ("platformdirs", "ModuleNotFoundError(name)", "platformdirs is not installed (pip install platformdirs)"),
        # As llvmlite ends where its library is built for another C library.
        ("llvmlite.binding", "OSError('no libllvmlite.so')", "llvmlite cannot be imported: no libllvmlite.so"),
    ],
)
def test_a_process_without_the_compiler_computes_with_xla_and_says_so_once(
    module: str, error: str, reason: str
) -> None:
    code = BLOCKED.format(module=module, error=error)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"(1, 13) XLA ({reason})"
    said = [line for line in done.stderr.splitlines() if "kernels" in line]
    assert said == [f"The CPU kernels do not run here, XLA computes in their place: {reason}"]


def test_a_backend_says_its_name(
    make_config: MakeConfig, make_weights: MakeWeights, one_cpu: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(**SIZES)
    weights = make_weights(config)

    def name(config: ModelConfig = config, placement: Placement = one_cpu) -> str:
        return select_backend(weights, config, placement).name

    assert re.fullmatch(r"CPU kernels \((AVX-512|AVX2|AVX|SSE2|NEON)\)", name())
    assert re.fullmatch(
        r"XLA for the layers, CPU kernels \(.+\) for the rest", name(dataclasses.replace(config, head_dim=12))
    )
    assert name(placement=dataclasses.replace(one_cpu, kernels=False)) == "XLA"
    planned = jax.sharding.AbstractMesh((2,), ("data",), abstract_device=AbstractDevice("cpu", None, "cpu"))
    assert name(placement=Placement(planned)) == "XLA (the CPU kernels take one device)"
    monkeypatch.setenv("JLLM_KERNELS", "xla")
    assert name() == "XLA (JLLM_KERNELS=xla)"
    assert XLA().name == "XLA"


def test_a_backend_of_another_name_runs_the_same_programs() -> None:
    one, other = cpu.XLAOnCPU(min_exact_batch=2, name="a"), cpu.XLAOnCPU(min_exact_batch=2, name="b")
    assert one == other
    assert hash(one) == hash(other)


@pytest.mark.parametrize("name", ["jllm_core", "jllm_core.model", "jllm_core.backends.select"])
def test_importing_the_model_loads_no_compiler(name: str) -> None:
    code = f"import sys, {name}; print([m for m in ('llvmlite', 'platformdirs') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("changed", ["MIN_FRAME_SIZE", "MIN_API_SIZE", "MAJOR", "MINOR"])
def test_an_xla_of_other_structures_is_refused(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(ffi_call_frame, changed, 10_000)
    monkeypatch.setattr(ffi, "target", ffi._registered.__wrapped__)
    assert "API version" in (ffi._fault.__wrapped__() or "")
    (record,) = caplog.records
    assert re.match("The CPU kernels do not run here, XLA computes.*API version", record.getMessage())


def test_a_system_without_a_function_that_kernels_call_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jllm_core.backends.cpu import threads

    monkeypatch.setenv("JLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(threads, "C_FUNCTIONS", (*threads.C_FUNCTIONS, "jllm_no_such_function"))
    monkeypatch.setattr(ffi, "target", ffi._registered.__wrapped__)
    assert ffi._failure_of_a_kernel() == "this system does not offer jllm_no_such_function to compiled code"


# ---- The bridge


def test_offsets_are_those_of_the_header() -> None:
    offsets = header_offsets((Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text())
    frame, at = offsets["XLA_FFI_CallFrame"], ffi_call_frame
    args, rets, attrs = (offsets[f"XLA_FFI_{name}"] for name in ("Args", "Rets", "Attrs"))
    assert (frame["struct_size"], frame["extension_start"]) == (at.FRAME_SIZE, at.FRAME_EXTENSION)
    assert (frame["api"], frame["ctx"], frame["stage"]) == (at.FRAME_API, at.FRAME_CONTEXT, at.FRAME_STAGE)
    assert frame["args"] + args["args"] == at.FRAME_ARGS
    assert frame["rets"] + rets["rets"] == at.FRAME_RETS
    assert frame["attrs"] + attrs["attrs"] == at.FRAME_ATTRS
    assert frame["attrs"] + attrs[""] == at.MIN_FRAME_SIZE
    extension = offsets.get("XLA_FFI_InternalExtension") or offsets["XLA_FFI_Extension_Base"]
    assert extension["type"] == at.EXTENSION_TYPE
    assert offsets["XLA_FFI_Metadata_Extension"]["metadata"] == at.EXTENSION_METADATA
    version, metadata = offsets["XLA_FFI_Api_Version"], offsets["XLA_FFI_Metadata"]
    assert metadata["api_version"] + version["major_version"] == at.METADATA_MAJOR
    assert metadata["api_version"] + version["minor_version"] == at.METADATA_MINOR
    assert metadata["traits"] == at.METADATA_TRAITS
    buffer = offsets["XLA_FFI_Buffer"]
    assert (buffer["data"], buffer["dims"]) == (at.BUFFER_DATA, at.BUFFER_DIMS)
    assert offsets["XLA_FFI_Scalar"]["value"] == at.SCALAR_VALUE
    api = offsets["XLA_FFI_Api"]
    assert api["api_version"] + version["major_version"] == at.API_MAJOR
    assert api["api_version"] + version["minor_version"] == at.API_MINOR
    assert api["XLA_FFI_Error_Destroy"] == at.API_ERROR_DESTROY
    assert api["XLA_FFI_ThreadPool_Schedule"] == at.API_SCHEDULE
    assert api["XLA_FFI_ThreadPool_NumThreads"] == at.API_THREADS
    for name, fields in {
        "XLA_FFI_Error_Destroy_Args": {"error": at.DESTROY_ERROR, "": at.DESTROY_SIZE},
        "XLA_FFI_ThreadPool_Schedule_Args": {
            "ctx": at.SCHEDULE_CONTEXT,
            "task": at.SCHEDULE_TASK,
            "data": at.SCHEDULE_DATA,
            "": at.SCHEDULE_SIZE,
        },
        "XLA_FFI_ThreadPool_NumThreads_Args": {
            "ctx": at.THREADS_CONTEXT,
            "num_threads": at.THREADS_RESULT,
            "": at.THREADS_SIZE,
        },
    }.items():
        assert {field: offsets[name][field] for field in fields} == fields


def header_offsets(header: str) -> dict[str, dict[str, int]]:
    """Offsets of the fields of each structure, and its size as that of the field ``""``, on a machine of 64 bits."""
    header = re.sub(r"//.*|/\*(.|\n)*?\*/", "", header)
    header = re.sub(r"_XLA_FFI_API_STRUCT_FIELD\((\w+)\);", r"void* \1;", header)
    header = re.sub(r"\w+ \(\*(\w+)\)\([^)]*\);", r"void* \1;", header)
    sizes = {"size_t": 8, "int64_t": 8, "int": 4, "int32_t": 4, "uint32_t": 4, "char": 1, "XLA_FFI_Handler_Traits": 4}
    sizes |= dict.fromkeys(re.findall(r"enum {[^}]*}\s*(XLA_FFI_\w+);", header), 4)
    aligned = dict(sizes)
    offsets: dict[str, dict[str, int]] = {}
    for name, body in re.findall(r"struct (XLA_FFI_\w+) {([^}]*)}", header):
        fields, end, widest = {}, 0, 1
        for kind, stars, field in re.findall(r"(?:const |struct )*(\w+)(\**)\s+(?:const )?(\w+);", body):
            size, alignment = (8, 8) if stars else (sizes[kind], aligned[kind])
            end = -(-end // alignment) * alignment
            fields[field], end, widest = end, end + size, max(widest, alignment)
        end = -(-end // widest) * widest
        offsets[name], sizes[name], aligned[name] = {**fields, "": end}, end, widest
    return offsets


def test_damaged_machine_code_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jllm_core.backends.cpu.embedding_and_head import Head
    from jllm_core.backends.cpu.few_row_matmul import Kind
    from jllm_core.backends.cpu.kernel_building_blocks import Matrix

    monkeypatch.setenv("JLLM_CACHE", str(tmp_path))
    kernel = Head(Matrix("w", Kind("float32")), transposed=False)
    code = ffi._object_code(kernel)
    (file,) = (tmp_path / "kernels").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert ffi._object_code(kernel) == code
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JLLM_CACHE", str(tmp_path / "file"))
    from jllm_core.backends.cpu.embedding_and_head import Head
    from jllm_core.backends.cpu.few_row_matmul import Kind
    from jllm_core.backends.cpu.kernel_building_blocks import Matrix

    assert ffi._object_code(Head(Matrix("w", Kind("int8")), transposed=False))


def test_unembedding_by_xla_and_by_kernels(
    make_config: MakeConfig, make_weights: MakeWeights, one_cpu: Placement
) -> None:
    weights = make_weights(make_config(**SIZES))
    x = jnp.asarray(random(3, 64))
    np.testing.assert_allclose(KERNELS.unembed(x, weights), unembed(x, weights), rtol=0, atol=1e-5)
