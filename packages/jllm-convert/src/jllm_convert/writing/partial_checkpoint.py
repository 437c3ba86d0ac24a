"""A conversion in the making: a folder beside the destination that takes its name once it is whole.

It is called ``.NAME.partial`` and keeps a journal of the arrays that are done, so that a conversion that was broken
off, by whatever, is gone on with by the next one of the same kind.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from jllm_core import checkpoint

from jllm_convert.errors import BusyError, ConversionError
from jllm_convert.writing.atomic_rename import put_in_place, remove

JOURNAL_FILE = "journal.jsonl"

Entries = dict[str, dict[str, Any]]
"""The manifest's entries of what is stored of one array, by name."""


@dataclass
class PartialCheckpoint:
    """A checkpoint that is being written.

    Attributes:
        folder: where.
        done: the arrays that an earlier conversion has written, as its journal has it: to be checked.
    """

    folder: Path
    done: dict[str, Entries]
    _lock: Lock = field(default_factory=Lock)

    @property
    def weights(self) -> Path:
        """The folder of the arrays."""
        return self.folder / checkpoint.WEIGHTS_FOLDER

    def note(self, array: str, entries: Entries) -> None:
        """Note that an array is written. May be called from several threads."""
        line = json.dumps({"array": array, "entries": entries}) + "\n"
        with self._lock, open(self.folder / JOURNAL_FILE, "a", encoding="utf-8") as journal:
            journal.write(line)


@contextlib.contextmanager
def begin(dst: Path, job: str) -> Iterator[PartialCheckpoint]:
    """Begin a checkpoint beside ``dst``, or go on with one; it takes the name ``dst`` when the block ends well.

    Where the block fails, what is done is kept if the same conversion could succeed another time: after Ctrl-C, a full
    disk, a read error. The exception then has a note that says so. A kill leaves it too.

    Args:
        dst: the checkpoint's name. What is there is replaced, in one step where the system can exchange two names.
        job: what makes two conversions the same: only then is what is there gone on with.

    Raises:
        ConversionError: the folder cannot be made, or another process is converting to ``dst``.
    """
    dst = dst.absolute()
    folder = folder_of(dst)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder, dst)
    except OSError as error:
        raise ConversionError(f"cannot write beside {dst}: {error}") from error
    try:
        partial = PartialCheckpoint(folder, _journaled(folder, job))
        if not partial.done:
            _emptied(folder, job)
        try:
            yield partial
            (folder / JOURNAL_FILE).unlink()
            checkpoint.sync(folder)
            put_in_place(folder, dst)
        except OSError as error:
            raise ConversionError(f"writing {dst} failed: {error}") from error
    except BaseException as error:
        if _may_succeed_later(error) and _journaled(folder, job):
            error.add_note(
                f"What is done is kept in {folder}: the same conversion goes on from there. Remove it for its space."
            )
        else:
            remove(folder)
        raise
    finally:
        os.close(lock)


def _locked(folder: Path, dst: Path) -> int:
    """The folder, made and held by this process alone; a descriptor that holds it until it is closed."""
    import fcntl

    while True:
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        if folder.is_symlink():  # where the names were exchanged and the process killed before it removed the old one
            folder.unlink()
            continue
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process may have put it in place, or removed it, between the two calls.
            if os.path.samestat(os.stat(folder), os.fstat(descriptor)):
                return descriptor
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(descriptor)
            raise BusyError(f"another process is converting to {dst}; wait for it, or choose another name") from None
        os.close(descriptor)


def _journaled(folder: Path, job: str) -> dict[str, Entries]:
    """The arrays that the journal says are done; none where it is of another job, or cannot be read."""
    try:
        first, *lines = (folder / JOURNAL_FILE).read_text(encoding="utf-8").splitlines(keepends=True)
        if json.loads(first) != {"job": job}:
            return {}
    except (OSError, ValueError):
        return {}
    done = {}
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # the last one, if the process died writing it
            fields = json.loads(line)
            done[fields["array"]] = dict(fields["entries"])
    return done


def _emptied(folder: Path, job: str) -> None:
    for entry in folder.iterdir():
        remove(entry)
    (folder / JOURNAL_FILE).write_text(json.dumps({"job": job}) + "\n", encoding="utf-8")


def _may_succeed_later(error: BaseException) -> bool:
    causes = (error, error.__cause__)
    return any(isinstance(cause, OSError | KeyboardInterrupt) for cause in causes)


def folder_of(dst: Path) -> Path:
    """Where a checkpoint is written before it gets the name ``dst``."""
    return dst.absolute().with_name(f".{dst.name}.partial")
