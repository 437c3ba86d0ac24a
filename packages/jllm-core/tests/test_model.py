"""The whole model, against a float64 numpy one that shares no code with it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jllm_core import ModelConfig, RopeScaling, Weights, forward
from jllm_core.array_info import named_leaves

MakeConfig = Callable[..., ModelConfig]
MakeWeights = Callable[..., Weights]

TOKENS = jnp.array([[1, 5, 2, 12, 0, 7], [3, 3, 9, 0, 11, 4]])
POSITIONS = jnp.broadcast_to(jnp.arange(6), (2, 6))

run = jax.jit(forward, static_argnames="config")


def logits_of(tokens: Any, weights: Weights, config: ModelConfig, positions: Any = POSITIONS) -> np.ndarray:
    return np.asarray(run(jnp.asarray(tokens), jnp.asarray(positions), weights, config=config)[0])


def reference_logits(tokens: np.ndarray, weights: Weights, config: ModelConfig) -> np.ndarray:
    """One text ``[T]``, token by token and head by head: ``[T, V]``."""
    w: Weights = jax.tree.map(lambda array: np.asarray(array, np.float64), weights)

    def norm(x: np.ndarray, gamma: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2) + config.rms_norm_eps) * gamma

    def rotate(x: np.ndarray, position: int) -> np.ndarray:
        half = config.head_dim // 2
        out = np.empty_like(x)
        for i in range(half):
            angle = position / config.rope_theta ** (i / half)
            if config.rope_scaling:
                angle /= config.rope_scaling.factor
            out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
            out[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
        return out

    def plus(bias: np.ndarray | None, *index: int) -> Any:
        return 0.0 if bias is None else bias[index]

    xs = [w.embedding[token] for token in tokens]
    for layer in w.layers:
        a, f = layer.attn, layer.ffw
        normed = [norm(x, layer.attn_pre_gamma) for x in xs]

        def head(t: int, n: int, matrix: Any, bias: Any, gamma: Any, normed: Any = normed) -> np.ndarray:
            x = normed[t] @ matrix[:, n] + plus(bias, n)
            return rotate(x if gamma is None else norm(x, gamma), t)

        attended = []
        for t in range(len(xs)):
            out = np.zeros(config.hidden_size) + plus(a.o_bias)
            for n in range(config.num_heads):
                group = n // (config.num_heads // config.num_kv_heads)
                q = head(t, n, a.q, a.q_bias, a.q_gamma)
                keys = [head(s, group, a.k, a.k_bias, a.k_gamma) for s in range(t + 1)]
                scores = np.array([q @ k for k in keys]) / np.sqrt(config.head_dim)
                weight = np.exp(scores - scores.max())
                weight /= weight.sum()
                seen = sum(weight[s] * (normed[s] @ a.v[:, group] + plus(a.v_bias, group)) for s in range(t + 1))
                out += seen @ a.o[n]
            attended.append(out)
        xs = [x + out for x, out in zip(xs, attended, strict=True)]
        for t, x in enumerate(xs):
            x_normed = norm(x, layer.attn_post_gamma)
            gate, up = x_normed @ f.w_gate + plus(f.b_gate), x_normed @ f.w_up + plus(f.b_up)
            xs[t] = x + (gate / (1 + np.exp(-gate)) * up) @ f.w_down + plus(f.b_down)
    head_matrix = w.embedding.T if w.lm_head is None else w.lm_head
    return np.stack([norm(x, w.gamma_final) @ head_matrix for x in xs])


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_embeddings": True, "rms_norm_eps": 1e-2},
        {"qk_norm": True},
        {
            "qkv_bias": True,
            "o_bias": True,
            "mlp_bias": True,
            "rope_theta": 100.0,
            "rope_scaling": RopeScaling(kind="linear", factor=2.0),
        },
    ],
    ids=["tied", "qk_norm", "biases-scaled-rope"],
)
def test_forward_matches_the_reference(
    make_config: MakeConfig, make_weights: MakeWeights, changes: dict[str, Any]
) -> None:
    config = make_config(**changes)
    weights = make_weights(config)
    got = logits_of(TOKENS, weights, config)
    assert got.shape == (2, 6, 13)
    expected = [reference_logits(np.asarray(row), weights, config) for row in TOKENS]
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.ptp(expected) > 1, "the logits are too flat to tell models apart"


@pytest.fixture(scope="module")
def config(make_config: MakeConfig) -> ModelConfig:
    return make_config(qk_norm=True)


@pytest.fixture(scope="module")
def weights(make_weights: MakeWeights, config: ModelConfig) -> Weights:
    return make_weights(config)


def test_a_later_token_does_not_change_earlier_logits(config: ModelConfig, weights: Weights) -> None:
    before = logits_of(TOKENS, weights, config)
    after = logits_of(TOKENS.at[0, 4].set(10), weights, config)
    np.testing.assert_array_equal(after[0, :4], before[0, :4])
    assert (after[0, 4:] != before[0, 4:]).any(-1).all()


def test_a_row_does_not_depend_on_its_neighbours(config: ModelConfig, weights: Weights) -> None:
    both = logits_of(TOKENS, weights, config)
    np.testing.assert_array_equal(logits_of(TOKENS.at[1].set(8), weights, config)[0], both[0])
    np.testing.assert_array_equal(logits_of(TOKENS[::-1], weights, config)[::-1], both)


def test_only_the_distances_between_positions_count(config: ModelConfig, weights: Weights) -> None:
    at_zero = logits_of(TOKENS, weights, config)
    np.testing.assert_allclose(logits_of(TOKENS, weights, config, POSITIONS + 50), at_zero, atol=1e-4)
    assert np.abs(logits_of(TOKENS, weights, config, POSITIONS * 3) - at_zero).max() > 1e-2


def test_the_causal_mask_goes_by_the_positions(config: ModelConfig, weights: Weights) -> None:
    backwards = logits_of(TOKENS[:, ::-1], weights, config, POSITIONS[:, ::-1])
    np.testing.assert_allclose(backwards[:, ::-1], logits_of(TOKENS, weights, config), atol=1e-5)


def test_gradients_are_finite_and_reach_every_array(make_config: MakeConfig, make_weights: MakeWeights) -> None:
    config = make_config(num_layers=1, qk_norm=True, qkv_bias=True, o_bias=True, mlp_bias=True)
    weights = make_weights(config)

    def loss(weights: Weights) -> jax.Array:
        logits, _ = forward(TOKENS, POSITIONS, weights, config)
        return -jax.nn.log_softmax(logits)[0, :-1][jnp.arange(5), TOKENS[0, 1:]].mean()

    value_and_slope = jax.jit(jax.value_and_grad(loss))
    _, slopes = value_and_slope(weights)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
    slopes = jax.tree.map(np.asarray, slopes)
    assert [name for name, slope in named_leaves(slopes).items() if not slope.any()] == []
    # A small step along the signs of the slopes changes the loss by the sum of their sizes.
    predicted = sum(1e-3 * np.abs(slope).sum() for slope in jax.tree.leaves(slopes))
    step = jax.tree.map(lambda slope: np.float32(1e-3) * np.sign(slope), slopes)
    values = jax.tree.map(np.asarray, weights)
    up, _ = value_and_slope(jax.tree.map(np.add, values, step))
    down, _ = value_and_slope(jax.tree.map(np.subtract, values, step))
    assert float(up - down) / 2 == pytest.approx(predicted, rel=0.02)


def test_bfloat16_weights_give_float32_logits_near_the_exact_ones(config: ModelConfig, weights: Weights) -> None:
    exact = logits_of(TOKENS, weights, config)
    rounded = logits_of(TOKENS, jax.tree.map(lambda array: array.astype(jnp.bfloat16), weights), config)
    assert rounded.dtype == np.float32
    error = np.abs(rounded - exact).max()
    assert 0 < error < 0.05 * np.abs(exact).max()


def test_q_and_k_gammas_work_only_as_a_pair(config: ModelConfig, weights: Weights) -> None:
    without = replace(
        weights,
        layers=[replace(layer, attn=replace(layer.attn, q_gamma=None, k_gamma=None)) for layer in weights.layers],
    )
    plain = replace(config, qk_norm=False)
    np.testing.assert_allclose(
        logits_of(TOKENS, without, plain)[0], reference_logits(np.asarray(TOKENS[0]), without, plain), atol=1e-4
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GrowingCache:
    """The simplest cache that meets the protocol: everything that came, layer by layer."""

    kept: dict[int, tuple[jax.Array, ...]] = field(default_factory=dict)

    def append(
        self, layer: int, k: jax.Array, v: jax.Array, positions: jax.Array
    ) -> tuple["GrowingCache", jax.Array, jax.Array, jax.Array]:
        new = (k.swapaxes(1, 2), v.swapaxes(1, 2), positions)
        if layer in self.kept:
            axes = (2, 2, 1)
            new = tuple(jnp.concatenate(pair, axis) for *pair, axis in zip(self.kept[layer], new, axes, strict=True))
        keys, values, stood_at = new
        return GrowingCache({**self.kept, layer: new}), keys, values, stood_at


def test_with_a_cache_the_text_may_come_in_pieces(config: ModelConfig, weights: Weights) -> None:
    whole = logits_of(TOKENS, weights, config)
    cache: Any = GrowingCache()
    pieces = []
    for piece in (slice(0, 3), slice(3, 4), slice(4, 6)):
        logits, cache = run(TOKENS[:, piece], POSITIONS[:, piece], weights, config=config, cache=cache)
        pieces.append(logits)
    assert sorted(cache.kept) == list(range(config.num_layers))
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, atol=1e-5)
