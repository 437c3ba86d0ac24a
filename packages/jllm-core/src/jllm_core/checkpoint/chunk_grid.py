"""Chunk grid: how an array is cut into chunks, each a file, and into boxes of whole chunks."""

import itertools
import math
from typing import Any

import numpy as np

Box = tuple[slice, ...]
"""A part of an array: for each axis a slice with a start and a stop inside the array, and no step."""

CHUNKS_PER_AXIS = 8
"""Chunks of a large array along the axis that tensor parallelism splits, so that a device reads its own part and no
more. Eight serves 2, 4 and 8 devices."""
MIN_CHUNKED_BYTES = 1 << 20
"""Smaller arrays are one chunk."""
DEFAULT_CHUNK_BYTES = 8 << 20
"""Chunks are cut further until they are about this small: whoever writes or reads one holds it whole."""
# In order of preference: the axes that ShardingRules splits by default. Experts are cut besides.
CHUNKED_AXES = ("heads", "kv_heads", "value_heads", "key_heads", "ffw", "shared_ffw", "vocab")
EXPERTS_AXIS = "experts"


def whole(shape: tuple[int, ...]) -> Box:
    """The box that holds all of an array of this shape."""
    return tuple(slice(0, size) for size in shape)


def box_shape(box: Box) -> tuple[int, ...]:
    """The shape of the part of an array that a box holds."""
    return tuple(part.stop - part.start for part in box)


def chunk_shape(shape: tuple[int, ...], dtype: Any, logical_axes: tuple[str | None, ...]) -> tuple[int, ...]:
    """The shape of an array's chunks: a slice along the axes that devices share out, or the whole array.

    Args:
        shape: the array's shape.
        dtype: its element type.
        logical_axes: the names of its axes, as in ``ArrayInfo``.
    """
    itemsize = np.dtype(dtype).itemsize
    nbytes = math.prod(shape) * itemsize
    axis = next((logical_axes.index(name) for name in CHUNKED_AXES if name in logical_axes), None)
    if axis is None or nbytes < MIN_CHUNKED_BYTES:
        return shape
    chunk = list(shape)
    chunk[axis] = -(-shape[axis] // CHUNKS_PER_AXIS)
    if EXPERTS_AXIS in logical_axes and nbytes >= CHUNKS_PER_AXIS * MIN_CHUNKED_BYTES:
        experts = logical_axes.index(EXPERTS_AXIS)
        chunk[experts] = -(-shape[experts] // CHUNKS_PER_AXIS)
    chunk[axis] = _even_part(chunk[axis], DEFAULT_CHUNK_BYTES // (math.prod(chunk) * itemsize // chunk[axis] or 1))
    return tuple(chunk)


def _even_part(size: int, limit: int) -> int:
    """A divisor of ``size``, at most 1.5 times ``limit``; the limit itself where all of them are much smaller.

    Chunks of equal size waste nothing: the last one along an axis is stored whole even where the array ends before it.
    """
    limit = max(limit, 1)
    divisor = next(part for part in range(min(size, limit * 3 // 2), 0, -1) if size % part == 0)
    return divisor if divisor * 4 >= min(size, limit) else limit


def blocks(shape: tuple[int, ...], dtype: Any, chunk: tuple[int, ...], limit: int) -> list[Box]:
    """Cut an array into boxes of whole chunks, each of at most ``limit`` bytes, or of one chunk if that has more.

    They come in the order of the array's bytes as far as the chunks allow.

    Args:
        shape: the array's shape.
        dtype: its element type.
        chunk: the shape of its chunks.
        limit: bytes of a box.
    """
    # Chunks of a box along each axis: all of them to begin with, and fewer from the first axis on until a box fits. So
    # boxes keep the last axes whole, along which the bytes lie side by side.
    take = [-(-size // part) for size, part in zip(shape, chunk, strict=True)]
    chunk_nbytes = math.prod(chunk) * np.dtype(dtype).itemsize
    for axis in range(len(take)):
        others = chunk_nbytes * math.prod(take) // max(take[axis], 1)
        take[axis] = min(take[axis], max(limit // max(others, 1), 1))
    steps = [count * size for count, size in zip(take, chunk, strict=True)]
    ranges = [
        [slice(start, min(start + step, size)) for start in range(0, size, max(step, 1))]
        for size, step in zip(shape, steps, strict=True)
    ]
    return list(itertools.product(*ranges))
