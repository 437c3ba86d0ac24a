"""Regular files of a source: opened without following links, read at byte offsets, checked for changes."""

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jllm_core.errors import reason

from jllm_convert.errors import ConversionError

# A single call reads 2 GiB at most on Linux, and fails above that on macOS.
_MAX_AT_ONCE = 1 << 30


class FileChangedError(OSError):
    """A file that was cut short, replaced or written to since it was found."""


@dataclass(frozen=True)
class RegularFile:
    """A regular file and its state when it was found. Several threads may read it at once.

    Nothing is mapped into memory: where a mapped file is cut short, reading it kills the process.

    Attributes:
        name: the name for error messages.
        path: its real path, without links.
        size: its size in bytes.
        mtime_ns: the time of its last change, in nanoseconds.
    """

    name: str
    path: Path
    size: int
    mtime_ns: int

    @classmethod
    def at(cls, path: Path, name: str) -> "RegularFile":
        """Find the file at ``path``, which must hold no links.

        Raises:
            OSError: there is none, or it is a folder, a pipe, a device or a socket.
        """
        # Links are not followed: the caller has resolved them, and decided where they may lead.
        status = os.stat(path, follow_symlinks=False)
        _check_regular(status)
        return cls(name, path, status.st_size, status.st_mtime_ns)

    @contextlib.contextmanager
    def open(self) -> Iterator[int]:
        """Open the file for the length of a ``with`` block; yields a file descriptor of its own to each caller.

        Raises:
            FileChangedError: the file is not as it was found, before or after the block.
            OSError: it cannot be opened.
        """
        # O_NONBLOCK: if a pipe has taken the file's place, opening it would otherwise wait forever for a writer.
        descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self._check_unchanged(descriptor)
            yield descriptor
            # Once more: bytes that were read before and after a change do not belong together.
            self._check_unchanged(descriptor)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def reading(self, what: str) -> Iterator[int]:
        """Open the file to read ``what``, with every OSError told as a ConversionError that names the file and it.

        Raises:
            ConversionError: the file cannot be read, ends early, or is not as it was found.
        """
        try:
            with self.open() as descriptor:
                yield descriptor
        except OSError as error:
            raise ConversionError(
                f"{self.name}: {what} cannot be read ({reason(error)}); see that the disk is sound and that nothing "
                "writes to the file, then start again"
            ) from error

    def read(self, max_bytes: int) -> bytes:
        """Read the whole file.

        Raises:
            OSError: the file has more than ``max_bytes`` bytes, has changed, or cannot be read.
        """
        if self.size > max_bytes:
            raise OSError(f"it has {self.size:,} bytes; at most {max_bytes:,} are read of such a file")
        content = bytearray(self.size)
        with self.open() as descriptor:
            read_into(descriptor, memoryview(content), 0)
        return bytes(content)

    def _check_unchanged(self, descriptor: int) -> None:
        # Of the open file, not of the path: another file may take the path at any time.
        status = os.fstat(descriptor)
        _check_regular(status)
        if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise FileChangedError(
                f"the file was changed while it was in use: it had {self.size:,} bytes and has {status.st_size:,}"
            )


def read_into(descriptor: int, target: memoryview, offset: int) -> None:
    """Fill ``target``, a buffer of bytes, from byte ``offset`` of a file on.

    Raises:
        FileChangedError: the file ends before ``target`` is full.
        OSError: reading fails.
    """
    done = 0
    # The system may return less than it is asked for.
    while done < len(target):
        count = os.preadv(descriptor, [target[done : done + _MAX_AT_ONCE]], offset + done)
        if count == 0:
            raise FileChangedError(
                f"the file was cut short while it was read: it ends at byte {offset + done:,}, "
                f"{len(target) - done:,} bytes too early"
            )
        done += count


def _check_regular(status: os.stat_result) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket", stat.S_ISLNK: "a link"}
    kind = next((name for is_kind, name in kinds.items() if is_kind(status.st_mode)), "a device")
    raise OSError(f"it is {kind}, not a regular file")
