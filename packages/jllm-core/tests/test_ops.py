"""The layer math, against the same formulas in float64 loops."""

import math
from collections.abc import Callable
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jllm_core import MLPLayer, ModelConfig, RopeScaling
from jllm_core.ops.attention import attention
from jllm_core.ops.linear import linear
from jllm_core.ops.mlp import mlp
from jllm_core.ops.norm import rms_norm
from jllm_core.ops.rope import apply_rope, rope_angles, rope_frequencies

MakeConfig = Callable[..., ModelConfig]


def values(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# ---- RMSNorm


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm_divides_by_the_root_of_the_mean_square(eps: float) -> None:
    x, gamma = values(0, 2, 3, 8), values(1, 8)
    expected = np.zeros(x.shape)
    for b, t in np.ndindex(2, 3):
        mean_square = sum(float(value) ** 2 for value in x[b, t]) / 8
        for d in range(8):
            expected[b, t, d] = x[b, t, d] / math.sqrt(mean_square + eps) * gamma[d]
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), jnp.asarray(gamma), eps), expected, rtol=1e-5)


def test_rms_norm_rounds_bfloat16_once() -> None:
    x = values(0, 64, 32).astype(jnp.bfloat16)
    exact = x.astype(float) / np.sqrt(np.mean(x.astype(float) ** 2, axis=-1, keepdims=True) + 1e-6)
    normed = rms_norm(jnp.asarray(x), jnp.ones(32, jnp.bfloat16), 1e-6)
    assert normed.dtype == jnp.bfloat16
    np.testing.assert_array_equal(normed, exact.astype(jnp.bfloat16))


# ---- Rotary embedding


def plain_frequency(i: int, config: ModelConfig) -> float:
    return 1.0 / config.rope_theta ** (2 * i / config.head_dim)


def test_frequencies_are_powers_of_theta(make_config: MakeConfig) -> None:
    config = make_config(head_dim=8, rope_theta=500_000.0)
    expected = [plain_frequency(i, config) for i in range(4)]
    np.testing.assert_allclose(rope_frequencies(config), expected, rtol=1e-6)
    assert rope_frequencies(config).dtype == np.float32


def test_linear_scaling_divides_every_frequency(make_config: MakeConfig) -> None:
    config = make_config(head_dim=8, rope_scaling=RopeScaling(kind="linear", factor=4.0))
    expected = [plain_frequency(i, config) / 4 for i in range(4)]
    np.testing.assert_allclose(rope_frequencies(config), expected, rtol=1e-6)


def test_factors_divide_each_frequency_by_its_own(make_config: MakeConfig) -> None:
    factors = (1.0, 2.0, 4.0, 32.0)
    config = make_config(head_dim=8, rope_scaling=RopeScaling(kind="factors", factors=factors))
    expected = [plain_frequency(i, config) / factors[i] for i in range(4)]
    np.testing.assert_allclose(rope_frequencies(config), expected, rtol=1e-6)


def test_llama3_scaling_keeps_fast_stretches_slow_and_blends_between(make_config: MakeConfig) -> None:
    scaling = RopeScaling(
        kind="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=8192
    )
    config = make_config(head_dim=64, rope_theta=500_000.0, rope_scaling=scaling)
    expected, kinds = [], set()
    for i in range(32):
        frequency = plain_frequency(i, config)
        turns = 8192 * frequency / (2 * math.pi)  # in the context of the first training
        if turns > 4:
            kind, factor = "kept", 1.0
        elif turns < 1:
            kind, factor = "stretched", 1 / 32
        else:
            kind, share = "blended", (turns - 1) / (4 - 1)
            factor = share + (1 - share) / 32
        kinds.add(kind)
        expected.append(frequency * factor)
    assert kinds == {"kept", "blended", "stretched"}
    np.testing.assert_allclose(rope_frequencies(config), expected, rtol=1e-5)


