"""The recorder of an engine's steps: its listeners, and the timeline of the last seconds."""

import threading
import time
import weakref
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from jllm_runtime import Engine, EngineConfig, EngineError, EngineStats, SamplingParams
from jllm_runtime.engine import timeline as timeline_module
from jllm_runtime.engine.recorder import Phase, Recorder, Track
from jllm_runtime.engine.timeline import MAX_ROWS, MAX_SPANS, Timeline


def greedy(max_tokens: int, **fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **fields)


class FakeSequence(SimpleNamespace):
    """What a recorder and its listeners read of a sequence, by default one that decodes."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def fake_sequence(**fields: Any) -> Any:
    numbers = {"end": 9, "index": 0, "reused": 0, "preemptions": 0, "computed": 3, "submitted": time.perf_counter()}
    ends = {"request": SimpleNamespace(failed=None), "stream": SimpleNamespace(finish_reason="stop")}
    return FakeSequence(**{"prompt_ids": [1, 2, 3], "token_ids": [4], **numbers, **ends, **fields})


# ---- Listeners that come, go and fail.


@dataclass
class Recorded:
    """A recorder that is driven by hand, with the sequences that it is told to be running."""

    running: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.recorder = Recorder(EngineStats, lambda: self.running, lambda: None)

    def start(self) -> Any:
        sequence = fake_sequence()
        self.recorder.arrive([sequence])
        self.running.append(sequence)
        return sequence

    def step(self) -> None:
        with self.recorder.step(), self.recorder.decode(self.running, 1):
            pass

    def end(self, sequence: Any) -> None:
        self.running.remove(sequence)
        self.recorder.end(sequence)


def test_nothing_is_kept_for_listeners_that_have_gone() -> None:
    recorded, timeline = Recorded(), Timeline()
    recorded.recorder.add(timeline)
    ended, left = recorded.start(), recorded.start()
    recorded.step()
    recorded.recorder.remove(timeline)
    recorded.end(ended)
    recorder = recorded.recorder
    assert (recorder._tracks, recorder._active, recorder._programs) == ({}, {}, [])
    # What goes on is known again where somebody listens again, and nothing of what has ended.
    again = Timeline()
    recorder.add(again)
    recorded.step()
    recorded.end(left)
    rows = again.rows().rows
    assert [(row.ended, [span.phase for span in row.spans]) for row in rows] == [("stop", ["waiting", "decode"])]
    assert (recorder._tracks, recorder._active, recorder._programs) == ({}, {}, [])


def test_rows_that_decode_are_not_looked_at_in_each_step() -> None:
    """The server's timeline listens always, and there may be hundreds of rows."""
    recorded, looks = Recorded(), []

    class Watched(FakeSequence):
        def __getattribute__(self, name: str) -> Any:
            looks.append(name)
            return super().__getattribute__(name)

    recorded.recorder.add(Timeline())
    recorded.running += [Watched(**vars(fake_sequence())) for _ in range(8)]
    recorded.step()
    looks.clear()
    recorded.step()
    assert looks == []


def test_a_preemption_is_seen_beside_an_end() -> None:
    recorded, timeline = Recorded(), Timeline()
    recorded.recorder.add(timeline)
    first, second = recorded.start(), recorded.start()
    recorded.step()
    recorded.end(first)
    recorded.running.remove(second)
    recorded.step()
    second.computed = 0
    recorded.running.append(second)
    recorded.step()
    second.computed = 3
    recorded.step()
    assert [[span.phase for span in row.spans] for row in timeline.rows().rows] == [
        ["waiting", "decode"],
        ["waiting", "decode", "preempted", "prefill", "decode"],
    ]


def test_a_listener_without_the_attributes_is_refused_where_it_is_added() -> None:
    recorded = Recorded()
    listener: Any = object()
    with pytest.raises(AttributeError, match="exact"):
        recorded.recorder.add(listener)
    recorded.start()
    recorded.step()


