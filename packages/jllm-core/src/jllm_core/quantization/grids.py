"""Weight quantisation in numpy (round to nearest), and dequantisation: what a converter does once for each matrix.

A *grid* is the set of numbers that quantised values stand for: ``value * scale``, or ``value * scale + offset``. The
work goes block by block, each small enough to stay in a core's cache with all that is computed from it.
"""

import math
from collections.abc import Iterator

import numpy as np

from jllm_core.quantization.arrays import Quantization, QuantizationError, QuantizedArray, group_count, split_groups

# Where the grid of a group of 4-bit values may end, as a share of its farthest number. To clip an outlier can make the
# steps finer for all others. For each group the share with the smallest squared error is taken.
_CLIP_SHARES = np.linspace(0.5, 1.0, 9).astype(np.float32)
# A symmetric grid has 8 steps on one side of zero and 7 on the other. With this share the farthest number is 7 steps
# away from zero, so a matrix that lies on such a grid already is not changed.
_SEVEN_STEPS_SHARE = np.float32(8 / 7)
# Numbers of a block: 1 MiB in float32, and as much again for what is computed from them.
_BLOCK_SIZE = 1 << 18


def quantize(
    matrix: np.ndarray, quantization: Quantization, inputs: int = 1, batch: int = 0, scales: np.ndarray | None = None
) -> QuantizedArray:
    """Quantise a matrix: each number becomes the nearest one on its grid. The result's parts are numpy arrays.

    8 bits: the largest magnitude of a channel (or group) is 127 steps. 4 bits: the grid spans the numbers of a group,
    or ends a little inside where that has the smaller squared error. Numbers that come from such a grid (GGUF's Q8_0
    and Q4_0, and with offsets Q4_1, in groups of 32) find it again, and are not rounded a second time.

    Args:
        matrix: float, ``batch`` axes, then ``inputs`` axes, then the outputs.
        quantization: bits, group and offsets.
        inputs: number of axes that are inputs.
        batch: number of axes before them that are neither inputs nor outputs (experts).
        scales: for 8 bits without groups, float32 in the matrix's shape with all input axes of size 1. The matrix may
            then be some inputs of a larger one, whose scales are the largest of the ``channel_maxima`` of all its
            pieces divided by ``np.float32(127)``. None computes the scales from the matrix itself.

    Raises:
        QuantizationError: numbers that are not finite or too large for a float16 scale, a group that does not divide
            the inputs, or scales that do not fit.
    """
    axis = batch + inputs - 1
    if quantization.group is not None:
        if scales is not None:
            raise QuantizationError(f"scales are given for whole channels of 8 bits, not for {quantization.name}")
        return _quantize_groups(matrix, quantization, quantization.group, axis)
    if scales is None:
        scales = channel_maxima(matrix, inputs, batch) / np.float32(127)
    else:
        expected = _channel_shape(matrix, inputs, batch)
        if scales.shape != expected or scales.dtype != np.float32:
            raise QuantizationError(
                f"a matrix {list(matrix.shape)} with {inputs} axes of inputs has scales float32{list(expected)}, "
                f"got {scales.dtype.name}{list(scales.shape)}"
            )
        _check_finite(matrix)
    rows = _rows(matrix, inputs, batch)
    values, by_row = np.empty(rows.shape, np.int8), scales.reshape(len(rows), 1, -1)
    for block, numbers in _blocks(rows):
        values[block] = _steps(numbers, by_row[block[0], :, block[2]], None, -127, 127)
    return QuantizedArray(values.reshape(matrix.shape), scales, axis=axis, bits=8)


def channel_maxima(matrix: np.ndarray, inputs: int = 1, batch: int = 0) -> np.ndarray:
    """The largest magnitude of each channel: float32, in the matrix's shape with all input axes of size 1.

    Args:
        matrix, inputs, batch: as ``quantize`` takes them.

    Raises:
        QuantizationError: numbers that are not finite.
    """
    rows = _rows(matrix, inputs, batch)
    maxima = np.zeros((len(rows), 1, rows.shape[2]), np.float32)
    for block, numbers in _blocks(rows):
        own = maxima[block[0], :, block[2]]
        np.maximum(own, _magnitude(numbers), out=own)
    _check_finite(maxima)
    return maxima.reshape(_channel_shape(matrix, inputs, batch))


