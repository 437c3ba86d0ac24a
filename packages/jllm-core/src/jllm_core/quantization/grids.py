"""From numbers to the nearest quantised array and back, in numpy: what a converter does once for each weight matrix.

The work goes block by block, each small enough to stay in a core's cache with all that is computed of it.
"""

import math
from collections.abc import Iterator

import numpy as np

from jllm_core.quantization.arrays import Quantization, QuantizationError, QuantizedArray, group_count, split_groups

# Where the grid of a group of 4-bit values may end, as a share of its farthest number: to cut off an outlier can make
# all others finer. The best of these, by squared error, is taken for each group.
_SHARES = np.linspace(0.5, 1.0, 9).astype(np.float32)
# A symmetric grid has 8 steps on one side and 7 on the other. With this share the farthest number is 7 steps off, so
# that matrices which lie on such a grid stay as they are.
_SEVEN_STEPS = np.float32(8 / 7)
# Numbers of a block: 1 MiB in float32, and as much again for what is computed of them.
_BLOCK = 1 << 18


def quantize(
    matrix: np.ndarray, quantization: Quantization, inputs: int = 1, batch: int = 0, scales: np.ndarray | None = None
) -> QuantizedArray:
    """The nearest matrix on the grid, with numpy arrays as its parts.

    8 bits: the largest magnitude of a channel (or group) is 127 steps. 4 bits: the grid spans the numbers of a group,
    or ends a little inside where that has the smaller squared error. Numbers that come from such a grid (GGUF's Q8_0
    and Q4_0, and with offsets Q4_1, in groups of 32) find it again, and are not rounded a second time.

    Args:
        matrix: float, ``batch`` axes, then ``inputs`` axes, then the outputs.
        quantization: bits, group and offsets.
        inputs: how many axes are inputs.
        batch: how many axes before them are neither inputs nor outputs.
        scales: for 8 bits without groups, float32 in the matrix's shape with all input axes of size 1. The matrix may
            then be some inputs of a larger one: its scales are the largest of the ``channel_maxima`` of all its pieces,
            by ``np.float32(127)``. None takes those of the matrix itself.

    Raises:
        QuantizationError: numbers that are not finite or too large for a float16 scale, a group that does not divide
            the inputs, or scales that do not fit.
    """
    axis = batch + inputs - 1
    if quantization.group is not None:
        if scales is not None:
            raise QuantizationError(f"scales are given for whole channels of 8 bits, not for {quantization.name}")
        return _by_groups(matrix, quantization, quantization.group, axis)
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


