"""Writing large files past the system's page cache.

What is synced at the end anyway gains nothing from the page cache: the copy into it, and the memory it takes from
other work, cost more than the disk's own time.
"""

import errno
import mmap
import os
from pathlib import Path

import numpy as np

_SECTOR = 4096
"""Addresses, offsets and lengths of direct writes are multiples of it on every disk there is."""
# Of smaller files the page cache makes fewer and larger writes.
_MIN_DIRECT_BYTES = 1 << 20
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)


class WriteBuffer:
    """Memory from which a file is written, for one file after another.

    Attributes:
        content: the bytes to be written.
    """

    def __init__(self, nbytes: int) -> None:
        self._memory = mmap.mmap(-1, max(-(-nbytes // _SECTOR) * _SECTOR, 1))  # begins at a page
        self.content = np.frombuffer(self._memory, np.uint8)[:nbytes]

    def write(self, path: Path) -> None:
        """Make a file of the content, or replace one.

        Raises:
            OSError: the disk cannot take it.
        """
        size = len(self.content)
        if size < _MIN_DIRECT_BYTES or not self._write_directly(path):
            with open(path, "wb", buffering=0) as file:
                _write_all(file.fileno(), memoryview(self._memory)[:size], 0)

    def _write_directly(self, path: Path) -> bool:
        """Write past the page cache; False where the system or this file system cannot."""
        direct = getattr(os, "O_DIRECT", None)
        if direct is None:
            return False
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | direct, 0o666)
        except OSError as error:
            if error.errno in _REFUSED:
                return False
            raise
        try:
            _write_all(descriptor, memoryview(self._memory), 0)
            os.ftruncate(descriptor, len(self.content))
        except OSError as error:
            if error.errno in _REFUSED:
                return False
            raise
        finally:
            os.close(descriptor)
        return True


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
