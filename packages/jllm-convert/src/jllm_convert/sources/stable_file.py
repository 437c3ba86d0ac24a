"""A regular file that is read in pieces and must stay as it is meanwhile."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

from jllm_convert.errors import ConversionError

Read: TypeAlias = Callable[[int, int], bytes]
"""``read(offset, count)``: exactly ``count`` bytes of a file from ``offset`` on."""


@dataclass(frozen=True)
class StableFile:
    """A file as it was when it was first looked at. It may be read from several threads at once.

    Nothing is mapped into memory: a mapped file that is cut short meanwhile kills the process that reads it.

    Attributes:
        path: where it is; a symbolic link is followed.
        size: in bytes.
        mtime_ns: when it was last written.
    """

    path: Path
    size: int
    mtime_ns: int

    @classmethod
    def at(cls, path: Path) -> "StableFile":
        """Look at a file.

        Raises:
            ConversionError: it cannot be opened, or is no regular file.
        """
        with _opened(path, "its header") as descriptor:
            status = os.fstat(descriptor)
        return cls(path, status.st_size, status.st_mtime_ns)

    @contextmanager
    def reader(self, what: str) -> Iterator[Read]:
        """Open the file for reading ``what``, which error messages name.

        Raises:
            ConversionError: the file cannot be read, ends early, or is not as it was when it was first looked at.
        """
        with _opened(self.path, what) as descriptor:
            self._check_unchanged(descriptor, what)
            yield partial(self._read, descriptor, what)
            self._check_unchanged(descriptor, what)

    def _check_unchanged(self, descriptor: int, what: str) -> None:
        status = os.fstat(descriptor)
        if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise ConversionError(
                f"{self.path} has changed since it was opened (it had {self.size:,} bytes and has "
                f"{status.st_size:,}), so {what} cannot be trusted; wait until it is written, then start again"
            )

    def _read(self, descriptor: int, what: str, offset: int, count: int) -> bytes:
        parts: list[bytes] = []
        missing = count
        while missing:
            try:
                part = os.pread(descriptor, missing, offset + count - missing)
            except OSError as error:
                raise _cannot_read(self.path, what, error) from error
            if not part:
                raise ConversionError(
                    f"{self.path} ends at byte {offset + count - missing:,} within {what}, {missing:,} bytes early; "
                    "it may be cut short, download it again"
                )
            parts.append(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


@contextmanager
def _opened(path: Path, what: str) -> Iterator[int]:
    """The descriptor of a regular file. Opening does not wait, as it otherwise would for a pipe without a writer."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _cannot_read(path, what, error) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ConversionError(
                f"{path} is not a regular file; expected a file on disk, not a folder, pipe or device"
            )
        yield descriptor
    finally:
        os.close(descriptor)


def _cannot_read(path: Path, what: str, error: OSError) -> ConversionError:
    return ConversionError(f"{path}: {what} cannot be read: {error.strerror or error}")
