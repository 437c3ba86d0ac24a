"""Writer of a checkpoint's arrays: several at a time, keeping those that an interrupted conversion has written."""

import hashlib
import shutil
from collections.abc import Callable, Container, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jllm_core import checkpoint

from jllm_convert.errors import ConversionError
from jllm_convert.writing.memory_budget import Task, run_tasks
from jllm_convert.writing.partial_checkpoint import Entries, PartialCheckpoint
from jllm_convert.writing.progress import Progress, ProgressCounter
from jllm_convert.writing.tensor_jobs import TensorJob, stored_nbytes


def write_arrays(
    made: PartialCheckpoint,
    jobs: Sequence[TensorJob],
    memory: int,
    on_progress: Callable[[Progress], None] | None = None,
    nonfinite: Container[str] = (),
    allow_nonfinite: bool = False,
) -> dict[str, dict[str, object]]:
    """Write the stored arrays of all jobs, and keep those already written whose hashes are right.

    Args:
        made: the folder.
        jobs: the arrays.
        memory: bytes of weights to hold at a time.
        on_progress: called with the bytes and arrays so far.
        nonfinite: arrays with numbers that are NaN or infinite, which is known only when they have been read. The other
            ones are written first, so that all of them are known.
        allow_nonfinite: whether these are kept.

    Returns:
        The manifest entries, in the order of the jobs; those of arrays that are not kept are missing.
    """
    stored = [name for job in jobs for name in job.infos]
    if not (made.weights / "_METADATA").exists():
        # orbax's metadata is written first. Without it, these are leftovers of a start that was killed.
        for unfinished in made.folder.glob(f"{checkpoint.WEIGHTS_FOLDER}*"):
            shutil.rmtree(unfinished)
        checkpoint.write_orbax_metadata(made.folder, stored)
    counter = ProgressCounter(len(jobs), stored_nbytes(jobs), on_progress, "converting")
    entries: Entries = {}

    def write(job: TensorJob, stopped: Callable[[], bool]) -> None:
        done = made.done.get(job.array)
        if done is not None and _still_there(made.weights, job, done):
            entries.update(done)
            counter.add(stored_nbytes([job]), arrays=1)
            return
        try:
            own = _write(made.weights, job, limit, counter, stopped)
        except ConversionError:  # such as a matrix without numbers, which cannot be quantised
            if job.array not in nonfinite or allow_nonfinite:
                raise
            return
        if stopped() or (job.array in nonfinite and not allow_nonfinite):
            return
        # Recorded after its last byte: the journal never names an array that is not complete. Nor one with such
        # numbers: who resumes the conversion reads it again, and so knows of them.
        if job.array not in nonfinite:
            made.record(job.array, own)
        entries.update(own)
        counter.add(0, arrays=1)

    limit = memory // 4  # at least four jobs at a time fit in the budget
    run_tasks([Task(each.peak_bytes(limit), partial(write, each), stored_nbytes([each])) for each in jobs], memory)
    return {name: entries[name] for name in stored if name in entries}


def _write(weights: Path, job: TensorJob, limit: int, counter: ProgressCounter, stopped: Callable[[], bool]) -> Entries:
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
