"""Command ``jllm bench``: rates, costs, and errors before any work."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jllm_core import MoEConfig
from jllm_core.backends.base import Backend
from jllm_core.backends.cpu.backend import CPUKernels
from jllm_runtime import RequestError, SamplingParams, generate
from jllm_runtime.benchmarking import costs, device_limits
from jllm_runtime.benchmarking.cases import Case, make_cases
from jllm_runtime.benchmarking.costs import bytes_of_decode, flops_of_prefill
from jllm_runtime.benchmarking.device_limits import Limits, find_limits
from jllm_runtime.benchmarking.measuring import measure_decode, measure_prefill
from jllm_runtime.benchmarking.peak_memory import peak_rss, reset_peak_rss
from jllm_runtime.benchmarking.report import Result
from jllm_runtime.cli import main
from jllm_runtime.programs import contiguous_batch

FIXED = Limits(bytes_per_s=2e12, flops_per_s=3e15, source="measured")
"""More than any machine that the tests run on."""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs ``jllm bench`` with these arguments; gives the exit code, standard output and standard error."""

    def run(*arguments: object, limits: Limits = FIXED) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["jllm", "bench", *map(str, arguments), "--no-compile-cache"])
        monkeypatch.setattr("jllm_runtime.benchmarking.device_limits.measure_limits", lambda *arguments: limits)
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return run


def test_the_json_object_has_the_promised_fields_and_adds_up(bench, friendly_checkpoint: Path, tiny) -> None:
    asked = ("--prompt-tokens", "65", "--decode-tokens", "3", "--batch", "1,3", "--repeats", "2", "--json")
    code, out, _ = bench(friendly_checkpoint, *asked)
    told = json.loads(out)
    assert code == 0
    assert (told["device"], told["devices"], told["model"]) == ("cpu", len(jax.devices()), str(friendly_checkpoint))
    assert told["limits"] == {"gigabytes_per_s": 2000, "gigaflops_per_s": 3e6, "source": "measured"}
    assert (told["dtype"], told["quantize"]) == ("float32", None)
    assert told["backend"].startswith(("XLA", "CPU kernels"))
    assert told["weights_bytes"] * told["devices"] >= 4 * told["parameters"] > 0
    assert [result["batch"] for result in told["results"]] == [1, 3]
    for result in told["results"]:
        assert (result["prompt_tokens"], result["context"], result["decode_tokens"]) == (65, 65, 3)
        assert len(result["prefill_seconds"]) == len(result["decode_seconds"]) == 2
        for work, tokens in (("prefill", 65), ("decode", 3)):
            seconds = float(np.median(result[f"{work}_seconds"]))
            assert result[f"{work}_tokens_per_s"] * seconds == pytest.approx(result["batch"] * tokens)
        assert result["decode_share_of_limit"] == pytest.approx(result["decode_gigabytes_per_s"] / 2000)
        assert result["prefill_share_of_limit"] == pytest.approx(result["prefill_gigaflops_per_s"] / 3e6)
        assert (result["decode_limit_gigabytes_per_s"], result["prefill_limit_gigaflops_per_s"]) == (2000, 3e6)
        read = result["decode_bytes_per_step"] * result["decode_tokens_per_s"] / result["batch"]
        assert result["decode_gigabytes_per_s"] == pytest.approx(read / 1e9, rel=1e-3)
        assert result["compile_s"] > 0
        assert result["peak_rss_bytes"] > told["weights_bytes"]


