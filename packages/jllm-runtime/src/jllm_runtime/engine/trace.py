"""Trace file of an engine's steps, in the trace event format that Perfetto and Chrome show.

A JSON array of events, one a line. The last line closes it, when the engine is closed; where the process was killed it
is missing, and the viewers do without. https://ui.perfetto.dev opens the file, on the reader's own machine.

Reference: "Trace Event Format" (Google, 2016).
"""

import contextlib
import errno
import io
import json
import logging
import os
import stat
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jllm_core.errors import reason

from jllm_runtime.engine.recorder import Phase, Program, Step, Track
from jllm_runtime.errors import EngineError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

ENGINE, SEQUENCES = 1, 2
"""Process ids of the two groups of tracks: the engine's steps and counters, and a track for each sequence."""

STEPS = 1
"""Thread id of the track of steps."""


def check_trace(path: str | os.PathLike[str] | None) -> None:
    """Refuse a path that no trace can be written to, and leave nothing there. What is there already stays.

    Args:
        path: of the file; None where there is to be no trace.

    Raises:
        EngineError: it is no regular file, its folder is not there, or it may not be written.
    """
    if path is None:
        return
    with _refusal(path):
        _check_regular(path)
        try:
            os.close(os.open(path, os.O_WRONLY))
        except FileNotFoundError:
            # Of a link to nothing it is the file behind it that would be made.
            target = os.path.realpath(path)
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            os.unlink(target)


