"""Raw arrays in files: reads of any box without the rest of the array."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jllm_core.checkpoint import Box

from jllm_convert.files.regular_file import RegularFile, read_into

# The largest run that is read only to have a part of it copied out, in bytes.
_MAX_SLAB_BYTES = 1 << 20
# The cost of a read call in bytes that could be read in its time: 2 microseconds at 4 GB/s.
_CALL_COST_BYTES = 8 << 10


@dataclass(frozen=True)
class StoredArray:
    """An array in a file: little-endian, the last axis fastest, uncompressed.

    The file is read with ``preadv`` and never mapped: a fault of the disk is then an error and not a signal, and pages
    that were read do not count as memory of the process.

    Attributes:
        name: the tensor's name, for messages.
        file: the file that holds it.
        offset: its first byte in the file.
        shape: its shape.
        dtype: its element type.
    """

    name: str
    file: RegularFile
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, box: Box) -> np.ndarray:
        """Read a box into a new array. Several threads may call this at once.

        Besides the result, it needs at most 1 MiB of memory.

        Raises:
            ConversionError: the file cannot be read, or has changed since it was found.
            ValueError: the box is not inside the array.
        """
        if len(box) != len(self.shape) or not all(_inside(part, n) for part, n in zip(box, self.shape, strict=True)):
            raise ValueError(f"{box} is not a box of tensor {self.name!r}, whose shape is {list(self.shape)}")
        values = np.empty([part.stop - part.start for part in box], self.dtype)
        if values.size == 0:
            return values
        with self.file.reading(f"tensor {self.name!r}") as descriptor:
            self._fill(values, box, descriptor)
        return values

    def _fill(self, values: np.ndarray, box: Box, descriptor: int) -> None:
        """Read ``box`` into ``values``, one run of bytes after another.

        A run is a range of entries along one axis, with everything along the faster axes. Where the box needs all of
        it, the run is read straight into ``values``; else into a slab, from which the box's part is copied.
        """
        shape, steps, counts = self.shape, self._steps(), values.shape
        axis = _run_axis(shape, steps, counts)
        if axis is None:
            read_into(descriptor, _bytes_of(values), self.offset)
            return
        starts = [range(part.start * step, part.stop * step, step) for part, step in zip(box, steps, strict=True)]
        # The first byte of each run, in the order of the entries of the outer axes.
        offsets = (self.offset + starts[axis].start + sum(outer) for outer in itertools.product(*starts[:axis]))
        if counts[axis + 1 :] == shape[axis + 1 :]:
            size, target = counts[axis] * steps[axis], _bytes_of(values)
            for place, offset in enumerate(offsets):
                read_into(descriptor, target[place * size : (place + 1) * size], offset)
            return
        # Both run over the outer axes in C order.
        for outer, offset in zip(np.ndindex(counts[:axis]), offsets, strict=True):
            self._fill_by_slabs(values[outer], box[axis + 1 :], descriptor, offset)

    def _fill_by_slabs(self, values: np.ndarray, inner: Box, descriptor: int, offset: int) -> None:
        """Read the run that starts at byte ``offset``, and copy ``inner`` of each of its entries into ``values``."""
        shape = self.shape[len(self.shape) - len(inner) :]
        step = math.prod(shape) * self.dtype.itemsize
        # One slab is used again for each part of the run.
        at_once = max(1, _MAX_SLAB_BYTES // step)
        slab = np.empty(min(at_once, len(values)) * step, np.uint8)
        for first in range(0, len(values), at_once):
            target = values[first : first + at_once]
            run = slab[: len(target) * step]
            read_into(descriptor, run.data, offset + first * step)
            target[...] = run.view(self.dtype).reshape(len(target), *shape)[(slice(None), *inner)]

    def _steps(self) -> list[int]:
        """For each axis, the bytes from one entry to the next (numpy's strides)."""
        return [math.prod(self.shape[axis + 1 :]) * self.dtype.itemsize for axis in range(len(self.shape))]


def _run_axis(shape: Sequence[int], steps: Sequence[int], counts: Sequence[int]) -> int | None:
    """The axis along which to read runs with the least cost of bytes and calls; None where the box is the whole array.

    Args:
        shape: the array's shape.
        steps: its steps in bytes.
        counts: how many entries of each axis the box has.
    """
    cut = [axis for axis, count in enumerate(counts) if count != shape[axis]]
    if not cut:
        return None
    # Below the last axis that is cut the box has everything: runs along that axis hold no byte too many.
    last = cut[-1]

    # Runs along an earlier axis are fewer and longer, but hold bytes outside the box.
    def cost(axis: int) -> int:
        run = counts[axis] * steps[axis]
        calls = 1 if axis == last else -(-run // _MAX_SLAB_BYTES)
        return math.prod(counts[:axis]) * (run + calls * _CALL_COST_BYTES)

    return min((axis for axis in range(last + 1) if axis == last or steps[axis] <= _MAX_SLAB_BYTES), key=cost)


def _inside(part: slice, size: int) -> bool:
    return part.step is None and 0 <= part.start <= part.stop <= size


def _bytes_of(values: np.ndarray) -> memoryview:
    """The memory of a contiguous array, by way of uint8: numpy gives no buffer of foreign types such as bfloat16."""
    return values.reshape(-1).view(np.uint8).data