def test_the_table_has_a_row_for_each_combination(bench, friendly_checkpoint: Path) -> None:
    asked = ("--prompt-tokens", "5,6", "--context", "7,80", "--decode-tokens", "2", "--repeats", "1")
    code, out, _ = bench(friendly_checkpoint, *asked)
    assert code == 0
    rows = [[cell.strip() for cell in line.split("│")[1:3]] for line in out.splitlines() if line.startswith("│")]
    assert rows == [["1", "5"], ["1", "5"], ["1", "6"], ["1", "6"], ["1", "7"], ["1", "80"], ["1", "7"], ["1", "80"]]
    assert "weights float32, on" in out
    assert "2,000.0 GB/s, 3,000,000 GFLOP/s (measured)" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "1,x"], "such as 1,4,16, got '1,x'"),
        (["--batch", "0"], "expected whole numbers from 1 up"),
        (["--prompt-tokens", ""], "expected whole numbers from 1 up"),
        (["--decode-tokens", "-3"], "expected whole numbers from 1 up"),
        (["--repeats", "0"], "0 is not in the range"),
        (["--prompt-tokens", "301", "--context", "8"], "301 tokens is longer than the model's context of 300"),
        (["--prompt-tokens", "8", "--context", "290", "--decode-tokens", "11"], "a text of 301 tokens"),
        (["--prompt-tokens", "8", "--mesh", "rows=8"], "unknown mesh axes ['rows']"),
        (["--prompt-tokens", "8", "--decode-tokens", "8", "--batch", "100000000"], "ask for a smaller batch"),
    ],
)
def test_bad_input_ends_with_two(bench, friendly_checkpoint: Path, arguments: list[str], words: str) -> None:
    code, out, err = bench(friendly_checkpoint, *arguments)
    assert (code, out) == (2, "")
    assert words in " ".join(err.split())


def test_a_model_that_is_not_there(bench, tmp_path: Path) -> None:
    code, _, err = bench(tmp_path / "nothing")
    assert code == 2
    assert "there is no model at" in err


def test_what_is_timed_are_the_tokens_of_generate(tiny, prompt) -> None:
    text = prompt(70)
    expected = tiny.naive_greedy(tiny.plain, text, 36)
    assert measure_prefill(tiny.plain, np.array([text]), 1).tokens == [expected[:1]]
    # More than a block of steps, and beside two rows that are not there.
    decoded = measure_decode(tiny.plain, np.array([text, prompt(70, 1), prompt(70, 2)]), 35, 2)
    assert decoded.tokens[0] == expected
    assert [len(row) for row in decoded.tokens] == [36, 36, 36]
    assert len(decoded.seconds) == 2


