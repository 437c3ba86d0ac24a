"""Interrupted conversions: what is kept, what is resumed, and nothing that is half there."""

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jllm_convert import ConversionError, Progress, conversion, convert
from jllm_convert.sources.opening import open_source
from jllm_convert.writing import plan
from jllm_convert.writing.tensor_jobs import PlainTensorJob
from jllm_core import checkpoint
from jllm_core.checkpoint import atomic_rename

Tensors = dict[str, np.ndarray]


@pytest.fixture
def source(
    tmp_path: Path, write_hf: Callable[..., Path], tiny_config: Callable[..., Any], hf_tensors: Callable[..., Tensors]
) -> Path:
    return write_hf(tmp_path / "source", tiny_config(), hf_tensors(tiny_config()), tokenizer={"version": "1.0"})


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out" / "model"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a checkpoint; the times in orbax's own are left out."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "_CHECKPOINT_METADATA"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Reads:
    """Counts the arrays that are read from the source, and breaks the conversion off after some."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.arrays: list[str] = []
        self.after: int | None = None
        self.error: BaseException = OSError(errno.ENOSPC, "No space left on device")
        pieces = PlainTensorJob.pieces

        def counted(job: PlainTensorJob, limit: int) -> Any:
            if self.after is not None and len(self.arrays) >= self.after:
                raise self.error
            self.arrays.append(job.array)
            yield from pieces(job, limit)

        monkeypatch.setattr(PlainTensorJob, "pieces", counted)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    monkeypatch.setattr("jllm_convert.writing.memory_budget.processors", lambda: 1)
    return Reads(monkeypatch)


@pytest.fixture
def uninterrupted(source: Path, tmp_path: Path) -> dict[str, bytes]:
    return contents(convert(source, tmp_path / "reference").path)


def test_a_conversion_goes_on_where_it_was_broken_off(
    source: Path, target: Path, reads: Reads, uninterrupted: dict[str, bytes]
) -> None:
    reads.arrays.clear()
    reads.after = 9
    with pytest.raises(ConversionError, match="No space left on device") as caught:
        convert(source, target)
    assert str(target.with_name(".model.partial")) in caught.value.__notes__[0]
    assert not target.exists()
    first = list(reads.arrays)
    reads.after = None
    seen: list[Progress] = []
    convert(source, target, on_progress=seen.append)
    assert len(reads.arrays) <= 21 + 2, "arrays that were done are read again"
    assert set(reads.arrays) >= set(first)
    assert contents(target) == uninterrupted
    assert files_in(target.parent) == ["model"]
    assert (seen[-1].arrays, seen[-1].nbytes) == (seen[-1].total_arrays, seen[-1].total_nbytes)


@pytest.mark.parametrize("damage", ["bit", "cut", "removed", "metadata"])
def test_what_is_damaged_meanwhile_is_made_again(
    source: Path, target: Path, reads: Reads, uninterrupted: dict[str, bytes], damage: str
) -> None:
    reads.arrays.clear()
    reads.after = 9
    with pytest.raises(ConversionError):
        convert(source, target)
    folder = target.with_name(".model.partial")
    done = [json.loads(line)["array"] for line in (folder / "journal.jsonl").read_text().splitlines()[1:]]
    file = checkpoint.ArrayStore.open(folder / "weights", done[3]).files()[0 if damage == "metadata" else 1]
    if damage == "removed":
        file.unlink()
    elif damage == "bit":
        data = bytearray(file.read_bytes())
        data[0] ^= 1
        file.write_bytes(data)
    else:
        file.write_bytes(file.read_bytes()[:-1])
    reads.after = None
    reads.arrays.clear()
    convert(source, target)
    assert done[3] in reads.arrays
    assert not set(done) - {done[3]} & set(reads.arrays)
    assert contents(target) == uninterrupted


@pytest.mark.parametrize("change", ["source", "dtype", "version", "journal", "line"])
def test_another_conversion_does_not_go_on_with_the_files_of_one(
    source: Path,
    target: Path,
    reads: Reads,
    write_hf: Callable[..., Path],
    tiny_config: Callable[..., Any],
    hf_tensors: Callable[..., Tensors],
    change: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads.after = 9
    with pytest.raises(ConversionError):
        convert(source, target)
    reads.after = None
    reads.arrays.clear()
    journal = target.with_name(".model.partial") / "journal.jsonl"
    if change == "source":
        write_hf(source, tiny_config(), hf_tensors(tiny_config(), seed=1), tokenizer={"version": "1.0"})
    elif change == "version":
        monkeypatch.setattr(plan, "__version__", "99")
    elif change == "journal":
        journal.write_text("{")
    elif change == "line":  # the process died while it wrote
        journal.write_text(journal.read_text()[:-9])
    convert(source, target, "bfloat16" if change == "dtype" else None)
    assert (len(reads.arrays) < 21) is (change == "line")
    fresh = convert(source, target.with_name("fresh"), "bfloat16" if change == "dtype" else None)
    assert contents(target) == contents(fresh.path)


def test_a_failure_that_no_other_try_would_mend_leaves_nothing(source: Path, target: Path, reads: Reads) -> None:
    reads.after, reads.error = 9, ConversionError("layers.0.attn.q cannot be quantised: it is not finite")
    with pytest.raises(ConversionError) as caught:
        convert(source, target)
    assert not hasattr(caught.value, "__notes__")
    assert files_in(target.parent) == []


def test_two_conversions_to_one_name_are_refused(source: Path, target: Path) -> None:
    folder = target.with_name(".model.partial")
    folder.mkdir(parents=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConversionError, match=f"another process is converting to {target}"):
            convert(source, target)
    finally:
        os.close(held)
    convert(source, target)
    assert files_in(target.parent) == ["model"]


def test_a_checkpoint_that_another_conversion_made_meanwhile_is_not_replaced(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is at the destination is looked at before the source is read, and once more under the lock."""
    plan_conversion = plan.plan_conversion

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(conversion, "plan_conversion", plan_conversion)
        convert(source, target, "bfloat16")
        return plan_conversion(*arguments)

    monkeypatch.setattr(conversion, "plan_conversion", meanwhile)
    with pytest.raises(ConversionError, match="exists; choose another name"):
        convert(source, target)
    assert checkpoint.read_manifest(target).dtype == "bfloat16"
    assert files_in(target.parent) == ["model"]


