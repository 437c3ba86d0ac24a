"""Files of a hub repository: names checked for path traversal, contents checked by their hashes."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO, Protocol

# A commit of git, in full.
COMMIT = re.compile(r"[0-9a-f]{40}")


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository.

    Attributes:
        name: its path in the repository, with slashes.
        size: its size in bytes.
        key: the hash of its content, and the name under which the content is stored here: SHA-256 where ``sha256`` is
            given, else git's hash of a blob.
        sha256: the SHA-256 of its content; the hub gives it for files in its large-file storage, as all weights are.
    """

    name: str
    size: int
    key: str
    sha256: str | None

    def hasher(self) -> _Hash:
        """Return a hash object that gives ``key`` when it is fed the content."""
        if self.sha256 is not None:
            return hashlib.sha256()
        git = hashlib.sha1(usedforsecurity=False)
        # git hashes a header before the content.
        git.update(b"blob %d\0" % self.size)
        return git

    def is_content_of(self, path: Path) -> bool:
        """Whether ``path`` holds this file's content. Reads the file where its size is right."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        with path.open("rb") as stream:
            return PartialDownload(stream, self).is_right()


class PartialDownload:
    """A download into a stream: the bytes so far, and their hash.

    Args:
        stream: may hold the first bytes already, which are hashed.
        file: the file that is downloaded.

    Attributes:
        size: the bytes so far.
    """

    def __init__(self, stream: BinaryIO, file: RemoteFile) -> None:
        self.file = file
        self.size = 0
        self._stream = stream
        self._hasher = file.hasher()
        # Bytes of an earlier attempt are hashed again: hash objects cannot be stored.
        stream.seek(0)
        while piece := stream.read(2**20):
            self._count(piece)
        if self.size > file.size:
            self.restart()

    def add(self, piece: bytes) -> None:
        """Append the next bytes."""
        self._stream.write(piece)
        self._stream.flush()  # so that a process that is killed leaves it to the next one
        self._count(piece)

    def restart(self) -> None:
        """Discard all bytes."""
        self._stream.seek(0)
        self._stream.truncate()
        self.size, self._hasher = 0, self.file.hasher()

    def digest(self) -> str:
        """Hash the bytes so far, in hex."""
        return self._hasher.hexdigest()

    def is_right(self) -> bool:
        """Whether the content is complete, with the right hash."""
        return self.size == self.file.size and self.digest() == self.file.key

    def _count(self, piece: bytes) -> None:
        self.size += len(piece)
        self._hasher.update(piece)


def stays_inside(name: str) -> bool:
    """Whether a relative path with slashes stays inside its folder, on any system (no path traversal)."""
    # By the rules of Windows too (drives, backslashes): a folder may be copied to any system.
    parts = name.split("/")
    outside = ".." in name.replace("\\", "/").split("/") or PurePosixPath(name).root
    return not (outside or "\0" in name or any(PureWindowsPath(part).anchor for part in parts))


def remote_file(listed: Any) -> RemoteFile:
    """Read a file of the hub's listing (``RepoSibling`` of huggingface_hub).

    Raises:
        ValueError: its size or its hash is missing or malformed.
    """
    size, key, sha256 = listed.size, listed.blob_id, None
    if listed.lfs is not None:
        size, key = listed.lfs.size, listed.lfs.sha256
        sha256 = key
    # The hash becomes the name of a file here, so it must not be a path.
    if not isinstance(size, int) or size < 0 or not re.fullmatch("[0-9a-f]{64}" if sha256 else "[0-9a-f]{40}", key):
        raise ValueError(f"file {listed.rfilename!r} has size {size!r} and hash {key!r}")
    return RemoteFile(str(listed.rfilename), size, key, sha256)
