"""Writer of a checkpoint's arrays: several at a time, keeping those that an interrupted conversion has written."""

import hashlib
import shutil
from collections.abc import Callable, Container, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jllm_core import checkpoint

from jllm_convert.errors import ConversionError
from jllm_convert.writing.memory_budget import Task, run_tasks
from jllm_convert.writing.partial_checkpoint import Entries, PartialCheckpoint
from jllm_convert.writing.progress import Counter, ProgressCounter
from jllm_convert.writing.tensor_jobs import TensorJob, stored_nbytes


class ArrayWriter:
    """Writer of the stored arrays of a model's jobs, all at once or some after others.

    Args:
        made: the folder.
        jobs: all arrays that the folder is to have.
        memory: bytes of weights to hold at a time.
        nonfinite: arrays with numbers that are NaN or infinite, which is known only when they have been read. The other
            ones are written first, so that all of them are known.
        allow_nonfinite: whether these are kept.
    """

    def __init__(
        self,
        made: PartialCheckpoint,
        jobs: Sequence[TensorJob],
        memory: int,
        nonfinite: Container[str] = (),
        allow_nonfinite: bool = False,
    ) -> None:
        self._made, self._memory, self._nonfinite, self._allow_nonfinite = made, memory, nonfinite, allow_nonfinite
        self.counter: Counter = ProgressCounter(len(jobs), stored_nbytes(jobs), None)
        """Counts the bytes and arrays that are written, and reports nothing until it is replaced."""
        self._limit = memory // 4  # at least four jobs at a time fit in the budget
        self._stored = [name for job in jobs for name in job.infos]
        self._entries: Entries = {}
        if not (made.weights / "_METADATA").exists():
            # orbax's metadata is written first. Without it, these are leftovers of a start that was killed.
            for unfinished in made.folder.glob(f"{checkpoint.WEIGHTS_FOLDER}*"):
                shutil.rmtree(unfinished)
            checkpoint.write_orbax_metadata(made.folder, self._stored)

    @property
    def entries(self) -> dict[str, dict[str, Any]]:
        """The manifest entries so far, in the order of the jobs; those of arrays that are not kept are missing."""
        return {name: self._entries[name] for name in self._stored if name in self._entries}

    def keep(self, jobs: Sequence[TensorJob]) -> list[str]:
        """Keep the arrays of some jobs that are written already and whose hashes are right, uncounted.

        Returns:
            Their names. The source is not read.
        """
        kept: list[str] = []

        def keep(job: TensorJob, stopped: Callable[[], bool]) -> None:
            if self._is_kept(job):
                kept.append(job.array)

        done = [job for job in jobs if job.array in self._made.done]
        run_tasks(
            [Task(each.peak_bytes(self._limit), partial(keep, each), stored_nbytes([each])) for each in done],
            self._memory,
        )
        return kept

    def write(self, jobs: Sequence[TensorJob]) -> None:
        """Write the stored arrays of some jobs, and keep those already written whose hashes are right."""
        limit = self._limit
        tasks = [Task(each.peak_bytes(limit), partial(self._write, each), stored_nbytes([each])) for each in jobs]
        run_tasks(tasks, self._memory)

    def _write(self, job: TensorJob, stopped: Callable[[], bool]) -> None:
        made = self._made
        if self._is_kept(job):
            self.counter.add(stored_nbytes([job]), arrays=1)
            return
        try:
            own = _write(made.weights, job, self._limit, self.counter, stopped)
        except ConversionError:  # such as a matrix without numbers, which cannot be quantised
            if job.array not in self._nonfinite or self._allow_nonfinite:
                raise
            return
        if stopped() or (job.array in self._nonfinite and not self._allow_nonfinite):
            return
        # Recorded after its last byte: the journal never names an array that is not complete. Nor one with such
        # numbers: who resumes the conversion reads it again, and so knows of them.
        if job.array not in self._nonfinite:
            made.record(job.array, own)
        self._entries.update(own)
        self.counter.add(0, arrays=1)

    def _is_kept(self, job: TensorJob) -> bool:
        done = self._made.done.get(job.array)
        if done is None or not _still_there(self._made.weights, job, done):
            return False
        self._entries.update(done)
        return True


def _write(weights: Path, job: TensorJob, limit: int, counter: Counter, stopped: Callable[[], bool]) -> Entries:
    """Write one job's arrays and return their manifest entries; none where it was stopped."""
    stores = {name: checkpoint.ArrayStore.create(weights, name, info) for name, info in job.infos.items()}
    hashes = {name: _Hash(store) for name, store in stores.items()}
    for name, box, values in job.pieces(limit):
        if stopped():
            return {}
        stores[name].write(box, values)
        hashes[name].update(box, values)
        counter.add(values.nbytes)
    return {
        name: {"shape": list(store.shape), "dtype": store.dtype.name, "sha256": hashes[name].hexdigest()}
        for name, store in stores.items()
    }


class _Hash:
    """SHA-256 of an array's bytes in C order: of the pieces if they come in that order, else of the file."""

    def __init__(self, store: checkpoint.ArrayStore) -> None:
        self._store, self._hashed, self._rows = store, hashlib.sha256(), 0

    def update(self, box: checkpoint.Box, values: np.ndarray) -> None:
        # Whole rows that follow the last ones: only then are the pieces' bytes in C order.
        next_rows = box[1:] == checkpoint.whole(self._store.shape[1:]) and (not box or box[0].start == self._rows)
        if next_rows:
            self._hashed.update(values.reshape(-1).view(np.uint8).data)
            self._rows = box[0].stop if box else 1

    def hexdigest(self) -> str:
        complete = self._rows == (self._store.shape[0] if self._store.shape else 1)
        return self._hashed.hexdigest() if complete else self._store.digest()


def _still_there(weights: Path, job: TensorJob, done: Entries) -> bool:
    """Whether the arrays of a journal entry are on the disk, undamaged and with the journal's hashes."""
    try:
        return set(done) == set(job.infos) and all(
            not list((store := checkpoint.ArrayStore.open(weights, name)).damage())
            and store.digest() == entry["sha256"]
            for name, entry in done.items()
        )
    except (checkpoint.CheckpointError, OSError):
        return False
