"""Contents of the cache on disk: converted models, unfinished conversions, compiled programs."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jllm_core import checkpoint, file_locks
from jllm_core.errors import JLLMError

from jllm_runtime.errors import CacheError

Kind = Literal["model", "unfinished", "programs"]

MODELS_FOLDER, USES_FOLDER, SOURCES_FOLDER = "converted", ".uses", ".sources"
"""Folders of jllm-convert's resolver: its checkpoints, the marks of their use, the hashes of their sources."""

# A conversion that was killed, or runs; and a checkpoint whose replacement, or removal here, was killed.
_UNFINISHED = re.compile(r"\.(.+)\.(partial|old|removed)")
# Folders of compiled programs, and what the files in them are called: nothing else is ever removed there.
_PROGRAMS = {"xla": re.compile(r".+-(cache|atime)"), "kernels": re.compile(r"[^.].*")}


@dataclass(frozen=True)
class Entry:
    """One thing in the cache that can be removed.

    Attributes:
        name: the name to remove it by.
        kind: a converted model, a conversion that is not finished, or a folder of compiled programs.
        path: the folder.
        nbytes: bytes of all files in it.
        used: the time of its last use, in seconds since 1970.
        what: what it is, in a few words.
        in_use: whether a process that runs has loaded it, or is making it.
    """

    name: str
    kind: Kind
    path: Path
    nbytes: int
    used: float
    what: str
    in_use: bool

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the attributes, with ``bytes`` for ``nbytes`` and ``last_use`` for ``used``."""
        return {
            "name": self.name,
            "kind": self.kind,
            "path": str(self.path),
            "bytes": self.nbytes,
            "last_use": self.used,
            "what": self.what,
            "in_use": self.in_use,
        }


def read_cache(root: Path) -> list[Entry]:
    """List the cache, the models first and in each kind what was used last.

    Raises:
        CacheError: the cache cannot be read.
    """
    try:
        entries = [*_models(root / MODELS_FOLDER), *_programs(root)]
    except OSError as error:
        raise CacheError(f"the cache folder {root} cannot be read ({error}); JLLM_CACHE names another place") from error
    kinds: dict[Kind, int] = {"model": 0, "unfinished": 1, "programs": 2}
    return sorted(entries, key=lambda entry: (kinds[entry.kind], -entry.used))


def remove(entry: Entry) -> int:
    """Remove an entry of the cache.

    Returns:
        The bytes that were removed.

    Raises:
        CacheError: it is in use, or it cannot be removed.
    """
    try:
        if entry.kind == "programs":
            return sum(_removed(path) for path in _program_files(entry.path, _PROGRAMS[entry.path.name]))
        with _lock_of(entry.path) as free:
            if not free:
                raise CacheError(f"{entry.name} is in use by a process that runs; end it first")
            return _remove_folder(entry)
    except OSError as error:
        raise CacheError(f"{entry.name} cannot be removed ({error}); see that {entry.path} can be written") from error


def forget_sources(root: Path) -> None:
    """Remove the hashes of sources, which are then read again, and marks of models that are not there any more."""
    models = root / MODELS_FOLDER
    for path in _listed(models / SOURCES_FOLDER):
        if re.fullmatch("[0-9a-f]{64}", path.name) and not path.is_dir():
            path.unlink(missing_ok=True)
    for path in _listed(models / USES_FOLDER):
        if not path.is_dir() and not os.path.lexists(models / path.name):
            path.unlink(missing_ok=True)


def _models(folder: Path) -> Iterator[Entry]:
    for path in _listed(folder):
        unfinished = _UNFINISHED.fullmatch(path.name)
        if not path.is_dir() or path.is_symlink():
            continue
        with _lock_of(path) as free:
            in_use = not free
        used = _changed(folder / USES_FOLDER / path.name) or _changed(path) or 0.0
        if unfinished:
            # By its whole name: a model may have the other part of it.
            yield Entry(path.name, "unfinished", path, _size(path), used, "a conversion that is not finished", in_use)
        elif checkpoint.is_checkpoint(path):
            yield Entry(path.name, "model", path, _size(path), used, _described(path), in_use)


def _described(folder: Path) -> str:
    try:
        manifest = checkpoint.read_manifest(folder)
    except JLLMError:
        return "a checkpoint that cannot be read"
    grid = "" if manifest.quantization is None else f"{manifest.quantization.name} and "
    return f"{manifest.source.get('name', 'a model')} in {grid}{manifest.dtype}"


def _programs(root: Path) -> Iterator[Entry]:
    for name, pattern in _PROGRAMS.items():
        files = list(_program_files(root / name, pattern))
        if files:
            sizes = sum(_file_size(path) for path in files)
            used = max(_changed(path) or 0.0 for path in files)
            yield Entry(name, "programs", root / name, sizes, used, f"{len(files):,} files of compiled programs", False)


def _program_files(folder: Path, pattern: re.Pattern[str]) -> Iterator[Path]:
    return (path for path in _listed(folder) if pattern.fullmatch(path.name) and path.is_file())


@contextlib.contextmanager
def _lock_of(path: Path) -> Iterator[bool]:
    """Lock an entry against those who use it. Yields whether nobody does; where there are no locks, nobody."""
    # Whoever loads a model holds the lock on its mark; whoever makes one, on the folder itself.
    mark = path.parent / USES_FOLDER / path.name
    target = path if _UNFINISHED.fullmatch(path.name) else mark
    if not os.path.lexists(target):
        yield True
        return
    try:
        descriptor = file_locks.lock(target, lambda: target.stat(), wait=False)
    except BlockingIOError:
        yield False
        return
    except OSError:  # such as a file system without locks
        yield True
        return
    try:
        yield True
    finally:
        os.close(descriptor)


def _remove_folder(entry: Entry) -> int:
    """Remove a folder that nobody uses, its name first: nobody may find half of it."""
    folder = entry.path
    if not _UNFINISHED.fullmatch(folder.name):
        folder = entry.path.with_name(f".{entry.path.name}.removed")
        if os.path.lexists(folder):  # what is left of a removal that was killed
            shutil.rmtree(folder)
        os.rename(entry.path, folder)
    size = _size(folder)
    shutil.rmtree(folder)
    (entry.path.parent / USES_FOLDER / entry.path.name).unlink(missing_ok=True)
    return size


def _removed(path: Path) -> int:
    size = _file_size(path)
    path.unlink(missing_ok=True)
    return size


def _listed(folder: Path) -> list[Path]:
    """The entries of a folder; none where it is missing, or is no folder."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _size(folder: Path) -> int:
    """Bytes of all files in a folder. Links are not followed."""
    return sum(_file_size(Path(parent, name)) for parent, _, names in os.walk(folder) for name in names)


def _file_size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:  # removed at this moment
        return 0


def _changed(path: Path) -> float | None:
    try:
        return path.lstat().st_mtime
    except OSError:
        return None


def total(entries: Iterable[Entry]) -> int:
    """Bytes of several entries."""
    return sum(entry.nbytes for entry in entries)
