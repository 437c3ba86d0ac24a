"""The thresholds of top-k and top-p and the draw, by XLA and by the CPU kernels, beside a sort and JAX's own."""

from functools import partial
from typing import Any

import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jllm_core.backends.base import XLA, Backend
from jllm_core.backends.cpu import ffi
from jllm_core.backends.cpu.backend import CPUKernels
from jllm_core.ops.sampling import argmax, draw, gumbel_noise, thresholds


@partial(jax.jit, static_argnames="backend")
def find(logits: Any, k: Any, p: Any, backend: Backend) -> jax.Array:
    return (backend.thresholds or thresholds)(logits, k, p)


@partial(jax.jit, static_argnames="backend")
def largest(x: Any, backend: Backend) -> jax.Array:
    return (backend.argmax or argmax)(x)


@partial(jax.jit, static_argnames="backend")
def drawn(logits: Any, keys: Any, backend: Backend) -> jax.Array:
    return (backend.draw or draw)(logits, keys)


@pytest.fixture(scope="module", params=["xla", "kernel"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """XLA's operations, and the kernels."""
    if request.param == "kernel" and not ffi.available():
        pytest.skip("the kernels' compiler is not installed")
    return CPUKernels() if request.param == "kernel" else XLA()


def kept(logits: np.ndarray, k: list[int], p: list[float], backend: Backend) -> np.ndarray:
    found = find(logits, np.array(k, np.int32), np.array(p, np.float32), backend)
    return logits >= np.asarray(found)[:, None]


def reference(logits: np.ndarray, k: int, p: float) -> np.ndarray:
    """What a sort in float64 keeps."""
    wide = logits.astype(np.float64)
    left = wide >= np.sort(wide)[-k] if 0 < k < wide.size else np.ones(wide.size, bool)
    if p == 1:
        return left
    weights = np.where(left, np.exp(wide - wide.max()), 0)
    falling = np.argsort(-wide, kind="stable")
    enough = np.flatnonzero(np.cumsum(weights[falling]) >= np.float32(p) * weights.sum())
    return left & (wide >= wide[falling[enough[0]]]) if len(enough) else left


def near_the_edge(logits: np.ndarray, k: int, p: float) -> bool:
    """Whether the rounding of the sums to float32 may decide."""
    wide = np.sort(np.where(reference(logits, k, 1), logits.astype(np.float64), -np.inf))[::-1]
    shares = np.cumsum(np.exp(wide - wide[0])) / np.exp(wide - wide[0]).sum()
    return p < 1 and bool(np.abs(shares - p).min() < 1e-5)


@given(data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_what_is_kept_is_what_a_sort_keeps(data: st.DataObject, backend: Backend) -> None:
    # Quarters, so that numbers tie; lengths around whole vectors.
    width = data.draw(st.sampled_from([1, 3, 16, 37, 64, 150]))
    most = data.draw(st.sampled_from([2, 8, 400]))
    quarters = data.draw(arrays.arrays(np.int64, (2, width), elements=st.integers(-most, most), fill=st.nothing()))
    logits = quarters.astype(np.float32) / 4
    k = data.draw(st.lists(st.integers(0, width + 1), min_size=2, max_size=2))
    p = data.draw(st.lists(st.one_of(st.just(1.0), st.floats(0.001, 1)), min_size=2, max_size=2))
    for row in range(2):
        assume(not near_the_edge(logits[row], k[row], p[row]))
    expected = [reference(*row) for row in zip(logits, k, p, strict=True)]
    np.testing.assert_array_equal(kept(logits, k, p, backend), expected)


@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0, 1e4])
def test_a_large_vocabulary(spread: float, backend: Backend) -> None:
    logits = np.random.default_rng(0).normal(0, spread, (3, 151_936)).astype(np.float32)
    k, p = [50, 0, 4000], [1.0, 0.9, 0.5]
    for row, found in enumerate(kept(logits, k, p, backend)):
        expected = reference(logits[row], k[row], p[row])
        # The sum of that many float32 may pass p a few tokens earlier or later.
        assert abs(int(found.sum()) - int(expected.sum())) <= (0 if p[row] == 1 else max(5, expected.sum() // 10_000))


def test_tokens_that_may_not_come(backend: Backend) -> None:
    """Of minus infinity, as a grammar leaves them."""
    logits = np.full((4, 40), -np.inf, np.float32)
    logits[:, [3, 17, 30]] = [2.0, 1.0, 0.0]
    found = kept(logits, [2, 0, 5, 1], [1.0, 0.6, 1.0, 0.9], backend)
    assert [np.flatnonzero(row).tolist() for row in found[[0, 1, 3]]] == [[3, 17], [3], [3]]
    assert found[2, [3, 17, 30]].all()  # fewer than k: the others may be kept, too


def test_the_narrowest_and_the_widest(backend: Backend) -> None:
    logits = np.random.default_rng(0).normal(0, 3, (1, 100)).astype(np.float32)
    for k, p, count in ((1, 1.0, 1), (0, 1e-30, 1), (100, 1.0, 100), (2**31 - 1, 1.0, 100), (0, 1.0, 100)):
        assert kept(logits, [k], [p], backend).sum() == count


def test_large_and_tiny_numbers(backend: Backend) -> None:
    logits = np.array([[3e38, 1e38, -3e38, 0.0, 1e-40, -1e-40, 2e-40]], np.float32)
    assert np.flatnonzero(kept(logits, [2], [1.0], backend)[0]).tolist() == [0, 1]
    assert np.flatnonzero(kept(logits, [3], [1.0], backend)[0]).tolist()[:2] == [0, 1]


def test_a_row_is_filtered_as_it_would_be_alone(backend: Backend) -> None:
    logits = np.random.default_rng(1).normal(0, 2, (5, 3000)).astype(np.float32)
    k, p = [0, 7, 0, 900, 0], [0.9, 1.0, 0.3, 0.95, 1.0]
    together = kept(logits, k, p, backend)
    for row in range(5):
        alone = kept(logits[row : row + 1], k[row : row + 1], p[row : row + 1], backend)
        np.testing.assert_array_equal(alone[0], together[row])


def test_who_searches(backend: Backend) -> None:
    if backend.thresholds is None:
        return
    text = str(jax.make_jaxpr(lambda x: find(x, jnp.array([3]), jnp.array([0.5]), backend))(jnp.zeros((1, 9))))
    assert "jllm_threshold" in text


# ---- The draw


def keys(count: int, seed: int = 7) -> jax.Array:
    return jax.random.split(jax.random.key(seed, impl="threefry2x32"), count)


def test_the_noise_is_that_of_jax() -> None:
    with jax.threefry_partitionable(True):
        expected = jax.vmap(lambda key: jax.random.gumbel(key, (1001,)))(keys(3))
    np.testing.assert_allclose(jax.jit(gumbel_noise, static_argnums=1)(keys(3), 1001), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("width", [1, 5, 16, 33, 5000, 8193])
def test_the_draw_is_the_argmax_of_logits_and_noise(width: int, backend: Backend) -> None:
    rows = 40
    logits = np.random.default_rng(width).normal(0, 2, (rows, width)).astype(np.float32)
    logits[:, 1::3] = -np.inf
    logits[1::2, width // 2 :] = -np.inf  # whole vectors without a token
    logits[:, 0] = np.maximum(logits[:, 0], -3)
    noise = np.asarray(gumbel_noise(keys(rows), width))
    found = drawn(logits, keys(rows), backend)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, np.argmax(logits + noise, axis=-1))


def test_every_place_has_noise_of_its_own(backend: Backend) -> None:
    """As often as their probabilities say: even ones here."""
    found = drawn(np.zeros((20_000, 20), np.float32), keys(20_000), backend)
    counts = np.bincount(found, minlength=20)
    assert np.abs(counts - 1000).max() < 5 * 31


@given(data=st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_the_argmax(data: st.DataObject, backend: Backend) -> None:
    """Of numbers that tie, of lengths around whole vectors and pieces."""
    width = data.draw(st.sampled_from([1, 5, 16, 37, 8191, 8192, 8193, 8209, 20_000]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    x = rng.integers(-3, data.draw(st.sampled_from([-2, 1, 100_000])), (3, width)).astype(np.float32)
    x[0] = -np.inf
    x[1, rng.random(width) < 0.5] = -np.inf
    found = largest(x, backend)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, np.argmax(x, axis=-1))
