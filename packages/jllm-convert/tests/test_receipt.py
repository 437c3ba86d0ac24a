"""The receipt: the maths of jllm_core, in a window of memory, and numbers that do not depend on its size."""

import itertools
import json
import math
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jllm_convert import convert, verify
from jllm_convert.errors import ConversionError
from jllm_convert.quality import streamed_model
from jllm_convert.quality.grid_choice import matrices_of
from jllm_convert.quality.receipt import (
    Comparison,
    Receipt,
    hidden_states,
    logits,
    measure,
    on_processor,
    receipt_text,
    text_ids,
)
from jllm_convert.quality.streamed_matrix import StreamedMatrix, runs
from jllm_convert.quality.streamed_model import StreamedModel, StreamedXLA
from jllm_core import (
    DeltaNetConfig,
    ModelConfig,
    MoEConfig,
    Quantization,
    RopeScaling,
    Weights,
    abstract_weights,
    forward,
)
from jllm_core.array_info import named_leaves
from jllm_core.backends.base import XLA
from jllm_core.checkpoint import Box, chunk_shape
from jllm_core.kv_cache import NoCache
from jllm_core.model import hidden_states as core_hidden_states
from jllm_core.ops.attention import attention
from jllm_core.quantization.arrays import dequantize
from jllm_core.quantization.grids import quantize
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Whitespace

Asked = list[tuple[str, Box | None]]

INT8, INT8_G32 = Quantization(8), Quantization(8, 32)
INT4, INT4_OFFSETS = Quantization(4, 32), Quantization(4, 32, offsets=True)
SMALL, LARGE = 1 << 10, 1 << 30
TOKENS = 24

LLAMA = ModelConfig(
    model_type="llama",
    vocab_size=37,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    context_length=TOKENS,
)
MIXTURE = MoEConfig(num_experts=6, experts_per_token=2, intermediate_size=64)
DYNAMIC = RopeScaling(kind="dynamic", factor=4.0, original_context_length=10)
YARN = RopeScaling(kind="yarn", factor=4.0, original_context_length=10, attention_factor=1.1)
HYBRID = replace(
    LLAMA,
    qk_norm=True,
    rotary_dim=8,
    output_gate=True,
    centered_norm=True,
    mixers=("delta_net", "attention"),
    delta_net=DeltaNetConfig(num_key_heads=2, num_value_heads=4, key_head_dim=16, value_head_dim=32),
)
MODELS = {
    "llama": LLAMA,
    "tied": replace(LLAMA, tie_embeddings=True),
    "qwen2": replace(LLAMA, qkv_bias=True),
    "biases": replace(LLAMA, qkv_bias=True, o_bias=True, mlp_bias=True),
    "qwen3": replace(LLAMA, qk_norm=True, tie_embeddings=True),
    "smollm3": replace(LLAMA, rope_layers=(True, False)),
    "windows": replace(LLAMA, windows=(5, None)),
    "dynamic": replace(LLAMA, rope_scaling=DYNAMIC),
    "yarn": replace(LLAMA, rope_scaling=YARN),
    "qwen3-moe": replace(LLAMA, qk_norm=True, moe=MIXTURE),
    "moe-mlp-only": replace(LLAMA, moe=replace(MIXTURE, normalize_weights=False, layers=(False, True))),
    "qwen2-moe": replace(LLAMA, qkv_bias=True, moe=replace(MIXTURE, shared_size=32, shared_gate=True)),
    "qwen3.5": HYBRID,
    "qwen3.5-moe": replace(HYBRID, moe=replace(MIXTURE, shared_size=32, shared_gate=True)),
}
GRIDS = [INT8, INT8_G32, INT4, INT4_OFFSETS]
WITH_EMBEDDING = Quantization(4, 32, embedding=8)
CASES = [(name, GRIDS[number % 4]) for number, name in enumerate(MODELS)]
CASES += [(name, grid) for name in ("llama", "qwen3-moe") for grid in GRIDS if (name, grid) not in CASES]
CASES += [(name, WITH_EMBEDDING) for name in ("llama", "tied")]


