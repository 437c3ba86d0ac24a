"""What the harness of the peers makes of its runs; the peers themselves are not run."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import cases, models, processes, prompts, runner
from benchmarks.peers.cases import ALL, FULL, JLLM, LIMITS, LLAMA, QUICK, TRANSFORMERS, Case, Contender, find_cases
from benchmarks.peers.results import Results
from benchmarks.peers.runner import Runner, leading
from benchmarks.peers.tables import case_table, limit_line, target_table
from benchmarks.peers.targets import Target, targets

OURS, FLOAT = Contender(JLLM, "int8"), Contender(JLLM, "float32")
Q8, F32 = Contender(LLAMA, "Q8_0"), Contender(LLAMA, "F32")
TORCH = Contender(TRANSFORMERS, "float32")


def record(case: str, contender: Contender, seconds: float, **more: Any) -> dict[str, Any]:
    names = {"model": "smollm2", "case": case, "peer": contender.peer, "precision": contender.precision}
    return {**names, "median_s": seconds, "peak_rss_bytes": 10**9, "same": 1.0, **more}


def machine(case: str, bytes_per_s: float) -> dict[str, Any]:
    return record(case, Contender(LIMITS), 0.0, bytes_per_s=bytes_per_s, flops_per_s=1e11)


def results(*records: dict[str, Any]) -> Results:
    return Results.of([*records, record("decode-512", OURS, 9.0, model="other")], "smollm2")


def test_a_ratio_is_the_median_of_the_rounds_own() -> None:
    found = results(
        *(record("decode-512", OURS, seconds) for seconds in (1.0, 2.0, 10.0)),
        *(record("decode-512", Q8, seconds) for seconds in (2.0, 4.2, 30.0)),
    )
    assert found.speedup("decode-512", OURS, Q8) == pytest.approx(2.1)
    assert found.speedup("decode-512", OURS, TORCH) is None


def test_the_best_peer_is_none_of_ours() -> None:
    found = results(record("start", OURS, 1.0), record("start", Q8, 3.0), record("start", TORCH, 2.0))
    assert found.fastest("start") == TORCH
    assert found.fastest("start", [Q8]) == Q8
    assert found.fastest("prefill-512") is None


def test_the_share_of_a_limit_is_taken_round_by_round() -> None:
    case = "decode-512"
    found = results(
        record(case, OURS, 1.0, needs=5e9), machine(case, 1e10), record(case, OURS, 2.0, needs=5e9), machine(case, 5e9)
    )
    assert found.share_of_limit(case, OURS, "bytes_per_s") == pytest.approx(0.5)
    assert found.share_of_limit(case, Q8, "bytes_per_s") is None
    assert "reads 7.5 GB/s (5.0 to 10.0)" in limit_line(found, [find_cases([case], FULL)[0]])


@pytest.fixture
def everything() -> Results:
    """A run of every contender of every quick case; ours take half the time of the others, but for the start."""
    made = []
    for case in QUICK:
        for who in case.contenders:
            ours = who.peer == JLLM
            made.append(record(case.name, who, 0.5 if ours else 1.0, **({"needs": 3e9} if ours else {})))
        made.append(machine(case.name, 1e10))
    return results(*made)


def test_every_target_can_be_measured(everything: Results) -> None:
    measured = {(target.case, target.against): target.measure(everything) for target in targets()}
    assert None not in measured.values()
    assert measured["decode b1, ctx 512, int4", "llama.cpp Q4_0"] == 2
    assert measured["decode b1 int8, share of reading", "measured read bandwidth"] == pytest.approx(0.6)
    assert measured["decode b1 int8, peak RSS, MB more", "llama.cpp Q8_0"] == 0
    assert measured["start to first word, float32, times", "transformers float32"] == 0.5


def test_the_table_tells_what_is_met(everything: Results) -> None:
    lines = target_table(everything, targets()).splitlines()[2:]
    missed = [line for line in lines if line.endswith("**no** |")]
    assert [line.split("|")[1].strip() for line in missed] == [
        "decode b1, ctx 512, the slowest of ours",
        "decode b1 int8, share of reading",
    ]
    assert "| decode b1, ctx 512, float32 | llama.cpp F32 | 1 | not run |  |" in target_table(results(), targets())


def test_a_bound_from_above_and_from_below() -> None:
    least, most = (Target("", "", 1.5, lambda _: None, at_most) for at_most in (False, True))
    assert [least.is_met(1.4), least.is_met(1.5), most.is_met(1.5), most.is_met(1.6)] == [False, True, True, False]


def test_a_case_lists_the_fastest_first(everything: Results) -> None:
    case = find_cases(["prefill-512"], QUICK)[0]
    lines = case_table(everything, case).splitlines()
    assert lines[2].startswith("| **jllm float32** | 1,024 | 1,024 to 1,024 | 1 | 2.00 | 6% | 1,000 | 100% |")
    assert lines[-1].split("|")[1].strip() in ("llama.cpp Q4_0", "transformers bfloat16")


def test_the_cases_have_names_of_their_own() -> None:
    assert len({case.name for case in FULL}) == len(FULL)
    assert {case.kind for case in FULL} == {"prefill", "decode", "start"}
    assert all(set(case.contenders) <= set(ALL) for case in FULL)
    with pytest.raises(SystemExit, match="unknown case 'decode-513'; known: decode-512"):
        find_cases(["decode-513"], FULL)


@pytest.mark.parametrize(("own", "other", "same"), [([1, 2], [1, 2], 2), ([1, 2, 3], [1, 9, 3], 1), ([4], [5], 0)])
def test_texts_agree_up_to_the_first_difference(own: list[int], other: list[int], same: int) -> None:
    assert leading(own, other) == same


CASE = Case("decode-8", "decode", prompt=8, tokens=3)


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """A runner whose reference says 1 2 3 4, and whose prompts need no tokenizer."""
    model = models.Model("tiny", tmp_path / "models", has_tokenizer=False)
    (tmp_path / "references").mkdir()
    (tmp_path / "references" / "tiny-decode-8.json").write_text(json.dumps([[1, 2, 3, 4]]))
    return Runner(model, tmp_path, threads=2)


def test_a_run_is_checked_against_the_reference(ready: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ask(contender: Contender, task: dict[str, Any], threads: int, **environment: str) -> dict[str, Any]:
        asked.append(task)
        return {"seconds": [0.5, 0.1, 0.3], "tokens": [[1, 2, 3, 5]]}

    monkeypatch.setattr(runner, "ask", ask)
    told = ready.run(CASE, OURS)
    assert (told["median_s"], told["tokens_per_s"], told["same"]) == (0.3, pytest.approx(10), 0.75)
    assert [len(text) for text in asked[0]["prompts"]] == [8]
    assert ready.run(CASE, F32)["same"] == 0.75  # its keys and values are float16
    for exact in (FLOAT, TORCH):
        with pytest.raises(SystemExit, match=f"{exact.name} leaves the reference in decode-8"):
            ready.run(CASE, exact)


def test_we_must_know_the_answer(ready: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    start = cases.find_cases(["start"], FULL)[0]
    monkeypatch.setattr(runner, "ask_in_words", lambda *_, **__: processes.Start(0.2, "Lyon, of course"))
    assert ready.run(start, Q8)["same"] == 0
    with pytest.raises(SystemExit, match="jllm int8 does not know the answer: 'Lyon, of course'"):
        ready.run(start, OURS)


def test_half_made_weights_are_made_anew(tmp_path: Path) -> None:
    def fail(part: Path) -> None:
        part.write_text("half")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        models.make(tmp_path / "model", fail)
    assert not (tmp_path / "model").exists()
    assert models.make(tmp_path / "model", lambda part: part.write_text("whole")).read_text() == "whole"
    assert models.make(tmp_path / "model", fail).read_text() == "whole"


def test_random_prompts_are_the_same_for_everybody(tmp_path: Path) -> None:
    model = models.Model("tiny", tmp_path, has_tokenizer=False)
    drawn = [prompts.prompts(model, tmp_path, 2, 16) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[0][1]
