"""The command: what it prints where, and its exit codes."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jllm_convert import ConversionError, Progress, convert, export, inspect, verify
from jllm_convert import cli as command
from jllm_convert.__about__ import __version__
from jllm_convert.progress_bar import progress_bar
from jllm_core import checkpoint

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command; gives its exit code and what it wrote to standard output and error."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["jllm-convert", *map(str, arguments)])
        code: Any = 0
        try:
            command.main()
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return run


@pytest.fixture
def source(
    tmp_path: Path,
    write_hf: Callable[..., Path],
    tiny_config: Callable[..., dict[str, Any]],
    hf_tensors: Callable[..., dict[str, np.ndarray]],
) -> Path:
    return write_hf(tmp_path / "source", tiny_config(), hf_tensors(tiny_config()), tokenizer={})


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["convert", "--help"]])
def test_help_is_printed(run: Run, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert out.startswith("Usage: ")


def test_help_of_convert_names_every_option(run: Run) -> None:
    _, out, _ = run("convert", "--help")
    for word in ("SRC", "DST", "--dtype", "keep", "float32", "bfloat16", "--overwrite"):
        assert word in out


def test_the_version_is_printed(run: Run) -> None:
    assert run("--version") == (0, f"jllm-convert, version {__version__}\n", "")


def test_a_conversion_prints_what_it_made(run: Run, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    code, out, err = run("convert", source, target, "--dtype", "bfloat16")
    assert (code, err) == (0, "")
    assert out == f"{target}: 21 arrays, bfloat16, llama, 9.3 kB\n"
    assert checkpoint.read_manifest(target).dtype == "bfloat16"


def test_warnings_go_to_standard_error(run: Run, source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").unlink()
    code, out, err = run("convert", source, tmp_path / "out")
    assert (code, out.count("\n")) == (0, 1)
    assert err == "Warning: source has no tokenizer.json: the model will take token ids only\n"


def test_a_conversion_error_is_a_message_and_exit_code_2(run: Run, source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").unlink()
    code, out, err = run("convert", source, tmp_path / "out")
    assert (code, out) == (2, "")
    assert err.startswith(f"Error: {source} holds no safetensors weights")


def test_a_missing_source_is_a_message_and_exit_code_2(run: Run, tmp_path: Path) -> None:
    code, out, err = run("convert", tmp_path / "nothing", tmp_path / "out")
    assert (code, out) == (2, "")
    assert f"there is nothing at {tmp_path / 'nothing'}" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "a", "b", "--dtype", "float8"], "'float8' is not one of 'keep', 'float32', 'bfloat16', 'float16'"),
        (["convert", "a"], "Missing argument 'DST'"),
        (["convert", "a", "b", "--colour"], "No such option"),
        (["polish"], "No such command 'polish'"),
        (["conver"], "Did you mean 'convert'?"),
        (["convert", "a", "b", "--quantise", "int8"], "Did you mean '--quantize'?"),
        (["convert", "a", "b", "--bits", "8"], "Did you mean '--quantize'?"),
        (["convert", "a", "--out-dir", "b"], "The destination is the second argument: jllm-convert convert SRC DST"),
        (["convert", "a", "--out-dir=b"], "The destination is the second argument: jllm-convert convert SRC DST"),
        (["export", "a", "-o", "b"], "The destination is the second argument: jllm-convert export CHECKPOINT HF_DIR"),
        (["export", "a", "b", "--force"], "Did you mean '--overwrite'?"),
        (["download", "a/b", "--local-dir", "c"], "Did you mean '--dest'?"),
        (["inspect", "a", "--out-dir", "b"], "No such option '--out-dir'."),
    ],
)
def test_bad_usage_is_a_message_and_exit_code_2(run: Run, arguments: list[str], message: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_overwrite_replaces_the_checkpoint(run: Run, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert run("convert", source, target)[0] == 0
    code, _, err = run("convert", source, target, "--dtype", "bfloat16")
    assert code == 2
    assert "--overwrite" in err
    assert run("convert", source, target, "--dtype", "bfloat16", "--overwrite")[0] == 0
    assert checkpoint.read_manifest(target).dtype == "bfloat16"


def test_a_full_disk_is_no_bad_input(run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    code, _, err = run("convert", source, tmp_path / "out")
    assert (code, "free; make room" in err) == (1, True)


def test_a_file_that_is_no_checkpoint_is_called_one(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    for arguments in (["verify", tmp_path / "model.gguf"], ["export", tmp_path / "model.gguf", tmp_path / "out"]):
        code, _, err = run(*arguments)
        assert code == 2
        assert "model.gguf is not a JLLM checkpoint: it is a file. Convert" in err


def test_a_checkpoint_is_inspected_verified_and_exported(run: Run, source: Path, tmp_path: Path) -> None:
    model, back = tmp_path / "model", tmp_path / "back"
    assert run("convert", source, model)[0] == 0
    for path in (source, model):
        code, out, err = run("inspect", path)
        assert (code, err) == (0, "")
        assert "llama" in out
        assert json.loads(run("inspect", path, "--json")[1])["family"] == "llama"
    code, out, err = run("verify", model, "--against", source)
    assert (code, err) == (0, "")
    assert out.endswith(f"compared with {source}: nothing is wrong\n")
    code, out, err = run("export", model, back, "--shard-size", "4kB")
    assert (code, err) == (0, "")
    assert out.startswith(f"{back}: 21 tensors, float32, ")
    assert len(list(back.glob("*.safetensors"))) > 1
    assert run("verify", model, "--against", back)[0] == 0

    (chunk,) = (model / "weights" / "layers.1.attn.q").glob("c*")
    chunk.write_bytes(chunk.read_bytes()[:-1])
    code, out, err = run("verify", model)
    assert code == 1
    assert out.endswith("bytes: 1 problems\n")
    assert "layers.1.attn.q is damaged" in err
    code, out, err = run("verify", model, "--json")
    assert (code, err) == (1, "")
    assert json.loads(out)["problems"][0]["array"] == "layers.1.attn.q"
    code, out, err = run("export", model, tmp_path / "again")
    assert code == 2
    assert "layers.1.attn.q is damaged" in err
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("command", ["inspect", "verify", "export"])
def test_what_is_not_there_is_a_message_and_exit_code_2(run: Run, tmp_path: Path, command: str) -> None:
    more = [tmp_path / "out"] if command == "export" else []
    code, out, err = run(command, tmp_path / "nothing", *more)
    assert (code, out) == (2, "")
    assert str(tmp_path / "nothing") in err


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("64MiB", 64 << 20), ("0.5 GB", 500_000_000), ("67108864", 67108864), ("1tib", 1 << 40), ("2kb", 2000), ("9B", 9)],
)
def test_sizes_are_read(text: str, nbytes: int) -> None:
    assert command.SizeType().convert(text, None, None) == nbytes


@pytest.mark.parametrize("text", ["", "lots", "64 MiBs", "-5", "1e9", "5PB"])
def test_what_is_no_size_is_a_message(run: Run, text: str) -> None:
    code, out, err = run("convert", "a", "b", "--memory", text)
    assert (code, out) == (2, "")
    assert "is not a size; expected a number of bytes, such as 1000000, 256MiB or 5GB" in err


def test_ctrl_c_tells_that_what_is_done_is_kept(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        error = KeyboardInterrupt()
        error.add_note("Finished work is kept")
        raise error

    monkeypatch.setattr("jllm_convert.conversion.convert", interrupt)
    code, out, err = run("convert", source, tmp_path / "out")
    assert (code, out) == (130, "")
    assert err.split("\n")[-3:] == ["Stopped.", "Finished work is kept", ""]


def test_ctrl_c_is_exit_code_130(run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jllm_convert.conversion.convert", interrupt)
    code, out, err = run("convert", source, tmp_path / "out")
    assert (code, out) == (130, "")
    assert err.strip() == "Stopped."


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Called in the test itself: after its fixtures, pytest sets standard error once more."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    return terminal


def test_no_bar_is_drawn_where_standard_error_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar("converting") as on_progress:
        assert on_progress is None


def test_each_step_has_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with progress_bar("the title") as on_progress:
        assert on_progress is not None
        on_progress(Progress(1, 2, 500, 1000, "converting [x]"))
        on_progress(Progress(1, 2, 5, 10, "measuring"))
    shown = terminal.getvalue()
    assert "converting [x]" in shown
    assert "measuring" in shown


def test_progress_draws_a_bar_and_prints_the_result(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = on_terminal(monkeypatch)
    seen: list[Progress] = []
    made = convert(source, tmp_path / "out", progress=True, on_progress=seen.append)
    assert terminal.getvalue().endswith(f"{tmp_path / 'out'}: 21 arrays, float32, llama, 18.6 kB\n")
    assert {progress.step for progress in seen} == {"converting"}
    assert "converting" in terminal.getvalue()
    verify(made.path, progress=True)
    assert terminal.getvalue().endswith("bytes: nothing is wrong\n")
    export(made.path, tmp_path / "back", progress=True)
    assert terminal.getvalue().endswith("bytes in 1 file\n")


def test_results_fit_on_a_line(source: Path, tmp_path: Path) -> None:
    made = convert(source, tmp_path / "out")
    exported = export(made.path, tmp_path / "back")
    for result in (made, made.manifest, exported, verify(made.path), inspect(source), inspect(made.path)):
        text = repr(result)
        assert "\n" not in text
        assert len(text) < 400 + len(str(tmp_path)), text


def test_exist_ok_says_that_it_was_there(run: Run, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    line = f"{target}: 21 arrays, float32, llama, 18.6 kB"
    assert run("convert", source, target, "--exist-ok") == (0, f"{line}\n", "")
    assert run("convert", source, target, "--exist-ok") == (0, f"{line} (it was there)\n", "")


def test_short_helps_are_whole_sentences(run: Run) -> None:
    _, out, _ = run("--help")
    commands = out.partition("Commands:")[2].strip().splitlines()
    assert len(commands) == 5
    assert [line for line in commands if not line.endswith(".") or line.endswith("...")] == []


# ---- The console. Each in a process of its own, as a user starts it.


def program(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "jllm_convert", *map(str, arguments)]
    return subprocess.run(command, check=False, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options})


@pytest.mark.parametrize("command", [["--help"], ["inspect", "SOURCE"], ["inspect", "SOURCE", "--json"]])
def test_an_output_that_nobody_reads_is_no_traceback(source: Path, command: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = program(*(word.replace("SOURCE", str(source)) for word in command), stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("command", [["--help"], ["inspect", "SOURCE"], ["inspect", "SOURCE", "--json"]])
def test_an_output_without_room_is_a_message(source: Path, command: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = program(*(word.replace("SOURCE", str(source)) for word in command), stdout=full)
    assert (done.returncode, done.stderr) == (1, b"Error: the output cannot be written: No space left on device\n")


@pytest.mark.parametrize(
    "locale", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}], ids=str
)
def test_letters_that_the_locale_has_not_are_no_traceback(source: Path, tmp_path: Path, locale: dict[str, str]) -> None:
    names = ["模型", os.fsdecode(b"caf\xe9")]  # the latter is Latin-1, and no UTF-8
    for name in names:
        folder = shutil.copytree(source, tmp_path / name)
        for words in (
            ["inspect", folder],
            ["inspect", folder, "--json"],
            ["convert", folder, f"{folder}.out"],
            ["verify", f"{folder}.out", "--against", folder],
            ["export", f"{folder}.out", f"{folder}.back"],
        ):
            done = program(*words, env={**os.environ, **locale})
            assert (done.returncode, done.stderr) == (0, b""), words
        done = program("inspect", f"{folder}.nothing", env={**os.environ, **locale})
        assert done.returncode == 2
        assert b"Traceback" not in done.stderr


def test_ctrl_c_while_the_modules_are_imported_is_no_traceback() -> None:
    # Ctrl-C comes at the first import after the handler is there, which is before any of ours.
    start = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "jllm_convert.cli":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from jllm_convert.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", start], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_paths_that_cannot_be_are_refused(run: Run, source: Path, tmp_path: Path) -> None:
    for path in ("", "a\0b", "\ud800"):
        with pytest.raises(ConversionError, match="cannot be a path"):
            convert(source, path)


def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "jllm_convert.cli", "convert", tmp_path / "nothing", tmp_path / "out"]
    done = subprocess.run(arguments, env=os.environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"Error: there is nothing at {tmp_path / 'nothing'}; "
        "expected a Hugging Face folder, a .gguf file or a model's name on the hub\n"
    )
