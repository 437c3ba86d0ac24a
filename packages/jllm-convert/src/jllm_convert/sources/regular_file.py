"""One file of a source, opened so that nothing but a regular file is ever read, and read at given places."""

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# A single call reads 2 GiB at most on Linux, and fails above that on macOS.
_MAX_AT_ONCE = 1 << 30


class FileChangedError(OSError):
    """The file is not the one that was looked at first: it was cut, replaced or written to meanwhile."""


@dataclass(frozen=True)
class RegularFile:
    """A regular file, as it was when it was found.

    Attributes:
        name: what the folder calls it, for messages.
        path: where it really is, with no link left to follow.
        size: bytes.
        mtime_ns: when it was last written to, nanoseconds.
    """

    name: str
    path: Path
    size: int
    mtime_ns: int

    @classmethod
    def at(cls, path: Path, name: str) -> "RegularFile":
        """The file at ``path``, which holds no links.

        Raises:
            OSError: there is none, or it is a folder, a pipe, a device or a socket.
        """
        status = os.stat(path, follow_symlinks=False)
        _check_regular(status)
        return cls(name, path, status.st_size, status.st_mtime_ns)

    @contextlib.contextmanager
    def open(self) -> Iterator[int]:
        """A file descriptor to read from, for the length of the block. Each call has its own, so threads may share us.

        Raises:
            FileChangedError: the file is not the one that was found.
            OSError: it cannot be opened.
        """
        # O_NONBLOCK: had a pipe taken the file's place, opening it would wait for a writer for ever.
        descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            _check_regular(status)
            if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
                raise FileChangedError(
                    f"the file was changed while it was in use: it had {self.size:,} bytes and has {status.st_size:,}"
                )
            yield descriptor
        finally:
            os.close(descriptor)

    def read(self, most: int) -> bytes:
        """All of the file's bytes.

        Raises:
            OSError: the file has more than ``most`` bytes, was changed, or cannot be read.
        """
        if self.size > most:
            raise OSError(f"it has {self.size:,} bytes; at most {most:,} are read of such a file")
        content = bytearray(self.size)
        with self.open() as descriptor:
            read_into(descriptor, memoryview(content), 0)
        return bytes(content)


def read_into(descriptor: int, target: memoryview, offset: int) -> None:
    """Fill ``target``, bytes, with what the file holds from ``offset`` on.

    Raises:
        FileChangedError: the file ends before ``target`` is full.
        OSError: reading fails.
    """
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done : done + _MAX_AT_ONCE]], offset + done)
        if count == 0:
            raise FileChangedError(
                f"the file was cut short while it was read: it ends at byte {offset + done:,}, "
                f"{len(target) - done:,} bytes too early"
            )
        done += count


def reason(error: OSError) -> str:
    """What an OSError says, without the path that the message around it gives already."""
    return error.strerror or str(error)


def _check_regular(status: os.stat_result) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket", stat.S_ISLNK: "a link"}
    kind = next((name for is_kind, name in kinds.items() if is_kind(status.st_mode)), "a device")
    raise OSError(f"it is {kind}, not a regular file")
