"""Keys and values of 8 bits: how near they are, and attention to them as they lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jllm_core.backends.cpu import blocked_attention
from jllm_core.ops.attention import attention
from jllm_core.quantization.keys_values import QuantizedSlots, quantize_slots


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def slots(x: jax.Array) -> QuantizedSlots:
    return QuantizedSlots(*quantize_slots(x))


def widened(x: QuantizedSlots) -> jax.Array:
    return x.values * x.scales[..., None]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_each_feature_is_within_half_a_step(dtype: str) -> None:
    x = (random(2, 3, 50, 16) * jnp.exp(3 * random(2, 3, 50, 1, seed=1))).astype(dtype)
    found = slots(x)
    assert (found.values.dtype, found.scales.dtype, found.shape) == (jnp.int8, jnp.float32, x.shape)
    assert np.abs(found.values).max(axis=-1).tolist() == np.full(x.shape[:-1], 127).tolist()
    error = jnp.abs(widened(found) - x.astype(jnp.float32))
    assert (error <= 0.501 * found.scales[..., None]).all()


def test_zeros_stay_zeros() -> None:
    found = slots(jnp.zeros((1, 1, 2, 8)))
    assert not found.values.any()
    assert not found.scales.any()


def test_their_bytes() -> None:
    assert slots(jnp.zeros((2, 3, 5, 8))).nbytes == 2 * 3 * 5 * (8 + 4)


@pytest.mark.parametrize("window", [None, 9])
def test_attention_needs_no_wider_copy(window: int | None) -> None:
    """The scales of keys come after the scores, those of values before the sums: the same as of the widened arrays."""
    q, k, v = random(2, 3, 4, 16), slots(random(2, 2, 64, 16, seed=1)), slots(random(2, 2, 64, 16, seed=2))
    positions = jnp.array([[30, 31, 32], [61, 62, 63]])
    expected = attention(q, widened(k), widened(v), positions, window=window)
    np.testing.assert_allclose(attention(q, k, v, positions, window=window), expected, atol=2e-6)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 500.0])
def test_attention_of_float16_neither_underflows_nor_overflows(scale: float) -> None:
    """Thousands of tokens that count alike: a probability times the scale of a value is below what float16 can hold."""
    q = (0.01 * random(1, 2, 2, 16)).astype(jnp.float16)
    k, v = slots(random(1, 2, 8192, 16, seed=1)), slots(scale * (1 + 0.5 * random(1, 2, 8192, 16, seed=2)))
    positions = jnp.array([[8000, 8191]])
    exact = attention(q.astype(jnp.float32), k, v, positions)
    got = attention(q, k, v, positions)
    assert got.dtype == jnp.float16
    np.testing.assert_allclose(got.astype(jnp.float32), exact, rtol=2e-3)


def test_attention_in_blocks() -> None:
    q, k, v = random(2, 16, 4, 16), slots(random(2, 2, 512, 16, seed=1)), slots(random(2, 2, 512, 16, seed=2))
    positions = jnp.array([[100], [290]]) + jnp.arange(16)
    expected = attention(q, widened(k), widened(v), positions)
    np.testing.assert_allclose(blocked_attention.attention(q, k, v, positions), expected, atol=2e-6)
