"""Arena allocator in large pages (huge pages), for the arrays of a model."""

import contextlib
import math
import mmap
import threading
from typing import Any

import numpy as np

REGION_BYTES = 256 << 20
"""Bytes that are asked of the system at a time. What is not used of them takes up no memory."""
XLA_ALIGNMENT = 64
"""XLA on a CPU computes in place from memory that begins at a multiple of this, and copies what does not."""


class LargePageArena:
    """Room for arrays that stay as long as a model does, one behind another in large pages where the system has them.

    With pages of 4 KiB each first write costs a page fault, and each step of decoding, which reads all weights, looks
    up every page's address. An array smaller than a large page (2 MiB) would get none on its own. A region goes
    back to the system when the last of its arrays is gone. Several threads may ask for arrays.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._region, self._used = np.empty(0, np.uint8), 0

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array in C order whose numbers are not set, as ``np.empty`` makes it."""
        dtype = np.dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        with self._lock:
            if self._used + nbytes > len(self._region):
                # Arrays hold the old region alive; the arena itself forgets it, and what was left of it.
                self._region, self._used = new_region(max(nbytes, REGION_BYTES)), 0
            memory = self._region[self._used : self._used + nbytes]
            self._used += -(-nbytes // XLA_ALIGNMENT) * XLA_ALIGNMENT
        array: np.ndarray = memory.view(dtype).reshape(shape)
        return array


def new_region(nbytes: int) -> np.ndarray:
    """Fresh memory from the system, which begins at a page, in large pages if it has them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    # Shared memory, mmap's default, has large pages only where an administrator allows them.
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)
