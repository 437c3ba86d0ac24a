"""Layers with a delta net by the CPU's kernel: beside XLA, and bit by bit beside itself."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jllm_core import (
    DeltaNetConfig,
    ModelConfig,
    MoEConfig,
    NoCache,
    Placement,
    Quantization,
    Weights,
    abstract_weights,
)
from jllm_core.backends.base import XLA, Backend
from jllm_core.backends.cpu import backend as cpu
from jllm_core.backends.select import select_backend
from jllm_core.model import Call, hidden_states
from jllm_core.quantization.arrays import QuantizedArray
from jllm_core.quantization.grids import quantize
from jllm_core.recurrent_state import RecurrentState, abstract_state

pytest.importorskip("llvmlite")

from jllm_core.backends.cpu.shared_expert import shared_expert

MakeConfig = Callable[..., ModelConfig]
MakeWeights = Callable[..., Weights]
KERNELS = cpu.CPULayerKernels()
NET = DeltaNetConfig(num_key_heads=2, num_value_heads=4, key_head_dim=32, value_head_dim=64)
KINDS: list[Any] = [jnp.float32, jnp.bfloat16, jnp.float16, Quantization(8), Quantization(4, 32)]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class States(NoCache):
    """The states of delta nets, and nothing of keys and values."""

    states: dict[int, RecurrentState]
    counts: Any = None

    def state(self, layer: int) -> RecurrentState:
        return self.states[layer]

    def set_state(self, layer: int, state: RecurrentState) -> "States":
        return dataclasses.replace(self, states={**self.states, layer: state})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pool(States):
    """More states than rows, which lie anywhere; those that nobody has are no numbers."""

    rows: Any = None
    begins: Any = None

    def state_places(self) -> tuple[Any, Any]:
        return self.rows, self.begins

    def states_of(self, layer: int) -> RecurrentState:
        return self.states[layer]

    with_states = States.set_state


def random(shape: Any, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def some_states(config: ModelConfig, rows: int) -> States:
    assert config.delta_net is not None
    info = abstract_state(config.delta_net, rows)
    states = {
        layer: jax.tree.map(lambda info, seed=layer: jnp.asarray(random(info.shape, seed)), info)
        for layer in config.layers_with("delta_net")
    }
    return States(states)


def net_config(make_config: MakeConfig, net: DeltaNetConfig = NET, **changes: Any) -> ModelConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    return make_config(**{**sizes, "delta_net": net, "mixers": ("delta_net",) * 2, "centered_norm": True, **changes})


def stored(kind: Any, config: ModelConfig, make_weights: MakeWeights) -> Weights:
    """Random weights of a type, or quantised."""
    if not isinstance(kind, Quantization):
        return make_weights(config, kind)

    def part(info: Any, array: Any) -> Any:
        if not isinstance(info, QuantizedArray):
            return array
        metadata = info.values.metadata
        quantised = quantize(np.asarray(array), kind, metadata["inputs"], metadata["batch"])
        return jax.tree.map(jnp.asarray, quantised)

    tree = abstract_weights(config, jnp.float32, kind)
    return jax.tree.map(part, tree, make_weights(config), is_leaf=lambda leaf: isinstance(leaf, QuantizedArray))


def layers(config: ModelConfig, weights: Weights, backend: Backend) -> Callable[..., Any]:
    """The hidden states of tokens by a backend, and the cache that they leave."""

    def run(tokens: Any, cache: Any) -> Any:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return hidden_states(tokens, positions, weights, config, cache, backend)

    return jax.jit(run)


def assert_close(got: Any, expected: Any, tolerance: float) -> None:
    size = float(np.abs(expected).max())
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * size)


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_a_delta_net_is_that_of_xla(data: st.DataObject, make_config: MakeConfig, make_weights: MakeWeights) -> None:
    draw = data.draw
    keys, of_each = draw(st.integers(1, 3), "key heads"), draw(st.integers(1, 3), "value heads of each")
    width = st.sampled_from([16, 32, 48, 80])
    net = DeltaNetConfig(
        num_key_heads=keys,
        num_value_heads=keys * of_each,
        key_head_dim=draw(width, "dk"),
        value_head_dim=draw(width, "dv"),
        conv_size=draw(st.integers(2, 4), "W"),
    )
    rows, length = draw(st.integers(1, 4), "rows"), draw(st.integers(1, 70), "tokens")
    sizes = {"hidden_size": draw(st.integers(1, 70), "D"), "num_layers": 1, "mixers": ("delta_net",)}
    config = net_config(make_config, net, **sizes)
    weights = make_weights(config)
    counts = np.array(draw(st.lists(st.integers(0, length), min_size=rows, max_size=rows), "counts"))
    cache = dataclasses.replace(some_states(config, rows), counts=jnp.asarray(counts))
    tokens = np.random.default_rng(rows).integers(0, 13, (rows, length))
    got, kept = layers(config, weights, KERNELS)(tokens, cache)
    expected, left = layers(config, weights, XLA())(tokens, cache)
    counted = np.arange(length) < counts[:, None]
    assert_close(np.asarray(got)[counted], np.asarray(expected)[counted], 5e-5) if counted.any() else None
    assert np.isfinite(np.asarray(got)).all()
    for mine, xlas in zip(jax.tree.leaves(kept.states), jax.tree.leaves(left.states), strict=True):
        assert_close(mine, xlas, 5e-5)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: getattr(kind, "name", None) or jnp.dtype(kind).name)
@pytest.mark.parametrize("length", [1, 40])
def test_weights_of_each_type(kind: Any, length: int, make_config: MakeConfig, make_weights: MakeWeights) -> None:
    config = net_config(make_config)
    weights = stored(kind, config, make_weights)
    cache, tokens = some_states(config, 3), np.random.default_rng(0).integers(0, 13, (3, length))
    got, _ = layers(config, weights, KERNELS)(tokens, cache)
    wide = jax.tree.map(
        lambda array: array.astype(jnp.float32) if array.dtype in (jnp.bfloat16, jnp.float16) else array, weights
    )
    expected, _ = layers(config, wide if not isinstance(kind, Quantization) else weights, XLA())(tokens, cache)
    if kind == jnp.bfloat16 and length > 1:
        # Products of such prompts take activations in bfloat16, where the processor has them: nearer than XLA's all the
        # same, which keeps more than those in it.
        other, _ = layers(config, weights, XLA())(tokens, cache)
        mine, xlas = (np.abs(np.asarray(states, np.float32) - expected) for states in (got, other))
        assert mine.mean() < xlas.mean()
        return
    assert_close(np.asarray(got, np.float32), expected, 5e-5 if weights.dtype == jnp.float32 else 1e-2)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: getattr(kind, "name", None) or jnp.dtype(kind).name)
def test_a_row_has_the_same_bits_alone(kind: Any, make_config: MakeConfig, make_weights: MakeWeights) -> None:
    config = net_config(make_config)
    run = layers(config, stored(kind, config, make_weights), KERNELS)
    for length in (1, 3):
        tokens, cache = np.random.default_rng(1).integers(0, 13, (16, length)), some_states(config, 16)
        together, kept = run(tokens, cache)
        for first, count in ((3, 1), (5, 2), (7, 5)):
            mine = slice(first, first + count)
            alone, own = run(tokens[mine], jax.tree.map(lambda array, mine=mine: array[mine], cache))
            np.testing.assert_array_equal(alone, together[mine])
            for one, all_ in zip(jax.tree.leaves(own), jax.tree.leaves(kept), strict=True):
                np.testing.assert_array_equal(one, all_[mine])


@pytest.mark.parametrize("kind", KINDS[:1] + KINDS[3:], ids=["float32", "int8", "int4"])
def test_a_text_has_the_same_bits_however_it_is_cut(
    kind: Any, make_config: MakeConfig, make_weights: MakeWeights
) -> None:
    config = net_config(make_config)
    run = layers(config, stored(kind, config, make_weights), KERNELS)
    tokens = np.random.default_rng(2).integers(0, 13, (2, 70))
    whole, kept = run(tokens, some_states(config, 2))
    pieces, cache = [], some_states(config, 2)
    for start, end in ((0, 1), (1, 2), (2, 5), (5, 69), (69, 70)):
        piece, cache = run(tokens[:, start:end], cache)
        pieces.append(np.asarray(piece))
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole)
    for one, other in zip(jax.tree.leaves(cache), jax.tree.leaves(kept), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_prompt_in_bfloat16_has_the_same_bits_however_it_is_cut(
    make_config: MakeConfig, make_weights: MakeWeights
) -> None:
    config = net_config(make_config)
    run = layers(config, make_weights(config, jnp.bfloat16), KERNELS)
    tokens = np.random.default_rng(2).integers(0, 13, (2, 130))
    whole, kept = run(tokens, some_states(config, 2))
    pieces, cache = [], jax.tree.map(lambda array: array[1:], some_states(config, 2))
    for start, end in ((0, 64), (64, 81), (81, 130)):
        piece, cache = run(tokens[1:, start:end], cache)
        pieces.append(np.asarray(piece))
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1)[0], whole[1])
    for one, other in zip(jax.tree.leaves(cache), jax.tree.leaves(kept), strict=True):
        np.testing.assert_array_equal(one[0], other[1])


@pytest.mark.parametrize("length", [1, 6])
def test_what_does_not_count_leaves_no_trace(length: int, make_config: MakeConfig, make_weights: MakeWeights) -> None:
    config = net_config(make_config)
    weights = make_weights(config)
    # Token 12 is no number.
    weights = dataclasses.replace(weights, embedding=weights.embedding.at[12].set(jnp.nan))
    run, before = layers(config, weights, KERNELS), some_states(config, 3)
    counts = np.array([0, min(2, length), length])
    tokens = np.where(np.arange(length) < counts[:, None], 5, 12)
    got, after = run(tokens, dataclasses.replace(before, counts=jnp.asarray(counts)))
    for old, new in zip(jax.tree.leaves(before.states), jax.tree.leaves(after.states), strict=True):
        np.testing.assert_array_equal(new[0], old[0])
    for row in (1, 2):
        mine = jax.tree.map(lambda array, row=row: array[row : row + 1], before)
        alone, left = run(tokens[row : row + 1, : counts[row]], mine)
        np.testing.assert_array_equal(got[row, : counts[row]], alone[0])
        for one, all_ in zip(jax.tree.leaves(left.states), jax.tree.leaves(after.states), strict=True):
            np.testing.assert_array_equal(one[0], all_[row])


def test_decays_of_every_size(make_config: MakeConfig, make_weights: MakeWeights) -> None:
    net = DeltaNetConfig(num_key_heads=1, num_value_heads=24, key_head_dim=16, value_head_dim=16)
    config = net_config(make_config, net, num_layers=1, mixers=("delta_net",))
    weights = make_weights(config)
    # Of the projections of decays nothing is left; a little of one is, where it is hardly felt.
    attn = dataclasses.replace(
        weights.layers[0].attn,
        a=jnp.zeros_like(weights.layers[0].attn.a),
        dt_bias=jnp.linspace(-40, 100, 24),
        a_log=jnp.linspace(-3, 3, 24),
    )
    weights = dataclasses.replace(weights, layers=[dataclasses.replace(weights.layers[0], attn=attn)])
    cache, tokens = some_states(config, 1), np.array([[3]])
    _, got = layers(config, weights, KERNELS)(tokens, cache)
    _, expected = layers(config, weights, XLA())(tokens, cache)
    np.testing.assert_allclose(got.states[0].memory, expected.states[0].memory, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("length", "kind", "gate"),
    [(1, jnp.float32, True), (1, jnp.float32, False), (20, Quantization(8), True), (1, Quantization(4, 32), True)],
    ids=["float32", "no gate", "int8 prompt", "int4"],
)
def test_experts_behind_a_delta_net(
    length: int, kind: Any, gate: bool, make_config: MakeConfig, make_weights: MakeWeights
) -> None:
    moe = MoEConfig(num_experts=4, experts_per_token=2, intermediate_size=32, shared_size=96, shared_gate=gate)
    config = net_config(make_config, moe=moe)
    weights, tokens = stored(kind, config, make_weights), np.random.default_rng(3).integers(0, 13, (2, length))
    got, _ = layers(config, weights, KERNELS)(tokens, some_states(config, 2))
    expected, _ = layers(config, weights, XLA())(tokens, some_states(config, 2))
    assert_close(got, expected, 5e-5)


def test_a_shared_expert_in_bfloat16_is_nearer_to_float32(make_config: MakeConfig, make_weights: MakeWeights) -> None:
    moe = MoEConfig(num_experts=4, experts_per_token=4, intermediate_size=32, shared_size=96, shared_gate=True)
    config = net_config(make_config, moe=moe)
    weights, tokens = make_weights(config, jnp.bfloat16), np.random.default_rng(3).integers(0, 13, (2, 40))
    wide = jax.tree.map(lambda array: array.astype(jnp.float32), weights)
    cache = some_states(config, 2)
    exact, got, xla = (
        np.asarray(layers(config, *by)(tokens, cache)[0], np.float32)
        for by in ((wide, XLA()), (weights, KERNELS), (weights, XLA()))
    )
    assert np.abs(got - exact).mean() < np.abs(xla - exact).mean()


def test_a_shared_expert_gives_a_token_the_same_bits_alone(make_config: MakeConfig, make_weights: MakeWeights) -> None:
    moe = MoEConfig(num_experts=2, experts_per_token=1, intermediate_size=16, shared_size=96, shared_gate=True)
    config = net_config(make_config, moe=moe)
    layer, x = make_weights(config).layers[0], jnp.asarray(random((20, 1, 64), 5))
    nothing = jnp.zeros((20, 1))
    call = Call(config, nothing, (nothing, nothing), KERNELS)
    together = shared_expert(x, layer, call)
    for first, count in ((0, 1), (3, 2), (4, 16)):
        alone = shared_expert(x[first : first + count], layer, call)
        np.testing.assert_array_equal(alone, together[first : first + count])


def test_a_model_of_both_kinds_without_a_cache(
    make_config: MakeConfig, make_weights: MakeWeights, one_cpu: Placement
) -> None:
    news = {"rotary_dim": 8, "output_gate": True, "qk_norm": True}
    config = net_config(make_config, mixers=("delta_net", "attention"), **news)
    weights, tokens = make_weights(config), np.random.default_rng(3).integers(0, 13, (2, 70))
    backend = select_backend(weights, config, one_cpu)
    assert backend.layer is not None
    got, _ = layers(config, weights, backend)(tokens, NoCache())
    expected, _ = layers(config, weights, XLA())(tokens, NoCache())
    assert_close(got, expected, 5e-5)


def test_memory_is_changed_where_it_lies(make_config: MakeConfig, make_weights: MakeWeights) -> None:
    config = net_config(make_config)
    weights, cache = make_weights(config), some_states(config, 3)

    def steps(tokens: Any, cache: Any) -> Any:
        run = layers(config, weights, KERNELS)
        return jax.lax.fori_loop(0, 8, lambda _, carry: run(tokens, carry)[1], cache)

    program = jax.jit(steps, donate_argnums=1).lower(np.zeros((3, 1), np.int32), cache).compile()
    assert "f32[3,4,32,64]" in program.as_text()
    assert not [line for line in program.as_text().splitlines() if " copy(" in line and "f32[3,4,32,64]" in line]


@pytest.mark.parametrize("length", [1, 6])
def test_states_anywhere_in_a_pool(length: int, make_config: MakeConfig, make_weights: MakeWeights) -> None:
    config = net_config(make_config)
    run, before = layers(config, make_weights(config), KERNELS), some_states(config, 6)
    tokens = np.random.default_rng(4).integers(0, 13, (6, length))
    # Rows go on, go on, begin, have no state (two of them), and begin without a token that counts.
    rows, begins = np.array([7, 2, 4, 9, -1, 0]), np.array([False, False, True, False, True, True])
    counts = np.array([length, 0, length, length, length, 0])

    def pooled(array: jax.Array) -> jax.Array:
        return jnp.full((9, *array.shape[1:]), jnp.nan).at[rows[:2]].set(array[:2])

    pool = Pool(jax.tree.map(pooled, before.states), jnp.asarray(counts), jnp.asarray(rows), jnp.asarray(begins))
    fresh = begins.reshape(6, 1, 1, 1)
    plain = States(jax.tree.map(lambda array: jnp.where(fresh, 0, array), before.states), jnp.asarray(counts))
    (got, after), (expected, left) = run(tokens, pool), run(tokens, plain)
    going = np.array([0, 2])
    np.testing.assert_array_equal(got[going], expected[going])
    assert np.isfinite(np.asarray(got)).all()
    for old, new, one in zip(*map(jax.tree.leaves, (pool.states, after.states, left.states)), strict=True):
        np.testing.assert_array_equal(new[jnp.array([7, 2, 4, 0])], one[jnp.array([0, 1, 2, 5])])
        untouched = np.array([1, 3, 5, 6, 8])
        np.testing.assert_array_equal(new[untouched], old[untouched])