def _quantize_groups(matrix: np.ndarray, quantization: Quantization, group: int, axis: int) -> QuantizedArray:
    """Quantise with a scale for each ``group`` numbers along ``axis``."""
    bits, outer, outputs = quantization.bits, matrix.shape[:axis], matrix.shape[axis + 1 :]
    groups = group_count(matrix.shape, axis, group)
    rows = matrix.reshape(math.prod(outer) * groups, group, math.prod(outputs))
    values = np.empty((len(rows), group * bits // 8, rows.shape[2]), np.int8 if bits == 8 else np.uint8)
    scales = np.empty((len(rows), 1, rows.shape[2]), np.float16)
    offsets = np.empty_like(scales) if quantization.offsets else None
    for block, numbers in _blocks(rows, whole_rows=True):
        if bits == 8:
            largest = _magnitude(numbers)  # of a group: [L, 1, R]
            _check_finite(largest)
            scales[block] = _float16(largest / np.float32(127))
            values[block] = _steps(numbers, scales[block], None, -127, 127)
            continue
        scales[block], lowest = _best_grid(numbers, quantization.offsets)
        halves = _steps(numbers, scales[block], lowest, 0, 15).astype(np.uint8)
        values[block] = pack(halves, 0).reshape(len(halves), group // 2, -1)
        if offsets is not None:
            offsets[block] = lowest
    return QuantizedArray(
        values.reshape(*outer, -1, *outputs),
        scales.reshape(*outer, groups, *outputs),
        None if offsets is None else offsets.reshape(*outer, groups, *outputs),
        axis=axis,
        bits=bits,
    )


def restore(array: QuantizedArray) -> np.ndarray:
    """Dequantise an array of numpy parts to float32: ``quantization.arrays.dequantize`` without JAX."""
    axis, groups = array.axis, array.scales.shape[array.axis]
    numbers = np.empty(array.shape, np.float32)
    values, split = split_groups(array.values, axis, groups), split_groups(numbers, axis, groups)
    if array.bits == 4:
        lowest = np.int8(8 if array.offsets is None else 0)
        low, high = np.split(split, 2, axis=axis + 1)
        low[...] = (values & 0xF).view(np.int8) - lowest
        high[...] = (values >> 4).view(np.int8) - lowest
    else:
        split[...] = values
    split *= np.expand_dims(array.scales.astype(np.float32), axis + 1)
    if array.offsets is not None:
        split += np.expand_dims(array.offsets.astype(np.float32), axis + 1)
    return numbers


def pack(halves: np.ndarray, axis: int) -> np.ndarray:
    """Pack values 0 to 15, in groups ``[..., groups, g, ...]`` at ``axis``, into bytes ``[..., groups * g/2, ...]``.

    A byte holds value n of a group in its low half and value ``n + g/2`` in its high half, so that both halves of a
    row of bytes are whole rows of weights.
    """
    low, high = np.split(halves, 2, axis=axis + 1)
    packed: np.ndarray = low | (high << 4)
    return packed.reshape(*packed.shape[:axis], -1, *packed.shape[axis + 2 :])


def _rows(matrix: np.ndarray, inputs: int, batch: int) -> np.ndarray:
    """The matrix reshaped to ``[batch, inputs, outputs]``."""
    outputs = math.prod(matrix.shape[batch + inputs :])
    return matrix.reshape(math.prod(matrix.shape[:batch]), -1, outputs)


def _channel_shape(matrix: np.ndarray, inputs: int, batch: int) -> tuple[int, ...]:
    """The shape of a matrix's channel scales: its own, with all input axes of size 1."""
    return (*matrix.shape[:batch], *[1] * inputs, *matrix.shape[batch + inputs :])


def _blocks(rows: np.ndarray, whole_rows: bool = False) -> Iterator[tuple[tuple[slice, slice, slice], np.ndarray]]:
    """Blocks of an array ``[L, M, R]``: the place of each and its numbers in float32.

    Args:
        rows: the array.
        whole_rows: whether M stays whole, because a group must not be cut.
    """
    length, middle, width = rows.shape
    # No block has a single column where the array has more: numpy sums a single one in another order, and the errors
    # that _best_grid compares would depend on the cut.
    parts = min(-(-width * (middle if whole_rows else 1) // _BLOCK_SIZE), max(width // 2, 1))
    columns = [slice(width * part // parts, width * (part + 1) // parts) for part in range(parts)]
    height = middle if whole_rows else min(max(_BLOCK_SIZE * parts // width, 1), middle)
    depth = max(_BLOCK_SIZE * parts // (width * height), 1)
    for first in range(0, length, depth):
        for top in range(0, middle, height):
            for column in columns:
                place = slice(first, first + depth), slice(top, top + height), column
                yield place, rows[place].astype(np.float32, order="C", copy=False)


def _magnitude(numbers: np.ndarray) -> np.ndarray:
    """The largest magnitude along axis 1: ``[L, M, R]`` to ``[L, 1, R]``."""
    largest: np.ndarray = np.max(np.abs(numbers), axis=1, keepdims=True)
    return largest


def _check_finite(numbers: np.ndarray) -> None:
    if not np.isfinite(numbers).all():
        raise QuantizationError("the matrix holds numbers that are not finite")


def _steps(
    numbers: np.ndarray,
    scales: np.ndarray,
    offsets: np.ndarray | None,
    lowest: int,
    highest: int,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """``(numbers - offsets) / scales``, rounded to the nearest integer and clipped; 0 where the scale is 0."""
    scales = scales.astype(np.float32)
    divisors = np.where(scales == 0, np.float32(np.inf), scales)
    steps = numbers if offsets is None else np.subtract(numbers, offsets, out=out)
    with np.errstate(over="ignore"):  # division by a subnormal scale may overflow; the result is clipped anyway
        steps = np.divide(steps, divisors, out=out)
    np.rint(steps, out=steps)
    clipped: np.ndarray = np.clip(steps, lowest, highest, out=steps)
    return clipped


def _best_grid(numbers: np.ndarray, with_offsets: bool) -> tuple[np.ndarray, np.ndarray]:
    """The scales and offsets with the smallest squared error, ``[L, 1, R]``, for groups ``[L, g, R]``.

    Scales are float16. Offsets are float32 whose values float16 can hold; those of a symmetric grid are -8 scales.
    """
    low, high = np.min(numbers, axis=1, keepdims=True), np.max(numbers, axis=1, keepdims=True)
    _check_finite(low)
    _check_finite(high)
    # With its sign: the farthest number goes to the side of the grid that has 8 steps, by a negative scale if need be.
    farthest = np.where(high > -low, high, low)
    best = np.zeros_like(low, np.float16), np.zeros_like(low)
    smallest, work = np.full(low.shape, np.inf, np.float32), np.empty_like(numbers)
    for share in _CLIP_SHARES if with_offsets else np.append(_CLIP_SHARES, _SEVEN_STEPS_SHARE):
        if with_offsets:
            scales = _float16(share * (high - low) / np.float32(15))
            offsets = _float16((high + low - share * (high - low)) / 2).astype(np.float32)
        else:
            scales = _float16(share * farthest / np.float32(-8))
            offsets = -8 * scales.astype(np.float32)
        # work becomes the steps, then the numbers that they stand for, then the error: in place, to stay in the cache.
        _steps(numbers, scales, offsets, 0, 15, out=work)
        work *= scales.astype(np.float32)
        work += offsets
        work -= numbers
        error = np.sum(np.square(work, out=work), axis=1, keepdims=True)
        better = error < smallest
        best = np.where(better, scales, best[0]), np.where(better, offsets, best[1])
        smallest = np.where(better, error, smallest)
    return best


def _float16(numbers: np.ndarray) -> np.ndarray:
    """The numbers as float16; an error where one is too large, which would become infinite."""
    if np.max(np.abs(numbers), initial=0) > np.finfo(np.float16).max:
        raise QuantizationError(f"the matrix needs a scale of {np.abs(numbers).max():.3g}, float16 ends at 65504")
    return numbers.astype(np.float16)
