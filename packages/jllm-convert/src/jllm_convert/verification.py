"""Verification of a checkpoint: chunk checksums, array hashes, and comparison with the source."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jllm_core import checkpoint

from jllm_convert.errors import ConversionError
from jllm_convert.files.paths import checked_path
from jllm_convert.progress_bar import reporting
from jllm_convert.sources.base import IGNORED_FIELDS
from jllm_convert.sources.left_out import in_words, recorded
from jllm_convert.sources.opening import open_source
from jllm_convert.sources.peft_adapter import ADAPTER, AdapterSource
from jllm_convert.writing.memory_budget import DEFAULT_MEMORY, Task, check_memory, run_tasks
from jllm_convert.writing.plan import ConversionPlan, plan_conversion
from jllm_convert.writing.progress import Progress, ProgressCounter
from jllm_convert.writing.tensor_jobs import TensorJob, stored_nbytes

# The most bytes of an array in memory while its chunks are checked and hashed.
_MAX_CHECK_BYTES = 48 << 20
ORBAX_FILES = ("_METADATA", "_CHECKPOINT_METADATA")


@dataclass(frozen=True)
class Damage:
    """A problem of a checkpoint.

    Attributes:
        array: the dotted name of the array; empty for a problem of the checkpoint as a whole.
        problem: a sentence that says what is wrong, where, what was expected and what was found.
    """

    array: str
    problem: str


@dataclass(frozen=True)
class Verification:
    """Result of a verification.

    Attributes:
        path: the checkpoint.
        arrays: how many arrays its manifest lists.
        nbytes: their total size in bytes.
        against: the source that they were compared with, or None.
        damages: the problems, in the order of the model.
        left_out: how many tensors of the source are not in the checkpoint, by what they are.
    """

    path: Path
    arrays: int
    nbytes: int
    against: Path | None
    damages: tuple[Damage, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.damages

    def __str__(self) -> str:
        verdict = "nothing is wrong" if self.ok else f"{len(self.damages):,} problems"
        compared = "" if self.against is None else f", compared with {self.against}"
        without = f" (left out: {in_words(self.left_out)})" if self.left_out else ""
        return f"{self.path}: {self.arrays} arrays, {self.nbytes:,} bytes{compared}: {verdict}{without}"

    def __repr__(self) -> str:
        # Not the generated one: it would list every problem.
        return f"<Verification {self}>"

    def as_dict(self) -> dict[str, Any]:
        """For JSON: ``path``, ``ok``, ``arrays``, ``bytes``, ``against``, ``left_out``: numbers of tensors by what they
        are, and ``problems``: ``array``, ``problem``."""
        return {
            "path": str(self.path),
            "ok": self.ok,
            "arrays": self.arrays,
            "bytes": self.nbytes,
            "against": None if self.against is None else str(self.against),
            "left_out": dict(self.left_out),
            "problems": [{"array": each.array, "problem": each.problem} for each in self.damages],
        }


def verify(
    path: str | Path,
    against: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    memory: int = DEFAULT_MEMORY,
    progress: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Verification:
    """Verify a whole checkpoint, without changing it.

    Args:
        path: the checkpoint.
        against: the folder or file that it was converted from: every array is then made again and compared bit by bit.
            The element type and the quantisation are taken from the checkpoint.
        adapter: the adapter that was merged, where one was, to compare with ``against``.
        memory: bytes of weights to hold in memory at a time.
        progress: draw a bar on standard error, or in a notebook's cell, and print the result at the end.
        on_progress: called as arrays are verified, from one thread at a time.

    Returns:
        All problems. Damage raises no exception here.

    Raises:
        CheckpointError: ``path`` is no checkpoint, or its manifest or architecture cannot be read.
        ConversionError: ``against`` cannot be converted.
    """
    with reporting("verifying", progress, on_progress) as report:
        source, merged = (None if each is None else checked_path(each) for each in (against, adapter))
        if merged is not None and source is None:
            raise ConversionError("an adapter is compared together with the model; say what to compare with (against)")
        found = _verify(checked_path(path), source, merged, memory, report)
    if progress:
        print(found, file=sys.stderr)
    return found


def _verify(
    path: Path,
    source: Path | None,
    adapter: Path | None,
    memory: int,
    on_progress: Callable[[Progress], None] | None,
) -> Verification:
    check_memory(memory)
    manifest, config = checkpoint.read_manifest(path), checkpoint.read_config(path)
    damages = [Damage("", problem) for problem in _structure(path, manifest)]
    try:
        checkpoint.check_against_config(path, config, manifest)
    except checkpoint.CheckpointError as error:
        damages.append(Damage("", str(error)))
    jobs: Sequence[TensorJob] = ()
    left_out: Mapping[str, int] = recorded(manifest.source)
    if source is not None:
        plan, left_out = _plan_like(manifest, source, adapter)
        if plan.config != config:
            damages.append(Damage("", f"{source} has another architecture than {path / checkpoint.MODEL_FILE}"))
        jobs = plan.jobs
        made = {name for job in jobs for name in job.infos}
        damages += [
            Damage(name, f"{name} is in {where}, and not in {other}")
            for names, where, other in (
                (made - set(manifest.arrays), source, path),
                (set(manifest.arrays) - made, path, source),
            )
            for name in sorted(names)
        ]
    # Only the arrays of the manifest are read; what is missing or left over is reported already.
    sizes = {name: _nbytes(entry) for name, entry in manifest.arrays.items()}
    found: dict[str, list[str]] = {name: [] for name in manifest.arrays}
    # With a source every array is read twice: once for its own hash, once to be compared.
    counter = ProgressCounter(len(sizes), sum(sizes.values()) * (1 if source is None else 2), on_progress, "verifying")

    def check(name: str, stopped: Callable[[], bool]) -> None:
        found[name] += _against_manifest(path / checkpoint.WEIGHTS_FOLDER, name, manifest.arrays[name])
        counter.add(sizes[name], arrays=1)

    run_tasks(
        [Task(min(2 * size, _MAX_CHECK_BYTES), partial(check, name), work=2 * size) for name, size in sizes.items()],
        memory,
    )

    def compare(job: TensorJob, stopped: Callable[[], bool]) -> None:
        for name in set(job.infos) & set(found):
            if found[name]:  # a damaged array differs from the source too; one problem of it is enough
                return
        for name, problem in _against_source(path / checkpoint.WEIGHTS_FOLDER, job, limit, stopped).items():
            if name in found:
                found[name].append(problem)
        counter.add(stored_nbytes([job]))

    # A piece of the source and the same piece of the checkpoint are in memory together.
    limit = memory // 8
    run_tasks(
        [Task(2 * each.peak_bytes(limit), partial(compare, each), stored_nbytes([each])) for each in jobs], memory
    )
    damages += [Damage(name, problem) for name, problems in found.items() for problem in problems]
    return Verification(path, len(sizes), sum(sizes.values()), source, tuple(damages), left_out)


def _structure(path: Path, manifest: checkpoint.Manifest) -> list[str]:
    """Problems of the folder: what is missing, or left over beside the arrays that the manifest lists."""
    weights = path / checkpoint.WEIGHTS_FOLDER
    if not weights.is_dir():
        return [f"{weights} is missing"]
    problems = [
        f"{weights / name} is missing: without it orbax does not restore the arrays"
        for name in ORBAX_FILES
        if not (weights / name).is_file()
    ]
    there = {entry.name for entry in weights.iterdir() if entry.is_dir()}
    return problems + [
        f"{weights / name} is left over: the manifest lists no such array"
        for name in sorted(there - set(manifest.arrays))
    ]


def _against_manifest(weights: Path, name: str, entry: dict[str, Any]) -> list[str]:
    """Problems of an array by its manifest entry, its checksums and its hash."""
    try:
        store = checkpoint.ArrayStore.open(weights, name)
        if (list(store.shape), store.dtype.name) != (entry["shape"], entry["dtype"]):
            return [
                f"the array {name} is {store.dtype.name}{list(store.shape)}, "
                f"the manifest says {entry['dtype']}{entry['shape']}"
            ]
        # Checksums first: they say which chunk is damaged, a hash only that something is.
        problems = list(store.damage())
        if problems or "sha256" not in entry:
            return problems or [f"the manifest has no hash of the array {name}"]
        digest = store.digest()
        if digest != entry["sha256"]:
            return [f"the array {name} has the SHA-256 {digest}, the manifest says {entry['sha256']}"]
    except (checkpoint.CheckpointError, OSError) as error:
        return [str(error)]
    return []


def _plan_like(
    manifest: checkpoint.Manifest, source: Path, adapter: Path | None
) -> tuple[ConversionPlan, Mapping[str, int]]:
    """Plan the conversion of the source that writes what the manifest says; count what the source leaves out.

    Raises:
        ConversionError: the source cannot be converted, or would be quantised in another way.
    """
    grid, merged = manifest.quantization, manifest.source.get(ADAPTER)
    if adapter is None and merged is not None:
        name = merged.get("name") if isinstance(merged, dict) else merged
        raise ConversionError(f"the checkpoint has the adapter {name} merged; name its folder too (--adapter, adapter)")
    change = None if adapter is None else AdapterSource(adapter)
    opened = open_source(source, list(manifest.source.get(IGNORED_FIELDS) or ()))
    if grid is None:
        return plan_conversion(opened, manifest.dtype, adapter=change), opened.left_out
    # The same arguments that a user would give, so that verify and convert plan alike.
    embedding = None if grid.embedding is None else f"int{grid.embedding}"
    kind = f"int{grid.bits}"
    plan = plan_conversion(opened, manifest.dtype, kind, grid.group, grid.offsets, embedding, adapter=change)
    if plan.grid != grid:
        raise ConversionError(
            f"{source} would be quantised as {plan.grid and plan.grid.name}, the checkpoint is {grid.name}"
        )
    return plan, opened.left_out


def _against_source(weights: Path, job: TensorJob, limit: int, stopped: Callable[[], bool]) -> dict[str, str]:
    """Compare the arrays of a job with the source; for each that differs, a message with the first index."""
    problems: dict[str, str] = {}
    stores: dict[str, checkpoint.ArrayStore] = {}
    for name, box, expected in job.pieces(limit):
        if stopped():
            return {}
        if name in problems:
            continue  # the pieces of a job cannot be skipped: later ones may be of another array
        try:
            if name not in stores:
                stores[name] = checkpoint.ArrayStore.open(weights, name)
            got = stores[name].read(box)
        except checkpoint.CheckpointError as error:
            problems[name] = str(error)
            continue
        # Compared as whole numbers: NaN differs from itself, and 0.0 equals -0.0.
        bits = f"u{expected.dtype.itemsize}"
        different = np.ascontiguousarray(expected).view(bits) != got.view(bits)
        if different.any():
            inside = np.unravel_index(int(np.argmax(different)), different.shape)
            # The index in the whole array, not in the piece.
            index_in_array = [int(part.start + index) for part, index in zip(box, inside, strict=True)]
            problems[name] = (
                f"the array {name} differs from the source: at {index_in_array} it has {got[inside]}, "
                f"the source gives {expected[inside]}"
            )
    return problems


def _nbytes(entry: dict[str, Any]) -> int:
    """Bytes of an array by its manifest entry; 0 where that makes no sense, which the array's own check reports."""
    try:
        return int(math.prod(entry["shape"]) * checkpoint.dtype_named(entry["dtype"]).itemsize)
    except (TypeError, AttributeError):
        return 0
