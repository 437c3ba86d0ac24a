"""From numbers to the nearest quantised array, in numpy: what a converter does once for each weight matrix."""

import numpy as np

from jllm_core.quantized import Quantization, QuantizationError, QuantizedArray, group_count, split_groups

# Where the grid of a group of 4-bit values may end, as a share of its farthest number: to cut off an outlier can make
# all others finer. The best of these, by squared error, is taken for each group.
_SHARES = np.linspace(0.5, 1.0, 9).astype(np.float32)
# A symmetric grid has 8 steps on one side and 7 on the other. With this share the farthest number is 7 steps off, so
# that matrices which lie on such a grid stay as they are.
_SEVEN_STEPS = np.float32(8 / 7)


def channel_maxima(matrix: np.ndarray, inputs: int = 1, batch: int = 0) -> np.ndarray:
    """The largest magnitude of each channel, in float32 and in the shape of its scales."""
    if not np.isfinite(matrix).all():
        raise QuantizationError("the matrix holds numbers that are not finite")
    axes = tuple(range(batch, batch + inputs))
    maxima: np.ndarray = np.max(np.abs(matrix.astype(np.float32)), axis=axes, keepdims=True)
    return maxima


def quantize(
    matrix: np.ndarray,
    quantization: Quantization,
    inputs: int = 1,
    batch: int = 0,
    scales: np.ndarray | None = None,
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

    Raises:
        QuantizationError: numbers that are not finite or too large for a float16 scale, or a group that does not
            divide the inputs.
    """
    if not np.isfinite(matrix).all():
        raise QuantizationError("the matrix holds numbers that are not finite")
    axis = batch + inputs - 1
    numbers = matrix.astype(np.float32)
    if quantization.group is None:
        if scales is None:
            scales = channel_maxima(matrix, inputs, batch) / np.float32(127)
        return QuantizedArray(_steps(numbers, scales, -127, 127).astype(np.int8), scales, axis=axis, bits=8)
    split = split_groups(numbers, axis, group_count(matrix.shape, axis, quantization.group))
    along = axis + 1
    if quantization.bits == 8:
        scales = _float16(np.max(np.abs(split), axis=along, keepdims=True) / np.float32(127))
        values = _steps(split, scales, -127, 127).astype(np.int8).reshape(matrix.shape)
        return QuantizedArray(values, np.squeeze(scales, along), axis=axis, bits=8)
    scales, offsets = _best_grid(split, along, quantization.offsets)
    halves = _steps(split - offsets.astype(np.float32), scales, 0, 15).astype(np.uint8)
    stored = np.squeeze(offsets, along) if quantization.offsets else None
    return QuantizedArray(pack(halves, axis), np.squeeze(scales, along), stored, axis=axis, bits=4)


def pack(halves: np.ndarray, axis: int) -> np.ndarray:
    """Values 0 to 15 in groups, ``[..., groups, g, ...]`` at ``axis``, as bytes ``[..., groups * g/2, ...]``."""
    low, high = np.split(halves, 2, axis=axis + 1)
    packed: np.ndarray = low | (high << 4)
    return packed.reshape(*packed.shape[:axis], -1, *packed.shape[axis + 2 :])


def _steps(numbers: np.ndarray, scales: np.ndarray, lowest: int, highest: int) -> np.ndarray:
    """``numbers / scales`` to the nearest whole number; where the scale is 0, so is every number."""
    scales = scales.astype(np.float32)
    with np.errstate(over="ignore"):  # over a scale of denormal size; it is clipped all the same
        steps = np.divide(numbers, scales, out=np.zeros_like(numbers), where=scales != 0)
    rounded: np.ndarray = np.clip(np.rint(steps), lowest, highest)
    return rounded


def _best_grid(split: np.ndarray, axis: int, with_offsets: bool) -> tuple[np.ndarray, np.ndarray]:
    """For each group the scale and the offset of smallest squared error: float16, and for a symmetric grid float32."""
    low, high = np.min(split, axis=axis, keepdims=True), np.max(split, axis=axis, keepdims=True)
    farthest = np.where(high > -low, high, low)
    best = (np.zeros_like(low, np.float16), np.zeros_like(low))
    smallest = np.full(low.shape, np.inf, np.float32)
    for share in _SHARES if with_offsets else np.append(_SHARES, _SEVEN_STEPS):
        if with_offsets:
            scales = _float16(share * (high - low) / np.float32(15))
            offsets = _float16((high + low - share * (high - low)) / 2).astype(np.float32)
        else:
            scales = _float16(share * farthest / np.float32(-8))
            offsets = -8 * scales.astype(np.float32)
        steps = _steps(split - offsets, scales, 0, 15)
        error = np.sum(np.square(steps * scales.astype(np.float32) + offsets - split), axis=axis, keepdims=True)
        better = error < smallest
        best = np.where(better, scales, best[0]), np.where(better, offsets, best[1])
        smallest = np.where(better, error, smallest)
    return best[0], best[1].astype(np.float16) if with_offsets else best[1]


def _float16(numbers: np.ndarray) -> np.ndarray:
    if np.max(np.abs(numbers), initial=0) > np.finfo(np.float16).max:
        raise QuantizationError(f"the matrix needs a scale of {np.abs(numbers).max():.3g}, float16 ends at 65504")
    return numbers.astype(np.float16)
