"""Progress on standard error: shown where somebody looks, gone when it is over, and never over an answer."""

import io
import re
import threading
from types import SimpleNamespace
from typing import Any

import jax
import jax.monitoring
import pytest
from jllm_runtime import progress
from jllm_runtime.compile_cache import keeps_programs
from jllm_runtime.progress import COMPILE_EVENT, TRACE_EVENT, StatusLine, compile_status, status, watch_compilation
from jllm_runtime.progress_bar import progress_bar

COLUMNS = 20


class Terminal(io.StringIO):
    """A terminal that keeps what it got; ``screen`` is what it shows."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        lines, row, column, saved, wraps = [" " * COLUMNS], 0, 0, (0, 0), True
        for part in re.findall(r"\0337|\0338|\033\[\?7[lh]|\033\[K|[^\033]", self.getvalue()):
            if part == "\0337":
                saved = row, column
            elif part == "\0338":
                row, column = saved
            elif part.startswith("\033[?7"):
                wraps = part.endswith("h")
            elif part == "\033[K":
                lines[row] = lines[row][:column].ljust(COLUMNS)
            elif part == "\r":
                column = 0
            elif part == "\n":
                row, column = row + 1, 0
                lines += [" " * COLUMNS] * (row == len(lines))
            else:
                if column == COLUMNS:
                    row, column = (row + 1, 0) if wraps else (row, COLUMNS - 1)
                    lines += [" " * COLUMNS] * (row == len(lines))
                lines[row] = lines[row][:column] + part + lines[row][column + 1 :]
                column += 1
        assert wraps
        return [line.rstrip() for line in lines]


class Notebook(io.StringIO):
    """Standard error in a notebook."""

    __module__ = "ipykernel.iostream"


class Immediately(threading.Timer):
    """A timer that does not wait."""

    def start(self) -> None:
        self.function(*self.args, **self.kwargs)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    return stand_in(Terminal(), monkeypatch)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilations are told when they begin."""
    monkeypatch.setattr(progress, "Timer", Immediately)


def stand_in(stream: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    # The module's own `sys`: pytest puts its own standard error back in before the test begins.
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))
    monkeypatch.setenv("TERM", "xterm")
    return stream


def compile_a_program() -> None:
    # A function of its own each time is compiled anew each time.
    jax.jit(lambda x: x + 1)(1)


# ---- The line.


def test_a_line_is_shown_and_taken_away(terminal: Terminal) -> None:
    with status("loading a ..."):
        assert terminal.screen() == ["loading a ..."]
    assert terminal.screen() == [""]


def test_it_stands_behind_half_an_answer_and_leaves_it(terminal: Terminal) -> None:
    terminal.write("The capital")
    with status("compiling 1 program ..."):
        assert terminal.screen() == ["The capitalcompilin."]  # the end of what has no room
    terminal.write(" of France is Paris.\n")
    assert terminal.screen() == ["The capital of Franc", "e is Paris.", ""]


def test_what_is_written_meanwhile_goes_over_it(terminal: Terminal) -> None:
    with status("loading a ..."):
        terminal.write("ab")
    terminal.write("c\n")
    assert terminal.screen() == ["abc", ""]


def test_a_longer_text_is_followed_by_a_shorter_one(terminal: Terminal) -> None:
    line = StatusLine()
    line.show("10 programs")
    line.show("9")
    assert terminal.screen() == ["9"]
    line.erase()
    assert terminal.screen() == [""]


def test_an_error_takes_it_away(terminal: Terminal) -> None:
    with pytest.raises(KeyboardInterrupt), status("loading a ..."):
        raise KeyboardInterrupt
    assert terminal.screen() == [""]


def test_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = stand_in(Notebook(), monkeypatch)
    line = StatusLine()
    for text in ("loading a ...", "ready"):
        line.show(text)
    line.erase()
    assert stderr.getvalue() == "\rloading a ...\rready        \r     \r"
    with status("b"):
        assert stderr.getvalue().endswith("\rb")


