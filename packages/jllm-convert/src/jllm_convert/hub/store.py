"""Download stores: the cache of huggingface_hub, or a folder of the user.

Both store blobs by their hash first, and install all files when every blob is there, so that a folder with a model in
it never holds half of a download.
"""

import contextlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from jllm_convert.errors import ConversionError
from jllm_convert.files.disk_space import file_size
from jllm_convert.files.model_folder import ModelFolder
from jllm_convert.hub.remote_file import COMMIT, RemoteFile, stays_inside

RECORD_FILE = "jllm-download.json"


class CacheStore:
    """The cache of huggingface_hub: blobs by their hash, and for each commit a folder of links to them.

    Args:
        repo: ``owner/name``.
        revision: the revision that was asked for; stored as a name of ``commit``, for use offline.
        commit: the commit of that revision.
        cache: the cache's folder; None is the user's.
    """

    def __init__(self, repo: str, revision: str, commit: str, cache: Path | None = None) -> None:
        root = cache_folder(repo, cache)
        self.blobs = root / "blobs"
        self.folder = root / "snapshots" / commit
        self._lock_file = root.parent / ".locks" / root.name / "jllm.lock"
        self._commit = commit
        self._reference = None if revision == commit else root / "refs" / revision

    def find(self, file: RemoteFile) -> Path | None:
        """Find the content of a file; None where it is missing. A blob has its name only when it is complete."""
        for path in (self.folder / file.name, self.blobs / file.key):
            if file_size(path) == file.size:
                return path
        return None

    def check(self, files: Sequence[RemoteFile]) -> None:
        """Do nothing: the cache has no files of the user."""

    def is_installed(self, files: Sequence[RemoteFile]) -> bool:
        """Whether every file is installed."""
        return all(file_size(self.folder / file.name) == file.size for file in files)

    def lock(self) -> AbstractContextManager[Any]:
        """Lock the repository's blobs against other processes."""
        return _lock(self._lock_file)

    def install(self, files: Sequence[RemoteFile]) -> None:
        """Link each file to its blob."""
        for file in files:
            link = self.folder / file.name
            if file_size(link) == file.size:
                continue
            link.parent.mkdir(parents=True, exist_ok=True)
            content, new = self.blobs / file.key, _new_name(link)
            # A relative link, so that the cache may be moved.
            try:
                new.symlink_to(os.path.relpath(content, link.parent))
            except OSError:  # such as a file system without links
                shutil.copyfile(content, new)
            # In one step: other programs, which do not know our lock, may install or read the same file.
            os.replace(new, link)

    def remember_revision(self) -> None:
        """Store the commit of the revision, for use offline. A read-only cache stays as it is."""
        if self._reference is not None and _text(self._reference) != self._commit:
            with contextlib.suppress(OSError):
                self._reference.parent.mkdir(parents=True, exist_ok=True)
                _write(self._reference, self._commit)


