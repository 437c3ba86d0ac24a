"""Layouts, against loops that say which element goes where."""

from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jllm_convert.families.tensor_layout import (
    Depthwise,
    Flat,
    Identity,
    Layout,
    Linear,
    RotaryPairs,
    Row,
    Stacked,
    contiguous,
    copy_into,
)
from jllm_convert.families.tensor_parts import Entry, OneAdded, Slot, Window
from jllm_convert.matching.rules import Part
from jllm_convert.sources.base import SourceTensor
from jllm_core.checkpoint import Box, box_shape, whole

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


# ---- Copies by tiles, and reading in pieces


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, ml_dtypes.bfloat16, np.float32, np.float64], ids=str)
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((300, 600), (1, 0)),
        ((1, 700), (1, 0)),
        ((130, 3, 140), (2, 0, 1)),
        ((130, 3, 140), (1, 2, 0)),
        ((3, 130, 140), (0, 2, 1)),
        ((5, 4, 3, 2), (3, 1, 2, 0)),
        ((0, 4), (1, 0)),
        ((7,), (0,)),
    ],
)
def test_a_transposed_view_is_copied_number_by_number(
    shape: tuple[int, ...], axes: tuple[int, ...], dtype: type
) -> None:
    values = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
    view = values.transpose(axes)
    np.testing.assert_array_equal(contiguous(view), view)
    assert contiguous(view).flags.c_contiguous
    assert contiguous(values) is values
    around = np.full([size + 2 for size in view.shape], 77, dtype)
    copy_into(around[tuple(slice(1, -1) for _ in axes)], view)  # a box of a larger array, and nothing beside it
    expected = np.full_like(around, 77)
    expected[tuple(slice(1, -1) for _ in axes)] = view
    np.testing.assert_array_equal(around, expected)


@pytest.mark.parametrize("nbytes", [0, 96, 400, 1 << 20])
@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (Identity(), (12, 8)),
        (Flat(), (6, 4)),
        (Linear(), (8, 12)),
        (Linear(), (8, 3, 4)),
        (Linear(inputs=2), (3, 4, 8)),
        (RotaryPairs(Linear()), (8, 3, 4)),
        (Stacked(), (3, 8, 6)),
        (Row(), (24,)),
        (Depthwise(), (4, 3, 8)),
        (Depthwise(middle=0), (4, 3, 8)),
        (Window(Linear(), 5, 40), (8, 3, 4)),
        (Window(Linear(inputs=2), 5, 40, axis=1), (3, 4, 8)),
        (Entry(Linear()), (1, 8, 12)),
        (OneAdded(Identity()), (24,)),
    ],
    ids=repr,
)
def test_an_array_is_read_in_pieces_that_lie_side_by_side(layout: Layout, shape: tuple[int, ...], nbytes: int) -> None:
    stored = numbered(*layout.source_shape(shape))
    runs = []

    def read(box: Box) -> np.ndarray:
        runs.append(int(stored[box].size))
        return stored[box].copy()

    tensor = SourceTensor("w", stored.shape, stored.dtype, Path("w"), read)
    expected = layout.to_jax(stored[layout.source_box(whole(shape), shape)], shape)
    array, seen = np.zeros(shape, np.float32), np.zeros(shape, int)
    for piece, values in Part(tensor, Slot(whole(shape), layout)).pieces(whole(shape), nbytes):
        assert values.shape == box_shape(piece)
        copy_into(array[piece], values)
        seen[piece] += 1
    np.testing.assert_array_equal(array, expected)
    assert (seen == 1).all()
    assert max(runs) <= max(nbytes // 4, shape[-1])  # a head is not cut
