"""Commands as processes: Ctrl-C at any time, outputs that take no more, locales without all letters."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

JLLM = [sys.executable, "-m", "jllm_runtime"]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
PLAN = ["plan", "Qwen/Qwen3-0.6B", "--topology", "v2-8"]
LOST = """
import gc, signal, sys, threading
from jllm_core import console

def interrupt_once(phase, info):
    gc.callbacks.remove(interrupt_once)
    signal.raise_signal(signal.SIGINT)

def interrupt_the_hook(frame, event, arg):
    if frame.f_code.co_name == "on_unraisable":
        sys.settrace(None)
        signal.raise_signal(signal.SIGINT)

{before}
try:
    with console.interrupts():
        gc.callbacks.append(interrupt_once)
        gc.collect()
        print("not interrupted", threading.Event().wait(60))
except KeyboardInterrupt:
    print("interrupted")
"""
IMPORTING = """
import sys, threading
from jllm_core import console

sys.path.insert(0, sys.argv[1])
try:
    with console.interrupts():
        import interrupted
        print("not interrupted", threading.Event().wait(60))
except KeyboardInterrupt:
    print("interrupted, imported as a whole:", interrupted.whole)
"""
TIMER = """
import threading
from jllm_core import console

try:
    with console.interrupts():
        threading.Timer(60, print, ["late"]).start()
        raise KeyboardInterrupt
except KeyboardInterrupt:
    print("interrupted")
"""
BUSY = """
import hashlib
from jllm_core import console

with console.interrupts():
    while True:
        try:
            print("busy", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in C, where Python handles no signal
        except KeyboardInterrupt:  # it came before that
            continue
"""


@pytest.fixture
def command(friendly_checkpoint: Path) -> list[str]:
    """A short run of ``jllm generate``, whose answer is "Hi, you!"."""
    return [*JLLM, "generate", str(friendly_checkpoint), "--no-compile-cache", "--prompt", "x"]


def run(*command: str, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **options.pop("env", {})}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **options}
    return subprocess.run(command, env=environment, text=True, check=False, **streams)


def test_the_package_is_a_command(command: list[str]) -> None:
    done = run(*command)
    assert (done.returncode, done.stdout) == (0, "Hi, you!\n"), done.stderr


# ---- Ctrl-C.


def test_ctrl_c_while_modules_are_imported_is_no_traceback(command: list[str]) -> None:
    timed = [sys.executable, "-X", "importtime", *command[1:]]
    with subprocess.Popen(timed, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if line.endswith(" click.exceptions\n"):
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130, said
    assert "Traceback" not in said


@pytest.mark.parametrize("before", ["", "sys.settrace(interrupt_the_hook)"], ids=["once", "and where it is noticed"])
def test_an_interrupt_that_python_ignores_comes_again(before: str, run_python: Callable[..., str]) -> None:
    assert run_python(LOST.format(before=before)) == "interrupted\n"


def test_a_second_ctrl_c_ends_what_does_not_hear_the_first() -> None:
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "busy\n"
        # The system keeps one signal of a kind until it is taken, so two at once may be one.
        for _ in range(200):
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
                break
        process.kill()
    assert process.returncode == 130


def test_ctrl_c_stays_ignored_in_a_background_job(command: list[str]) -> None:
    ignored = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", ignored, command[0], "-X", "importtime", *command[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.endswith(" click.exceptions\n") or line.endswith(" jllm_runtime.generation\n"):
            process.send_signal(signal.SIGINT)
    assert process.communicate()[0] == "Hi, you!\n"
    assert process.returncode == 0


# ---- Outputs that take no more.


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
@pytest.mark.parametrize("arguments", [None, PLAN, [*PLAN, "--json"], ["--help"]])
def test_a_full_disk_is_told_in_a_sentence(arguments: list[str] | None, command: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = run(*(command if arguments is None else [*JLLM, *arguments]), stdout=full)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "Error: the output cannot be written: No space left on device"
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.parametrize("arguments", [None, PLAN, [*PLAN, "--json"], ["--help"]])
def test_a_reader_that_has_gone_is_no_error(arguments: list[str] | None, command: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run(*(command if arguments is None else [*JLLM, *arguments]), stdout=writer)
    os.close(writer)
    # `generate` says what it runs on before it answers, and nothing after.
    first = r".* on 1 x cpu, float32 \(.*\)\n" if arguments is None else ""
    assert done.returncode == 141
    assert re.fullmatch(first, done.stderr)


# ---- Locales without all letters.


@pytest.mark.parametrize("locale", [ASCII, {"PYTHONIOENCODING": "ascii"}], ids=["C", "ascii"])
def test_an_answer_that_the_locale_cannot_write(locale: dict[str, str], write_checkpoint) -> None:
    model = write_checkpoint.saying(">漢!")
    command = [*JLLM, "generate", str(model), "--no-compile-cache", "--raw", "--prompt", ">", "--max-tokens", "4"]
    done = run(*command, env=locale)
    assert (done.returncode, done.stdout) == (0, "\\u6f22!\n"), done.stderr
    done = run(*command, "--json", env=locale)
    assert done.stdout.isascii()
    assert json.loads(done.stdout)["text"] == "漢!"


@pytest.mark.parametrize("locale", [ASCII, {"PYTHONIOENCODING": "ascii"}], ids=["C", "ascii"])
def test_a_table_that_the_locale_cannot_write(locale: dict[str, str]) -> None:
    done = run(*JLLM, *PLAN, env=locale)
    assert done.returncode == 0, done.stderr
    assert "GiB" in done.stdout


def test_a_prompt_that_the_locale_cannot_read(command: list[str]) -> None:
    done = run(*command[:-1], "caf\udce9", env=ASCII)
    assert done.returncode == 2
    assert "character 4 is the byte 0xE9" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interrupt_waits_for_the_end_of_an_import(tmp_path: Path) -> None:
    module = tmp_path / "interrupted.py"
    module.write_text("import signal, time\nsignal.raise_signal(signal.SIGINT)\ntime.sleep(0.1)\nwhole = True\n")
    command = [sys.executable, "-c", IMPORTING, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr) == ("interrupted, imported as a whole: True\n", "")


def test_a_process_that_is_interrupted_waits_for_no_timer() -> None:
    result = subprocess.run([sys.executable, "-c", TIMER], capture_output=True, text=True, timeout=30)
    assert (result.stdout, result.stderr) == ("interrupted\n", "")