def test_rope_rotates_the_pairs_of_the_two_halves(make_config: MakeConfig) -> None:
    config = make_config(head_dim=8)
    x, positions = values(0, 2, 3, 5, 8), np.array([[0, 1, 2], [7, 50, 9]])
    expected = np.zeros(x.shape)
    for b, t, n, i in product(range(2), range(3), range(5), range(4)):
        angle = positions[b, t] * plain_frequency(i, config)
        first, second = float(x[b, t, n, i]), float(x[b, t, n, i + 4])
        expected[b, t, n, i] = first * math.cos(angle) - second * math.sin(angle)
        expected[b, t, n, i + 4] = second * math.cos(angle) + first * math.sin(angle)
    rotated = apply_rope(jnp.asarray(x), rope_angles(jnp.asarray(positions), config))
    np.testing.assert_allclose(rotated, expected, atol=1e-5)


def test_bfloat16_is_rotated_by_float32_angles(make_config: MakeConfig) -> None:
    config = make_config(head_dim=4)
    cos, sin = rope_angles(jnp.array([[1000, 1001]]), config)  # one number to bfloat16
    assert (cos.dtype, sin.dtype) == (jnp.float32, jnp.float32)
    rotated = apply_rope(jnp.ones((1, 2, 1, 4), jnp.bfloat16), (cos, sin))
    assert rotated.dtype == jnp.bfloat16
    exact = [math.cos(position) - math.sin(position) for position in (1000, 1001)]
    np.testing.assert_allclose(np.asarray(rotated, np.float32)[0, :, 0, 0], exact, atol=0.01)


# ---- Attention


