"""Dequantisation of GGUF tensors: any box, by the blocks that it touches, a slab at a time."""

import itertools
import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np
from jllm_core.checkpoint import Box

from jllm_convert.files.regular_file import RegularFile, read_into
from jllm_convert.sources.gguf.tensors import GGUFTensor

# The most bytes to read and the most values to dequantise at a time. Dequantising makes several float32 arrays of the
# values, and is fastest while these fit in a core's cache.
_MAX_SLAB_BYTES = 1 << 20
_MAX_SLAB_VALUES = 1 << 17
# The most bytes of a row outside the box that are read along: that costs less than a call for each row.
_MAX_GAP_BYTES = 8 << 10


def dtype_of(tensor: GGUFTensor) -> np.dtype:
    """The element type of a tensor when read: its own if it is not quantised, else float32."""
    plain: dict[str, np.dtype] = {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
    return plain.get(tensor.kind.name, np.dtype(np.float32))


def can_dequantise(tensor: GGUFTensor) -> bool:
    """Whether the gguf package can dequantise this tensor's type."""
    from gguf import dequantize

    try:
        dequantize(np.zeros((1, tensor.block_bytes), np.uint8), tensor.kind)
    except NotImplementedError:
        return False
    return True


def read_box(file: RegularFile, tensor: GGUFTensor, box: Box) -> np.ndarray:
    """Read a box of a tensor. Besides the result, it needs a few MiB of memory.

    Args:
        file: the file that holds the tensor.
        tensor: a tensor of a type that ``can_dequantise``.
        box: the box.

    Returns:
        The box's values, in the element type ``dtype_of(tensor)``.

    Raises:
        ConversionError: the file cannot be read, ends early, or has changed; the message names the file and the tensor.
    """
    values = np.empty([part.stop - part.start for part in box], dtype_of(tensor))
    if not values.size:
        return values
    width, columns = tensor.shape[-1], box[-1]
    rows = values.reshape(-1, values.shape[-1])
    done = 0
    with file.reading(f"tensor {tensor.name!r}") as descriptor:
        for first, count in _runs(tensor.shape[:-1], box[:-1]):
            target = rows[done : done + count]
            # Three cases: whole rows; some columns of many rows; long parts of rows, one at a time.
            if target.shape[1] == width:
                _fill(descriptor, tensor, target.reshape(-1), first * width)
            elif target.shape[1] < _MAX_SLAB_VALUES:
                _fill_columns(descriptor, tensor, target, first, columns.start)
            else:
                for i in range(count):
                    _fill(descriptor, tensor, target[i], (first + i) * width + columns.start)
            done += count
    return values


def _runs(shape: tuple[int, ...], box: Box) -> Iterator[tuple[int, int]]:
    """Runs of neighbouring rows of a box: (first row, number of rows). ``shape`` and ``box`` lack the last axis."""
    # Trailing axes that the box has whole are contiguous.
    cut = len(shape)
    while cut and box[cut - 1] == slice(0, shape[cut - 1]):
        cut -= 1
    inner = math.prod(shape[cut:])
    if not cut:
        yield 0, inner
        return
    *outer, last = box[:cut]
    for index in itertools.product(*(range(part.start, part.stop) for part in outer)):
        row = 0
        for i, length in zip((*index, last.start), shape[:cut], strict=True):
            row = row * length + i
        yield row * inner, (last.stop - last.start) * inner


def _fill(descriptor: int, tensor: GGUFTensor, target: np.ndarray, first: int) -> None:
    """Fill ``target`` ``[n]`` with the values from number ``first`` of the whole tensor on."""
    block, stop = tensor.block, first + len(target)
    for start in range(first // block * block, stop, _MAX_SLAB_VALUES):
        blocks = -(-(min(start + _MAX_SLAB_VALUES, stop) - start) // block)
        raw = np.empty(blocks * tensor.block_bytes, np.uint8)
        read_into(descriptor, raw.data, tensor.offset + start // block * tensor.block_bytes)
        values = _decode(tensor, raw)
        # The first and the last block may reach beyond the target.
        low, high = max(start, first), min(start + len(values), stop)
        target[low - first : high - first] = values[low - start : high - start]


def _fill_columns(descriptor: int, tensor: GGUFTensor, target: np.ndarray, row: int, column: int) -> None:
    """Fill ``target`` ``[n, columns]`` from ``row`` and ``column`` on; several rows are dequantised at once."""
    block, size = tensor.block, tensor.block_bytes
    row_bytes = tensor.shape[-1] // block * size
    low, high = column // block, -(-(column + target.shape[1]) // block)
    is_gap_small = row_bytes - (high - low) * size <= _MAX_GAP_BYTES
    step = max(1, _MAX_SLAB_VALUES // ((high - low) * block))
    if is_gap_small:
        step = max(1, min(step, _MAX_SLAB_BYTES // row_bytes))
    for done in range(0, len(target), step):
        part = target[done : done + step]
        start = tensor.offset + (row + done) * row_bytes
        if is_gap_small:
            whole = np.empty((len(part), row_bytes), np.uint8)
            read_into(descriptor, whole.reshape(-1).data, start)
            raw = whole[:, low * size : high * size]
        else:
            raw = np.empty((len(part), (high - low) * size), np.uint8)
            for i, own in enumerate(raw):
                read_into(descriptor, own.data, start + i * row_bytes + low * size)
        values = _decode(tensor, np.ascontiguousarray(raw).reshape(-1)).reshape(len(part), -1)
        part[:] = values[:, column - low * block : column - low * block + part.shape[1]]


def _decode(tensor: GGUFTensor, raw: np.ndarray) -> np.ndarray:
    """Dequantise whole blocks, given as bytes, to values ``[n]``."""
    from gguf import dequantize

    if tensor.block == 1:  # F32, F16, BF16
        return raw.view(dtype_of(tensor))
    # A damaged scale may be infinite or NaN; its values are too, and not worth a warning of numpy.
    with np.errstate(all="ignore"):
        # As one row: gguf dequantises 16 rows at a time, and a row for each block would be slow.
        values: np.ndarray = dequantize(raw.reshape(1, -1), tensor.kind)
    return values.reshape(-1)