def test_a_partial_folder_that_goes_while_it_is_measured_is_no_error(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk = os.walk

    def gone(folder: Path) -> Any:
        for parent, folders, names in walk(folder):
            yield parent, folders, [*names, "removed"]

    monkeypatch.setattr(os, "walk", gone)
    convert(source, target)


def test_a_refused_conversion_keeps_what_an_interrupted_one_has_written(
    source: Path, target: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads.after = 15
    with pytest.raises(ConversionError):
        convert(source, target)
    usage = shutil.disk_usage(source)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=-1_000_000))
    with pytest.raises(ConversionError, match="make room"):
        convert(source, target)
    monkeypatch.undo()
    monkeypatch.setattr("jllm_convert.writing.memory_budget.processors", lambda: 1)
    again = Reads(monkeypatch)
    convert(source, target)
    assert len(again.arrays) < 15


# ---- exist_ok


def test_the_same_conversion_again_does_nothing(source: Path, target: Path) -> None:
    first = convert(source, target, "bfloat16", exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    again = convert(source, target, "bfloat16", exist_ok=True)
    assert (first.is_new, again.is_new) == (True, False)
    assert (again.manifest, again.config, again.receipt) == (first.manifest, first.config, first.receipt)
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before
    assert files_in(target.parent) == ["model"]


@pytest.mark.parametrize("other", ["options", "source", "quantised", "old"])
def test_another_conversion_under_the_name_is_an_error(source: Path, target: Path, other: str) -> None:
    made = convert(source, target)
    quantised = {"quantize": "int8", "receipt": False}
    options: dict[str, Any] = {"options": {"dtype": "bfloat16"}, "quantised": quantised}.get(other, {})
    if other == "source":
        os.utime(source / "model.safetensors", ns=(1, 1))
    if other == "old":  # of a version that did not write the fingerprint
        del made.manifest.source["fingerprint"]
        made.manifest.write(target)
    with pytest.raises(ConversionError, match=r"is another conversion: of other files .* replace it with overwrite"):
        convert(source, target, exist_ok=True, **options)
    assert convert(source, target, overwrite=True, exist_ok=True, **options).is_new
    assert not convert(source, target, overwrite=True, exist_ok=True, **options).is_new


def test_what_is_no_checkpoint_is_not_replaced_whatever_is_given(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    (target / "thesis.txt").write_text("")
    with pytest.raises(ConversionError, match="is not a JLLM checkpoint, so it is not replaced"):
        convert(source, target, exist_ok=True, overwrite=True)


def test_exist_ok_waits_for_another_conversion(source: Path, target: Path) -> None:
    made: list[bool] = []
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        made.append(convert(source, target, exist_ok=True).is_new)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False, False, False, True]
    assert files_in(target.parent) == ["model"]


def test_a_conversion_that_does_not_fit_on_the_disk_is_refused_before_it_begins(
    source: Path, target: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads.after = 15
    with pytest.raises(ConversionError):
        convert(source, target)
    usage = shutil.disk_usage(source)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=9000))
    reads.after = None
    with pytest.raises(ConversionError, match=r"other needs 18,624 bytes, .* has 9,000 free"):
        convert(source, target.with_name("other"))
    assert files_in(target.parent) == [".model.partial"]
    convert(source, target)  # most of it is written already


