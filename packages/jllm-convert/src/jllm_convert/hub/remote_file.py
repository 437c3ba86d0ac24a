"""The files of a model repository: their names, which a stranger chose, and their contents, which have hashes."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO, Protocol

COMMIT = re.compile(r"[0-9a-f]{40}")


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository.

    Attributes:
        name: its path in the repository, with slashes.
        size: in bytes.
        key: the hash of its content, and the name under which the content is kept: SHA-256 where ``sha256`` is given,
            else git's hash of it.
        sha256: of its content, where the hub says it: for files in its large-file storage, which all weights are.
    """

    name: str
    size: int
    key: str
    sha256: str | None

    def hasher(self) -> _Hash:
        """What gives ``key`` once the content went through it."""
        if self.sha256 is not None:
            return hashlib.sha256()
        git = hashlib.sha1(usedforsecurity=False)
        git.update(b"blob %d\0" % self.size)
        return git

    def is_content_of(self, path: Path) -> bool:
        """Whether ``path`` holds this file's content. Reads it where the size is right."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        with path.open("rb") as stream:
            return PartialDownload(stream, self).is_right()


class PartialDownload:
    """A content that arrives in a stream: how much of it is there, and the hash of that."""

    def __init__(self, stream: BinaryIO, file: RemoteFile) -> None:
        self.file = file
        self.size = 0
        self._stream = stream
        self._hasher = file.hasher()
        stream.seek(0)
        while piece := stream.read(2**20):
            self._count(piece)
        if self.size > file.size:
            self.restart()

    def add(self, piece: bytes) -> None:
        self._stream.write(piece)
        self._stream.flush()  # a process that is killed leaves it to the next
        self._count(piece)

    def restart(self) -> None:
        self._stream.seek(0)
        self._stream.truncate()
        self.size, self._hasher = 0, self.file.hasher()

    def digest(self) -> str:
        return self._hasher.hexdigest()

    def is_right(self) -> bool:
        return self.size == self.file.size and self.digest() == self.file.key

    def _count(self, piece: bytes) -> None:
        self.size += len(piece)
        self._hasher.update(piece)


def is_below(name: str) -> bool:
    """Whether a path with slashes stays in the folder that it is put in, on any system."""
    parts = name.split("/")
    outside = ".." in name.replace("\\", "/").split("/") or PurePosixPath(name).root
    return not (outside or "\0" in name or any(PureWindowsPath(part).anchor for part in parts))


def remote_file(listed: Any) -> RemoteFile:
    """A file of the hub's listing.

    Raises:
        ValueError: it lacks its size or its hash, or they are none.
    """
    size, key, sha256 = listed.size, listed.blob_id, None
    if listed.lfs is not None:
        size, key = listed.lfs.size, listed.lfs.sha256
        sha256 = key
    # A hash becomes the name of a file here, so it must be nothing else.
    if not isinstance(size, int) or size < 0 or not re.fullmatch("[0-9a-f]{64}" if sha256 else "[0-9a-f]{40}", key):
        raise ValueError(f"file {listed.rfilename!r} has size {size!r} and hash {key!r}")
    return RemoteFile(str(listed.rfilename), size, key, sha256)
