"""Partial checkpoint: a folder beside the destination, with a journal, that is renamed when it is complete.

It is called ``.NAME.partial``. Its journal lists the finished arrays, so that the next conversion with the same
fingerprint resumes one that was interrupted.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from jllm_core import checkpoint, file_locks
from jllm_core.checkpoint.atomic_rename import recover, remove, replace_folder

from jllm_convert.errors import BusyError, DestinationError, DownloadError

JOURNAL_FILE = "journal.jsonl"

Entries = dict[str, dict[str, Any]]
"""Manifest entries of the stored arrays that make up one array of the model, by name."""


@dataclass
class PartialCheckpoint:
    """A checkpoint that is being written.

    Attributes:
        folder: its folder.
        done: the arrays that an interrupted conversion has written, by its journal. They must be checked.
    """

    folder: Path
    done: dict[str, Entries]
    _lock: Lock = field(default_factory=Lock)

    @property
    def weights(self) -> Path:
        """The folder of the arrays."""
        return self.folder / checkpoint.WEIGHTS_FOLDER

    def record(self, array: str, entries: Entries) -> None:
        """Record in the journal that an array is written. Several threads may call this."""
        line = json.dumps({"array": array, "entries": entries}) + "\n"
        # One write of one line: a kill leaves whole lines, and perhaps a last part of one.
        with self._lock, open(self.folder / JOURNAL_FILE, "a", encoding="utf-8") as journal:
            journal.write(line)


@contextlib.contextmanager
def locked(dst: Path, *, wait: bool = False) -> Iterator[None]:
    """Lock a checkpoint's name, ``dst``, against other conversions to it, in this process and in others.

    What a conversion decides by what is at ``dst`` holds only as long as it has this lock. A replacement of ``dst``
    that was killed is undone first.

    Args:
        dst: the checkpoint's name.
        wait: whether to wait for another conversion to ``dst``.

    Raises:
        DestinationError: nothing can be written beside ``dst``.
        BusyError: without ``wait``, another conversion to ``dst`` is running.
    """
    folder = partial_folder(dst)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        descriptor = file_locks.lock(folder, lambda: _make_folder(folder), wait=wait)
    except BlockingIOError:
        raise BusyError(f"another process is converting to {dst}; wait for it, or choose another name") from None
    except OSError as error:
        raise DestinationError(f"cannot write beside {dst}: {error}") from error
    try:
        recover(dst)
        yield
    finally:
        # One that was only locked is empty, and goes. After a rename another conversion may have made its own.
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(folder), os.fstat(descriptor)):
                folder.rmdir()
        os.close(descriptor)


def _make_folder(folder: Path) -> None:
    # A link that was at ``dst`` has this name if a process was killed after it had exchanged the names.
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir()


@contextlib.contextmanager
def begin(dst: Path, fingerprint: str, keep: str = "") -> Iterator[PartialCheckpoint]:
    """Start or resume a checkpoint beside ``dst``, and rename it to ``dst`` when the block succeeds.

    The caller must have ``dst`` locked.

    Where the block fails, finished arrays are kept if the same conversion could succeed another time: after Ctrl-C, a
    full disk, a read error. The exception then has a note that says so. A kill keeps them too.

    Args:
        dst: the checkpoint's name. What is there is replaced, in one step where the system can exchange two names.
        fingerprint: identifies the conversion. Only files of one with the same fingerprint are resumed.
        keep: the name of an entry that the caller has put into the folder, and removes when it is done with it. A
            conversion that could succeed another time leaves it, even where no array is finished.

    Raises:
        DestinationError: the folder cannot be written.
    """
    dst = dst.absolute()
    folder = partial_folder(dst)
    try:
        try:
            partial = PartialCheckpoint(folder, finished(folder, fingerprint))
            if not partial.done:
                _reset(folder, fingerprint, keep)
            yield partial
            # Without a journal the folder is not resumed. Sync before the rename: after a power cut, the new name must
            # not lead to empty files.
            (folder / JOURNAL_FILE).unlink()
            checkpoint.sync(folder)
            replace_folder(folder, dst)
        except OSError as error:
            raise DestinationError(f"writing {dst} failed: {error}") from error
    except BaseException as error:
        begun = finished(folder, fingerprint) or (keep and (folder / keep).exists())
        if is_resumable(error) and begun:
            error.add_note(
                f"Finished work is kept in {folder}: the same conversion resumes from it. Remove the folder to "
                "free its space."
            )
        else:
            remove(folder)
        raise


def finished(folder: Path, fingerprint: str) -> dict[str, Entries]:
    """The finished arrays by a folder's journal; none where it has another fingerprint, or cannot be read."""
    try:
        first, *lines = (folder / JOURNAL_FILE).read_text(encoding="utf-8").splitlines(keepends=True)
        if json.loads(first) != {"job": fingerprint}:
            return {}
    except (OSError, ValueError):
        return {}
    done = {}
    for line in lines:
        # The last line is incomplete if the process died while it wrote it.
        with contextlib.suppress(ValueError, KeyError, TypeError):
            fields = json.loads(line)
            done[fields["array"]] = dict(fields["entries"])
    return done


def _reset(folder: Path, fingerprint: str, keep: str) -> None:
    """Empty the folder but for one entry, and start a journal."""
    for entry in folder.iterdir():
        if entry.name != keep:
            remove(entry)
    (folder / JOURNAL_FILE).write_text(json.dumps({"job": fingerprint}) + "\n", encoding="utf-8")


def is_resumable(error: BaseException) -> bool:
    """Whether the same conversion could succeed after this error: it is of the disk, the network or the user."""
    causes = (error, error.__cause__)
    return any(isinstance(cause, OSError | KeyboardInterrupt | DownloadError) for cause in causes)


def partial_folder(dst: Path) -> Path:
    """The folder in which a checkpoint is written before it is renamed to ``dst``."""
    return dst.absolute().with_name(f".{dst.name}.partial")