def test_an_interrupted_conversion_is_known_again_in_another_process(source: Path) -> None:
    """There the functions that initialise random weights, which descriptions of arrays have too, are others."""
    opened = open_source(source)
    planned = plan.plan_conversion(opened)
    others = [
        replace(job, match=replace(job.match, info=replace(job.match.info, initializer=lambda key, shape, dtype: key)))
        for job in planned.jobs
        if isinstance(job, PlainTensorJob)
    ]
    assert replace(planned, jobs=others).fingerprint(opened) == planned.fingerprint(opened)
    assert replace(planned, jobs=others[1:]).fingerprint(opened) != planned.fingerprint(opened)


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("old", ["checkpoint", "empty", "link"])
def test_what_is_there_is_replaced_without_a_trace(
    source: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool, old: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    if old == "checkpoint":
        convert(source, target)
    elif old == "empty":
        target.mkdir(parents=True)
    else:
        convert(source, elsewhere)
        target.parent.mkdir()
        target.symlink_to(elsewhere)
    if not exchange:
        monkeypatch.setattr(atomic_rename, "_exchange", lambda *_: False)
    convert(source, target, "bfloat16", overwrite=True)
    assert not target.is_symlink()
    assert checkpoint.read_manifest(target).dtype == "bfloat16"
    assert files_in(target.parent) == ["model"]
    if old == "link":
        assert checkpoint.read_manifest(elsewhere).dtype == "float32", "what the link pointed to is not ours to remove"


def test_an_old_checkpoint_that_lost_its_name_to_a_kill_gets_it_back(source: Path, target: Path) -> None:
    convert(source, target)
    before = contents(target)
    target.rename(target.with_name(".model.old"))
    with pytest.raises(ConversionError, match="dtype"):
        convert(source, target, "float8")
    with pytest.raises(ConversionError, match="exists"):
        convert(source, target)
    assert contents(target) == before
    assert files_in(target.parent) == ["model"]


# ---- Kills


def test_kills_at_any_time_leave_a_whole_checkpoint_and_what_can_be_gone_on_with(
    source: Path, target: Path, uninterrupted: dict[str, bytes], write_hf: Callable[..., Path]
) -> None:
    kills = int(os.environ.get("JLLM_TEST_KILLS", "12"))
    convert(source, target, "bfloat16")
    old = contents(target)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jllm_convert.conversion", "orbax.checkpoint", "numpy"])
    for _ in range(2):  # the first one starts the server that the others are forked from
        started = time.monotonic()
        process = context.Process(target=convert, args=(source, target.with_name("timing")), kwargs={"overwrite": True})
        process.start()
        process.join()
        assert process.exitcode == 0
        usual = time.monotonic() - started
    random.seed(0)
    killed = 0
    for _ in range(10 * kills):
        if killed == kills:
            break
        started = time.monotonic()
        process = context.Process(target=convert, args=(source, target), kwargs={"overwrite": True})
        process.start()
        process.join(random.uniform(0, 1.1 * usual))
        with contextlib.suppress(ProcessLookupError):  # it may have ended this very moment
            os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        if process.exitcode == -signal.SIGKILL:
            killed += 1
        else:  # the machine has become faster
            assert process.exitcode == 0
            usual = min(usual, time.monotonic() - started)
        now = contents(target)
        assert now in (old, uninterrupted), "a half checkpoint is under the final name"
        if now == uninterrupted:  # begin again
            convert(source, target, "bfloat16", overwrite=True)
    assert killed == kills
    convert(source, target, overwrite=True)
    assert contents(target) == uninterrupted
    assert files_in(target.parent) == ["model", "timing"]