def naive_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    batch, queries, heads, width = q.shape
    group = heads // k.shape[1]
    out = np.zeros(q.shape)
    for b, t, n in product(range(batch), range(queries), range(heads)):
        seen = [s for s in range(k.shape[2]) if mask[b, t, s]]
        scores = [float(q[b, t, n].astype(float) @ k[b, n // group, s]) / math.sqrt(width) for s in seen]
        weights = [math.exp(score - max(scores)) for score in scores]
        for s, weight in zip(seen, weights, strict=True):
            out[b, t, n] += weight / sum(weights) * v[b, n // group, s]
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_attention_is_softmax_over_what_each_query_sees(kv_heads: int, window: int | None) -> None:
    q, k, v = values(0, 2, 3, 6, 4), values(1, 2, kv_heads, 5, 4), values(2, 2, kv_heads, 5, 4)
    queries, keys = np.array([[4, 2, 3], [9, 8, 7]]), np.array([[2, 0, 1, 4, 3], [5, 6, 7, 8, 9]])  # in any order
    behind = queries[:, :, None] - keys[:, None, :]
    mask = (behind >= 0) & (behind < (window or 99))
    out = attention(*map(jnp.asarray, (q, k, v, queries, keys)), window)
    np.testing.assert_allclose(out, naive_attention(q, k, v, mask), atol=1e-5)


def test_a_query_that_may_see_nothing_gets_finite_values_and_spoils_no_other() -> None:
    q, k, v = (jnp.asarray(values(seed, 1, 2, 2, 4)) for seed in range(3))
    queries, keys = jnp.array([[5, 0]]), jnp.array([[1, 2]])
    out = attention(q, k, v, queries, keys)
    assert jnp.isfinite(out).all()
    whole = attention(q, k, v, jnp.array([[5, 5]]), keys)
    np.testing.assert_allclose(out[0, 0], whole[0, 0], rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda k: attention(q, k, v, queries, keys).sum()))(k)
    assert jnp.isfinite(gradient).all()


def test_what_a_query_does_not_see_has_no_influence_however_large() -> None:
    q, k, v = (jnp.asarray(values(seed, 1, 2, 2, 4)) for seed in range(3))
    where = (jnp.array([[3, 4]]), jnp.array([[3, 9]]))
    out = attention(q, k.at[:, :, 1].set(1e4 * q[:, 0]), v.at[:, :, 1].set(1e6), *where)
    np.testing.assert_array_equal(out, attention(q, k, v, *where))


def test_bfloat16_attention_scores_in_float32() -> None:
    # Two scores, 300 and 301, which are one number to bfloat16, so that it would weigh both keys by half.
    q = jnp.full((1, 1, 1, 4), 2.0, jnp.bfloat16)
    k = jnp.array([[[[75.0] * 4, [75.0] * 3 + [76.0]]]], jnp.bfloat16)
    v = jnp.array([[[[0.0] * 4, [1.0] * 4]]], jnp.bfloat16)
    out = attention(q, k, v, jnp.array([[1]]), jnp.array([[0, 1]]))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), 1 / (1 + math.exp(-1)), atol=5e-3)


# ---- Linear and the feed-forward layer


def test_linear_adds_its_bias_to_the_trailing_axes() -> None:
    x, w, bias = values(0, 2, 3, 4), values(1, 4, 5, 2), values(2, 5, 2)
    expected = np.tensordot(x.astype(float), w, 1) + bias
    y = linear("BTD,DNH->BTNH", jnp.asarray(x), jnp.asarray(w), jnp.asarray(bias))
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("biased", [False, True])
def test_mlp_is_a_gated_silu(biased: bool) -> None:
    d, f = 4, 6
    x, w_gate, w_up, w_down = values(0, 1, 2, d), values(1, d, f), values(2, d, f), values(3, f, d)
    b_gate, b_up, b_down = values(4, f), values(5, f), values(6, d)
    expected = np.zeros(x.shape)
    for t in range(2):
        hidden = []
        for j in range(f):
            gate = sum(float(x[0, t, i]) * w_gate[i, j] for i in range(d)) + biased * b_gate[j]
            up = sum(float(x[0, t, i]) * w_up[i, j] for i in range(d)) + biased * b_up[j]
            hidden.append(gate / (1 + math.exp(-gate)) * up)
        for i in range(d):
            expected[0, t, i] = sum(hidden[j] * w_down[j, i] for j in range(f)) + biased * b_down[i]
    biases = [jnp.asarray(bias) for bias in (b_gate, b_up, b_down)] if biased else []
    layer = MLPLayer(*map(jnp.asarray, (w_gate, w_up, w_down)), *biases)
    np.testing.assert_allclose(mlp(jnp.asarray(x), layer), expected, atol=1e-5)


# ---- Rotations for long contexts


def test_yarn_keeps_the_fast_features_and_stretches_the_slow(make_config: MakeConfig) -> None:
    scaling = RopeScaling(kind="yarn", factor=4.0, original_context_length=64, attention_factor=1.5)
    config = make_config(head_dim=64, rope_scaling=scaling)
    plain, scaled = rope_frequencies(make_config(head_dim=64)), rope_frequencies(config)
    assert scaled[0] == plain[0]
    assert scaled[-1] == plain[-1] / 4
    ratios = scaled / plain
    assert (np.diff(ratios) <= 1e-7).all()
    assert len(np.unique(ratios.round(4))) > 3, "nothing is blended"
    cos, sin = rope_angles(jnp.array([[0]]), config)
    np.testing.assert_allclose(cos, 1.5)
    np.testing.assert_allclose(sin, 0.0)


def test_dynamic_scaling_goes_by_the_length_of_each_text(make_config: MakeConfig) -> None:
    scaling = RopeScaling(kind="dynamic", factor=2.0, original_context_length=8)
    config, positions = make_config(head_dim=8, rope_scaling=scaling), jnp.array([[3], [3], [3]])
    cos, _ = rope_angles(positions, config, jnp.array([4, 8, 24]))
    plain, _ = rope_angles(positions, make_config(head_dim=8))
    np.testing.assert_allclose(cos[:2], plain[:2], rtol=1e-5)
    # Three times the first training: the base grows by (2 * 3 - 1) ** (8 / 6).
    grown, _ = rope_angles(positions, make_config(head_dim=8, rope_theta=10000.0 * 5 ** (8 / 6)))
    np.testing.assert_allclose(cos[2], grown[2], rtol=1e-5)
    # Without a length the text ends with the last position that is given.
    alone, _ = rope_angles(jnp.array([[3, 23]]), config)
    np.testing.assert_allclose(alone[:, :1], grown[:1], rtol=1e-5)
