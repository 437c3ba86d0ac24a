"""Direct I/O (O_DIRECT): large files written past the system's page cache.

A file that is synced at the end anyway gains nothing from the page cache: the copy into it, and the memory that it
takes from other work, cost more than the disk's own time.
"""

import errno
import os
from pathlib import Path

from jllm_core.checkpoint.large_pages import new_region

_SECTOR = 4096
"""Addresses, offsets and lengths of direct writes are multiples of this on every disk there is."""
# Smaller files go through the page cache, which makes fewer and larger writes of them.
_MIN_DIRECT_BYTES = 1 << 20
# What file systems without direct I/O (tmpfs, some network ones) answer, when a file is opened or at the first write.
_UNSUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP)


class WriteBuffer:
    """Aligned memory from which files are written, one after another.

    Attributes:
        content: the bytes of the next file; fill it before ``write``.
    """

    def __init__(self, nbytes: int) -> None:
        self._memory = new_region(max(-(-nbytes // _SECTOR) * _SECTOR, 1))
        self.content = self._memory[:nbytes]

    def write(self, path: Path) -> None:
        """Write the content to a file, which is replaced if it exists.

        Raises:
            OSError: the disk cannot take it.
        """
        size = len(self.content)
        if size < _MIN_DIRECT_BYTES or not self._write_directly(path):
            with open(path, "wb", buffering=0) as file:
                _write_all(file.fileno(), self.content.data, 0)

    def _write_directly(self, path: Path) -> bool:
        """Write by direct I/O; False where the system or the file system has none."""
        direct = getattr(os, "O_DIRECT", None)
        if direct is None:
            return False
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | direct, 0o666)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return False
            raise
        try:
            # Whole sectors only: the last one is written in full, and the file then cut to its length.
            _write_all(descriptor, self._memory.data, 0)
            os.ftruncate(descriptor, len(self.content))
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return False
            raise
        finally:
            os.close(descriptor)
        return True


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    """Write all of a view; a single system call writes less than 2 GiB."""
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
