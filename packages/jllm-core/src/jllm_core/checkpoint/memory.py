"""Memory for arrays that stay as long as a model does."""

import contextlib
import math
import mmap
import threading
from typing import Any

import numpy as np

REGION_BYTES = 256 << 20
"""So much is asked of the system at a time. What of it is not used takes up no memory."""
ALIGNMENT = 64
"""XLA on a CPU computes from memory that begins at a multiple of it, and copies what does not."""


class Regions:
    """Room for arrays, one behind another, in large pages where the system has them.

    A page of 4 KiB costs a fault when it is first written, and a look-up of its address each time that a step gets to
    it. Arrays that lie apart, each smaller than a large page (2 MiB), get none. A region is given back when the last of
    its arrays is gone. Several threads may take.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._region, self._used = np.empty(0, np.uint8), 0

    def take(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array that holds anything."""
        dtype = np.dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        with self._lock:
            if self._used + nbytes > len(self._region):
                self._region, self._used = _new_region(max(nbytes, REGION_BYTES)), 0
            memory = self._region[self._used : self._used + nbytes]
            self._used += -(-nbytes // ALIGNMENT) * ALIGNMENT
        array: np.ndarray = memory.view(dtype).reshape(shape)
        return array


def _new_region(nbytes: int) -> np.ndarray:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    # Shared memory, mmap's default, has large pages only where an administrator allows them.
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)
