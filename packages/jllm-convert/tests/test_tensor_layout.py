"""Layouts, against loops that say which element goes where."""

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jllm_convert.families.tensor_layout import Flat, Identity, Layout, Linear, RotaryPairs

SIZES = st.integers(1, 4)


def numbered(*shape: int) -> np.ndarray:
    return np.arange(prod(shape), dtype=np.float32).reshape(shape)


@given(d=SIZES, n=SIZES, h=SIZES)
def test_q_k_and_v_are_split_into_heads(d: int, n: int, h: int) -> None:
    stored = numbered(n * h, d)
    expected = np.empty((d, n, h), np.float32)
    for i, j, k in np.ndindex(d, n, h):
        expected[i, j, k] = stored[j * h + k, i]
    assert Linear().source_shape((d, n, h)) == (n * h, d)
    np.testing.assert_array_equal(Linear().to_jax(stored, (d, n, h)), expected)


@given(n=SIZES, h=SIZES, d=SIZES)
def test_o_takes_its_heads_as_inputs(n: int, h: int, d: int) -> None:
    stored = numbered(d, n * h)
    expected = np.empty((n, h, d), np.float32)
    for j, k, i in np.ndindex(n, h, d):
        expected[j, k, i] = stored[i, j * h + k]
    assert Linear(inputs=2).source_shape((n, h, d)) == (d, n * h)
    np.testing.assert_array_equal(Linear(inputs=2).to_jax(stored, (n, h, d)), expected)


def test_a_matrix_is_transposed() -> None:
    stored = numbered(3, 5)
    assert Linear().source_shape((5, 3)) == (3, 5)
    np.testing.assert_array_equal(Linear().to_jax(stored, (5, 3)), stored.T)


def test_a_bias_is_split_into_heads() -> None:
    assert Flat().source_shape((3, 4)) == (12,)
    np.testing.assert_array_equal(Flat().to_jax(numbered(12), (3, 4)), numbered(3, 4))


def test_embeddings_and_norms_stay_as_they_are() -> None:
    stored = numbered(5, 3)
    assert Identity().source_shape((5, 3)) == (5, 3)
    assert Identity().to_jax(stored, (5, 3)) is stored


@given(d=SIZES, heads=SIZES, pairs=SIZES)
def test_rotary_pairs_of_a_matrix_become_halves(d: int, heads: int, pairs: int) -> None:
    h = 2 * pairs
    stored = numbered(heads * h, d)
    expected = np.empty((d, heads, h), np.float32)
    for i, head, pair in np.ndindex(d, heads, pairs):
        expected[i, head, pair] = stored[head * h + 2 * pair, i]
        expected[i, head, pair + pairs] = stored[head * h + 2 * pair + 1, i]
    layout = RotaryPairs(Linear())
    assert layout.source_shape((d, heads, h)) == (heads * h, d)
    np.testing.assert_array_equal(layout.to_jax(stored, (d, heads, h)), expected)


@given(heads=SIZES, pairs=SIZES)
def test_rotary_pairs_of_a_bias_become_halves(heads: int, pairs: int) -> None:
    h = 2 * pairs
    stored = numbered(heads * h)
    expected = np.empty((heads, h), np.float32)
    for head, pair in np.ndindex(heads, pairs):
        expected[head, pair] = stored[head * h + 2 * pair]
        expected[head, pair + pairs] = stored[head * h + 2 * pair + 1]
    np.testing.assert_array_equal(RotaryPairs(Flat()).to_jax(stored, (heads, h)), expected)


@pytest.mark.parametrize("heads", [4, 2])
def test_rotary_pairs_undo_the_permutation_of_llama_cpp(heads: int) -> None:
    h, d = 6, 5
    rows = numbered(heads * h, d)
    permuted = rows.reshape(heads, 2, h // 2, d).swapaxes(1, 2).reshape(rows.shape)
    assert not np.array_equal(permuted, rows)
    undone = RotaryPairs(Linear()).to_jax(permuted, (d, heads, h))
    np.testing.assert_array_equal(undone, Linear().to_jax(rows, (d, heads, h)))


@pytest.mark.parametrize("layout", [Linear(), Linear(inputs=2), RotaryPairs(Linear())])
def test_the_element_type_is_kept(layout: Layout) -> None:
    shape = (2, 3, 4)
    stored = np.zeros(layout.source_shape(shape), np.float16)
    assert layout.to_jax(stored, shape).dtype == np.float16