@pytest.mark.parametrize("call", ["entered", "ended", "stepped", "close"])
def test_a_listener_that_fails_is_told_no_more_and_the_engine_goes_on(
    call: str, tiny, prompt, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail(*_: Any) -> None:
        calls.append(call)
        raise ValueError("a bug of the listener")

    broken, timeline = Timeline(), Timeline()
    monkeypatch.setattr(broken, "steps", True)
    monkeypatch.setattr(broken, call, fail)
    with Engine(tiny.plain, EngineConfig(pages=64)) as engine:
        engine.recorder.add(broken)
        engine.recorder.add(timeline)
        for size in (5, 6):
            assert engine.submit(prompt(size), greedy(3)).result().finish_reason == "length"
    assert calls == [call]
    assert [row.ended for row in timeline.rows().rows] == ["length", "length"]
    [record] = [record for record in caplog.records if "told no more" in record.getMessage()]
    assert "a bug of the listener" in str(record.exc_info)


def test_listeners_do_not_hold_up_callers(tiny, prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what ends well, and of what fails."""
    told = []
    with Engine(tiny.plain, EngineConfig(pages=64)) as engine:
        timeline = Timeline()

        def ended(track: Track, reason: str, at: float) -> None:
            # What `submit` needs: another thread can have it.
            def take() -> None:
                told.append((reason, taken := engine._changed.acquire(timeout=5)))
                if taken:
                    engine._changed.release()

            caller = threading.Thread(target=take)
            caller.start()
            caller.join()

        monkeypatch.setattr(timeline, "ended", ended)
        engine.recorder.add(timeline)
        engine.submit(prompt(5), greedy(3)).result()
        monkeypatch.setattr(engine._executor, "decode", lambda *_: 1 / 0)
        with pytest.raises(EngineError, match="ZeroDivisionError"):
            engine.submit(prompt(6), greedy(3)).result()
    assert told == [("length", True), ("failed", True)]


# ---- The last seconds.


def test_the_timeline_has_the_phases_of_running_and_ended_sequences(tiny, prompt) -> None:
    timeline = Timeline()
    with Engine(tiny.plain, EngineConfig(pages=64)) as engine:
        engine.recorder.add(timeline)
        engine.submit(prompt(70), greedy(4)).result()
        engine.submit(prompt(70), greedy(4)).result()
        engine.recorder.remove(timeline)
        engine.submit(prompt(70), greedy(4)).result()
    first, second = timeline.rows().rows
    assert [span.phase for span in first.spans] == ["waiting", "prefill", "decode"]
    assert [(row.number, row.prompt_tokens, row.generated_tokens, row.ended) for row in (first, second)] == [
        (1, 70, 4, "length"),
        (2, 70, 4, "length"),
    ]
    assert (first.reused_tokens, second.reused_tokens) == (0, 64)
    for row in (first, second):
        assert all(span.start >= span.end >= 0 for span in row.spans)
        assert [span.end for span in row.spans[:-1]] == [span.start for span in row.spans[1:]]


def test_the_timeline_forgets_and_has_no_more_than_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(timeline_module.time, "perf_counter", lambda: now)
    timeline, ended = Timeline(), [Track(number, fake_sequence()) for number in range(1, MAX_ROWS + 11)]
    for track in ended:
        timeline.entered(track, "waiting", 990.0)
        timeline.ended(track, "stop", 995.0 + track.number / 100)
    live = Track(100, fake_sequence())
    timeline.entered(live, "waiting", 960.0)
    timeline.entered(live, "decode", 965.0)
    shown = timeline.rows()
    # The one that runs, and the last of the others.
    assert [row.number for row in shown.rows] == [*range(12, MAX_ROWS + 11), 100]
    assert shown.left_out == 1  # older ones are not kept
    assert [(span.phase, span.start, span.end) for span in shown.rows[-1].spans] == [("decode", 35.0, 0.0)]
    now = 1026.0
    assert [row.number for row in timeline.rows().rows] == [100]


def test_the_timeline_keeps_no_sequence_that_has_ended() -> None:
    timeline, sequence = Timeline(), fake_sequence(token_ids=[4, 5], reused=2)
    kept = weakref.ref(sequence)
    track = Track(1, sequence)
    timeline.entered(track, "waiting", time.perf_counter())
    timeline.ended(track, "stop", time.perf_counter())
    del sequence, track
    assert kept() is None
    [row] = timeline.rows().rows
    assert (row.prompt_tokens, row.reused_tokens, row.generated_tokens) == (3, 2, 2)


def test_the_timeline_forgets_by_age_without_a_reader() -> None:
    timeline = Timeline()
    for number, end in ((1, 1000.0), (2, 1020.0), (3, 1031.0)):
        timeline.entered(Track(number, fake_sequence()), "waiting", 990.0)
        timeline.ended(Track(number, fake_sequence()), "stop", end)
    assert [kept.number for kept in timeline._ended] == [2, 3]


def test_the_timeline_has_the_times_of_phases_that_are_no_longer_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1050.0
    monkeypatch.setattr(timeline_module.time, "perf_counter", lambda: now)
    timeline, track = Timeline(), Track(1, fake_sequence())
    phases: list[tuple[Phase, float]] = [("waiting", 1000.0), ("prefill", 1001.5), ("decode", 1004.0)]
    phases += [("preempted", 1010.0), ("prefill", 1011.0), ("decode", 1013.0)]
    for phase, at in phases:
        timeline.entered(track, phase, at)
    times = {"waiting": 1.5, "prefill": 2.5 + 2, "decode": 6 + 37.0, "preempted": 1.0}
    [row] = timeline.rows().rows
    assert [span.phase for span in row.spans] == ["decode"]
    assert row.times == times
    timeline.ended(track, "length", 1052.0)
    now = 1060.0
    [row] = timeline.rows().rows
    assert row.times == {**times, "decode": 6 + 39.0}


def test_the_timeline_has_the_times_of_more_phases_than_it_keeps() -> None:
    timeline, track = Timeline(), Track(1, fake_sequence())
    timeline.entered(track, "waiting", 0.0)
    for number in range(2 * MAX_SPANS):
        timeline.entered(track, ("prefill", "preempted")[number % 2], 1.0 + number)
    timeline.ended(track, "stop", 1.0 + 2 * MAX_SPANS)
    assert timeline._ended[0].times == {"waiting": 1, "prefill": MAX_SPANS, "preempted": MAX_SPANS}