class TraceFile:
    """Listener that writes a trace file, replacing what is there.

    Tracks and events:

    - *engine*, track *steps*: a slice for each step, with the numbers of its tokens and pages, and in it a slice for
      each program (``prefill`` of a chunk, ``decode``), with its sequences; counters of sequences and of pages.
    - *sequences*: a track for each, with a slice from its arrival to its end, in it the phases ``waiting``,
      ``prefill``, ``decode`` and ``preempted``, and in these the chunks of its prompt.

    Each event is given to the operating system when it is made, so that a killed process loses none.

    Args:
        path: of the file.

    Attributes:
        exact: programs are waited for.
        steps: it is told of steps.

    Raises:
        EngineError: the file cannot be written, or is no regular file.
    """

    exact = True
    steps = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._start = time.perf_counter()
        with _refusal(path):
            _check_regular(path)
            # Not buffered: a line is with the operating system once it is written. `close` closes it.
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
            _lock(self._file)
            self._file.truncate(0)
        self._good = 0  # bytes of whole lines
        self._write(b"[\n")
        self._name("process_name", ENGINE, 0, "engine")
        self._name("process_name", SEQUENCES, 0, "sequences")
        self._name("thread_name", ENGINE, STEPS, "steps")
        started = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._event("i", "started", ENGINE, STEPS, self._start, {"time": started}, s="p")

    def entered(self, track: Track, phase: Phase, at: float) -> None:
        """Begin a phase of a sequence, and end the one before it."""
        sequence = track.sequence
        if phase == "waiting":
            self._name("thread_name", SEQUENCES, track.number, f"sequence {track.number}")
            self._event("M", "thread_sort_index", SEQUENCES, track.number, None, {"sort_index": track.number})
            prompt = len(sequence.prompt_ids)
            args = {"prompt_tokens": prompt, "max_tokens": sequence.end - prompt, "answer": sequence.index}
            self._event("B", f"sequence {track.number}", SEQUENCES, track.number, at, args)
        else:
            self._event("E", track.phase, SEQUENCES, track.number, at, {})
        args = {"reused_tokens": sequence.computed} if phase == "prefill" else {}
        self._event("B", phase, SEQUENCES, track.number, at, args)

    def ended(self, track: Track, reason: str, at: float) -> None:
        """End a sequence's slices."""
        sequence = track.sequence
        args = {
            "finish_reason": reason,
            "generated_tokens": len(sequence.token_ids),
            "reused_tokens": sequence.reused,
            "preemptions": sequence.preemptions,
        }
        self._event("E", track.phase, SEQUENCES, track.number, at, {})
        self._event("E", f"sequence {track.number}", SEQUENCES, track.number, at, args)

    def stepped(self, step: Step) -> None:
        """Write a step, its programs, and the counters at its end."""
        stats = step.stats
        pages = {"in_use": stats.pages_in_use, "idle": stats.pages_idle}
        pages["free"] = stats.pages - sum(pages.values())
        kind = " and ".join(dict.fromkeys(program.name for program in step.programs))
        args = {
            "step": step.number,
            "rows": len({track.number for program in step.programs for track, _, _ in program.parts}),
            "prompt_tokens": step.prompt_tokens,
            "generated_tokens": step.generated_tokens,
            **{f"pages_{name}": count for name, count in pages.items()},
        }
        self._slice(kind, ENGINE, STEPS, step.start, step.end, args)
        for program in step.programs:
            self._program(program)
        self._event("C", "pages", ENGINE, 0, step.end, pages)
        self._event("C", "sequences", ENGINE, 0, step.end, {"running": stats.running, "waiting": stats.waiting})

    def close(self) -> None:
        """Close the array, and the file."""
        self._event("i", "closed", ENGINE, STEPS, time.perf_counter(), {}, end=b"\n]\n", s="p")
        self._file.close()

    def _program(self, program: Program) -> None:
        start, end = program.start, program.end
        numbers = [track.number for track, _, _ in program.parts]
        if program.name == "decode":
            steps = max((count for _, _, count in program.parts), default=0)
            args = {"rows": len(numbers), "steps": steps, "sequences": numbers}
            self._slice("decode", ENGINE, STEPS, start, end, args)
            return
        tokens = sum(count for _, _, count in program.parts)
        args = {"rows": len(numbers), "tokens": tokens, "sequences": numbers}
        self._slice("prefill", ENGINE, STEPS, start, end, args)
        for track, first, count in program.parts:
            self._slice("chunk", SEQUENCES, track.number, start, end, {"first": first, "tokens": count})

    def _name(self, kind: str, process: int, thread: int, name: str) -> None:
        self._event("M", kind, process, thread, None, {"name": name})

    def _slice(self, name: str, process: int, thread: int, start: float, end: float, args: dict[str, Any]) -> None:
        self._event("X", name, process, thread, start, args, dur=round((end - start) * 1e6, 1))

    def _event(
        self,
        kind: str,
        name: str,
        process: int,
        thread: int,
        at: float | None,
        args: dict[str, Any],
        end: bytes = b",\n",
        **more: Any,
    ) -> None:
        """Write an event: ``at`` in seconds, by ``time.perf_counter``; the file's times are microseconds."""
        # A sequence may have been submitted just before the file was begun.
        times = {} if at is None else {"ts": round(max(0.0, at - self._start) * 1e6, 1)}
        event = {"ph": kind, "name": name, "pid": process, "tid": thread, **times, **more, "args": args}
        self._write(json.dumps(event, separators=(",", ":")).encode() + end)

    def _write(self, line: bytes) -> None:
        if self._file.closed:
            return
        try:
            if self._file.write(line) != len(line):
                raise OSError("the line was written in part")
            self._good += len(line)
        except OSError as error:  # most likely a full disk; the answers are worth more than the trace
            with contextlib.suppress(OSError):
                self._file.truncate(self._good)
            with contextlib.suppress(OSError):
                self._file.close()
            logger.warning("the trace %s ends here: %s; the engine goes on", self._path, error)


def _check_regular(path: str | os.PathLike[str]) -> None:
    """Refuse what is there and is no regular file: to open a pipe would wait for its reader."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")


def _lock(file: io.FileIO) -> None:
    """Keep a trace from other engines, which would write into its lines."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise OSError(errno.EBUSY, "another engine writes its trace there") from error
    except OSError:  # a file system without locks
        pass


@contextlib.contextmanager
def _refusal(path: str | os.PathLike[str]) -> Any:
    try:
        yield
    except (OSError, ValueError) as error:
        raise EngineError(
            f"cannot write a trace to {os.fspath(path)!r}: {reason(error)}; expected the path of a file, in a folder "
            "that is there and may be written"
        ) from error
