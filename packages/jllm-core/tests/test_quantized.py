"""Quantised weights: the grid, the packing, the product, and a whole model of them."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, PartitionSpec
from jllm_core import ModelConfig, Quantization, QuantizedArray, Weights, abstract_weights, forward, init_weights
from jllm_core.array_info import named_leaves
from jllm_core.ops.linear import linear
from jllm_core.quantization import arrays, grids
from jllm_core.quantization.arrays import QuantizationError, dequantize
from jllm_core.quantization.grids import channel_maxima, pack, quantize, restore
from jllm_core.sharding import PRESETS

MakeConfig = Callable[..., ModelConfig]
MakeWeights = Callable[..., Weights]

INT8, INT8_G32 = Quantization(8), Quantization(8, 32)
INT4_G32, INT4_G64 = Quantization(4, 32), Quantization(4, 64)
INT4_OFFSETS = Quantization(4, 32, offsets=True)
ALL = [INT8, INT8_G32, INT4_G32, INT4_G64, INT4_OFFSETS]
# Shape, number of input axes, number of axes before them, and an equation: q, o, and the experts of a mixture.
SHAPES: list[tuple[tuple[int, ...], int, int, str]] = [
    ((64, 3, 8), 1, 0, "BTD,DNH->BTNH"),
    ((3, 64, 5), 2, 0, "BTNH,NHD->BTD"),
    ((64, 7), 1, 0, "BTF,FD->BTD"),
]
WITH_EMBEDDING = [Quantization(8, embedding=8), Quantization(4, 32, embedding=8)]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def grid_step(array: QuantizedArray) -> np.ndarray:
    """The distance between neighbouring numbers of the grid, for each element."""
    scales = np.abs(np.asarray(array.scales, np.float32))
    for axis, (size, parts) in enumerate(zip(array.shape, scales.shape, strict=True)):
        scales = np.repeat(scales, size // parts, axis=axis)
    return scales


@pytest.mark.parametrize("quantization", ALL, ids=lambda q: q.name)
@pytest.mark.parametrize(("shape", "inputs", "batch"), [s[:3] for s in SHAPES] + [((2, 64, 5), 1, 1)])
def test_every_number_is_within_a_step_of_its_own(
    quantization: Quantization, shape: tuple[int, ...], inputs: int, batch: int
) -> None:
    matrix = random(*shape)
    array = quantize(matrix, quantization, inputs, batch)
    assert array.shape == shape
    assert array.group == quantization.group
    error, step = np.abs(np.asarray(dequantize(array)) - matrix), grid_step(array)
    # Half a step, and what float16 rounds off the scale of the farthest; a clipped one of 4 bits is further off.
    inside = np.abs(matrix) <= 5 * step if quantization.bits == 4 else np.full(shape, True)
    assert (error[inside] <= (0.5 + 127 * 2**-11) * step[inside]).all()
    assert inside.mean() > 0.8
    assert error.std() > 0


@pytest.mark.parametrize("quantization", ALL, ids=lambda q: q.name)
def test_a_matrix_on_the_grid_comes_back_exactly(quantization: Quantization) -> None:
    highest = 127 if quantization.bits == 8 else 7
    steps = np.random.default_rng(1).integers(-highest, highest + 1, (64, 6)).astype(np.float32)
    steps[::32] = highest  # each group reaches the end of its grid, and one with an offset both ends
    steps[1::32] = -8 if quantization.offsets else steps[1::32]
    matrix = steps * np.float32(0.0625)
    np.testing.assert_array_equal(dequantize(quantize(matrix, quantization)), matrix)


def whole(matrix: np.ndarray, quantization: Quantization, inputs: int, batch: int) -> tuple[np.ndarray, ...]:
    """What ``quantize`` makes, all of the matrix at once: steps (not packed), scales and offsets."""
    axis = batch + inputs - 1
    numbers = matrix.astype(np.float32)

    def steps(x: np.ndarray, scales: np.ndarray, lowest: int, highest: int) -> np.ndarray:
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            return np.clip(np.rint(np.where(scales == 0, 0, x / scales)), lowest, highest)

    if quantization.group is None:
        scales = np.abs(numbers).max(tuple(range(batch, axis + 1)), keepdims=True) / np.float32(127)
        return steps(numbers, scales, -127, 127), scales, np.zeros(0)
    split = numbers.reshape(*matrix.shape[:axis], -1, quantization.group, *matrix.shape[axis + 1 :])
    low, high = split.min(axis + 1, keepdims=True), split.max(axis + 1, keepdims=True)
    if quantization.bits == 8:
        scales = (np.abs(split).max(axis + 1, keepdims=True) / np.float32(127)).astype(np.float16)
        return steps(split, scales.astype(np.float32), -127, 127), scales, np.zeros(0)
    candidates = []
    for share in np.linspace(0.5, 1, 9).astype(np.float32):
        if quantization.offsets:
            scales = (share * (high - low) / np.float32(15)).astype(np.float16)
            candidates.append((scales, ((high + low - share * (high - low)) / 2).astype(np.float16)))
        else:
            candidates.append((share * np.where(high > -low, high, low) / np.float32(-8)).astype(np.float16))
    if not quantization.offsets:
        candidates.append((np.float32(8 / 7) * np.where(high > -low, high, low) / np.float32(-8)).astype(np.float16))
        candidates = [(scales, -8 * scales.astype(np.float32)) for scales in candidates]
    errors = []
    for scales, offsets in ((s.astype(np.float32), o.astype(np.float32)) for s, o in candidates):
        off = steps(split - offsets, scales, 0, 15) * scales + offsets - split
        errors.append(np.sum(np.square(off), axis=axis + 1, keepdims=True))
    best = np.argmin(errors, axis=0)[None]
    scales, offsets = (np.take_along_axis(np.stack(x), best, 0)[0] for x in zip(*candidates, strict=True))
    return steps(split - offsets.astype(np.float32), scales.astype(np.float32), 0, 15), scales, offsets


def awkward(shape: tuple[int, ...], kind: str, seed: int) -> np.ndarray:
    chance = np.random.default_rng(seed)
    matrix = chance.standard_normal(shape).astype(np.float32)
    if kind == "outliers":
        matrix[chance.random(shape) < 0.02] *= 1000
    if kind == "mostly zero":
        matrix[chance.random(shape) < 0.9] = 0
    sizes = {"zeros": 0.0, "denormal": 1e-40, "tiny": 1e-7, "large": 3e3}
    return np.full(shape, matrix.flat[0]) if kind == "equal" else matrix * np.float32(sizes.get(kind, 0.02))


@pytest.mark.parametrize("quantization", ALL, ids=lambda q: q.name)
@pytest.mark.parametrize(
    ("shape", "inputs", "batch"),
    [((64, 3, 8), 1, 0), ((3, 64, 5), 2, 0), ((128, 1), 1, 0), ((3, 128, 17), 1, 1), ((192, 131), 1, 0)],
)
@pytest.mark.parametrize("kind", ["plain", "outliers", "mostly zero", "zeros", "denormal", "tiny", "large", "equal"])
def test_blocks_leave_no_trace(
    monkeypatch: pytest.MonkeyPatch,
    quantization: Quantization,
    shape: tuple[int, ...],
    inputs: int,
    batch: int,
    kind: str,
) -> None:
    for number, numbers in enumerate((64, 8200)):
        matrix = awkward(shape, kind, number)
        if number % 2:
            matrix = matrix.astype(ml_dtypes.bfloat16)
        monkeypatch.setattr(grids, "_BLOCK_SIZE", numbers)
        got, (steps, scales, offsets) = (
            quantize(matrix, quantization, inputs, batch),
            whole(matrix, quantization, inputs, batch),
        )
        values = steps.astype(np.int8).reshape(shape)
        if quantization.bits == 4:
            values = pack(steps.astype(np.uint8), batch + inputs - 1)
        assert got.values.tobytes() == values.tobytes()
        assert got.scales.tobytes() == scales.tobytes()
        assert quantization.offsets == (got.offsets is not None)
        assert got.offsets is None or got.offsets.tobytes() == offsets.tobytes()


@pytest.mark.parametrize(("shape", "inputs", "batch"), [((64, 7), 1, 0), ((4, 32, 5), 2, 0), ((3, 64, 5), 1, 1)])
def test_a_matrix_in_pieces_is_quantised_as_the_whole(shape: tuple[int, ...], inputs: int, batch: int) -> None:
    matrix = random(*shape)
    expected = quantize(matrix, INT8, inputs, batch)
    pieces = np.split(matrix, 2, axis=batch)
    maxima = np.maximum(*(channel_maxima(piece, inputs, batch) for piece in pieces))
    np.testing.assert_array_equal(maxima / np.float32(127), expected.scales)
    got = [quantize(piece, INT8, inputs, batch, scales=expected.scales) for piece in pieces]
    np.testing.assert_array_equal(np.concatenate([array.values for array in got], axis=batch), expected.values)
    assert got[0].scales is expected.scales


def test_scales_that_do_not_fit() -> None:
    matrix, scales = random(64, 7), np.ones((1, 7), np.float32)
    with pytest.raises(QuantizationError, match="whole channels of 8 bits, not for int8-g32"):
        quantize(matrix, INT8_G32, scales=scales)
    for wrong in (scales[0], scales.astype(np.float16), np.ones((64, 1), np.float32)):
        with pytest.raises(QuantizationError, match=r"\[64, 7\] with 1 axes of inputs has scales float32\[1, 7\], got"):
            quantize(matrix, INT8, scales=wrong)
    matrix[3, 2] = np.nan
    with pytest.raises(QuantizationError, match="not finite"):
        quantize(matrix, INT8, scales=scales)
    with pytest.raises(QuantizationError, match="not finite"):
        channel_maxima(matrix)


@pytest.mark.parametrize("quantization", ALL, ids=lambda q: q.name)
@pytest.mark.parametrize(("shape", "inputs", "batch"), [s[:3] for s in SHAPES] + [((2, 64, 5), 1, 1)])
def test_numpy_restores_what_jax_does(
    quantization: Quantization, shape: tuple[int, ...], inputs: int, batch: int
) -> None:
    array = quantize(random(*shape), quantization, inputs, batch)
    restored = restore(array)
    assert restored.dtype == np.float32
    np.testing.assert_array_equal(restored, dequantize(array))


def test_four_bits_cut_an_outlier_off_where_that_is_nearer() -> None:
    matrix = np.full((32, 1), 0.1, np.float32)
    matrix[0] = -1.0
    by_the_largest = np.clip(np.rint(matrix * 8), -8, 7) / 8
    got = np.asarray(dequantize(quantize(matrix, INT4_G32)))
    assert np.square(got - matrix).sum() < np.square(by_the_largest - matrix).sum()


@pytest.mark.parametrize("quantization", ALL, ids=lambda q: q.name)
def test_zeros_stay_zeros(quantization: Quantization) -> None:
    matrix = random(64, 4)
    matrix[:, 1] = 0
    numbers = np.asarray(dequantize(quantize(matrix, quantization)))
    assert np.isfinite(numbers).all()
    assert not numbers[:, 1].any()


def test_offsets_move_the_grid_of_a_group() -> None:
    halves = np.random.default_rng(2).integers(0, 16, (2, 32, 3)).astype(np.uint8)
    scales, offsets = random(2, 3, seed=3).astype(np.float16), random(2, 3, seed=4).astype(np.float16)
    array = QuantizedArray(pack(halves, 0), scales, offsets, axis=0, bits=4)
    expected = halves.astype(np.float32) * scales[:, None].astype(np.float32) + offsets[:, None].astype(np.float32)
    np.testing.assert_array_equal(dequantize(array), expected.reshape(64, 3))


def test_two_values_a_byte_half_a_group_apart() -> None:
    halves = np.arange(32, dtype=np.uint8).reshape(1, 32, 1) % 16
    packed = pack(halves, 0)
    assert packed.shape == (16, 1)
    assert packed[3, 0] == halves[0, 3, 0] | halves[0, 19, 0] << 4


@pytest.mark.parametrize("quantization", ALL, ids=lambda q: q.name)
@pytest.mark.parametrize(("shape", "inputs", "batch", "equation"), SHAPES)
def test_the_product_is_that_of_the_numbers(
    quantization: Quantization, shape: tuple[int, ...], inputs: int, batch: int, equation: str
) -> None:
    array = jax.tree.map(jnp.asarray, quantize(random(*shape), quantization, inputs, batch))
    x = random(2, 3, *shape[:inputs], seed=1)
    expected = np.einsum(equation, x, np.asarray(dequantize(array)))
    np.testing.assert_allclose(linear(equation, jnp.asarray(x), array), expected, atol=1e-4)
    rounded = linear(equation, jnp.asarray(x, jnp.bfloat16), array)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(rounded, np.float32), expected, atol=0.05 * np.abs(expected).max())


def test_an_embedding_has_a_scale_a_row() -> None:
    matrix = random(7, 24) * np.float32(10) ** np.arange(-3, 4)[:, None]
    array = jax.tree.map(jnp.asarray, quantize(matrix, INT8, batch=1))
    assert (array.values.shape, array.scales.shape, array.group) == ((7, 24), (7, 1), None)
    numbers = np.asarray(dequantize(array))
    assert (np.abs(numbers - matrix) <= 0.501 / 127 * np.abs(matrix).max(1, keepdims=True)).all()
    tokens = jnp.array([[6, 0], [3, 3]])
    np.testing.assert_array_equal(array.rows(tokens, jnp.float32), numbers[np.asarray(tokens)])
    assert array.rows(tokens, jnp.bfloat16).dtype == jnp.bfloat16
    x = random(2, 24, seed=1)
    got = linear("...D,VD->...V", jnp.asarray(x), array)
    np.testing.assert_allclose(got, x @ numbers.T, rtol=1e-5, atol=1e-5 * np.abs(numbers).max())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_four_bits_are_never_further_off_than_by_the_largest(groups: int, outputs: int, size: float, seed: int) -> None:
    matrix = random(32 * groups, outputs, seed=seed) * np.float32(size)
    split = matrix.reshape(groups, 32, outputs)
    largest = np.take_along_axis(split, np.abs(split).argmax(1, keepdims=True), 1)
    scales = (largest / -8).astype(np.float16).astype(np.float32)
    plain = np.clip(np.rint(split / scales), -8, 7) * scales
    got = np.asarray(dequantize(quantize(matrix, INT4_G32))).reshape(split.shape)
    assert (np.square(got - split).sum(1) <= np.square(plain - split).sum(1) * (1 + 1e-5)).all()


@pytest.mark.parametrize("quantization", ALL, ids=lambda q: q.name)
def test_the_description_has_the_shapes_of_the_array(make_config: MakeConfig, quantization: Quantization) -> None:
    config = make_config(hidden_size=64, intermediate_size=128, num_heads=2, num_kv_heads=1, head_dim=64, num_layers=1)
    plain, quantized = abstract_weights(config), abstract_weights(config, jnp.bfloat16, quantization)
    infos = named_leaves(quantized)
    for name, inputs in (("attn.q", 1), ("attn.o", 2), ("ffw.w_down", 1)):
        array = quantize(random(*named_leaves(plain)[f"layers.0.{name}"].shape), quantization, inputs)
        for part in ("values", "scales"):
            info, numbers = infos[f"layers.0.{name}.{part}"], getattr(array, part)
            assert (info.shape, info.dtype) == (numbers.shape, numbers.dtype)
            assert info.logical_axes == named_leaves(plain)[f"layers.0.{name}"].logical_axes
    assert infos["embedding"].dtype == jnp.bfloat16
    assert quantized.lm_head.shape == plain.lm_head.shape
    assert sum(info.nbytes for info in infos.values()) < sum(info.nbytes for info in named_leaves(plain).values()) / 2


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantization", WITH_EMBEDDING, ids=lambda q: q.name)
def test_the_embedding_is_described_as_it_is_stored(
    make_config: MakeConfig, quantization: Quantization, tied: bool
) -> None:
    sizes = {"vocab_size": 16, "hidden_size": 64, "intermediate_size": 32, "head_dim": 32}
    config = make_config(**sizes, num_layers=1, tie_embeddings=tied)
    plain, described = (abstract_weights(config, jnp.bfloat16, q) for q in (None, quantization))
    embedding = described.embedding
    assert (embedding.shape, embedding.bits, embedding.group) == (plain.embedding.shape, 8, None)
    array = quantize(random(*embedding.shape), INT8, **embedding.values.metadata)
    for part in ("values", "scales"):
        info, numbers = getattr(embedding, part), getattr(array, part)
        assert (info.shape, info.dtype) == (numbers.shape, numbers.dtype)
        assert info.logical_axes == ("vocab", "model")
    assert described.dtype == jnp.bfloat16
    assert (described.lm_head is None) is tied
    assert tied or described.lm_head.bits == quantization.bits
    mesh = AbstractMesh((2, 2), ("data", "tensor"))
    for rules in (PRESETS["tensor"], PRESETS["fsdp"]):
        placed = rules.tree_shardings(described, mesh).embedding
        assert placed.values.spec == rules.sharding(plain.embedding, mesh).spec
        assert placed.scales.spec == PartitionSpec("tensor", None)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantization", [INT8, INT4_G32, *WITH_EMBEDDING], ids=lambda q: q.name)
def test_a_model_runs_on_quantised_weights(
    make_config: MakeConfig, make_weights: MakeWeights, quantization: Quantization, tied: bool
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32}
    config = make_config(**sizes, num_layers=1, tie_embeddings=tied)
    plain, tree = make_weights(config), abstract_weights(config, jnp.float32, quantization)

    def convert(info: Any, array: Any) -> Any:
        if not isinstance(info, QuantizedArray):
            return array
        own = INT8 if info is tree.embedding else quantization
        return jax.tree.map(jnp.asarray, quantize(np.asarray(array), own, **info.values.metadata))

    quantized = jax.tree.map(convert, tree, plain, is_leaf=lambda leaf: isinstance(leaf, QuantizedArray))
    numbers = jax.tree.map(
        lambda leaf: dequantize(leaf) if isinstance(leaf, QuantizedArray) else leaf,
        quantized,
        is_leaf=lambda leaf: isinstance(leaf, QuantizedArray),
    )
    tokens, positions = jnp.array([[1, 5, 2, 12]]), jnp.arange(4)[None]
    run = jax.jit(forward, static_argnames="config")
    got = run(tokens, positions, quantized, config=config)[0]
    np.testing.assert_allclose(got, run(tokens, positions, numbers, config=config)[0], atol=1e-4)
    assert np.abs(got - run(tokens, positions, plain, config=config)[0]).max() > 1e-3
    assert jax.tree.structure(quantized) == jax.tree.structure(tree)


def test_random_quantised_weights_are_finite_and_use_the_grid(make_config: MakeConfig) -> None:
    config = make_config(hidden_size=64, intermediate_size=32, num_layers=1, head_dim=32)
    for quantization in (INT8, INT4_G32):
        w_up = init_weights(config, jax.random.key(0), quantization=quantization).layers[0].ffw.w_up
        numbers = np.asarray(dequantize(w_up))
        assert np.isfinite(numbers).all()
        assert len(np.unique(numbers)) > 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3,), "quantised to 8 or 4 bits, got 3"),
        ((4,), "4 bits need a group"),
        ((8, 48), "one of 32, 64, 128 inputs, got 48"),
        ((8, 32, True), "offsets are for 4 bits"),
        ((8, None, False, 4), "embedding is quantised to 8 bits or stays as it is, got 4"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_what_no_quantisation_is(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        Quantization(*arguments)


def test_what_cannot_be_quantised(make_config: MakeConfig) -> None:
    with pytest.raises(QuantizationError, match=r"groups of 32 do not divide axis 0 of \[12, 6, 4\]"):
        abstract_weights(make_config(), quantization=INT4_G32)
    with pytest.raises(QuantizationError, match="groups of 64 do not divide"):
        quantize(random(96, 2), INT4_G64)
    for number in (np.nan, np.inf):
        with pytest.raises(QuantizationError, match="not finite"):
            quantize(np.full((32, 1), number, np.float32), INT8)
    for quantization in (INT8_G32, INT4_G32, INT4_OFFSETS):
        with pytest.raises(QuantizationError, match=r"needs a scale of .*float16 ends at 65504"):
            quantize(np.full((32, 1), 1e9, np.float32), quantization)


def test_names_say_what_is_stored() -> None:
    names = [Quantization(*arguments).name for arguments in itertools.product((4,), (32, 128), (False, True))]
    assert names == ["int4-g32", "int4-g32-offsets", "int4-g128", "int4-g128-offsets"]
    assert INT8.name == "int8"
    assert [q.name for q in WITH_EMBEDDING] == ["int8-embedding8", "int4-g32-embedding8"]


@pytest.mark.parametrize("quantization", [INT8_G32, INT4_G32, INT4_OFFSETS], ids=lambda q: q.name)
def test_grids_of_gguf_are_found_again(quantization: Quantization) -> None:
    """Blocks as llama.cpp makes them: a float16 step from the extremes, Q4_1 with a float16 minimum."""
    numbers = random(4, 32, 50, seed=5)
    low, high = numbers.min(1, keepdims=True), numbers.max(1, keepdims=True)
    farthest = np.where(high > -low, high, low)
    step, offset, lowest, highest = {
        "int8-g32": (farthest / 127, 0 * low, -127, 127),
        "int4-g32": (farthest / -8, 0 * low, -8, 7),
        "int4-g32-offsets": ((high - low) / 15, low, 0, 15),
    }[quantization.name]
    step, offset = (x.astype(np.float16).astype(np.float32) for x in (step, offset))
    blocks = np.clip(np.rint((numbers - offset) / step), lowest, highest) * step + offset
    matrix = blocks.reshape(128, 50)
    np.testing.assert_array_equal(dequantize(quantize(matrix, quantization)), matrix)


# ---- Gradients.


def loss_of(config: ModelConfig) -> Callable[[Weights], jax.Array]:
    tokens = jnp.arange(5)[None]
    return lambda weights: forward(tokens, tokens, weights, config)[0].sum()


def random_quantized(make_config: MakeConfig, quantization: Quantization) -> tuple[ModelConfig, Weights]:
    config = make_config(hidden_size=64, intermediate_size=64, head_dim=64, num_layers=1, tie_embeddings=True)
    return config, init_weights(config, jax.random.key(0), quantization=quantization)


@pytest.mark.parametrize("quantization", [*ALL, *WITH_EMBEDDING], ids=lambda q: q.name)
@pytest.mark.parametrize("compiled", [False, True])
def test_quantised_weights_have_no_gradient(
    make_config: MakeConfig, quantization: Quantization, compiled: bool
) -> None:
    config, weights = random_quantized(make_config, quantization)
    loss = jax.jit(loss_of(config)) if compiled else loss_of(config)
    for differentiate in (jax.grad(loss, allow_int=True), lambda weights: jax.vjp(loss, weights)):
        with pytest.raises(QuantizationError, match=r"no gradient: .*Load the checkpoint that they were made from"):
            differentiate(weights)


@pytest.mark.parametrize("quantization", [INT8, INT4_G32, INT4_OFFSETS, *WITH_EMBEDDING], ids=lambda q: q.name)
def test_gradients_go_through_quantised_weights_to_others(make_config: MakeConfig, quantization: Quantization) -> None:
    config, weights = random_quantized(make_config, quantization)
    whole = jax.tree.map(
        lambda array: dequantize(array) if isinstance(array, QuantizedArray) else array,
        weights,
        is_leaf=lambda array: isinstance(array, QuantizedArray),
    )

    def gradient(weights: Weights) -> jax.Array:
        gammas = weights.layers[0].attn_pre_gamma

        def loss(gammas: jax.Array) -> jax.Array:
            layer = dataclasses.replace(weights.layers[0], attn_pre_gamma=gammas)
            return loss_of(config)(dataclasses.replace(weights, layers=[layer]))

        return jax.grad(loss)(gammas)

    found, expected = gradient(weights), gradient(whole)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * float(jnp.abs(expected).max()))
    assert float(jnp.abs(expected).max()) > 0


def test_the_program_is_the_same_as_without_the_refusal(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, weights = random_quantized(make_config, INT4_OFFSETS)

    def program() -> str:
        # A function of its own each time, so that JAX traces it anew.
        text = jax.jit(lambda weights: loss_of(config)(weights)).lower(weights).compile().as_text()
        return "\n".join(line.split(", metadata=")[0] for line in text.splitlines() if line.startswith("  "))

    with_refusal = program()
    monkeypatch.setattr(arrays, "without_gradient", lambda scales: scales)
    assert program() == with_refusal
