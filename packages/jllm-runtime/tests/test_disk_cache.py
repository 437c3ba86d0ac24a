"""jllm cache: what it lists, what it removes, and what it leaves alone."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jllm_core import checkpoint, file_locks
from jllm_runtime import cli as command

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("JLLM_CACHE", str(folder))
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command; gives its exit code and what it wrote to standard output and error."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["jllm", "cache", *map(str, arguments)])
        code: Any = 0
        try:
            command.main()
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code or 0, out, err

    return run


def add_model(cache: Path, name: str, used: int = 0) -> Path:
    """Put a checkpoint of 1,000 bytes of arrays into the cache, as the converter's resolver does."""
    folder = cache / "converted" / name
    (folder / "weights" / "a").mkdir(parents=True)
    (folder / "weights" / "a" / "c.0").write_bytes(bytes(1000))
    (folder / checkpoint.MODEL_FILE).write_text("{}")
    checkpoint.Manifest("bfloat16", {}, {"name": f"{name}.gguf"}).write(folder)
    mark = cache / "converted" / ".uses" / name
    mark.parent.mkdir(exist_ok=True)
    mark.touch()
    os.utime(mark, (used, used))
    return folder


def add_programs(cache: Path) -> None:
    for name in ("xla/jit_f-0a-cache", "xla/jit_f-0a-atime", "kernels/0a.o"):
        path = cache / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(100))


@pytest.fixture
def full(cache: Path) -> Path:
    """A cache with two models, an unfinished conversion and programs."""
    add_model(cache, "old-1a-v1", used=1_000)
    add_model(cache, "new-2b-v1", used=1_000_000_000)
    (cache / "converted" / ".half-3c-v1.partial").mkdir()
    (cache / "converted" / ".half-3c-v1.partial" / "journal.jsonl").write_bytes(bytes(50))
    add_programs(cache)
    return cache


def listed(run: Run) -> dict[str, dict[str, Any]]:
    code, out, err = run("--json")
    assert (code, err) == (0, "")
    return {entry["name"]: entry for entry in json.loads(out)["entries"]}


def test_an_empty_cache(run: Run, cache: Path) -> None:
    assert run() == (0, f"nothing in {cache}\n", "")
    assert not cache.exists()
    assert json.loads(run("--json")[1]) == {"folder": str(cache), "bytes": 0, "entries": []}
    assert run("remove", "--all") == (0, f"0 bytes removed from {cache}\n", "")


def test_everything_is_listed_with_sizes_and_last_use(run: Run, full: Path) -> None:
    entries = listed(run)
    assert list(entries) == ["new-2b-v1", "old-1a-v1", ".half-3c-v1.partial", "kernels", "xla"]
    assert [entry["kind"] for entry in entries.values()] == ["model", "model", "unfinished", "programs", "programs"]
    new = entries["new-2b-v1"]
    assert 1000 < new["bytes"] < 3000
    assert (new["last_use"], new["what"], new["in_use"]) == (1e9, "new-2b-v1.gguf in bfloat16", False)
    assert entries["xla"]["bytes"] == 200
    code, out, err = run()
    assert (code, err) == (0, "")
    assert "new-2b-v1.gguf in bfloat16" in out
    assert out.splitlines()[-1].endswith(f" in {full}")


def test_a_model_is_removed_by_its_name_or_a_part_of_it_or_its_path(run: Run, full: Path) -> None:
    size = listed(run)["old-1a-v1"]["bytes"]
    code, out, err = run("remove", "old")
    assert (code, err) == (0, "")
    assert out.startswith(f"removed old-1a-v1: {size / 1000:.1f} kB\n")
    assert not (full / "converted" / "old-1a-v1").exists()
    assert not (full / "converted" / ".uses" / "old-1a-v1").exists()
    assert run("remove", full / "converted" / "new-2b-v1")[0] == 0
    assert list(listed(run)) == [".half-3c-v1.partial", "kernels", "xla"]
    assert run("remove", ".half-3c-v1.partial")[0] == 0
    assert sorted(path.name for path in (full / "converted").iterdir()) == [".uses"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the NAME of what to remove"),
        (["nothing"], "the cache has no 'nothing'"),
        (["new-2b"], ""),
        (["v1"], "'v1' is in several names: "),
        (["/"], "the cache has no '/'"),
        ([".."], "the cache has no '..'"),
        (["new", "nothing"], "the cache has no 'nothing'"),
    ],
)
def test_a_name_that_means_nothing_removes_nothing(run: Run, full: Path, arguments: list[str], message: str) -> None:
    before = listed(run)
    code, _, err = run("remove", *arguments)
    if not message:
        assert code == 0
        return
    assert (code, message in err) == (2, True)
    assert listed(run) == before