def test_prompts_are_taken_in_as_generate_takes_them(tiny, prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [prompt(290, seed) for seed in range(3)]
    taken: list[tuple[int, ...]] = []
    prefill = contiguous_batch.prefill

    def record(weights: Any, cache: Any, tokens: Any, lengths: Any, hidden: Any, chunks: Any, *rest: Any) -> Any:
        if chunks[1] > chunks[0]:
            taken.append((*tokens.shape, *map(int, chunks), *rest[1:]))
        return prefill(weights, cache, tokens, lengths, hidden, chunks, *rest)

    monkeypatch.setattr(contiguous_batch, "prefill", record)
    generate(tiny.plain, texts, SamplingParams(max_tokens=1))
    expected, taken[:] = taken[:], []
    measure_prefill(tiny.plain, np.array(texts), 1)
    assert expected
    assert taken == 2 * expected  # the warm-up, and the one that counts


def test_a_step_reads_the_weights_and_the_filled_slots(tiny) -> None:
    model, config = tiny.plain, tiny.config
    arrays = jax.tree.leaves(model.weights)
    read = sum(array.nbytes for array in arrays) - model.weights.embedding.nbytes  # it is not tied
    slot = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    assert bytes_of_decode(model, Case(10, 10, 1, 1)) == read + 11 * slot
    assert bytes_of_decode(model, Case(10, 10, 2, 3)) == 2 * read + 3 * (11 + 12) * slot


def test_a_prefill_computes_the_head_once(tiny) -> None:
    config = tiny.config
    heads, d, h = config.num_heads * config.head_dim, config.hidden_size, config.num_layers
    layer = 2 * d * heads + 2 * d * config.num_kv_heads * config.head_dim + 3 * d * config.intermediate_size
    head = d * config.vocab_size

    def flops(tokens: int, batch: int = 1) -> int:
        return flops_of_prefill(tiny.plain, Case(tokens, tokens, 1, batch))

    assert flops(1) == 2 * h * layer + 2 * head + 4 * h * heads
    assert flops(3) == 3 * 2 * h * layer + 2 * head + 4 * h * heads * (1 + 2 + 3)
    assert flops(3, batch=4) == 4 * flops(3)


def test_of_a_mixture_only_the_experts_that_tokens_go_to_are_read(tiny) -> None:
    moe = MoEConfig(num_experts=8, experts_per_token=2, intermediate_size=48)
    config = dataclasses.replace(tiny.config, moe=moe, model_type="qwen3_moe")
    model = tiny.random(config)
    experts = [[layer.ffw.we_gate, layer.ffw.we_up, layer.ffw.we_down] for layer in model.weights.layers]
    size = sum(array.nbytes for array in jax.tree.leaves(experts))
    one, two = (bytes_of_decode(model, Case(1, 1, 1, batch)) for batch in (1, 2))
    slots = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    assert two - one == pytest.approx(size * (0.75 - 0.75**2) + slots, abs=2)


def test_a_result_is_held_against_its_needs(tiny) -> None:
    case = Case(8, 8, 2, 1)
    model = tiny.plain
    prompts = np.zeros((1, 8), np.int32)
    result = Result.of(model, case, measure_prefill(model, prompts, 3), measure_decode(model, prompts, 2, 3), 1, None)
    assert result.bytes_per_s * result.decode.median_s == pytest.approx(bytes_of_decode(model, case))
    assert result.flops_per_s * result.prefill.median_s == pytest.approx(flops_of_prefill(model, case))


def test_cases_are_all_combinations(tiny) -> None:
    cases = make_cases(tiny.config, [8, 16], [4], [1, 2])
    assert cases == [Case(8, 8, 4, 1), Case(8, 8, 4, 2), Case(16, 16, 4, 1), Case(16, 16, 4, 2)]
    assert make_cases(tiny.config, [8], [4], [1], [32]) == [Case(8, 32, 4, 1)]
    with pytest.raises(RequestError, match="batch 2, prompt 8, 4 tokens from 297 on: a text of 301 tokens"):
        make_cases(tiny.config, [8], [4], [2], [297])


def test_the_limits_of_a_known_accelerator_are_the_published_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        platform, device_kind = "gpu", "NVIDIA H200"

    monkeypatch.setattr(device_limits, "measure_limits", lambda *arguments: FIXED)
    found = find_limits(Device())
    assert (found.bytes_per_s, found.flops_per_s) == (4800e9, 989.5e12)
    assert found.source.startswith("https://")
    Device.device_kind = "Tesla T4"
    assert [find_limits(Device(), dtype=dtype).flops_per_s for dtype in ("bfloat16", "float16")] == [8.1e12, 65e12]
    Device.device_kind = "another"
    assert find_limits(Device()) == FIXED
    assert find_limits(jax.devices()[0]) == FIXED


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits from small arrays, tried once."""
    for name, value in {"READ_BYTES": 2**22, "_BYTES_OF_TRY": 2**22, "MIN_SECONDS": 0, "MIN_ROUNDS": 1}.items():
        monkeypatch.setattr(device_limits, name, value)
    monkeypatch.setitem(device_limits._GEMM_SIZES, "cpu", 128)


@pytest.mark.parametrize("backend", [None, CPUKernels()], ids=["XLA", "kernels"])
def test_the_limits_of_a_cpu_are_measured(quick: None, backend: Backend | None) -> None:
    found = device_limits.measure_limits(jax.devices("cpu")[0], backend, [2**20, 2**20 - 5, 2**21 + 1, 2**30])
    assert found.source == "measured"
    assert 1e8 < found.bytes_per_s < 1e13
    assert 1e8 < found.flops_per_s < 1e15
    assert [size for size, _ in found.reads] == [3 * 2**20, 2**20]  # in whole MiB; as much as memory's need not be


def test_the_fastest_of_all_ways_and_tries_is_the_limit(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # Seconds that each try takes: two ways by turns, and the clock is read before and after.
    took = iter([3.0, 8.0, 2.0, 5.0, 4.0, 8.0])
    now = [0.0]
    monkeypatch.setattr(device_limits, "MIN_ROUNDS", 3)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    array = jax.numpy.zeros(())

    def way(amount: int) -> Callable[[], tuple[jax.Array, int]]:
        calls = iter(range(4))

        def work() -> tuple[jax.Array, int]:
            if next(calls):  # the first compiles
                now[0] += next(took)
            return array, amount

        return work

    # 100 in 2 s is more than 200 in 5 s.
    assert device_limits._highest_rate([way(100), way(200)]) == 50


def test_what_was_read_of_more_bytes_is_read_of_fewer() -> None:
    limits = Limits(10.0, 1.0, "measured", ((100, 40.0), (200, 50.0), (400, 8.0)))
    asked = (50, 100, 101, 200, 201, 400, 401)
    assert [limits.bytes_per_s_of(size) for size in asked] == [50, 50, 50, 50, 10, 10, 10]


def test_the_model_itself_raises_a_limit_that_it_exceeds() -> None:
    limits = Limits(10.0, 20.0, "measured", ((100, 40.0),))
    assert limits.including([(100, 39.0), (101, 9.0)], 19.0).source == "measured"
    faster = limits.including([(100, 45.0), (1000, 12.0)], 30.0)
    assert faster.source == "measured, and the model's own best"
    assert (faster.bytes_per_s_of(50), faster.bytes_per_s_of(101), faster.bytes_per_s_of(2000)) == (45, 12, 10)
    assert faster.flops_per_s == 30


def test_nothing_is_more_than_the_whole_of_its_limit(bench, friendly_checkpoint: Path) -> None:
    """However low the device was measured."""
    slow = Limits(1.0, 1.0, "measured", ((10**9, 2.0),))
    asked = ("--prompt-tokens", "5,65", "--decode-tokens", "1,3", "--repeats", "3")
    code, out, _ = bench(friendly_checkpoint, *asked, "--json", limits=slow)
    told = json.loads(out)
    assert (code, told["limits"]["source"]) == (0, "measured, and the model's own best")
    shares = [result[f"{work}_share_of_limit"] for result in told["results"] for work in ("prefill", "decode")]
    assert 0 < min(shares) <= max(shares) <= 1
    for result in told["results"]:
        best = min(result["decode_seconds"]) * result["decode_limit_gigabytes_per_s"]
        assert best >= result["decode_bytes_per_step"] * result["decode_tokens"] / 1e9 * 0.999
    _, out, _ = bench(friendly_checkpoint, *asked, limits=slow)
    rows = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    assert len(rows) == 8  # four of prefill, in 7 columns, and four of decode, where "can read" is one more
    assert max(int(row[5 if len(row) == 7 else 6].strip().rstrip("%")) for row in rows) <= 100


def test_the_peak_is_that_of_now(tiny: Any) -> None:
    def held(size: int) -> int:
        reset_peak_rss()
        np.ones(size, np.int8)
        return peak_rss() or 0

    large = held(200_000_000)
    assert large > 200_000_000
    if Path("/proc/self/clear_refs").exists():
        assert held(1000) < large - 150_000_000


def test_a_cache_without_room_is_refused(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(8, 300 - 8, 8, 3)
    # 4 rows, 300 tokens in whole chunks, keys and values of 2 layers.
    assert costs.cache_bytes(tiny.plain, case) == 4 * 320 * 2 * 2 * 2 * 8 * 4
    costs.check_memory(tiny.plain, [case])
    weights = sum(array.nbytes for array in jax.tree.leaves(tiny.plain.weights))
    monkeypatch.setattr("os.sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else weights)
    with pytest.raises(RequestError, match=r"batch 3, prompt 8, .* the cache needs .* beside .* of weights on cpu"):
        costs.check_memory(tiny.plain, [case])
