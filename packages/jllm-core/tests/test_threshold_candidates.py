"""Thresholds by candidates and by four bits a pass: those of the search bit by bit, to the bit."""

from functools import partial
from typing import Any, NamedTuple

import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, Mesh
from jllm_core.backends import threshold_candidates
from jllm_core.backends.base import XLA
from jllm_core.ops.sampling import thresholds
from jllm_core.sharding import Placement

ONE = Placement(Mesh(np.array(jax.devices()[:1]), ("tensor",)))
REFERENCE = jax.jit(thresholds)
WAYS = {
    "candidates": jax.jit(partial(threshold_candidates.thresholds, ONE)),
    "search": jax.jit(partial(threshold_candidates.searched_thresholds, ONE)),
}
WIDTHS = [5, 64, 65, 300]  # each is compiled: fewer than candidates, as many, more


@st.composite
def rows(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of three rows: spread out, in quarters that tie, or all equal; some minus infinity."""
    width = draw(st.sampled_from(WIDTHS))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = random.normal(0, draw(st.sampled_from([0.0, 0.1, 1.0, 5.0, 1e3])), (3, width)).astype(np.float32)
    if draw(st.booleans()):
        logits = np.round(logits * 4) / 4
    if draw(st.booleans()):
        logits[random.random((3, width)) < draw(st.sampled_from([0.2, 0.99]))] = -np.inf
        logits[:, draw(st.integers(0, width - 1))] = 1.0
    k = draw(arrays.arrays(np.int32, 3, elements=st.one_of(st.integers(0, 70), st.sampled_from([999, 2**31 - 1]))))
    chances = st.one_of(st.just(1.0), st.floats(0.001, 1), st.sampled_from([1e-30, 0.5, 0.95, 0.99999994]))
    return logits, k, np.array(draw(st.lists(chances, min_size=3, max_size=3)), np.float32)


@pytest.mark.parametrize("way", WAYS)
@given(case=rows())
@settings(max_examples=120, deadline=None, derandomize=True)
def test_it_is_the_threshold_of_the_search_bit_by_bit(case: tuple[np.ndarray, ...], way: str) -> None:
    np.testing.assert_array_equal(WAYS[way](*case), REFERENCE(*case))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0, 30.0])
def test_a_large_vocabulary(way: str, spread: float) -> None:
    logits = np.random.default_rng(0).normal(0, spread, (4, 151_936)).astype(np.float32)
    k, p = np.array([20, 0, 64, 4000], np.int32), np.array([0.95, 0.5, 1.0, 0.9], np.float32)
    np.testing.assert_array_equal(WAYS[way](logits, k, p), REFERENCE(logits, k, p))


def decided(logits: Any, k: int, p: float) -> bool:
    """Whether candidates decide: the search then gives nonsense, and is not asked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threshold_candidates, "searched_thresholds", lambda _, logits, *rest: jnp.full(len(logits), 7e7))
        found = threshold_candidates.thresholds(ONE, jnp.asarray(logits)[None], jnp.array([k]), jnp.array([p]))
    return float(found[0]) != 7e7


def test_candidates_decide_what_they_can() -> None:
    # A token every half, each e**-0.5 times as probable as the one before.
    steep = -np.arange(300, dtype=np.float32) / 2
    flat = np.zeros(300, np.float32)
    few = np.where(np.arange(300) < 5, steep, -np.inf)
    assert decided(steep, 20, 0.95)
    assert decided(steep, 0, 0.95)
    assert decided(steep, 64, 1.0)
    assert decided(few, 20, 0.9)  # a grammar leaves fewer than k
    assert decided(flat, 20, 1.0)  # all tie, at the threshold
    assert decided(flat, 0, 0.105)
    assert not decided(steep, 65, 1.0)
    assert not decided(flat, 20, 0.5)  # of tokens that tie there are more than candidates
    assert not decided(flat, 0, 0.9)  # more tokens than candidates reach p
    share = float(1 / np.exp(-np.arange(20) / 2).sum())
    assert not decided(steep, 20, share)  # the rounding of the sum says whether the first token is enough
    assert decided(steep, 20, share + 1e-3)


def on(kind: str | None, count: int = 1, **options: bool) -> Placement:
    device = None if kind is None else NamedTuple("Device", [("device_kind", str)])(kind)
    return Placement(AbstractMesh((count,), ("tensor",), abstract_device=device), **options)


def test_who_has_them() -> None:
    assert XLA().thresholds is None
    for placement in (on("cpu"), on(None), on("cpu", 8, kernels=False)):
        assert XLA(placement).thresholds is None
    for placement in (on("cpu", 8), on("TPU v2"), on("TPU v5 lite", 8), on("NVIDIA L4", 2)):
        assert XLA(placement).thresholds.func is threshold_candidates.thresholds
    assert XLA(on("NVIDIA L4")).thresholds.func is threshold_candidates.searched_thresholds