def test_programs_are_removed_and_other_files_beside_them_are_not(run: Run, full: Path) -> None:
    (full / "xla" / "thesis.txt").write_text("")
    (full / "thesis.txt").write_text("")
    assert run("remove", "--programs")[0] == 0
    assert list(listed(run)) == ["new-2b-v1", "old-1a-v1", ".half-3c-v1.partial"]
    assert (full / "xla" / "thesis.txt").exists()
    assert (full / "thesis.txt").exists()


def test_all_removes_all_of_ours_and_nothing_else(run: Run, full: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "weights").mkdir(parents=True)
    for name in (checkpoint.MANIFEST_FILE, checkpoint.MODEL_FILE, "weights/numbers"):
        (outside / name).write_text("{}")
    converted = full / "converted"
    (converted / "link-v1").symlink_to(outside)
    (converted / "new-2b-v1" / "weights" / "link").symlink_to(outside)
    (converted / "a folder of mine").mkdir()
    (converted / "a folder of mine" / "thesis.txt").write_text("")
    (converted / ".sources").mkdir()
    (converted / ".sources" / ("0" * 64)).write_text("0" * 64)
    assert run("remove", "--all")[0] == 0
    assert listed(run) == {}
    assert sorted(path.name for path in converted.iterdir()) == [".sources", ".uses", "a folder of mine", "link-v1"]
    assert list((converted / ".sources").iterdir()) == []
    assert list((converted / ".uses").iterdir()) == []
    assert (outside / "weights" / "numbers").exists()
    assert (converted / "a folder of mine" / "thesis.txt").exists()


@pytest.mark.parametrize("entry", ["old-1a-v1", ".half-3c-v1.partial"])
def test_what_is_in_use_is_left_and_said(run: Run, full: Path, entry: str) -> None:
    converted = full / "converted"
    # As a process does that has loaded the model; and one that converts.
    if entry.startswith("."):
        held = file_locks.lock(converted / entry, lambda: None)
    else:
        held = file_locks.lock(converted / ".uses" / entry, lambda: None, shared=True)
    try:
        assert listed(run)[entry]["in_use"]
        code, out, err = run("remove", "--all")
        assert code == 1
        assert err == f"Error: {entry} is in use by a process that runs; end it first\n"
        assert "removed new-2b-v1" in out
        assert list(listed(run)) == [entry]
    finally:
        os.close(held)
    assert run("remove", entry)[0] == 0
    assert listed(run) == {}


def test_a_checkpoint_that_is_damaged_is_listed_and_removed(run: Run, full: Path) -> None:
    (full / "converted" / "old-1a-v1" / checkpoint.MANIFEST_FILE).write_text("damaged")
    assert listed(run)["old-1a-v1"]["what"] == "a checkpoint that cannot be read"
    assert run("remove", "old-1a-v1")[0] == 0


def test_a_cache_that_cannot_be_read_is_a_message(run: Run, full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    code, out, err = run()
    assert (code, out) == (2, "")
    assert "cannot be read" in err
    assert "JLLM_CACHE" in err


def test_a_removal_that_fails_is_a_message(run: Run, full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "rename", refuse)
    code, _, err = run("remove", "old")
    assert code == 1
    assert "Read-only file system" in err


def test_a_temporary_checkpoint_goes_at_the_end_of_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jllm_runtime import loading

    made: list[Path | None] = []

    class Entry:
        def load(self) -> Callable[..., Path]:
            def resolve(name: str, folder: Path | None = None) -> Path:
                made.append(folder)
                return (folder or tmp_path) / "model"

            return resolve

    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [Entry()])
    with loading.temporary_checkpoint("a/b") as path:
        assert path.parent.is_dir()
    assert not path.parent.exists()
    assert loading.resolve_model("a/b") == tmp_path / "model"
    assert made == [path.parent, None]
