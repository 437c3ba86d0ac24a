"""Weight files of a repository that are on this disk only while they are needed.

Until a file is fetched its header alone stands in its place, in a file of the same length (``hub/remote_header.py``),
so that a source can be opened and its conversion planned. With the header come the RoPE factors of a GGUF file, which
are a tensor and belong to the config. What is fetched has the hash that the hub gives, and takes
the place of the header.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock

from jllm_convert.errors import DownloadError
from jllm_convert.files.disk_space import file_size
from jllm_convert.hub.remote_file import RemoteFile
from jllm_convert.hub.remote_header import fetch_header
from jllm_convert.hub.repository import PARTIAL_SUFFIX, Repository
from jllm_convert.hub.store import CacheStore
from jllm_convert.sources.gguf.config import ROPE_FACTORS
from jllm_convert.sources.gguf.cursor import MAX_HEADER_BYTES
from jllm_convert.sources.gguf.header import find_gguf_file, gguf_header_end, read_gguf_header
from jllm_convert.sources.huggingface.safetensors_header import MAX_HEADER

_WHOLE_SUFFIX = ".whole"
# Sources remember when a file was changed, and refuse one that was changed since: header and content have one time.
_CHANGED_NS = 10**18
# The headers of most files: of a shard's some hundred tensors, and of a GGUF file, which has a vocabulary.
_FIRST_BYTES, _GGUF_FIRST_BYTES = 64 << 10, 8 << 20
_HEADERS_AT_ONCE = 4
# The most bytes of a tensor that belongs to the config; a longer one is refused by its shape.
_MAX_CONFIG_BYTES = 1 << 20


class RemoteShards:
    """The weight files of one commit, by the paths that a source opens them by.

    Args:
        repository: the repository.
        store: where its files go: a cache of its own, in which no other process writes.
        files: the weight files.
        count: called, from several threads, with the bytes of each piece that comes.

    Raises:
        DownloadError: a header cannot be downloaded.
    """

    def __init__(
        self, repository: Repository, store: CacheStore, files: Sequence[RemoteFile], count: Callable[[int], None]
    ) -> None:
        self._repository, self._store = repository, store
        self._files = {str(store.folder / file.name): file for file in files}
        self.count = count
        self._lock, self._stop = Lock(), Event()
        self._coming: dict[str, Future[None]] = {}
        self._pool = ThreadPoolExecutor(1)
        self._fetched_alone: dict[str, list[tuple[int, int]]] = {}
        self.here: set[str] = {path for path in self._files if self._is_whole(path)}
        with ThreadPoolExecutor(_HEADERS_AT_ONCE) as pool:
            list(pool.map(self._fetch_header, [path for path in self._files if path not in self.here]))

    @property
    def sizes(self) -> Mapping[str, int]:
        """The bytes of each file, by its path."""
        return {path: file.size for path, file in self._files.items()}

    def begun(self) -> Mapping[str, int]:
        """The bytes of files that an earlier run has fetched in part, by path."""
        partial = {path: self._store.blobs / f"{file.key}{PARTIAL_SUFFIX}" for path, file in self._files.items()}
        return {path: size for path, blob in partial.items() if (size := file_size(blob))}

    def begin(self, path: str) -> None:
        """Start to fetch a file in the background, unless it is here or comes already."""
        with self._lock:
            if path not in self.here and path not in self._coming:
                self._coming[path] = self._pool.submit(self._fetch, path)

    def ensure(self, path: str) -> None:
        """Wait until a file is here, and fetch it where that was not begun.

        Raises:
            DownloadError: the download fails, or its content has not the hash that the hub gives.
        """
        self.begin(path)
        coming = self._coming.get(path)
        if coming is None:
            return
        try:
            coming.result()
        finally:
            with self._lock:
                self._coming.pop(path, None)

    def release(self, path: str) -> None:
        """Delete a file."""
        with self._lock:
            self.here.discard(path)
            self._coming.pop(path, None)
            # First the mark: a kill in between leaves a file that is fetched again, and none that is taken for whole.
            self._mark(path).unlink(missing_ok=True)
            Path(path).unlink(missing_ok=True)

    def close(self) -> None:
        """End the downloads that run. What has come is kept."""
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _mark(self, path: str) -> Path:
        """An empty file that is there while the one at ``path`` is whole and checked."""
        return self._store.blobs / mark_name(self._files[path])

    def _is_whole(self, path: str) -> bool:
        return (
            self._mark(path).exists() and Path(path).is_file() and Path(path).stat().st_size == self._files[path].size
        )

    def _fetch_header(self, path: str) -> None:
        file, target = self._files[path], Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        self._mark(path).unlink(missing_ok=True)
        if target.suffix.lower() == ".gguf":
            how = (lambda: gguf_header_end(target), _GGUF_FIRST_BYTES, MAX_HEADER_BYTES)
        else:
            how = (lambda: _safetensors_header_end(target), _FIRST_BYTES, MAX_HEADER)
        end = fetch_header(self._repository, file, target, *how)
        os.truncate(target, file.size)
        self._fetched_alone[path] = [(0, end)]
        if target.suffix.lower() == ".gguf":
            self._fetch_rope_factors(path, end)
        os.utime(target, ns=(_CHANGED_NS, _CHANGED_NS))

    def _fetch_rope_factors(self, path: str, begin: int) -> None:
        """Fetch the RoPE factors of a GGUF file, as far as they lie behind the bytes that are there."""
        file, target = self._files[path], Path(path)
        for tensor in read_gguf_header(find_gguf_file(target)).tensors:
            start = max(tensor.offset, begin)
            if tensor.name != ROPE_FACTORS or tensor.end <= start or tensor.end - start > _MAX_CONFIG_BYTES:
                continue
            with contextlib.closing(self._repository.pieces(file, start, tensor.end)) as pieces:
                content = b"".join(pieces)
            with target.open("r+b") as stream:
                stream.seek(start)
                stream.write(content)
            self._fetched_alone[path].append((start, tensor.end))

    def _fetch(self, path: str) -> None:
        file, target = self._files[path], Path(path)
        self._repository.fetch([file], self._store.blobs, self.count, self._stop)
        blob = self._store.blobs / file.key
        if not blob.exists():
            raise DownloadError(f"the download of {file.name} was ended")
        # The plan was made by the header that came first, before there was a hash to check it by.
        alone = self._fetched_alone.pop(path, [])
        if any(_part(blob, *place) != _part(target, *place) for place in alone):
            blob.unlink()
            raise DownloadError(
                f"{self._repository.url}: the header of {file.name} was another one when it was fetched alone: it was "
                "damaged on the way. Start again"
            )
        os.utime(blob, ns=(_CHANGED_NS, _CHANGED_NS))
        os.replace(blob, target)
        self._mark(path).touch()
        with self._lock:
            self.here.add(path)


def mark_name(file: RemoteFile) -> str:
    """The name of the mark of a whole file: by its path too, as several files may have the same content."""
    return hashlib.sha256(f"{file.key} {file.name}".encode()).hexdigest() + _WHOLE_SUFFIX


def _safetensors_header_end(path: Path) -> int:
    with path.open("rb") as stream:
        # A length beyond reason is refused by whoever reads the header.
        return 8 + min(int.from_bytes(stream.read(8), "little"), MAX_HEADER)


def _part(path: Path, start: int, stop: int) -> bytes:
    with path.open("rb") as stream:
        stream.seek(start)
        return stream.read(stop - start)
