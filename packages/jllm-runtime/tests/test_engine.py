"""The engine: the same tokens whatever else runs, all pages back at the end, and one program for every mix."""

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jllm_core import ModelConfig, init_weights
from jllm_core.config import MoEConfig, RopeScaling
from jllm_core.quantization.arrays import Quantization
from jllm_runtime import (
    Engine,
    EngineConfig,
    EngineError,
    GenerationOutput,
    Model,
    Piece,
    QueueFullError,
    Request,
    RequestError,
    SamplingParams,
    generate,
)
from jllm_runtime.cache.paged import page_bytes
from jllm_runtime.engine import pool_size
from jllm_runtime.programs import paged_batch

# Few sizes, so that few programs are compiled.
PAGES = 64
TIGHT = EngineConfig(pages=24, page_size=16)


@pytest.fixture
def engine(tiny) -> Iterator[Engine]:
    with Engine(tiny.plain, EngineConfig(pages=PAGES)) as engine:
        yield engine
        engine.close(drain=True)
        assert engine.stats().pages_in_use == 0


@pytest.fixture
def free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the bytes of memory that this machine seems to have left."""
    file = tmp_path / "meminfo"
    monkeypatch.setattr(pool_size, "MEMORY_FILE", file)

    def put(size: int) -> None:
        file.write_text(f"MemAvailable: {size // 1024} kB\n")

    return put


def greedy(max_tokens: int, **fields: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **fields)


def seeded(max_tokens: int, seed: int = 3, **fields: object) -> SamplingParams:
    return SamplingParams(temperature=1.0, top_p=0.95, seed=seed, max_tokens=max_tokens, **fields)


def tokens(outputs: list[GenerationOutput]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


# ---- The same tokens.


@pytest.mark.parametrize("length", [1, 2, 64, 65, 128, 129, 200])
def test_greedy_tokens_are_those_of_the_plain_model(length: int, engine: Engine, tiny, prompt) -> None:
    [output] = engine.generate([prompt(length)], greedy(12))
    assert output.token_ids == tiny.naive_greedy(tiny.plain, prompt(length), 12)
    assert output.finish_reason == "length"


def families(config: ModelConfig) -> dict[str, ModelConfig]:
    return {
        "qwen3": config,
        "llama": dataclasses.replace(
            config, model_type="llama", num_layers=1, num_heads=9, num_kv_heads=3, qk_norm=False, tie_embeddings=True
        ),
        "qwen3_moe": dataclasses.replace(
            config,
            model_type="qwen3_moe",
            num_layers=1,
            moe=MoEConfig(num_experts=4, experts_per_token=2, intermediate_size=16),
        ),
    }


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3_moe"])
def test_the_same_request_gets_the_same_tokens_whatever_happens(family: str, tiny, prompt) -> None:
    """Alone, among 15 others, after a cold and a warm prefix cache, and after giving way."""
    model = tiny.random(families(tiny.config)[family])
    asked = [(prompt(100), greedy(50)), (prompt(100), seeded(50))]
    prompts, params = [list(each) for each in zip(*asked, strict=True)]
    others = [prompt(1 + 17 * number, seed=1) for number in range(15)]

    more = [prompt(50, seed=number) for number in range(6)]

    expected = tokens(generate(model, prompts, params))
    assert expected[0] != expected[1]
    with Engine(model, EngineConfig(pages=PAGES)) as engine:
        for one, own, right in zip(prompts, params, expected, strict=True):
            alone = engine.submit(one, own).result()
            assert alone.token_ids == right
            warm = engine.submit(one, own).result()
            assert (warm.token_ids, warm.reused_tokens) == (right, 64)
            beside = [engine.submit(other, seeded(25, seed=number)) for number, other in enumerate(others)]
            assert engine.submit(one, own).result().token_ids == right
            assert [len(request.result().token_ids) for request in beside] == [25] * 15
        apart = [engine.submit(one, greedy(40)).result().token_ids for one in more]
        assert engine.stats().preemptions == 0

    # Few pages: the youngest give way, and are computed anew.
    with Engine(model, TIGHT) as engine:
        with engine._changed:  # all of them before the first step
            requests = [engine.submit(one, own) for one, own in asked * 3]
            requests += [engine.submit(one, greedy(40)) for one in more]
        assert tokens([request.result() for request in requests]) == expected * 3 + apart
        assert engine.stats().preemptions > 2


def test_one_program_serves_every_mix(engine: Engine, prompt) -> None:
    engine.generate([prompt(5), prompt(70)], greedy(8))
    before = paged_batch.decode_rows._cache_size()
    mix = [
        greedy(9),
        seeded(9, top_k=5, min_p=0.1),
        greedy(9, logprobs=3),
        seeded(9, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.1, logit_bias={3: 2.0}),
        greedy(9, min_tokens=4, stop_token_ids=[7, 8]),
    ]
    for own in mix:
        engine.generate([prompt(30), prompt(9)], own)
    assert paged_batch.decode_rows._cache_size() == before


def compiled() -> int:
    """The number of programs that the engine has so far."""
    programs = [value for value in vars(paged_batch).values() if hasattr(value, "_cache_size")]
    assert len(programs) >= 5
    return sum(program._cache_size() for program in programs)


def test_programs_do_not_follow_the_free_memory(tiny, prompt, free_memory: Callable[[int], None]) -> None:
    sizes: list[int] = []
    before = 0
    # A page takes 16 KiB, and a quarter of what is free is taken. A third more, and yet the same number of pages.
    for free_kib in (67 * 16 * 4, 89 * 16 * 4):
        free_memory(free_kib * 1024)
        before = compiled()
        with Engine(tiny.plain) as engine:
            engine.generate([prompt(5), prompt(70)], greedy(4))
            sizes.append(engine.stats().pages)
    assert sizes == [64, 64]
    assert compiled() == before


# ---- Prefixes.


def test_a_conversation_finds_what_it_began_with(engine: Engine, prompt) -> None:
    first = engine.submit(prompt(130), greedy(20)).result()
    follow_up = prompt(130) + first.token_ids + prompt(20, seed=2)
    second = engine.submit(follow_up, greedy(10)).result()
    assert second.reused_tokens == 128
    third = engine.submit(follow_up + second.token_ids + [1, 2, 3], greedy(5)).result()
    assert third.reused_tokens == 128  # what was decoded is no page of a prompt; the second prompt had no third page
    assert second.token_ids == generate(engine.model, [follow_up], greedy(10))[0].token_ids


# ---- What requests ask for.


def test_logprobs_are_those_of_the_plain_model(engine: Engine, tiny, prompt) -> None:
    [output] = engine.generate([prompt(70)], seeded(6, logprobs=4, prompt_logprobs=2))
    text = prompt(70) + output.token_ids
    logits = np.asarray(tiny.plain.logits([text]), np.float64)[0]
    expected = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    expected -= logits.max(-1, keepdims=True)
    assert output.logprobs is not None
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    found = [*output.prompt_logprobs[1:], *output.logprobs]
    assert len(found) == len(text) - 1
    for position, one in enumerate(found):
        assert one is not None
        assert one.token_id == text[position + 1]
        assert one.logprob == pytest.approx(expected[position, text[position + 1]], abs=1e-3)
        best = np.argsort(-expected[position])[: len(one.top)]
        assert [token for token, _ in one.top] == best.tolist()
        np.testing.assert_allclose([p for _, p in one.top], expected[position][best], atol=1e-3)
    assert {len(one.top) for one in output.logprobs} == {4}


def test_prompt_logprobs_are_complete_though_the_prefix_is_known(engine: Engine, prompt) -> None:
    engine.generate([prompt(150)], greedy(2))
    output = engine.submit(prompt(150), greedy(2, prompt_logprobs=0)).result()
    assert output.reused_tokens == 0
    assert output.prompt_logprobs is not None
    assert [one.token_id for one in output.prompt_logprobs[1:] if one] == prompt(150)[1:]


def test_penalties_and_biases_are_those_of_the_plain_model(engine: Engine, tiny, prompt) -> None:
    ids, bias = prompt(66), {5: 4.0, 9: -100.0}
    params = greedy(14, repetition_penalty=1.4, presence_penalty=0.7, frequency_penalty=0.9, logit_bias=bias)
    expected = tiny.naive_penalized(tiny.plain, ids, 14, params)
    together = engine.generate([ids, ids, prompt(5)], [params, greedy(14), params])
    assert together[0].token_ids == expected
    assert together[1].token_ids == tiny.naive_greedy(tiny.plain, ids, 14)
    assert together[0].token_ids != together[1].token_ids


def test_stop_ids_end_an_answer_but_not_too_early(engine: Engine, prompt) -> None:
    whole = engine.submit(prompt(5), greedy(20)).result().token_ids
    third = whole[2]
    output = engine.submit(prompt(5), greedy(20, stop_token_ids=[third])).result()
    assert (output.token_ids, output.finish_reason) == (whole[:3], "stop")
    later = engine.submit(prompt(5), greedy(20, stop_token_ids=[third], min_tokens=10)).result()
    assert third not in later.token_ids[:10]
    assert later.token_ids[:2] == whole[:2]
    never = engine.submit(
        prompt(5), SamplingParams(max_tokens=2**31, min_tokens=2**31, stop_token_ids=[third])
    ).result()
    assert third not in never.token_ids
    assert never.finish_reason == "length"


def test_the_end_of_text_waits_for_min_tokens(tiny) -> None:
    model = tiny.saying([*b">do", tiny.end], eos_ids=(tiny.end,))
    with Engine(model, EngineConfig(pages=PAGES)) as engine:
        assert engine.submit(">", greedy(9)).result().text == "do"
        late = engine.submit(">", greedy(9, min_tokens=6)).result()
        assert len(late.token_ids) >= 6
        assert tiny.end not in late.token_ids[:6]


@pytest.mark.parametrize("seed", [5, 2**32 - 2, 2**63])
def test_several_answers_are_those_of_following_seeds(seed: int, engine: Engine, prompt) -> None:
    outputs = engine.submit(prompt(70), seeded(10, seed=seed, n=3)).results()
    assert [output.index for output in outputs] == [0, 1, 2]
    assert tokens(outputs) == [
        engine.submit(prompt(70), seeded(10, seed=seed + i)).result().token_ids for i in range(3)
    ]
    assert len({tuple(output.token_ids) for output in outputs}) == 3


def test_stop_texts_and_pieces(tiny) -> None:
    model = tiny.saying([*b">hey STOP!", tiny.end], eos_ids=(tiny.end,))
    with Engine(model, EngineConfig(pages=PAGES)) as engine:
        pieces = list(engine.submit(">", greedy(30, stop="OP", logprobs=0)))
        assert "".join(piece.text for piece in pieces) == "hey ST"
        assert [token for piece in pieces for token in piece.token_ids] == list(b"hey STOP")
        assert [one.token_id for piece in pieces for one in piece.logprobs or []] == list(b"hey STOP")
        assert pieces[-1].output is not None
        assert pieces[-1].output.text == "hey ST"
        assert [piece.output for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert len(pieces) > 1


def test_a_full_context_gets_no_answer(engine: Engine, tiny, prompt) -> None:
    [output] = engine.generate([prompt(tiny.config.context_length)], greedy(5))
    assert (output.token_ids, output.finish_reason) == ([], "length")


@pytest.mark.parametrize("room", [1, 3])
def test_an_answer_ends_with_the_context(room: int, engine: Engine, tiny, prompt) -> None:
    ids = prompt(tiny.config.context_length - room)
    [output] = engine.generate([ids], greedy(100))
    assert output.token_ids == tiny.naive_greedy(tiny.plain, ids, room)


# ---- Cancelling, failing, closing.


def test_cancelling_keeps_what_there_is_and_frees_the_pages(engine: Engine, prompt) -> None:
    request = engine.submit(prompt(70), greedy(200))
    first = next(iter(request))  # leaving the iteration cancels
    output = request.result(timeout=30)
    assert output.finish_reason == "cancelled"
    assert output.token_ids[: len(first.token_ids)] == first.token_ids
    assert engine.stats().pages_in_use == 0
    assert engine.stats().cancelled == 1
    assert engine.submit(prompt(70), greedy(3)).result().finish_reason == "length"


def test_what_waits_can_be_cancelled(engine: Engine, prompt) -> None:
    running = [engine.submit(prompt(5, seed=number), greedy(100)) for number in range(16)]
    waiting = engine.submit(prompt(5), greedy(100))
    waiting.cancel()
    assert waiting.result().token_ids == []
    assert [len(request.result().token_ids) for request in running] == [100] * 16


def test_many_random_requests_leave_no_page_behind(tiny) -> None:
    rng = np.random.default_rng(0)
    with Engine(tiny.plain, TIGHT) as engine:
        requests = []
        for number in range(200):
            ids = rng.integers(0, 3, rng.integers(1, 150)).tolist()  # many begin alike
            fields = {"n": int(rng.integers(1, 3)), "logprobs": 1 if number % 7 == 0 else None}
            requests.append(engine.submit(ids, seeded(int(rng.integers(1, 60)), seed=number, **fields)))
            if number % 5 == 0:
                requests[rng.integers(len(requests))].cancel()
        outputs = [output for request in requests for output in request.results(timeout=120)]
        stats = engine.stats()
    assert (stats.pages_in_use, stats.running, stats.waiting) == (0, 0, 0)
    assert stats.requests == stats.finished + stats.cancelled == 200
    assert stats.generated_tokens == sum(len(output.token_ids) for output in outputs)
    assert stats.cancelled > 10
    assert stats.reused_tokens > 0
    assert stats.preemptions > 0


def test_tokens_that_were_reused_are_tokens_of_prompts(engine: Engine, prompt) -> None:
    for _ in range(2):
        engine.submit(prompt(101), greedy(2)).result()
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.reused_tokens) == (200, 64)  # the last token of each is decode's


def test_a_failed_step_fails_its_requests_and_not_the_engine(
    engine: Engine, prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = engine.submit(prompt(70), greedy(20)).result().token_ids
    decode, calls = paged_batch.decode_rows, []

    def fail_once(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            decode(*arguments)  # takes the donated pages with it
            raise RuntimeError("out of luck")
        return decode(*arguments)

    monkeypatch.setattr(paged_batch, "decode_rows", fail_once)
    with pytest.raises(EngineError, match="a step of the engine failed: RuntimeError: out of luck"):
        engine.submit(prompt(70), greedy(20)).result(timeout=30)
    again = engine.submit(prompt(70), greedy(20)).result(timeout=30)
    assert (again.token_ids, again.reused_tokens) == (expected, 0)  # the pages began anew
    assert engine.stats().failed == 1


def test_a_failed_prefill_leaves_the_others_their_tokens(
    engine: Engine, prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = engine.submit(prompt(9), greedy(150)).result().token_ids
    take = paged_batch.prefill_pages

    def fail(*arguments: object) -> object:
        if arguments[2][0, 0] == 271:
            take(*arguments)
            raise RuntimeError("a bad prompt")
        return take(*arguments)

    monkeypatch.setattr(paged_batch, "prefill_pages", fail)
    other = engine.submit(prompt(9), greedy(150))
    bad = engine.submit([271] * 70, greedy(5))
    with pytest.raises(EngineError, match="a bad prompt"):
        bad.result(timeout=30)
    assert other.result(timeout=30).token_ids == expected


def test_closing_ends_what_runs(tiny, prompt) -> None:
    engine = Engine(tiny.plain, EngineConfig(pages=PAGES))
    requests = [engine.submit(prompt(5, seed=number), greedy(200)) for number in range(20)]
    assert not engine.closed
    engine.close()
    assert engine.closed
    assert {request.result(timeout=1).finish_reason for request in requests} <= {"cancelled", "length"}
    assert requests[-1].result().finish_reason == "cancelled"
    assert not engine._thread.is_alive()
    with pytest.raises(EngineError, match="the engine is closed"):
        engine.submit([1])
    engine.close()


def test_leaving_the_block_waits_for_what_runs(tiny, prompt) -> None:
    with Engine(tiny.plain, EngineConfig(pages=PAGES)) as engine:
        request = engine.submit(prompt(5), greedy(50))
    assert len(request.result(timeout=0).token_ids) == 50


def test_an_error_in_the_block_cancels_what_runs(tiny, prompt) -> None:
    def leave() -> None:
        with Engine(tiny.plain, EngineConfig(pages=PAGES, decode_steps=1)) as engine:
            requests.append(engine.submit(prompt(5), greedy(290)))
            raise KeyError

    requests: list = []
    with pytest.raises(KeyError):
        leave()
    assert requests[0].result(timeout=0).finish_reason == "cancelled"


def test_generate_shows_a_bar_when_it_is_told_to(engine: Engine, prompt, capsys: pytest.CaptureFixture[str]) -> None:
    engine.generate([prompt(5)] * 3, greedy(2))
    assert capsys.readouterr().err == ""
    outputs = engine.generate([prompt(5)] * 3, [greedy(1), greedy(2), greedy(3)], progress=True)
    assert [len(output.token_ids) for output in outputs] == [1, 2, 3]
    captured = capsys.readouterr()
    assert "Generating" in captured.err
    assert captured.out == ""


# ---- Threads and asyncio.


def test_threads(engine: Engine, prompt) -> None:
    found: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        pieces = list(engine.submit(prompt(20, seed=number), greedy(15)))
        found[number] = [token for piece in pieces for token in piece.token_ids]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = tokens(generate(engine.model, [prompt(20, seed=number) for number in range(12)], greedy(15)))
    assert [found[number] for number in range(12)] == expected


def test_asyncio(engine: Engine, prompt) -> None:
    async def ask(number: int) -> list[int]:
        return [
            token async for piece in engine.submit(prompt(20, seed=number), greedy(15)) for token in piece.token_ids
        ]

    async def leave_early() -> GenerationOutput:
        request = engine.submit(prompt(20), greedy(200))
        async for _ in request:
            break
        request.cancel()
        return await asyncio.to_thread(request.result)

    async def all_together() -> tuple[list[list[int]], GenerationOutput]:
        return await asyncio.gather(*map(ask, range(6))), await leave_early()

    found, left = asyncio.run(all_together())
    assert found == tokens(generate(engine.model, [prompt(20, seed=number) for number in range(6)], greedy(15)))
    assert left.finish_reason == "cancelled"


def test_an_engine_in_an_event_loop(tiny, prompt) -> None:
    pieces: list[Piece] = []

    async def read(request: Request) -> None:
        async for piece in request:
            pieces.append(piece)

    async def leave() -> None:
        async with Engine(tiny.plain, EngineConfig(pages=PAGES)) as engine:
            reading = asyncio.create_task(read(engine.submit(prompt(5), greedy(40))))
            await asyncio.sleep(0)
        # The answer was finished, and read while the engine was closing: the loop went on.
        assert engine.closed
        assert pieces
        await reading

    asyncio.run(leave())
    assert pieces[-1].output is not None
    assert len(pieces[-1].output.token_ids) == 40


def test_an_error_in_an_event_loop_cancels(tiny, prompt) -> None:
    async def fail() -> GenerationOutput:
        try:
            async with Engine(tiny.plain, EngineConfig(pages=PAGES)) as engine:
                request = engine.submit(prompt(5), greedy(290))
                raise ZeroDivisionError
        except ZeroDivisionError:
            return request.result(timeout=0)

    assert asyncio.run(fail()).finish_reason == "cancelled"


def test_a_result_that_takes_too_long(engine: Engine, prompt) -> None:
    request = engine.submit(prompt(5), greedy(290))
    with pytest.raises(TimeoutError, match="has not ended within 0 s"):
        request.result(timeout=0)
    request.cancel()


# ---- What is refused.


def test_what_can_never_fit_is_refused_with_the_numbers(tiny, prompt) -> None:
    message = r"of 150 tokens .* up to 60 need 4 pages of 64 tokens.* has 3"
    with Engine(tiny.plain, EngineConfig(pages=3)) as engine, pytest.raises(RequestError, match=message):
        engine.submit(prompt(150), greedy(60))


def test_a_full_queue_refuses(tiny, prompt) -> None:
    with Engine(tiny.plain, EngineConfig(pages=PAGES, max_queue=16)) as engine:
        requests = [engine.submit(prompt(5), greedy(250)) for _ in range(16)]
        while engine.stats().running < 16:
            time.sleep(0.001)
        requests += [engine.submit(prompt(5), greedy(1)) for _ in range(16)]
        with pytest.raises(QueueFullError, match="16 answers wait already, the limit is 16"):
            engine.submit(prompt(5), greedy(1))
        for request in requests:
            request.cancel()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_batch": 0}, "max_batch must be a whole number, 1 or above, got 0"),
        ({"pages": 1.5}, "pages must be"),
        ({"page_size": 48}, "page_size must be a power of two, got 48"),
        ({"decode_steps": 33}, "decode_steps must be at most 32, got 33"),
        ({"kv_dtype": "int4"}, "kv_dtype must be one of float32, bfloat16, float16, int8, or None, got 'int4'"),
        ({"batch_sizes": (2, 4), "max_batch": 8}, r"batch_sizes must reach max_batch \(8\)"),
    ],
)
def test_an_impossible_config_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        EngineConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stop_token_ids": [272]}, "token id 272 is outside the vocabulary"),
        ({"logit_bias": {-1: 1.0}}, "token id -1 is outside"),
        ({"stop": "x"}, "stop strings need a tokenizer"),
    ],
)
def test_an_impossible_request_is_refused_at_once(fields: dict[str, object], message: str, engine: Engine) -> None:
    with pytest.raises(RequestError, match=message):
        engine.submit([1], SamplingParams(**fields))


@pytest.mark.parametrize("name", ["n", "logprobs", "prompt_logprobs", "min_tokens"])
def test_generate_refuses_by_name_what_only_the_engine_does(name: str, tiny) -> None:
    with pytest.raises(RequestError, match=f"generate does not do {name}; use jllm_runtime.Engine"):
        generate(tiny.plain, [[1]], SamplingParams(**{name: 2}))


def test_pages_by_default_fit_the_machine_and_the_model(tiny) -> None:
    assert EngineConfig(max_batch=3).page_count(tiny.plain) == 3 * 5  # 300 tokens are five pages
    assert EngineConfig(pages=7).page_count(tiny.plain) == 7


@pytest.mark.parametrize(("platform", "values", "lost"), [("cpu", 7, 1 / 3), ("gpu", 28, 1 / 9)])
def test_pages_by_the_free_memory_are_of_few_numbers(
    platform: str, values: int, lost: float, tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))
    large = dataclasses.replace(tiny.config, context_length=10**6)
    model = SimpleNamespace(config=large, weights=tiny.plain.weights, mesh=mesh, placement=None)
    page = page_bytes(large, 64, jnp.float32)
    counts = []
    for spare in range(100, 1001):
        monkeypatch.setattr(pool_size, "_spare_bytes", lambda *_, spare=spare: spare * page)
        counts.append(EngineConfig().page_count(model))
        assert (1 - lost) * spare <= counts[-1] <= spare
    assert counts == sorted(counts)
    assert len(set(counts)) == values


def test_what_the_system_keeps_files_in_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:  24684084 kB\nMemFree:  1000 kB\nMemAvailable:   23813692 kB\nBuffers:  200396 kB\n")
    monkeypatch.setattr(pool_size, "MEMORY_FILE", file)
    assert pool_size._available_memory() == 23813692 * 1024
    file.write_text("MemTotal:  24684084 kB\n")  # kernels before 3.14
    assert 0 < pool_size._available_memory() < 2**50


@pytest.mark.parametrize(
    ("width", "max_batch", "sizes"),
    [(64, 16, (16,)), (576, 16, (8, 16)), (1024, 5, (4, 8)), (4096, 8, (2, 4, 8)), (4096, 1, (1,)), (64, 3, (4,))],
)
def test_batch_sizes_are_those_that_round_alike(width: int, max_batch: int, sizes: tuple[int, ...], tiny) -> None:
    config = dataclasses.replace(tiny.config, hidden_size=width, num_heads=width // 8, num_kv_heads=1)
    model = dataclasses.replace(tiny.plain, config=config)
    assert EngineConfig(max_batch=max_batch).sizes(model) == sizes
    assert EngineConfig(max_batch=2, batch_sizes=(4, 1)).sizes(model) == (1, 4)


def test_quantised_weights(tiny, prompt) -> None:
    quantization = Quantization(bits=8)
    weights = init_weights(tiny.config, jax.random.key(0), quantization=quantization)
    model = dataclasses.replace(tiny.plain, weights=weights)
    with Engine(model, EngineConfig(pages=PAGES)) as engine:
        outputs = engine.generate([prompt(70), prompt(9)], greedy(8))
    assert tokens(outputs) == tokens(generate(model, [prompt(70), prompt(9)], greedy(8)))


def test_a_text_whose_keys_depend_on_its_length_shares_no_pages(tiny, prompt) -> None:
    scaling = RopeScaling(kind="dynamic", factor=2.0, original_context_length=128)
    model = tiny.random(dataclasses.replace(tiny.config, num_layers=1, rope_scaling=scaling))
    with Engine(model, EngineConfig(pages=PAGES)) as engine:
        short = [engine.submit(prompt(128), greedy(8)).result() for _ in range(2)]
        long = [engine.submit(prompt(128) + prompt(n), greedy(8)).result() for n in (10, 10, 30)]
    assert [output.reused_tokens for output in short + long] == [0, 64, 0, 0, 0]
    prompts = [prompt(128), prompt(128) + prompt(10), prompt(128) + prompt(30)]
    assert tokens([short[0], *long[1:]]) == tokens(generate(model, prompts, greedy(8)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_types_of_16_bits(dtype: Any, tiny, prompt) -> None:
    model: Model = tiny.random(dataclasses.replace(tiny.config, num_layers=1), dtype)
    with Engine(model, EngineConfig(pages=PAGES)) as engine:
        alone = engine.submit(prompt(66), greedy(8)).result().token_ids
        together = [engine.submit(prompt(66), greedy(8)), engine.submit(prompt(130), greedy(8))]
        assert together[0].result().token_ids == alone


def test_keys_and_values_of_8_bits(tiny, prompt) -> None:
    """The pages take a fraction of the bytes, and the neighbours still change nothing."""
    model = tiny.random(dataclasses.replace(tiny.config, head_dim=16))
    with Engine(model, EngineConfig(pages=PAGES, kv_dtype="int8")) as engine:
        alone = engine.submit(prompt(66), seeded(12)).result().token_ids
        together = [engine.submit(prompt(66), seeded(12)), engine.submit(prompt(130), greedy(8))]
        assert together[0].result().token_ids == alone
        assert together[1].result().token_ids == generate(model, [prompt(130)], greedy(8), kv_dtype="int8")[0].token_ids