@pytest.mark.parametrize(("given", "said"), [(None, ""), (False, ""), (True, "loading a ...\n")])
def test_a_file_gets_what_was_asked_for(given: bool | None, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = stand_in(io.StringIO(), monkeypatch)
    with status("loading a ...", given):
        pass
    assert stderr.getvalue() == said


def test_nothing_is_shown_where_it_is_not_wanted(terminal: Terminal, monkeypatch: pytest.MonkeyPatch, at_once) -> None:
    with status("loading a ...", False), compile_status(False):
        compile_a_program()
    monkeypatch.setenv("TERM", "dumb")
    with status("loading a ..."), compile_status():
        compile_a_program()
    assert terminal.getvalue() == ""


def test_a_closed_standard_error_is_no_error(terminal: Terminal) -> None:
    line = StatusLine()
    line.show("loading a ...")
    terminal.isatty = lambda: True  # type: ignore[method-assign] # a closed one would not be asked
    terminal.close()
    line.erase()


def test_a_bar_in_a_notebook(monkeypatch: pytest.MonkeyPatch, at_once) -> None:
    stderr = stand_in(Notebook(), monkeypatch)
    with progress_bar("Generating", 2) as advance:
        advance()
        compile_a_program()
    shown = [text.strip() for text in stderr.getvalue().split("\r")]
    first, second = "Generating: 0 of 2", "Generating: 1 of 2"
    assert shown == ["", first, second, *("Compiling ...", second) * 2, "", ""]  # traced, then compiled


# ---- Compilations.


def test_programs_that_are_compiled_are_counted(terminal: Terminal, at_once) -> None:
    seen = []
    stop = watch_compilation(lambda number: seen.append((number, terminal.screen())), lambda: None)
    compile_a_program()
    # The line is there before the watch looks at it: listeners are called in the order of their registration.
    with compile_status(), stop:
        compile_a_program()
        assert terminal.screen() == [""]
        compile_a_program()
    compile_a_program()
    assert not keeps_programs()
    # Each is traced, then compiled.
    assert seen == [(number, [f"compiling {number} program."]) for number in (1, 1, 2, 2)]
    assert terminal.screen() == [""]


def test_a_program_whose_kernels_take_long_is_told_while_it_is_traced(terminal: Terminal, at_once) -> None:
    """Kernels of the CPU backend are compiled while a program is traced; XLA may need little time afterwards."""
    seen = []

    def program(x: jax.Array) -> jax.Array:
        inner = jax.jit(lambda y: y - 1)(x)
        seen.append(terminal.screen())
        return inner + 1

    with compile_status():
        for _ in range(2):
            jax.jit(lambda x: program(x))(1)
            assert terminal.screen() == [""]
    assert seen == [["compiling 1 program."], ["compiling 2 program."]]


def test_they_are_kept_for_next_time(terminal: Terminal, at_once, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jllm_runtime.compile_cache.keeps_programs", lambda: True)
    with compile_status():
        compile_a_program()
    assert "compiling 1 program, kept for next time ..." in terminal.getvalue()


def test_a_quick_compilation_is_not_told(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "COMPILE_DELAY_S", 60)
    with compile_status():
        compile_a_program()
        timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
        assert all(timer.finished.is_set() for timer in timers)
    assert terminal.getvalue() == ""


def test_a_slow_compilation_is_told_and_a_thread_may_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "COMPILE_DELAY_S", 0.01)
    told, ended = threading.Event(), threading.Event()

    def compile_slowly() -> None:
        jax.monitoring.record_scalar(COMPILE_EVENT, 0.0)
        assert told.wait(10)
        jax.monitoring.record_event_duration_secs(COMPILE_EVENT, 0.0)

    with watch_compilation(lambda number: told.set(), ended.set):
        thread = threading.Thread(target=compile_slowly)
        thread.start()
        assert ended.wait(10)
        thread.join()


def test_a_program_that_is_quickly_compiled_is_not_taken_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    timers: list[Any] = []

    class Kept(threading.Timer):
        def start(self) -> None:
            timers.append(self)

    monkeypatch.setattr(progress, "Timer", Kept)

    def take(event: str, long: bool) -> None:
        jax.monitoring.record_scalar(event, 0.0)
        if long:
            timers[-1].function()
        jax.monitoring.record_event_duration_secs(event, 0.0)

    seen: list[int] = []
    with watch_compilation(seen.append, lambda: None):
        take(TRACE_EVENT, long=True)
        take(COMPILE_EVENT, long=False)
        take(TRACE_EVENT, long=False)
        take(COMPILE_EVENT, long=True)
    assert seen == [1, 2]


def test_a_block_that_ends_first_is_told_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    with watch_compilation(calls.append, lambda: None):
        jax.monitoring.record_scalar(COMPILE_EVENT, 0.0)
        timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
        [timer] = [timer for timer in timers if not timer.finished.is_set()]
    timer.function()  # as if it had been about to begin
    assert calls == []


def test_the_library_shows_it(terminal: Terminal, at_once, friendly_checkpoint, capsys) -> None:
    from jllm_runtime import Engine, EngineConfig, SamplingParams, generate, load_model

    model = load_model(friendly_checkpoint)
    assert f"loading {friendly_checkpoint.name} ..." in terminal.getvalue()
    jax.clear_caches()
    generate(model, "x", SamplingParams(max_tokens=2))
    assert "compiling 1 program ..." in terminal.getvalue()
    before = len(terminal.getvalue())
    jax.clear_caches()
    load_model(friendly_checkpoint, progress=False)
    generate(model, "x", SamplingParams(max_tokens=2), progress=False)
    assert len(terminal.getvalue()) == before
    with Engine(model, EngineConfig(pages=4)) as engine:
        engine.generate(["x"], SamplingParams(max_tokens=2))
    bar = capsys.readouterr().err
    assert "Generating" in bar
    assert len(terminal.getvalue()) == before
