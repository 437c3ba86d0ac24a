"""Download of a model from the Hugging Face hub: the files that a conversion reads, all of one commit."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Lock

from jllm_convert.errors import ConversionError, DestinationError
from jllm_convert.files.disk_space import file_size, free_space
from jllm_convert.files.model_folder import CONFIG_FILE
from jllm_convert.files.paths import checked_path
from jllm_convert.hub.model_id import ModelId, looks_like_id
from jllm_convert.hub.remote_file import COMMIT, RemoteFile, stays_inside
from jllm_convert.hub.repository import PARTIAL_SUFFIX, Repository
from jllm_convert.hub.selection import config_file, gguf_file, has_model, model_files
from jllm_convert.hub.store import (
    RECORD_FILE,
    CacheStore,
    FolderStore,
    Store,
    cache_folder,
    cached_commit,
    is_whole,
    read_record,
)
from jllm_convert.progress_bar import reporting
from jllm_convert.writing.progress import Progress

OnProgress = Callable[[int, int], None]
"""Callback: the bytes that are here, and the total."""


def download(
    model_id: str,
    dest: str | Path | None = None,
    revision: str | None = None,
    *,
    progress: bool = False,
    on_progress: OnProgress | None = None,
) -> Path:
    """Download a model: its config, tokenizer and safetensors, or one GGUF file, all of one commit.

    An interrupted download is resumed at its last byte. Every file is checked against the hub's hash. The token is the
    one of ``hf auth login`` or ``HF_TOKEN``; ``HF_ENDPOINT``, ``HF_HOME``, ``HF_HUB_CACHE`` and ``HF_HUB_OFFLINE`` mean
    what they mean to huggingface_hub.

    Args:
        model_id: ``owner/name``, or ``owner/name/file.gguf`` for that file alone.
        dest: a folder for the files, and for a record of their origin, ``jllm-download.json``. None is the hub's cache,
            which other programs share.
        revision: a branch, a tag or a commit; None is ``main``.
        progress: draw a bar on standard error, or in a notebook's cell, and print where the model is at the end.
        on_progress: called from one thread at a time, with bytes that never decrease.

    Returns:
        The folder with the model (in the cache, the snapshot of the commit), or the GGUF file.

    Raises:
        ConversionError: the download fails; the message says what to do.
    """
    with reporting(f"downloading {model_id}", progress, None) as report:

        def both(done: int, total: int) -> None:
            if report is not None:
                report(Progress(0, 1, done, total))
            if on_progress is not None:
                on_progress(done, total)

        path = _download(model_id, None if dest is None else checked_path(dest), revision, both)
    if progress:
        print(f"{model_id} is at {path}", file=sys.stderr)
    return path


def _download(model_id: str, dest: Path | None, revision: str | None, on_progress: OnProgress) -> Path:
    from huggingface_hub import constants

    wanted = ModelId.parse(model_id)
    check_revision(revision)
    # Offline, any request to the hub would fail: use what an earlier download left.
    if constants.is_offline_mode():
        return _offline(wanted, dest, revision)
    repository = Repository(wanted.repo, revision or "main")
    store: Store
    if dest is None:
        store = CacheStore(wanted.repo, revision or "main", repository.commit)
    else:
        store = FolderStore(dest, wanted.repo, repository.commit)
    with disk_errors(store):
        files = [gguf_file(repository, wanted.file)] if wanted.file else model_files(repository, store)
        fetch_and_install(repository, store, files, on_progress)
    if isinstance(store, CacheStore):
        store.remember_revision()
    return store.folder / wanted.file if wanted.file else store.folder


def check_revision(revision: str | None) -> None:
    """Refuse a revision that can be none."""
    if revision is not None and (not revision or not stays_inside(revision)):
        raise ConversionError(f"{revision!r} is not a revision; expected a branch, a tag or a commit, such as main")


def download_config(repo: str) -> Path:
    """Download the config.json of a model on the hub to the hub's cache, and nothing else.

    Args:
        repo: ``owner/name``.

    Returns:
        The snapshot's folder, which has config.json and whatever was downloaded before.

    Raises:
        ConversionError: the download fails, or the repository has no model in safetensors.
    """
    from huggingface_hub import constants

    commit = cached_commit(repo, "main")
    if constants.is_offline_mode():
        folder = cache_folder(repo) / "snapshots" / str(commit)
        if not (folder / CONFIG_FILE).is_file():
            raise ConversionError(
                f"offline (HF_HUB_OFFLINE), and the cache has no {CONFIG_FILE} of {repo}; unset HF_HUB_OFFLINE to "
                "download it"
            )
        return folder
    repository = Repository(repo, "main")
    store = CacheStore(repo, "main", repository.commit)
    with disk_errors(store):
        fetch_and_install(repository, store, [config_file(repository)], None)
    # A commit that is remembered may have a whole model, for use offline; this one has a file of it.
    if commit is None:
        store.remember_revision()
    return store.folder


def local_path(src: str | Path, revision: str | None = None, on_progress: OnProgress | None = None) -> Path:
    """Find the folder or file of a model. A model on the hub is downloaded, unless it is here already.

    Args:
        src: a path, or a model's name on the hub where no such path exists.
        revision: a branch, a tag or a commit of a model on the hub.
        on_progress: as in ``download``.

    Raises:
        ConversionError: the download fails, or a revision is given with a path.
    """
    if not looks_like_id(str(src)):
        if revision is not None:
            raise ConversionError(f"a revision is for a model on the hub (owner/name), which {src} is not")
        return Path(src)
    try:
        return download(str(src), revision=revision, on_progress=on_progress)
    except ConversionError as error:
        # Of the same class, which says whether another try may succeed.
        raise type(error)(f"there is nothing at {src} on this machine, and as a model of the hub: {error}") from error


def origin(path: Path) -> dict[str, str] | None:
    """Find the origin of a downloaded model: its ``repo`` and its ``revision``, a commit.

    Args:
        path: a folder or a file that ``download`` returned, or another in the hub's cache, with links not followed: a
            file of the cache is a link to a blob, whose path does not say the commit.

    Returns:
        None where nothing records it, or a recorded file is missing or has another size.
    """
    path = Path(os.path.abspath(path))
    # In the hub's cache: models--OWNER--NAME/snapshots/COMMIT/...
    for parent in (path, *path.parents):
        owner = parent.parent.parent.name
        if parent.parent.name == "snapshots" and owner.startswith("models--") and COMMIT.fullmatch(parent.name):
            return {"repo": "/".join(owner.split("--")[1:]), "revision": parent.name}
    # In a folder of the user: its record. A GGUF file may be in a subfolder of the folder with the record.
    for folder in (path,) if path.is_dir() else path.parents:
        record = read_record(folder / RECORD_FILE)
        name = None if folder == path else path.relative_to(folder).as_posix()
        if record is not None:
            return {key: record[key] for key in ("repo", "revision")} if is_whole(folder, record, name) else None
    return None


def fetch_and_install(
    repository: Repository, store: Store, files: Sequence[RemoteFile], on_progress: OnProgress | None
) -> None:
    """Download the blobs that are missing, and install all files."""
    store.check(files)
    # Files with the same content are downloaded once.
    contents = list({file.key: file for file in files}.values())
    total = sum(file.size for file in contents)
    missing = [file for file in contents if store.find(file) is None]
    if missing:
        # Before the check of the disk: without access, its advice would be useless.
        repository.check_access(missing[0])
        _check_space(store, missing)
    elif store.is_installed(files):
        _ByteCounter(total, on_progress).add(total)
        return
    with store.lock():
        # Once more: another process may have downloaded them before this one got the lock.
        store.check(files)
        missing = [file for file in contents if store.find(file) is None]
        count = _ByteCounter(total, on_progress)
        count.add(total - sum(file.size for file in missing))
        repository.fetch(missing, store.blobs, count.add)
        if not store.is_installed(files):
            store.install(files)


def _check_space(store: Store, missing: Sequence[RemoteFile]) -> None:
    """Refuse a download that the disk has no room for. Partial downloads count as done."""
    need = 0
    for file in missing:
        # One with too many bytes is started anew; it must not count for more than the file.
        partial = store.blobs / f"{file.key}{PARTIAL_SUFFIX}"
        need += file.size - min(file_size(partial) or 0, file.size)
    place, free = free_space(store.blobs.absolute())
    if need > free:
        raise DestinationError(
            f"the download needs {need:,} more bytes, and {place} has {free:,} free; free {need - free:,} more, or "
            "choose another place (dest, or HF_HUB_CACHE for the cache)"
        )


@contextlib.contextmanager
def disk_errors(store: Store) -> Iterator[None]:
    """Turn an OSError of the block into a ConversionError with advice."""
    try:
        yield
    except OSError as error:
        advice = "free some space" if error.errno == errno.ENOSPC else "see that it can be written"
        other = "set HF_HUB_CACHE to another folder" if isinstance(store, CacheStore) else "give another one"
        raise DestinationError(f"{store.folder} cannot be used ({error}); {advice}, or {other}") from error


class _ByteCounter:
    """Sum of the bytes that are here, reported only when it grows."""

    def __init__(self, total: int, on_progress: OnProgress | None) -> None:
        self._total, self._on_progress = total, on_progress
        self._here, self._reported = 0, -1
        self._lock = Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self._here += size
            # A server that starts a file anew takes bytes back; a progress bar must not run backwards.
            if self._on_progress is not None and self._here > self._reported:
                self._reported = self._here
                self._on_progress(self._here, self._total)


def _offline(wanted: ModelId, dest: Path | None, revision: str | None) -> Path:
    """Find a model that was downloaded before, without the hub.

    Raises:
        ConversionError: it is not here, or not complete.
    """
    commit = cached_commit(wanted.repo, revision or "main")
    if dest is not None:
        folder = dest
        # A revision that is a branch has a commit only where the cache knows it.
        record = read_record(dest / RECORD_FILE)
        whole = (
            record is not None
            and record["repo"] == wanted.repo
            and (revision is None or record["revision"] == commit)
            and is_whole(dest, record, wanted.file)
        )
    else:
        folder = cache_folder(wanted.repo)
        whole = False
        if commit is not None:
            folder = folder / "snapshots" / commit
            whole = (folder / wanted.file).is_file() if wanted.file else has_model(folder)
    if not whole:
        raise ConversionError(
            f"offline (HF_HUB_OFFLINE), and {folder} has no complete copy of {wanted} at {revision or 'main'}; "
            "unset HF_HUB_OFFLINE to download it"
        )
    return folder / wanted.file if wanted.file else folder
