"""Recording of an engine's steps and of the phases of its sequences, for a trace file and for the server's page."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field
from typing import Literal, Protocol

from jllm_runtime.engine.scheduler import PromptPage
from jllm_runtime.engine.sequence import Sequence
from jllm_runtime.engine.stats import EngineStats

logger = logging.getLogger(__name__)

Phase = Literal["waiting", "prefill", "decode", "preempted"]
"""Phases of a sequence: in the queue; from its admission to its first token; from there to its end; in the queue again,
because pages had run out."""


@dataclass(eq=False)
class Track:
    """A sequence as it is recorded.

    Attributes:
        number: order of arrival, from 1.
        sequence: the sequence.
        phase: the phase that it is in.
    """

    number: int
    sequence: Sequence
    phase: Phase = "waiting"


@dataclass
class Program:
    """A run of a program on the devices.

    Attributes:
        name: ``"prefill"`` or ``"decode"``.
        start, end: in seconds, by ``time.perf_counter``.
        parts: each sequence in it, the position of its first token in the text, and the number of its tokens. Those of
            decode are the most that it may get.
    """

    name: str
    start: float
    parts: list[tuple[Track, int, int]]
    end: float = 0.0


@dataclass
class Step:
    """A step of the engine that has ended.

    Attributes:
        number: steps that were recorded before, plus one.
        start, end: in seconds, by ``time.perf_counter``.
        programs: what ran in it, in order.
        prompt_tokens: prompt tokens that it computed.
        generated_tokens: tokens of answers that it made.
        stats: statistics at its end.
    """

    number: int
    start: float
    end: float
    programs: list[Program]
    prompt_tokens: int
    generated_tokens: int
    stats: EngineStats


class Listener(Protocol):
    """A receiver of what is recorded. The engine's thread calls it. One that raises an error is told no more.

    Attributes:
        exact: programs are waited for, so that their times are those of the devices. Otherwise a prefill ends when it
            is handed to the devices, and the decode after it takes in its time.
        steps: it is told of steps, too. To put them together takes time in each of them.
    """

    exact: bool
    steps: bool

    def entered(self, track: Track, phase: Phase, at: float) -> None:
        """A sequence enters a phase, at its arrival the first one; ``track`` has the phase that it leaves."""

    def ended(self, track: Track, reason: str, at: float) -> None:
        """A sequence has ended: ``"stop"``, ``"length"``, ``"cancelled"`` or ``"failed"``."""

    def stepped(self, step: Step) -> None:
        """A step has ended. Only those that want ``steps`` are told."""

    def close(self) -> None:
        """The engine is closed."""


@dataclass
class Recorder:
    """Recorder of one engine. Without a listener it does nothing. The engine's thread calls it.

    Args:
        stats: statistics of the engine.
        running: the sequences that run.
        wait: waits until the devices have done what they were given.
    """

    stats: Callable[[], EngineStats]
    running: Callable[[], list[Sequence]]
    wait: Callable[[], None]
    _listeners: tuple[Listener, ...] = ()
    _is_exact: bool = False
    _wants_steps: bool = False
    _tracks: dict[Sequence, Track] = field(default_factory=dict)
    # Those that ran when it last looked; None where some of them have ended. There may be many more that wait.
    _ran: list[Sequence] | None = None
    # Of those that ran, in prefill or decode, and of these those in prefill.
    _active: dict[Sequence, Track] = field(default_factory=dict)
    _in_prefill: dict[Sequence, Track] = field(default_factory=dict)
    _programs: list[Program] = field(default_factory=list)
    _adding: threading.Lock = field(default_factory=threading.Lock)
    # The last listener has gone. What was known for it is for the engine's thread to forget, which may be reading it.
    _is_stale: bool = False
    _arrivals: int = 0
    _steps: int = 0

    def add(self, listener: Listener) -> None:
        """Add a listener. Any thread may call; of what began before it is told the next change."""
        with self._adding:
            self._set_listeners((*self._listeners, listener))

    def remove(self, listener: Listener) -> None:
        """Remove a listener. Any thread may call; it may be told of a step that is under way."""
        with self._adding:
            self._set_listeners(tuple(other for other in self._listeners if other is not listener))
            self._is_stale = self._is_stale or not self._listeners

    def _set_listeners(self, listeners: tuple[Listener, ...]) -> None:
        # Asked here, so that a listener without these attributes is an error of whoever adds it.
        self._is_exact = any(listener.exact for listener in listeners)
        self._wants_steps = any(listener.steps for listener in listeners)
        self._listeners = listeners

    def arrive(self, sequences: Iterable[Sequence]) -> None:
        """Note sequences that have been taken in."""
        if self._is_heard():
            for sequence in sequences:
                self._track(sequence)

    def end(self, sequence: Sequence, failed: bool = False) -> None:
        """Note the end of a sequence."""
        if self._is_heard():
            track, at = self._track(sequence), time.perf_counter()
            reason = "failed" if failed or sequence.request.failed else sequence.stream.finish_reason or "cancelled"
            self._tell(lambda listener: listener.ended(track, reason, at))
        self._tracks.pop(sequence, None)
        self._in_prefill.pop(sequence, None)
        if self._active.pop(sequence, None) is not None:
            self._ran = None

    def prefill(self, pages: ListLike[PromptPage[Sequence]]) -> contextlib.AbstractContextManager[None]:
        """Record what runs inside as the prefill of a chunk."""
        return self._program("prefill", ((page.sequence, page.start, page.stop - page.start) for page in pages))

    def decode(self, sequences: ListLike[Sequence], steps: int) -> contextlib.AbstractContextManager[None]:
        """Record what runs inside as decode steps."""
        return self._program("decode", ((sequence, sequence.computed, steps) for sequence in sequences))

    @contextlib.contextmanager
    def _program(self, name: str, parts: Iterable[tuple[Sequence, int, int]]) -> Iterator[None]:
        if not self._is_heard():
            yield
            return
        # What was admitted or preempted since the last program is in its new phase from here on.
        start = self._observe()
        if not self._wants_steps:
            yield
            return
        program = Program(name, start, [(self._track(sequence), first, count) for sequence, first, count in parts])
        try:
            yield
            if self._is_exact:
                self.wait()
        finally:
            program.end = time.perf_counter()
            self._programs.append(program)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Record what runs inside as a step."""
        if not self._is_heard():
            yield
            return
        before, start = self.stats() if self._wants_steps else None, time.perf_counter()
        self._programs = []
        try:
            yield
        finally:
            if self._is_heard():
                end = self._observe()
                # A listener that came within the step is told of the next one.
                if before is not None and self._programs:
                    self._stepped(before, start, end)
            # They know their sequences, which may have ended.
            self._programs = []

    def _stepped(self, before: EngineStats, start: float, end: float) -> None:
        self._steps += 1
        after = self.stats()
        reused = after.reused_tokens - before.reused_tokens  # counted as prompt tokens, too
        step = Step(
            self._steps,
            start,
            end,
            self._programs,
            prompt_tokens=after.prompt_tokens - before.prompt_tokens - reused,
            generated_tokens=after.generated_tokens - before.generated_tokens,
            stats=after,
        )
        self._tell(lambda listener: listener.stepped(step) if listener.steps else None)

    def close(self) -> None:
        """End what has not ended, and tell the listeners that the engine is closed. The engine's thread has ended."""
        for sequence in list(self._tracks):
            self.end(sequence, failed=True)
        self._tell(lambda listener: listener.close())
        for listener in self._listeners:
            self.remove(listener)

    def _tell(self, news: Callable[[Listener], None]) -> None:
        """Tell all listeners. The answers are worth more than what is recorded of them: one that fails is removed."""
        for listener in self._listeners:
            try:
                news(listener)
            except Exception:
                self.remove(listener)
                logger.exception("%r has failed and is told no more of the engine, which goes on", listener)

    def _is_heard(self) -> bool:
        """Whether there is a listener. What was known for those that have all gone is forgotten before."""
        if self._is_stale:
            # First the flag: it may be raised again meanwhile.
            self._is_stale = False
            self._tracks.clear()
            self._active.clear()
            self._in_prefill.clear()
            self._ran = None
        return bool(self._listeners)

    def _track(self, sequence: Sequence) -> Track:
        if sequence not in self._tracks:
            self._arrivals += 1
            self._tracks[sequence] = track = Track(self._arrivals, sequence)
            self._tell(lambda listener: listener.entered(track, "waiting", sequence.submitted))
        return self._tracks[sequence]

    def _observe(self) -> float:
        """Compare the sequences' phases with those that are known, and return the time."""
        at = time.perf_counter()
        running = self.running()
        # In most steps it is the same ones that run, and they may be hundreds.
        if running != self._ran:
            self._ran, now = list(running), set(running)
            for track in [track for sequence, track in self._active.items() if sequence not in now]:
                self._enter(track, "preempted", at)
            for sequence in self._ran:
                if sequence not in self._active:
                    self._enter(self._track(sequence), _phase(sequence), at)
        # The first token. What decodes goes on to do so, until it ends or is preempted.
        for track in [track for track in self._in_prefill.values() if _phase(track.sequence) == "decode"]:
            self._enter(track, "decode", at)
        return at

    def _enter(self, track: Track, phase: Phase, at: float) -> None:
        self._tell(lambda listener: listener.entered(track, phase, at))
        track.phase = phase
        if phase == "preempted":
            del self._active[track.sequence]
        else:
            self._active[track.sequence] = track
        if phase == "prefill":
            self._in_prefill[track.sequence] = track
        else:
            self._in_prefill.pop(track.sequence, None)


def _phase(sequence: Sequence) -> Phase:
    """The phase of a sequence that runs."""
    # After a preemption some tokens of the answer are known, and computed anew.
    known = len(sequence.prompt_ids) + len(sequence.token_ids)
    return "decode" if sequence.token_ids and sequence.computed >= known - 1 else "prefill"