@dataclass
class Pair:
    """A random model and its quantised self, as the receipt reads them and as jllm_core does."""

    config: ModelConfig
    infos: Weights
    plain: dict[str, np.ndarray]
    stored: dict[str, np.ndarray]

    def models(self, memory: int, asked: Asked | None = None) -> tuple[StreamedModel, StreamedModel]:
        infos = abstract_weights(self.config)
        return (
            StreamedModel(self.config, infos, serve(self.plain, asked), TOKENS, memory),
            StreamedModel(self.config, self.infos, serve(self.stored, asked), TOKENS, memory),
        )

    def weights(self) -> tuple[Weights, Weights]:
        """Both as trees of JAX arrays, in float32 what is not quantised."""
        plain = jax.tree.structure(abstract_weights(self.config))
        exact = [jnp.asarray(array, jnp.float32) for array in self.plain.values()]
        rounded = [
            jnp.asarray(array, None if array.dtype == np.float16 or array.dtype.kind in "iu" else jnp.float32)
            for array in (self.stored[name] for name in named_leaves(self.infos))
        ]
        return jax.tree.unflatten(plain, exact), jax.tree.unflatten(jax.tree.structure(self.infos), rounded)


def serve(arrays: dict[str, np.ndarray], asked: Asked | None = None) -> Callable[..., np.ndarray]:
    def read(name: str, box: Box | None = None) -> np.ndarray:
        if asked is not None:
            asked.append((name, box))
        for part, size in zip(box or (), arrays[name].shape, strict=bool(box)):
            assert part.step is None
            assert 0 <= part.start < part.stop <= size
        return arrays[name][box or ...]

    return read


