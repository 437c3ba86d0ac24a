"""Progress on a terminal or in a notebook: a line while a model is loaded or programs are compiled."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from threading import Lock, Timer, get_ident

COMPILE_DELAY_S = 0.5
"""Seconds before a compilation is told: a program that was kept on disk is there sooner, and needs no word."""

TRACE_EVENT = "/jax/core/compile/jaxpr_trace_duration"
"""JAX's event of a program that is traced: a scalar when it begins, a duration when it ends. Kernels are compiled
within it."""

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
"""The like of a program that is compiled by XLA, or read from disk."""


def is_shown(progress: bool | None) -> bool:
    """Whether to show progress: as told, and for None where standard error is a terminal or a notebook."""
    return (_is_terminal() or is_notebook()) if progress is None else progress


@contextmanager
def status(text: str, progress: bool | None = None) -> Iterator[None]:
    """Show a line on standard error while the block runs.

    Args:
        text: the line.
        progress: as ``is_shown`` has it.
    """
    line = StatusLine()
    if is_shown(progress):
        line.show(text)
    try:
        yield
    finally:
        line.erase()


@contextmanager
def compile_status(progress: bool | None = None) -> Iterator[None]:
    """Show a line on standard error while programs are compiled within the block, on any thread.

    Args:
        progress: as ``is_shown`` has it.
    """
    if not is_shown(progress):
        yield
        return
    from jllm_runtime.compile_cache import keeps_programs

    line = StatusLine()

    def show(programs: int) -> None:
        kept = ", kept for next time" if keeps_programs() else ""
        line.show(f"compiling {programs} program{'s' if programs > 1 else ''}{kept} ...")

    with watch_compilation(show, line.erase):
        yield


@contextmanager
def watch_compilation(on_start: Callable[[int], None], on_end: Callable[[], None]) -> Iterator[None]:
    """Call back when programs are compiled within the block, on any thread. Nothing is called after the block.

    Args:
        on_start: a program is being traced or compiled, for COMPILE_DELAY_S already. Called with the number of such
            programs since the block began.
        on_end: such a program is traced or compiled, or the block ends.
    """
    watch, watches = _Watch(on_start, on_end), _watches()
    watches.append(watch)
    try:
        yield
    finally:
        watches.remove(watch)
        watch.close()


@dataclass
class _Work:
    """What a thread traces or compiles now: the event that holds all others."""

    event: str
    timer: Timer
    depth: int = 1  # JAX traces one program within another
    told: bool = False


class _Watch:
    """The compilations of one block, each on a thread of its own."""

    def __init__(self, on_start: Callable[[int], None], on_end: Callable[[], None]) -> None:
        self._on_start, self._on_end = on_start, on_end
        self._work: dict[int, _Work] = {}
        # The number of programs that have been told, and the threads that have just traced the last of theirs.
        self._programs = 0
        self._traced: set[int] = set()
        self._closed = False
        self._changed = Lock()

    def begin(self, event: str, thread: int) -> None:
        timer = Timer(COMPILE_DELAY_S, lambda: self._tell(thread, timer))
        timer.daemon = True
        with self._changed:
            if self._closed:  # while JAX was calling here
                return
            if outer := self._work.get(thread):
                outer.depth += 1
                return
            self._work[thread] = _Work(event, timer)
        timer.start()

    def end(self, thread: int) -> None:
        with self._changed:
            if work := self._work.get(thread):  # none where it had begun before the block
                work.depth -= 1
                if not work.depth:
                    self._end(thread)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            for thread in list(self._work):
                self._end(thread)

    def _tell(self, thread: int, timer: Timer) -> None:
        with self._changed:
            work = self._work.get(thread)
            if work is None or work.timer is not timer:  # it has ended while this waited
                return
            # A program that was told while it was traced is compiled next.
            if work.event == TRACE_EVENT or thread not in self._traced:
                self._programs += 1
            work.told = True
            self._on_start(self._programs)

    def _end(self, thread: int) -> None:
        work = self._work.pop(thread)
        work.timer.cancel()
        self._traced.discard(thread)
        if work.told:
            if work.event == TRACE_EVENT:
                self._traced.add(thread)
            self._on_end()


@cache
def _watches() -> list[_Watch]:
    """Those that watch now. JAX is asked to tell once a process, for older releases of it cannot be asked to stop."""
    import jax.monitoring

    watches: list[_Watch] = []

    def begin(event: str, value: float | int, **kwargs: str | int) -> None:
        if event in (TRACE_EVENT, COMPILE_EVENT):
            for watch in tuple(watches):
                watch.begin(event, get_ident())

    def end(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event in (TRACE_EVENT, COMPILE_EVENT):
            for watch in tuple(watches):
                watch.end(get_ident())

    jax.monitoring.register_scalar_listener(begin)
    jax.monitoring.register_event_duration_secs_listener(end)
    return watches


class StatusLine:
    """A line on standard error that can be erased, and leaves what else stands there as it is.

    On a terminal it begins where the cursor is, also behind half an answer, and the cursor stays there. What the
    terminal is too narrow for is not seen.
    """

    def __init__(self) -> None:
        self._text = ""

    def show(self, text: str) -> None:
        """Show a text in place of the last one."""
        if _is_terminal():
            # The cursor is saved and put back, and long texts do not wrap: what is written later goes over it.
            _write(f"\0337\033[?7l\033[K{text}\0338\033[?7h")
        elif is_notebook():
            _write(f"\r{text.ljust(len(self._text))}")
        else:
            _write(f"{text}\n")
        self._text = text

    def erase(self) -> None:
        """Take the text away, if there is one."""
        if self._text and _is_terminal():
            _write("\033[K")
        elif self._text and is_notebook():
            _write(f"\r{' ' * len(self._text)}\r")
        self._text = ""


def _is_terminal() -> bool:
    # A console of Windows takes escape sequences only where somebody has switched them on.
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and os.name == "posix"


def is_notebook() -> bool:
    """Whether standard error is shown by a Jupyter notebook."""
    return type(sys.stderr).__module__.startswith("ipykernel.")


def _write(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # whoever has closed standard error wants no progress
        sys.stderr.write(text)
        sys.stderr.flush()
