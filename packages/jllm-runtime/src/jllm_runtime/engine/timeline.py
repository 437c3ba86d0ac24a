"""Timeline of the last sequences of an engine, for the server's page."""

import threading
import time
from collections import deque
from dataclasses import dataclass, field

from jllm_runtime.engine.recorder import Phase, Step, Track
from jllm_runtime.engine.sequence import Sequence

SECONDS = 30.0
"""Time that the timeline goes back."""

MAX_ROWS = 32
"""Most sequences that are shown, and most that have ended and are kept."""

MAX_SPANS = 64
"""Most phases of a sequence that are kept; one that is preempted again and again has many."""


@dataclass(frozen=True)
class Span:
    """A phase of a sequence.

    Attributes:
        phase: ``"waiting"``, ``"prefill"``, ``"decode"`` or ``"preempted"``.
        start: seconds before now at which it began.
        end: seconds before now at which it ended; 0 where it goes on.
    """

    phase: Phase
    start: float
    end: float


@dataclass(frozen=True)
class TimelineRow:
    """A sequence.

    Attributes:
        number: order of arrival, from 1.
        prompt_tokens: tokens of its prompt.
        reused_tokens: prompt tokens whose keys and values came from the prefix cache.
        generated_tokens: tokens of its answer so far.
        ended: ``"stop"``, ``"length"``, ``"cancelled"`` or ``"failed"``; None while it has not ended.
        spans: its phases of the last seconds, the first one first.
        times: seconds in each phase so far, of those that it was in, also before the last seconds.
    """

    number: int
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    ended: str | None
    spans: list[Span]
    times: dict[Phase, float]


@dataclass(frozen=True)
class TimelineRows:
    """The last seconds of an engine.

    Attributes:
        seconds: how far it goes back.
        rows: sequences, in the order of their arrival: those that run or wait, the oldest first, and as many of those
            that have ended as there is room for, the latest first.
        left_out: sequences of these seconds for which there was no room.
    """

    seconds: float
    rows: list[TimelineRow]
    left_out: int


@dataclass
class _Kept:
    """A sequence that is kept, with its phases and their starts, by ``time.perf_counter``."""

    number: int
    # None once it has ended: only its numbers are kept then, and nothing of its texts.
    sequence: Sequence | None
    numbers: tuple[int, int, int] = (0, 0, 0)
    spans: deque[tuple[Phase, float]] = field(default_factory=lambda: deque(maxlen=MAX_SPANS))
    # Of the phases before the last one; the spans of some may be gone.
    times: dict[Phase, float] = field(default_factory=dict)
    ended: str | None = None
    end: float = 0.0

    def enter(self, phase: Phase, at: float) -> None:
        self.times = self.times_at(at)
        self.spans.append((phase, at))

    def finish(self, reason: str, at: float) -> None:
        self.times = self.times_at(at)
        self.numbers, self.sequence = self.counts(), None
        self.ended, self.end = reason, at

    def times_at(self, at: float) -> dict[Phase, float]:
        """Seconds in each phase, up to a time."""
        if self.ended or not self.spans:
            return self.times
        phase, start = self.spans[-1]
        return {**self.times, phase: self.times.get(phase, 0.0) + at - start}

    def counts(self) -> tuple[int, int, int]:
        """Tokens of the prompt, those of it that were reused, and those of the answer."""
        if self.sequence is None:
            return self.numbers
        return len(self.sequence.prompt_ids), self.sequence.reused, len(self.sequence.token_ids)


class Timeline:
    """Listener that keeps the last seconds. The engine's thread writes, any thread reads."""

    exact = False
    steps = False

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: dict[int, _Kept] = {}
        self._ended: deque[_Kept] = deque(maxlen=MAX_ROWS)

    def entered(self, track: Track, phase: Phase, at: float) -> None:
        """Note a phase of a sequence."""
        with self._lock:
            self._live.setdefault(track.number, _Kept(track.number, track.sequence)).enter(phase, at)

    def ended(self, track: Track, reason: str, at: float) -> None:
        """Note the end of a sequence."""
        with self._lock:
            kept = self._live.pop(track.number, None)
            if kept is not None:
                kept.finish(reason, at)
                self._ended.append(kept)
            self._forget(at)

    def stepped(self, step: Step) -> None:
        """Not called: steps are not kept."""

    def close(self) -> None:
        """What is known may still be read."""

    def rows(self) -> TimelineRows:
        """The last seconds, as of now."""
        now = time.perf_counter()
        with self._lock:
            self._forget(now)
            live, ended = list(self._live.values()), list(self._ended)
            chosen = live[:MAX_ROWS]
            chosen = ended[len(ended) - min(len(ended), MAX_ROWS - len(chosen)) :] + chosen
            rows = [_row(kept, now) for kept in sorted(chosen, key=lambda kept: kept.number)]
        return TimelineRows(SECONDS, rows, len(live) + len(ended) - len(rows))

    def _forget(self, now: float) -> None:
        """Forget what has ended before the last seconds. The lock is held."""
        while self._ended and now - self._ended[0].end >= SECONDS:
            self._ended.popleft()


def _row(kept: _Kept, now: float) -> TimelineRow:
    prompt, reused, generated = kept.counts()
    starts = [start for _, start in kept.spans]
    ends = [*starts[1:], kept.end if kept.ended else now]
    spans = [
        Span(phase, round(now - start, 3), round(now - end, 3))
        for (phase, start), end in zip(kept.spans, ends, strict=True)
        if now - end < SECONDS
    ]
    return TimelineRow(
        number=kept.number,
        prompt_tokens=prompt,
        reused_tokens=reused,
        generated_tokens=generated,
        ended=kept.ended,
        spans=spans,
        times={phase: round(seconds, 3) for phase, seconds in kept.times_at(now).items()},
    )