def make_pair(config: ModelConfig, grid: Quantization, source: Any = np.float32, dtype: Any = np.float32) -> Pair:
    """The model in the type ``source``, and what a conversion to ``dtype`` and to the grid stores of it."""
    random = np.random.default_rng(0)
    plain = {}
    for name, info in named_leaves(abstract_weights(config)).items():
        mean, spread = (1.0, 0.3) if "gamma" in name else (0.0, 1.0 if name == "embedding" else 0.15)
        plain[name] = random.normal(mean, spread, info.shape).astype(source)
    infos = abstract_weights(config, dtype, grid)
    matrices, stored = matrices_of(infos), {}
    for name, array in plain.items():
        if name not in matrices:
            stored[name] = array.astype(dtype)
            continue
        quantized = quantize(array, matrices[name].quantization, **matrices[name].values.metadata)
        parts = {"values": quantized.values, "scales": quantized.scales, "offsets": quantized.offsets}
        stored |= {f"{name}.{part}": numbers for part, numbers in parts.items() if numbers is not None}
    return Pair(config, infos, plain, stored)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tokenizer, that has a word of the receipt's text for each of the tiny models' tokens."""
    words = list(dict.fromkeys(["?", *(word for word, _ in Whitespace().pre_tokenize_str(receipt_text()))]))
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(words[: LLAMA.vocab_size])}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def ids_in(folder: Path, config: ModelConfig = LLAMA) -> np.ndarray:
    ids = text_ids(folder / "tokenizer.json", config)
    assert ids is not None
    return ids


def measured(pair: Pair, folder: Path, memory: int, asked: Asked | None = None) -> Receipt:
    ids = ids_in(folder, pair.config)
    return measure(pair.config, ids, pair.infos, serve(pair.plain, asked), serve(pair.stored, asked), memory=memory)


def log_probabilities(pair: Pair, ids: np.ndarray) -> list[jax.Array]:
    """By jllm_core, of both models."""
    tokens, positions = jnp.asarray(ids)[None], jnp.arange(len(ids))[None]
    return [jax.nn.log_softmax(forward(tokens, positions, weights, pair.config)[0][0]) for weights in pair.weights()]


def compared(exact: jax.Array, rounded: jax.Array) -> tuple[float, float]:
    """The mean divergence and the share of positions with the same token on top."""
    kl = jnp.mean(jnp.sum(jnp.exp(exact) * (exact - rounded), axis=-1))
    return float(kl), float(jnp.mean(jnp.argmax(exact, -1) == jnp.argmax(rounded, -1)))


@pytest.mark.parametrize(("name", "grid"), CASES, ids=lambda case: getattr(case, "name", case))
def test_it_is_the_model_of_core(name: str, grid: Quantization, folder: Path) -> None:
    pair, ids = make_pair(MODELS[name], grid), ids_in(folder)
    tokens, positions = jnp.asarray(ids)[None], jnp.arange(TOKENS)[None]
    expected = [
        core_hidden_states(tokens, positions, weights, pair.config, NoCache(), XLA())[0][0]
        for weights in pair.weights()
    ]
    exact, rounded = log_probabilities(pair, ids)
    kl, top1 = compared(exact, rounded)
    assert kl > 1e-4
    for memory in (SMALL, LARGE):
        models = pair.models(memory)
        states = hidden_states(*models, ids)
        np.testing.assert_allclose(states[0], expected[0], atol=1e-4)
        np.testing.assert_allclose(states[1], expected[1], atol=1e-4)
        columns = list(zip(*logits(*models, *states), strict=True))
        got = [jax.nn.log_softmax(jnp.concatenate(side, axis=-1)) for side in columns]
        np.testing.assert_allclose(got[0], exact, atol=1e-4)
        np.testing.assert_allclose(got[1], rounded, atol=1e-4)
        receipt = measured(pair, folder, memory)
        assert receipt.kl_nats == pytest.approx(kl, abs=1e-4, rel=1e-3)
        assert receipt.top1_agreement == pytest.approx(top1)
        assert receipt.tokens == TOKENS


@pytest.mark.parametrize("name", ["biases", "qwen3", "qwen3-moe"])
@pytest.mark.parametrize("grid", [*GRIDS, WITH_EMBEDDING], ids=lambda grid: grid.name)
def test_the_size_of_the_window_does_not_show(name: str, grid: Quantization, folder: Path) -> None:
    pair = make_pair(MODELS[name], grid)
    boxes: dict[int, Asked] = {SMALL: [], 1 << 15: [], LARGE: []}
    receipts = {memory: measured(pair, folder, memory, asked) for memory, asked in boxes.items()}
    for memory, receipt in receipts.items():
        assert receipt.kl_nats == pytest.approx(receipts[LARGE].kl_nats, abs=1e-6), memory
        assert receipt.top1_agreement == receipts[LARGE].top1_agreement
    assert len(boxes[SMALL]) > 1.2 * len(boxes[1 << 15]) > 1.2 * len(boxes[LARGE])
    assert {name for name, _ in boxes[SMALL]} == {name for name, _ in boxes[LARGE]}


@pytest.mark.parametrize("memory", [SMALL, LARGE])
@pytest.mark.parametrize("name", ["biases", "qwen3-moe"])
def test_the_largest_activation_of_float16_is_found(name: str, memory: int, folder: Path) -> None:
    pair = make_pair(MODELS[name], INT8, dtype=np.float16)
    assert (
        measured(replace(pair, infos=abstract_weights(pair.config, np.float32, INT8)), folder, memory).largest_at
        is None
    )
    ids, seen = ids_in(folder), {}
    model = pair.models(LARGE)[1]
    model = replace(model, observe=lambda where, numbers: seen.update({where: float(np.abs(numbers).max())}))
    x = model.embed(ids)
    for number in range(pair.config.num_layers):
        x = model.layer(x, number)
        assert seen[f"the residual stream behind layer {number}"] == pytest.approx(np.abs(x).max())
    down = "we_down" if name == "qwen3-moe" else "w_down"
    assert {f"the {end} of layers.1.ffw.{down}" for end in ("input", "output")} < set(seen)
    assert {f"the output of layers.0.attn.{part}" for part in "qkvo"} < set(seen)
    receipt = measured(pair, folder, memory)
    # Of several experts, the last one's is what was kept here.
    assert receipt.largest_activation is not None
    if name == "biases":
        assert receipt.largest_activation == pytest.approx(max(seen.values()), rel=1e-4)
        assert seen[str(receipt.largest_at)] == pytest.approx(receipt.largest_activation, rel=1e-4)
    assert receipt.largest_activation >= max(seen.values()) * 0.9999
    assert not receipt.nearly_overflows


def test_a_model_beside_itself_is_no_different(folder: Path) -> None:
    pair = make_pair(LLAMA, INT8)
    infos, read = abstract_weights(LLAMA), serve(pair.plain)
    receipt = measure(LLAMA, ids_in(folder), infos, read, read, memory=SMALL)
    assert (receipt.kl_nats, receipt.top1_agreement) == (0.0, 1.0)


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_types_of_16_bits_are_read_and_what_storing_rounds_is_measured(name: str, folder: Path) -> None:
    half = make_pair(MODELS[name], INT8, source=ml_dtypes.bfloat16)
    same = replace(half, plain={array: numbers.astype(np.float32) for array, numbers in half.plain.items()})
    assert measured(half, folder, SMALL) == measured(same, folder, SMALL)
    pair = make_pair(MODELS[name], INT8, dtype=ml_dtypes.bfloat16)
    kl, _ = compared(*log_probabilities(pair, ids_in(folder)))
    assert measured(pair, folder, SMALL).kl_nats == pytest.approx(kl, rel=1e-3)


def test_only_rows_of_the_text_and_experts_that_it_goes_to_are_read(folder: Path) -> None:
    config = replace(LLAMA, moe=replace(MIXTURE, num_experts=40), context_length=3)
    pair, asked, ids = make_pair(config, INT4), [], set(ids_in(folder)[:3].tolist())
    measured(pair, folder, LARGE, asked)
    rows = {row for name, box in asked if name == "embedding" and box for row in range(box[0].start, box[0].stop)}
    assert rows == ids
    for name in ("layers.1.ffw.we_gate", "layers.1.ffw.we_down.values", "layers.1.ffw.we_up.scales"):
        boxes = [box for asked_name, box in asked if asked_name == name]
        experts = [expert for box in boxes if box for expert in range(box[0].start, box[0].stop)]
        assert len(experts) == len(set(experts)), "an expert was read twice"
        assert config.moe is not None
        assert config.moe.experts_per_token <= len(experts) <= 3 * config.moe.experts_per_token


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_experts_that_lie_in_one_chunk_are_read_together(grid: Quantization) -> None:
    config = replace(LLAMA, moe=replace(MIXTURE, num_experts=8))
    pair, name = make_pair(config, grid), "layers.0.ffw.we_up"
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32))
    info, exact = matrices_of(pair.infos)[name], dequantize(matrices_of(pair.weights()[1])[name])

    def products(memory: int, asked: Asked) -> dict[int, np.ndarray]:
        matrix = StreamedMatrix(name, info, serve(pair.stored, asked), memory)
        experts = np.array([0, 1, 2, 5, 7])
        return {n: np.asarray(expert.matmul("RD,DF->RF", x)) for n, expert in matrix.entries(experts)}

    for memory in (SMALL, LARGE):
        asked: Asked = []
        found = products(memory, asked)
        assert [*found] == [0, 1, 2, 5, 7]
        for number, got in found.items():
            np.testing.assert_allclose(got, x @ exact[number], atol=1e-4)
        values = [box[0] for asked_name, box in asked if asked_name == f"{name}.values" and box]
        if memory == LARGE:
            assert [(box.start, box.stop) for box in values] == [(0, 3), (5, 6), (7, 8)]
        else:
            assert {box.stop - box.start for box in values} == {1}


def test_the_logits_of_a_slab_count_as_well(folder: Path) -> None:
    """A column of the head has 256 bytes, its logits 96 in each of six arrays: 4 fit in 4 KiB."""
    models = make_pair(LLAMA, INT8).models(16 * 4096)
    states = hidden_states(*models, ids_in(folder))
    assert [exact.shape[1] for exact, _ in logits(*models, *states)] == [4] * 9 + [1]


def test_a_receipt_stays_in_its_window(folder: Path) -> None:
    """Arrays of 64 and 128 MiB, made box by box as they are asked for."""
    mixture = MoEConfig(num_experts=4, experts_per_token=2, intermediate_size=8192, layers=(False, True))
    config = ModelConfig(
        model_type="qwen3_moe",
        vocab_size=32768,
        hidden_size=1024,
        intermediate_size=16384,
        num_layers=2,
        num_heads=128,
        num_kv_heads=4,
        head_dim=128,
        context_length=16,
        moe=mixture,
    )
    infos, plain = abstract_weights(config, np.float32, INT4), named_leaves(abstract_weights(config))
    stored, largest = named_leaves(infos), 0

    def make(descriptions: dict[str, Any], name: str, box: Box | None) -> np.ndarray:
        nonlocal largest
        info = descriptions[name]
        shape = info.shape if box is None else tuple(part.stop - part.start for part in box)
        largest = max(largest, math.prod(shape) * info.dtype.itemsize)
        some = pattern.astype(info.dtype) if info.dtype.kind == "f" else pattern.view(info.dtype)
        return np.resize(some, shape)

    memory, pattern = 16 << 20, np.random.default_rng(0).normal(0, 0.05, 9973).astype(np.float32)
    tracemalloc.start()
    try:
        receipt = measure(
            config,
            ids_in(folder, config),
            infos,
            lambda name, box=None: make(plain, name, box),
            lambda name, box=None: make(stored, name, box),
            memory=memory,
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert receipt.tokens == config.context_length
    assert largest <= memory // 4
    assert peak < memory


def test_heads_are_attended_to_by_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    q = jnp.asarray(random.standard_normal((1, 5, 8, 4)).astype(np.float32))
    k, v = (jnp.asarray(random.standard_normal((1, 2, 5, 4)).astype(np.float32)) for _ in range(2))
    positions = jnp.arange(5)[None]
    monkeypatch.setattr(streamed_model, "HEADS_AT_ONCE", 3)
    got = StreamedXLA().attention(q, k, v, positions, positions, 3)
    np.testing.assert_allclose(got, attention(q, k, v, positions, positions, 3), atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
@pytest.mark.parametrize(
    ("name", "equation", "shape"),
    [
        ("attn.q", "BTD,DNH->BTNH", (1, 5, 64)),
        ("attn.o", "BTNH,NHD->BTD", (1, 5, 4, 32)),
        ("ffw.w_up", "...D,DF->...F", (5, 64)),
        ("ffw.w_down", "...F,FD->...D", (2, 5, 96)),
    ],
)
def test_a_matrix_multiplies_slab_by_slab(grid: Quantization, name: str, equation: str, shape: tuple[int, ...]) -> None:
    pair, name = make_pair(LLAMA, grid), f"layers.0.{name}"
    x = jnp.asarray(np.random.default_rng(1).standard_normal(shape).astype(np.float32))
    expected = jnp.einsum(equation, x, dequantize(matrices_of(pair.weights()[1])[name]), precision="highest")
    for memory in (SMALL, LARGE):
        matrix = StreamedMatrix(name, matrices_of(pair.infos)[name], serve(pair.stored), memory)
        np.testing.assert_allclose(matrix.matmul(equation, x), expected, atol=1e-4)


def test_it_runs_on_the_processor_where_jax_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with on_processor():
        assert jnp.ones(2).devices() == {jax.local_devices(backend="cpu")[0]}

    def none(backend: str) -> None:
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", none)
    with on_processor():
        assert jnp.ones(2).devices()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.floats(0.1, 60.0), st.integers(0, 99))
def test_a_comparison_in_slabs_is_that_of_whole_distributions(size: int, slab: int, spread: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    exact = (random.standard_normal((5, size)) * spread).astype(np.float32)
    rounded = (exact + random.standard_normal((5, size))).astype(np.float32)
    exact[:, -1] = exact.max(axis=-1)  # a tie: the first counts
    comparison, itself = Comparison(5), Comparison(5)
    for start in range(0, size, slab):
        comparison.add(exact[:, start : start + slab], rounded[:, start : start + slab])
        itself.add(exact[:, start : start + slab], exact[:, start : start + slab])
    logs = [x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (exact.astype(float), rounded.astype(float))]
    kl = np.mean(np.sum(np.exp(logs[0]) * (logs[0] - logs[1]), axis=-1))
    assert comparison.kl_nats() == pytest.approx(kl, rel=1e-4, abs=1e-5 * spread)
    assert comparison.top1_agreement() == np.mean(exact.argmax(-1) == rounded.argmax(-1))
    assert (itself.kl_nats(), itself.top1_agreement()) == (0.0, 1.0)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
@pytest.mark.parametrize(("name", "axis"), [("attn.q", 1), ("attn.o", 0), ("ffw.w_up", 1), ("ffw.w_down", 0)])
def test_slabs_are_the_matrix(grid: Quantization, name: str, axis: int) -> None:
    pair, name = make_pair(LLAMA, grid), f"layers.0.{name}"
    expected = np.asarray(dequantize(matrices_of(pair.weights()[1])[name]))
    for memory in (SMALL, 1 << 14, LARGE):
        slabs = list(StreamedMatrix(name, matrices_of(pair.infos)[name], serve(pair.stored), memory).slabs(axis))
        np.testing.assert_array_equal(np.concatenate([slab for _, slab in slabs], axis), expected)
        assert [own.start for own, _ in slabs][1:] == [own.stop for own, _ in slabs][:-1]
        assert (len(slabs) == 1) == (memory == LARGE)


def test_pieces_end_where_chunks_of_the_files_do() -> None:
    config = replace(LLAMA, intermediate_size=4096, hidden_size=512)
    info = matrices_of(abstract_weights(config, np.float32, INT4))["layers.0.ffw.w_down"]
    assert chunk_shape(info.values.shape, info.values.dtype, info.values.logical_axes) == (256, 512)  # 512 inputs
    chunk = 256 * 512 + 2 * 512 * 512 // 32  # bytes of their values and scales

    def ranges(chunks: float) -> list[int]:
        return [piece.stop for piece in StreamedMatrix("w_down", info, serve({}), int(4 * chunks * chunk)).pieces(0)]

    assert ranges(100) == [4096]
    assert ranges(2.5) == list(range(1024, 4097, 1024))
    assert ranges(1) == list(range(512, 4097, 512))
    assert ranges(0.65) == [stop for end in range(512, 4097, 512) for stop in (end - 192, end)]
    assert ranges(0) == list(range(32, 4097, 32))


@given(st.lists(st.integers(0, 60), unique=True).map(sorted))
def test_runs_are_the_numbers(numbers: list[int]) -> None:
    found = runs(np.asarray(numbers, np.int64))
    assert [n for run in found for n in range(run.start, run.stop)] == numbers
    assert all(one.stop < two.start for one, two in itertools.pairwise(found))


def test_a_text_has_no_more_tokens_than_the_model_has_room_for(folder: Path) -> None:
    whole = ids_in(folder)
    np.testing.assert_array_equal(text_ids(folder / "tokenizer.json", replace(LLAMA, context_length=7)), whole[:7])


def test_without_a_tokenizer_or_tokens_there_is_nothing_to_read(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    assert text_ids(tokenizer, LLAMA) is None
    Tokenizer(WordLevel({"": 0}, unk_token="?")).save(str(tokenizer))
    with pytest.raises(ConversionError, match="download it again, or remove it"):
        text_ids(tokenizer, LLAMA)  # nothing stands for a word that it does not know
    Tokenizer(BPE()).save(str(tokenizer))
    assert text_ids(tokenizer, LLAMA) is None


def test_a_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    with pytest.raises(ConversionError, match=r"not of this model: it has a token \d+, the model knows 3$"):
        text_ids(folder / "tokenizer.json", replace(LLAMA, vocab_size=3))


# ---- Conversions to float16


def half_source(
    folder: Path, write_hf: Callable[..., Path], tiny_config: Any, hf_tensors: Any, factor: float, **files: Any
) -> Path:
    """A model whose feed-forward part gives numbers ``factor`` times as large as usual."""
    config = tiny_config()
    tensors = hf_tensors(config)
    tensors["model.layers.1.mlp.down_proj.weight"] *= factor
    tokenizer = Tokenizer(WordLevel({"?": 0, "the": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    return write_hf(folder / "source", config, tensors, tokenizer=json.loads(tokenizer.to_str()))


WHERE = r"the (output of layers\.1\.ffw\.w_down|residual stream behind layer 1)"


@pytest.mark.parametrize("quantize_to", [None, "int8"])
def test_a_model_whose_activations_float16_cannot_hold_is_refused(
    quantize_to: Any, tmp_path: Path, write_hf: Any, tiny_config: Any, hf_tensors: Any
) -> None:
    source = half_source(tmp_path, write_hf, tiny_config, hf_tensors, 1e4)
    target = tmp_path / "half"
    how: dict[str, Any] = {"dtype": "float16", "quantize": quantize_to}
    with pytest.raises(
        ConversionError, match=rf"activations overflow in float16: {WHERE} reaches [\d.e+]+ on "
    ) as error:
        convert(source, target, **how)
    assert "float16 ends at 65,504. Store it in another type (--dtype bfloat16 or float32), or" in str(error.value)
    assert not target.exists()
    assert convert(source, tmp_path / "wide", dtype="bfloat16").receipt is None
    # Asked for, it is made, with the number in the manifest; who has not asked for it does not get it.
    made = convert(source, target, allow_nonfinite=True, **how)
    assert made.receipt is not None
    assert made.receipt.overflows
    assert made.manifest.receipt == made.receipt.as_dict()
    assert any("float16 ends at 65,504; other texts may have larger ones" in words for words in made.warnings)
    assert convert(source, target, exist_ok=True, allow_nonfinite=True, **how).receipt == made.receipt
    with pytest.raises(
        ConversionError, match="is this conversion, made with --allow-nonfinite: the model's activations"
    ):
        convert(source, target, exist_ok=True, **how)


@pytest.mark.parametrize(
    ("factor", "options", "words"),
    [
        (1.0, {}, None),
        (150.0, {}, "other texts may have larger ones: bfloat16 has no such limit"),
        (1e4, {"receipt": False}, "whether the activations fit into float16 was not measured"),
    ],
)
def test_what_is_said_of_activations_in_float16(
    factor: float,
    options: Any,
    words: str | None,
    tmp_path: Path,
    write_hf: Any,
    tiny_config: Any,
    hf_tensors: Any,
) -> None:
    source = half_source(tmp_path, write_hf, tiny_config, hf_tensors, factor)
    made = convert(source, tmp_path / "half", dtype="float16", **options)
    assert made.manifest.dtype == "float16"
    if words is None:
        assert made.warnings == ()
        assert made.receipt is not None
        assert 0 < made.receipt.kl_nats < 1e-4
        assert "reaches" in str(made.receipt)
    else:
        (warning,) = made.warnings
        assert words in warning
    assert verify(made.path, source).ok