class FolderStore:
    """A folder of the user. The files become plain files in it, with a record of their origin.

    Args:
        folder: the folder; it need not exist.
        repo: ``owner/name``.
        commit: the commit of the files.
    """

    def __init__(self, folder: Path, repo: str, commit: str) -> None:
        self.folder = folder
        self.blobs = folder / ".jllm-download"
        self._origin = {"repo": repo, "revision": commit}
        self._previous = self.blobs / "previous.json"
        self._record = self._read_record()
        self._same: dict[tuple[str, int], bool] = {}

    def find(self, file: RemoteFile) -> Path | None:
        """Find the content of a file, in the folder or among the blobs; None where it is missing."""
        content = self.blobs / file.key
        if file_size(content) == file.size:
            return content
        return self.folder / file.name if self._is_in_place(file) else None

    def check(self, files: Sequence[RemoteFile]) -> None:
        """Check that the download replaces or joins nothing but an earlier download of the same model.

        Raises:
            ConversionError: the files that are in the way.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise ConversionError(f"{self.folder} is a file; give the name of a folder to download to")
        recorded, names = self._record["files"], {file.name for file in files}
        problems = []
        if recorded and not self._is_of_this_commit():
            of, other = self._record, recorded.keys() - names
            if of["repo"] != self._origin["repo"]:
                problems.append(f"{self.folder} holds files of {of['repo']}; choose another folder")
            elif other:
                problems.append(
                    f"{self.folder} holds {', '.join(sorted(other))} of revision {of['revision']}, which would be "
                    f"mixed with files of {self._origin['revision']}; choose another folder, or remove it first"
                )
        problems += [
            f"{self.folder / file.name} is there and is not the file of {self._origin['repo']}; it is not replaced, "
            "choose another folder"
            for file in files
            if file.name not in recorded and os.path.lexists(self.folder / file.name) and not self._is_in_place(file)
        ]
        if problems:
            raise ConversionError(problems)

    def is_installed(self, files: Sequence[RemoteFile]) -> bool:
        """Whether every file is installed and recorded."""
        recorded = self._record["files"] if self._is_of_this_commit() else {}
        return all(file.name in recorded and self._is_in_place(file) for file in files)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder against other processes; remove the blobs and the lock when the block succeeds."""
        path = self.folder / ".jllm-download.lock"
        with _lock(path):
            # Read again under the lock: another process may have installed files meanwhile.
            self._record = self._read_record()
            yield
            shutil.rmtree(self.blobs, ignore_errors=True)
            with contextlib.suppress(OSError):
                path.unlink()

    def install(self, files: Sequence[RemoteFile]) -> None:
        """Move the blobs to the names of the files, and write the record last."""
        # The record must not be believed while files change. It is kept aside for a run after a kill.
        if (self.folder / RECORD_FILE).exists():
            self.blobs.mkdir(exist_ok=True)
            os.replace(self.folder / RECORD_FILE, self._previous)
        waiting = [file for file in files if not self._is_in_place(file)]
        uses = Counter(file.key for file in waiting)
        for file in waiting:
            path, content = self.folder / file.name, self.blobs / file.key
            path.parent.mkdir(parents=True, exist_ok=True)
            uses[file.key] -= 1
            if uses[file.key]:  # another file has the same content: the last one takes the blob
                # In one step: another process may look at it, before it waits for the lock.
                new = _new_name(path)
                shutil.copyfile(content, new)
                os.replace(new, path)
            else:
                os.replace(content, path)
        # Two downloads of one commit share a folder: a GGUF file beside the safetensors, for example.
        kept = self._record["files"] if self._is_of_this_commit() else {}
        installed = {file.name: {"size": file.size, "sha256": file.sha256} for file in files}
        self._record = {**self._origin, "files": {**kept, **installed}}
        _write(self.folder / RECORD_FILE, json.dumps(self._record, indent=2) + "\n")

    def _read_record(self) -> dict[str, Any]:
        return read_record(self.folder / RECORD_FILE) or read_record(self._previous) or {"files": {}}

    def _is_of_this_commit(self) -> bool:
        return self._origin.items() <= self._record.items()

    def _is_in_place(self, file: RemoteFile) -> bool:
        """Whether the file has its content: by the record where that has the hash, else by reading it, once."""
        path = self.folder / file.name
        if file_size(path) != file.size:
            return False
        recorded = self._record["files"].get(file.name, {}).get("sha256")
        if file.sha256 is not None and recorded is not None:
            return bool(file.sha256 == recorded)
        # Hashing gigabytes takes seconds, and ``check``, ``find`` and ``is_installed`` all ask.
        known = (file.name, path.stat().st_mtime_ns)
        if known not in self._same:
            self._same[known] = file.is_content_of(path)
        return self._same[known]


Store = CacheStore | FolderStore


def cache_folder(repo: str, cache: Path | None = None) -> Path:
    """The folder of a repository in a cache of huggingface_hub; without ``cache`` in the user's."""
    from huggingface_hub import constants

    return (Path(constants.HF_HUB_CACHE) if cache is None else cache) / f"models--{repo.replace('/', '--')}"


def cached_commit(repo: str, revision: str) -> str | None:
    """The commit of a revision when it was last downloaded to the cache, or None."""
    commit = revision if COMMIT.fullmatch(revision) else _text(cache_folder(repo) / "refs" / revision)
    return commit if commit is not None and COMMIT.fullmatch(commit) else None


def read_record(path: Path) -> dict[str, Any] | None:
    """Read a folder's download record: ``repo``, ``revision``, ``files``; None without a valid one."""
    try:
        # The folder may be from a stranger, and the record too.
        record = ModelFolder(path.parent).read_json(path.name) or {}
        names = {name: (int(entry["size"]), entry.get("sha256")) for name, entry in record["files"].items()}
        whole = isinstance(record["repo"], str) and COMMIT.fullmatch(record["revision"])
    except (ConversionError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return dict(record) if whole and all(map(stays_inside, names)) else None


def is_whole(folder: Path, record: dict[str, Any], name: str | None = None) -> bool:
    """Whether the recorded files, or the one named, exist with the recorded sizes."""
    # By sizes, without reading: this is asked each time a model is named.
    files = record["files"]
    names = files if name is None else {name} & files.keys()
    return bool(names) and all(file_size(folder / each) == files[each]["size"] for each in names)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None


def _write(path: Path, text: str) -> None:
    """Write a text file, replacing it atomically."""
    new = _new_name(path)
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def _new_name(path: Path) -> Path:
    """A name beside a file for what is to replace it, which no other process or thread uses."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(path):
        yield