def _by_groups(matrix: np.ndarray, quantization: Quantization, group: int, axis: int) -> QuantizedArray:
    bits, outer, outputs = quantization.bits, matrix.shape[:axis], matrix.shape[axis + 1 :]
    groups = group_count(matrix.shape, axis, group)
    rows = matrix.reshape(math.prod(outer) * groups, group, math.prod(outputs))
    values = np.empty((len(rows), group * bits // 8, rows.shape[2]), np.int8 if bits == 8 else np.uint8)
    scales = np.empty((len(rows), 1, rows.shape[2]), np.float16)
    offsets = np.empty_like(scales) if quantization.offsets else None
    for block, numbers in _blocks(rows, whole_rows=True):
        if bits == 8:
            largest = _magnitude(numbers)
            _check_finite(largest)
            scales[block] = _float16(largest / np.float32(127))
            values[block] = _steps(numbers, scales[block], None, -127, 127)
            continue
        scales[block], moved = _best_grid(numbers, quantization.offsets)
        halves = _steps(numbers, scales[block], moved, 0, 15).astype(np.uint8)
        values[block] = pack(halves, 0).reshape(len(halves), group // 2, -1)
        if offsets is not None:
            offsets[block] = moved
    return QuantizedArray(
        values.reshape(*outer, -1, *outputs),
        scales.reshape(*outer, groups, *outputs),
        None if offsets is None else offsets.reshape(*outer, groups, *outputs),
        axis=axis,
        bits=bits,
    )


def restore(array: QuantizedArray) -> np.ndarray:
    """The numbers, in float32, that a quantised array of numpy parts stands for: ``dequantize`` without JAX."""
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
    """Values 0 to 15 in groups, ``[..., groups, g, ...]`` at ``axis``, as bytes ``[..., groups * g/2, ...]``."""
    low, high = np.split(halves, 2, axis=axis + 1)
    packed: np.ndarray = low | (high << 4)
    return packed.reshape(*packed.shape[:axis], -1, *packed.shape[axis + 2 :])


def _rows(matrix: np.ndarray, inputs: int, batch: int) -> np.ndarray:
    """The matrix as ``[batch, inputs, outputs]``."""
    outputs = math.prod(matrix.shape[batch + inputs :])
    return matrix.reshape(math.prod(matrix.shape[:batch]), -1, outputs)


def _channel_shape(matrix: np.ndarray, inputs: int, batch: int) -> tuple[int, ...]:
    return (*matrix.shape[:batch], *[1] * inputs, *matrix.shape[batch + inputs :])


def _blocks(rows: np.ndarray, whole_rows: bool = False) -> Iterator[tuple[tuple[slice, slice, slice], np.ndarray]]:
    """An array ``[L, M, R]`` in blocks, each as its place and its numbers in float32; M may have to stay whole.

    No block has a single column where the array has more: numpy adds a single one in another order.
    """
    length, middle, width = rows.shape
    parts = min(-(-width * (middle if whole_rows else 1) // _BLOCK), max(width // 2, 1))
    columns = [slice(width * part // parts, width * (part + 1) // parts) for part in range(parts)]
    height = middle if whole_rows else min(max(_BLOCK * parts // width, 1), middle)
    depth = max(_BLOCK * parts // (width * height), 1)
    for first in range(0, length, depth):
        for top in range(0, middle, height):
            for some in columns:
                place = slice(first, first + depth), slice(top, top + height), some
                yield place, rows[place].astype(np.float32, order="C", copy=False)


def _magnitude(numbers: np.ndarray) -> np.ndarray:
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
    """``(numbers - offsets) / scales`` to the nearest whole number; 0 where the scale is."""
    scales = scales.astype(np.float32)
    divisors = np.where(scales == 0, np.float32(np.inf), scales)
    steps = numbers if offsets is None else np.subtract(numbers, offsets, out=out)
    with np.errstate(over="ignore"):  # over a scale of denormal size; it is clipped all the same
        steps = np.divide(steps, divisors, out=out)
    np.rint(steps, out=steps)
    clipped: np.ndarray = np.clip(steps, lowest, highest, out=steps)
    return clipped


def _best_grid(numbers: np.ndarray, with_offsets: bool) -> tuple[np.ndarray, np.ndarray]:
    """For groups ``[L, g, R]`` the scales and the offsets of smallest squared error, ``[L, 1, R]``.

    Both hold what float16 can, the offsets in float32; those of a symmetric grid are 8 steps below zero.
    """
    low, high = np.min(numbers, axis=1, keepdims=True), np.max(numbers, axis=1, keepdims=True)
    _check_finite(low)
    _check_finite(high)
    farthest = np.where(high > -low, high, low)
    best = np.zeros_like(low, np.float16), np.zeros_like(low)
    smallest, work = np.full(low.shape, np.inf, np.float32), np.empty_like(numbers)
    for share in _SHARES if with_offsets else np.append(_SHARES, _SEVEN_STEPS):
        if with_offsets:
            scales = _float16(share * (high - low) / np.float32(15))
            offsets = _float16((high + low - share * (high - low)) / 2).astype(np.float32)
        else:
            scales = _float16(share * farthest / np.float32(-8))
            offsets = -8 * scales.astype(np.float32)
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
    if np.max(np.abs(numbers), initial=0) > np.finfo(np.float16).max:
        raise QuantizationError(f"the matrix needs a scale of {np.abs(numbers).max():.3g}, float16 ends at 65504")
    return numbers.astype(np.float16)
