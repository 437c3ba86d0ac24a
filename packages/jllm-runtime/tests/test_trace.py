"""The trace of an engine's steps, and the timeline of its last seconds: every sequence, every token, and no harm."""

import io
import itertools
import json
import logging
import os
import threading
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from jllm_runtime import Engine, EngineConfig, EngineError, EngineStats, SamplingParams
from jllm_runtime.engine import timeline as timeline_module
from jllm_runtime.engine.recorder import Phase, Recorder, Track
from jllm_runtime.engine.timeline import MAX_ROWS, MAX_SPANS, Timeline
from jllm_runtime.engine.trace import ENGINE, SEQUENCES, TraceFile, check_trace

KINDS = {"M", "B", "E", "X", "C", "i"}
# So few that the youngest must give way.
TIGHT = EngineConfig(pages=24, page_size=16)


def greedy(max_tokens: int, **fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **fields)


def events_of(path: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(path.read_text())
    return events


def tracks(events: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """The events of each sequence, by their times; of those of one time, in the order of the file."""
    found = defaultdict(list)
    for event in events:
        if event["pid"] == SEQUENCES and event["ph"] in "BEX" and event["tid"]:
            found[event["tid"]].append(event)
    return {number: sorted(own, key=lambda event: event["ts"]) for number, own in found.items()}


def slices(own: list[dict[str, Any]]) -> Iterator[tuple[int, str, float, float]]:
    """Depth, name, start and end of each slice of a track that was begun and ended; all must have been."""
    stack: list[dict[str, Any]] = []
    for event in own:
        if event["ph"] == "B":
            stack.append(event)
        elif event["ph"] == "E":
            begun = stack.pop()
            assert begun["name"] == event["name"]
            yield len(stack), event["name"], begun["ts"], event["ts"]
    assert stack == []


class FakeSequence(SimpleNamespace):
    """What a recorder and its listeners read of a sequence, by default one that decodes."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def fake_sequence(**fields: Any) -> Any:
    numbers = {"end": 9, "index": 0, "reused": 0, "preemptions": 0, "computed": 3, "submitted": time.perf_counter()}
    ends = {"request": SimpleNamespace(failed=None), "stream": SimpleNamespace(finish_reason="stop")}
    return FakeSequence(**{"prompt_ids": [1, 2, 3], "token_ids": [4], **numbers, **ends, **fields})


@pytest.fixture(scope="module")
def traced(tiny, tmp_path_factory) -> tuple[list[dict[str, Any]], EngineStats]:
    """A run with prompts of several chunks, twins, preemptions, a cancelled answer and one that ends at once."""
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    rng = np.random.default_rng(0)
    first, *others, last = [rng.integers(3, 200, size).tolist() for size in (70, *[50] * 6, 20)]
    path.write_text("what was there before, and is longer than a line " * 1000)
    with Engine(tiny.plain, TIGHT, trace=path) as engine:
        with engine._changed:  # all of them before the first step
            requests = [engine.submit(first, greedy(40, n=2))]
            requests += [engine.submit(other, greedy(40)) for other in others]
            gone = engine.submit(last, greedy(100))
            gone.cancel()
        for request in requests:
            request.results()
        engine.submit(first, greedy(3)).result()
        stats = engine.stats()
    return events_of(path), stats


def test_every_event_has_the_fields_of_the_format(traced) -> None:
    events, _ = traced
    assert {event["ph"] for event in events} == KINDS
    for event in events:
        assert {type(event["name"]), type(event["pid"]), type(event["tid"])} == {str, int}
        assert ("ts" in event) == (event["ph"] != "M")
        assert event.get("ts", 0) >= 0
        assert ("dur" in event) == (event["ph"] == "X")
        assert event.get("dur", 0) >= 0
    assert {type(value) for event in events if event["ph"] == "C" for value in event["args"].values()} == {int}
    assert [event["name"] for event in events if event["ph"] == "i"] == ["started", "closed"]


def test_every_sequence_has_a_track_from_its_arrival_to_its_end(traced) -> None:
    events, stats = traced
    found = tracks(events)
    assert len(found) == 2 + 6 + 1 + 1
    names = {event["tid"] for event in events if event["name"] == "thread_name" and event["pid"] == SEQUENCES}
    assert names == set(found)
    reasons = Counter()
    for number, own in found.items():
        all_slices = list(slices(own))
        [(_, name, start, end)] = [one for one in all_slices if one[0] == 0]
        assert name == f"sequence {number}"
        phases = sorted(one for one in all_slices if one[0] == 1)
        phases.sort(key=lambda one: one[2])
        # Without a gap, from the first to the last moment.
        assert [phases[0][2], phases[-1][3]] == [start, end]
        assert all(before[3] == after[2] for before, after in itertools.pairwise(phases))
        last = own[-1]["args"]
        reasons[last["finish_reason"]] += 1
        order = [phase[1] for phase in phases]
        assert order[0] == "waiting"
        assert order.count("preempted") == last["preemptions"]
        if last["finish_reason"] == "length":
            assert order == ["waiting", "prefill", *order[2:-1], "decode"]
    assert reasons == {"length": 9, "cancelled": 1}
    assert stats.preemptions > 0


def test_its_sums_are_those_of_the_statistics(traced) -> None:
    events, stats = traced
    steps = [event for event in events if event["ph"] == "X" and "step" in event["args"]]
    assert [event["args"]["step"] for event in steps] == list(range(1, len(steps) + 1))
    assert sum(event["args"]["generated_tokens"] for event in steps) == stats.generated_tokens == 9 * 40 - 37
    assert sum(event["args"]["prompt_tokens"] for event in steps) == stats.prompt_tokens - stats.reused_tokens
    ends = [own[-1]["args"] for own in tracks(events).values()]
    assert sum(end["generated_tokens"] for end in ends) == stats.generated_tokens
    assert sum(end["reused_tokens"] for end in ends) == stats.reused_tokens > 0
    assert sum(end["preemptions"] for end in ends) == stats.preemptions
    for event in steps:
        assert sum(event["args"][f"pages_{state}"] for state in ("in_use", "idle", "free")) == TIGHT.pages
    last = [event for event in events if event["ph"] == "C"][-2:]
    assert [event["name"] for event in last] == ["pages", "sequences"]
    assert last[1]["args"] == {"running": 0, "waiting": 0}
    assert last[0]["args"]["in_use"] == 0


def test_programs_lie_in_steps_and_chunks_in_the_prefill_of_their_sequences(traced) -> None:
    events, stats = traced
    of_engine = [event for event in events if event["ph"] == "X" and event["pid"] == ENGINE]
    steps = [event for event in of_engine if "step" in event["args"]]
    programs = [event for event in of_engine if "step" not in event["args"]]
    for program in programs:
        start, end = program["ts"], program["ts"] + program["dur"]
        # Times are rounded to a tenth of a microsecond.
        around = [s for s in steps if s["ts"] <= start + 0.2 and end <= s["ts"] + s["dur"] + 0.2]
        assert len(around) == 1
        assert program["name"] in around[0]["name"].split(" and ")
    assert sum(p["args"]["tokens"] for p in programs if p["name"] == "prefill") == (
        stats.prompt_tokens - stats.reused_tokens
    )
    for own in tracks(events).values():
        prefills = [one[2:] for one in slices(own) if one[1] == "prefill"]
        for chunk in (event for event in own if event["name"] == "chunk"):
            start, end = chunk["ts"], chunk["ts"] + chunk["dur"]
            assert any(first <= start + 0.2 and end <= last + 0.2 for first, last in prefills)


def test_it_is_there_line_by_line_while_the_engine_runs(tiny, prompt, tmp_path: Path) -> None:
    """What a killed process leaves: it has no other chance to write."""
    path = tmp_path / "trace.json"
    with Engine(tiny.plain, EngineConfig(pages=64), trace=path) as engine:
        engine.submit(prompt(70), greedy(5)).result()
        text = path.read_text()
        assert text.endswith(",\n")
        events = json.loads(text.removesuffix(",\n") + "]")
        assert all(json.loads(line.removesuffix(",")) for line in text.splitlines()[1:])
        # The answer is given out within the step that ends it, which is not written yet.
        assert [own[-1]["args"]["finish_reason"] for own in tracks(events).values()] == ["length"]
    assert events_of(path)[: len(events)] == events


def test_a_step_that_fails_ends_its_sequences(tiny, prompt, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "trace.json"
    with Engine(tiny.plain, EngineConfig(pages=64), trace=path) as engine:
        failing = threading.Event()
        decode = engine._executor.decode

        def fail_once(*args: Any) -> Any:
            if not failing.is_set():
                failing.set()
                raise RuntimeError("out of memory")
            return decode(*args)

        monkeypatch.setattr(engine._executor, "decode", fail_once)
        with pytest.raises(EngineError, match="out of memory"):
            engine.submit(prompt(5), greedy(5)).result()
        engine.submit(prompt(6), greedy(5)).result()
    found = tracks(events_of(path))
    assert [own[-1]["args"]["finish_reason"] for own in found.values()] == ["failed", "length"]
    assert [len(list(slices(own))) for own in found.values()] == [3, 4]


def test_the_same_tokens_with_a_trace_and_nothing_recorded_without(tiny, prompt, tmp_path: Path) -> None:
    with Engine(tiny.plain, EngineConfig(pages=64)) as engine:
        plain = engine.submit(prompt(70), greedy(9)).result().token_ids
        recorder = engine.recorder
        assert (recorder._tracks, recorder._programs, recorder._steps) == ({}, [], 0)
    with Engine(tiny.plain, EngineConfig(pages=64), trace=tmp_path / "trace.json") as engine:
        assert engine.submit(prompt(70), greedy(9)).result().token_ids == plain


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


# ---- Files that cannot be written.


@pytest.mark.parametrize("name", [".", "none/trace.json", "file/trace.json"])
def test_a_path_that_cannot_be_written_is_refused(name: str, tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match=r"cannot write a trace to .*; expected the path of a file"):
        Engine(tiny.plain, EngineConfig(pages=64), trace=tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_trace_from_before_stays_where_the_engine_does_not_start(tiny, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text("[]")
    with pytest.raises(EngineError, match="batch_sizes"):
        Engine(tiny.plain, EngineConfig(pages=64, batch_sizes=(1,)), trace=path)
    check_trace(path)
    assert path.read_text() == "[]"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="NO named pipes on this system: they go untested")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused: list[str] = []

    def refuse(call: Callable[[Path], object]) -> None:
        with pytest.raises(EngineError) as caught:
            call(tmp_path / "pipe")
        refused.append(str(caught.value))

    for call in (check_trace, TraceFile):
        thread = threading.Thread(target=refuse, args=(call,), daemon=True)
        thread.start()
        thread.join(timeout=10)
    assert [message.split(": ", 1)[1] for message in refused] == [
        "it is no regular file; expected the path of a file, in a folder that is there and may be written"
    ] * 2


def test_a_link_to_nothing_is_followed_and_nothing_left_behind_it(tmp_path: Path) -> None:
    link, target = tmp_path / "link", tmp_path / "target"
    link.symlink_to(target)
    check_trace(link)
    assert (link.is_symlink(), target.exists()) == (True, False)
    TraceFile(link).close()
    assert [event["name"] for event in events_of(target) if event["ph"] == "i"] == ["started", "closed"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="NO /dev/full on this system: a full disk goes untested")
def test_a_full_disk_ends_the_trace_and_not_the_engine(
    tiny, prompt, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = TraceFile(tmp_path / "trace.json")
    file._file.close()
    file._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with caplog.at_level(logging.WARNING), Engine(tiny.plain, EngineConfig(pages=64)) as engine:
        engine.recorder.add(file)
        assert engine.submit(prompt(5), greedy(3)).result().finish_reason == "length"
    [record] = [record for record in caplog.records if "trace" in record.getMessage()]
    assert "trace.json" in record.getMessage()
    assert "No space left" in record.getMessage()


def test_a_line_that_was_written_in_part_is_taken_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = TraceFile(tmp_path / "trace.json")
    before = (tmp_path / "trace.json").read_text()

    class NearlyFull(io.FileIO):
        def write(self, line: Any) -> int:
            return super().write(bytes(line)[:7])

    file._file.close()
    file._file = NearlyFull(tmp_path / "trace.json", "ab")
    file.entered(Track(1, fake_sequence()), "waiting", 0.0)
    assert "the engine goes on" in caplog.text
    assert (tmp_path / "trace.json").read_text() == before


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
