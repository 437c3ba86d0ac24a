"""The trace of an engine's steps: every sequence, every token, and no harm."""

import io
import itertools
import json
import logging
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from jllm_runtime import Engine, EngineConfig, EngineError, EngineStats, SamplingParams
from jllm_runtime.engine.recorder import Track
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


# ---- Files that cannot be written.


@pytest.mark.parametrize("name", [".", "none/trace.json", "file/trace.json"])
def test_a_path_that_cannot_be_written_is_refused(name: str, tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match=r"cannot write a trace to .*; expected the path of a file"):
        Engine(tiny.plain, EngineConfig(pages=64), trace=tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_a_name_that_is_no_path_is_refused(name: str, tiny) -> None:
    with pytest.raises(EngineError, match=r"cannot write a trace to '.*expected the path of a file"):
        Engine(tiny.plain, EngineConfig(pages=64), trace=name)


def test_a_trace_that_another_engine_writes_is_refused_and_left_alone(tiny, prompt, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with Engine(tiny.plain, EngineConfig(pages=64), trace=path) as engine:
        engine.generate([prompt(5)], progress=False)
        before = path.read_bytes()
        with pytest.raises(EngineError, match="another engine writes its trace there"):
            Engine(tiny.plain, EngineConfig(pages=64), trace=path)
        assert path.read_bytes() == before
    assert json.loads(path.read_text())
    # It is free again.
    with Engine(tiny.plain, EngineConfig(pages=64), trace=path):
        pass
    assert [event["name"] for event in json.loads(path.read_text())][-2:] == ["started", "closed"]


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
    sequence: Any = SimpleNamespace(prompt_ids=[1, 2, 3], end=9, index=0)
    file.entered(Track(1, sequence), "waiting", 0.0)
    assert "the engine goes on" in caplog.text
    assert (tmp_path / "trace.json").read_text() == before
