"""Generation by cache and compiled blocks, held against the plain model, one token at a time."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from jllm_runtime import Engine, EngineConfig, Model, RequestError, SamplingParams, generate, stream_generate
from jllm_runtime.errors import ModelError
from jllm_runtime.generation import MAX_BATCH
from jllm_runtime.programs import contiguous_batch
from jllm_runtime.sampling import SamplingArrays, sample

MakePrompt = Callable[..., list[int]]


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens)


# ---- The cache changes nothing.


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 130, 200])
def test_greedy_tokens_are_those_of_the_plain_model(length: int, tiny, prompt: MakePrompt) -> None:
    ids = prompt(length)
    [output] = generate(tiny.plain, [ids], greedy(12))
    assert output.token_ids == tiny.naive_greedy(tiny.plain, ids, 12)
    assert output.prompt_token_ids == ids
    assert output.finish_reason == "length"


def test_the_answers_depend_on_the_prompts_first_token(tiny, prompt: MakePrompt) -> None:
    """Else the comparison above would not notice a cache that forgets."""
    ids = prompt(130)
    others = [ids[0] ^ 1, *ids[1:]]
    outputs = generate(tiny.plain, [ids, others], greedy(12))
    assert outputs[0].token_ids != outputs[1].token_ids
    assert min(len(set(output.token_ids)) for output in outputs) > 3


def test_sampled_tokens_are_those_of_the_plain_model(tiny, prompt: MakePrompt) -> None:
    """Each drawn from its own logits with the seed and the position that it will have."""
    params = SamplingParams(temperature=1.0, top_k=20, top_p=0.9, min_p=0.01, seed=3, max_tokens=12)
    arrays, draw = SamplingArrays.of([params]), jax.jit(sample)

    def choose(logits: np.ndarray, position: int) -> int:
        return int(draw(logits[None], np.array([position], np.int32), arrays)[0])

    ids = prompt(70)
    [output] = generate(tiny.plain, [ids], params)
    assert output.token_ids == tiny.naive(tiny.plain, ids, 12, choose)
    assert output.token_ids != tiny.naive_greedy(tiny.plain, ids, 12)


PENALIZED = SamplingParams(
    max_tokens=50, repetition_penalty=1.4, presence_penalty=0.7, frequency_penalty=0.9, logit_bias={5: 4.0, 9: -100.0}
)


@pytest.mark.parametrize("lookup", [0, 7])
def test_penalties_and_biases_are_those_of_the_plain_model(lookup: int, tiny, prompt: MakePrompt) -> None:
    ids = prompt(20) * 2
    expected = tiny.naive_penalized(tiny.plain, ids, 50, PENALIZED)
    [output] = generate(tiny.plain, [ids], PENALIZED, lookup=lookup)
    assert output.token_ids == expected != tiny.naive_greedy(tiny.plain, ids, 50)
    streamed = [token for piece in stream_generate(tiny.plain, ids, PENALIZED, lookup) for token in piece.token_ids]
    assert streamed == expected


@pytest.mark.parametrize("lookup", [0, 7])
def test_penalties_of_a_row_are_its_own_and_the_engine_s(lookup: int, tiny, prompt: MakePrompt) -> None:
    drawn = dataclasses.replace(PENALIZED, temperature=0.8, top_p=0.9, seed=5, max_tokens=40)
    prompts, params = [prompt(70), prompt(9), prompt(9)], [drawn, greedy(40), PENALIZED]
    outputs = [output.token_ids for output in generate(tiny.plain, prompts, params, lookup=lookup)]
    alone = [generate(tiny.plain, [ids], own)[0].token_ids for ids, own in zip(prompts, params, strict=True)]
    with Engine(tiny.plain, EngineConfig(max_batch=4, pages=64)) as engine:
        by_engine = [output.token_ids for output in engine.generate(prompts, params)]
    assert outputs == alone == by_engine
    assert outputs[1] != outputs[2]


def test_a_batch_without_penalties_runs_the_program_without_them(tiny, prompt: MakePrompt) -> None:
    generate(tiny.plain, [prompt(5)], greedy(4))
    generate(tiny.plain, [prompt(5)], dataclasses.replace(PENALIZED, max_tokens=4))
    before = contiguous_batch.decode._cache_size()
    generate(tiny.plain, [prompt(6)], greedy(5))
    generate(tiny.plain, [prompt(6)], dataclasses.replace(PENALIZED, max_tokens=5, presence_penalty=0.1))
    assert contiguous_batch.decode._cache_size() == before


# ---- Without parameters, the publisher's.


@pytest.fixture
def published(tiny) -> Model:
    """A model whose publisher recommends to draw."""
    settings = {"do_sample": True, "temperature": 0.7, "top_k": 30, "repetition_penalty": 1.2}
    return dataclasses.replace(tiny.plain, generation_config=settings)


def test_without_parameters_the_publisher_s_are_taken(published: Model, prompt: MakePrompt, monkeypatch) -> None:
    monkeypatch.setattr("jllm_runtime.sampling.draw_seed", lambda: 11)
    monkeypatch.setattr("secrets.randbits", lambda _: 11)
    ids, theirs = prompt(9), SamplingParams(temperature=0.7, top_k=30, repetition_penalty=1.2, seed=11)
    [expected] = generate(published, [ids], theirs)
    assert generate(published, [ids])[0].token_ids == expected.token_ids
    assert list(stream_generate(published, ids))[-1].output.token_ids == expected.token_ids
    with Engine(published, EngineConfig(max_batch=4, pages=64)) as engine:
        assert engine.submit(ids).result().token_ids == expected.token_ids
        assert engine.generate(ids)[0].token_ids == expected.token_ids
    [greedy_one] = generate(published, [ids], SamplingParams())
    assert greedy_one.token_ids == generate(dataclasses.replace(published, generation_config={}), [ids])[0].token_ids
    assert greedy_one.token_ids != expected.token_ids


def test_an_impossible_value_of_the_publisher_s_is_refused_with_its_place(published: Model, tmp_path) -> None:
    broken = dataclasses.replace(published, generation_config={"temperature": "warm"}, path=tmp_path)
    message = f"{tmp_path / 'generation_config.json'}: temperature must be 0 or above, got 'warm'"
    for answer in (generate, stream_generate):
        with pytest.raises(ModelError, match=re.escape(message)):
            answer(broken, [1])
    # It does no harm where somebody else decides.
    assert SamplingParams.of(broken, temperature=0) == SamplingParams()


@pytest.mark.parametrize("length", [240, 255, 256, 257])
def test_a_cache_that_grows_changes_nothing(length: int, tiny, prompt: MakePrompt) -> None:
    ids = prompt(length)
    [output] = generate(tiny.plain, [ids], greedy(40))
    assert output.token_ids == tiny.naive_greedy(tiny.plain, ids, 40)


def test_three_kv_heads_and_nine_query_heads(tiny, prompt: MakePrompt) -> None:
    config = dataclasses.replace(
        tiny.config, num_layers=1, num_heads=9, num_kv_heads=3, qk_norm=False, tie_embeddings=True
    )
    model, ids = tiny.random(config), prompt(66)
    [output] = generate(model, [ids], greedy(8))
    assert output.token_ids == tiny.naive_greedy(model, ids, 8)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_types_of_16_bits(dtype: Any, tiny, prompt: MakePrompt) -> None:
    """Rounding may decide between near ties; what the cached model takes must be within it of the plain one's best."""
    model, ids = tiny.random(dataclasses.replace(tiny.config, num_layers=1), dtype), prompt(66)
    [output] = generate(model, [ids], greedy(8))
    logits = np.asarray(model.logits([ids + output.token_ids]))[0, len(ids) - 1 : -1]
    assert logits.dtype == np.float32
    taken = np.take_along_axis(logits, np.array(output.token_ids)[:, None], axis=-1)[:, 0]
    np.testing.assert_array_less(logits.max(axis=-1) - taken, 0.05 * logits.std())


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize("head_dim", [8, 16])  # by XLA, by the CPU kernels where they are installed
def test_keys_and_values_of_fewer_bits(kv_dtype: str, head_dim: int, tiny, prompt: MakePrompt) -> None:
    """What is taken must be within their rounding of the best; and neither neighbours nor drafts change it."""
    config = dataclasses.replace(tiny.config, head_dim=head_dim, num_layers=1)
    model, ids = tiny.random(config), prompt(66)
    [output] = generate(model, [ids], greedy(12), kv_dtype=kv_dtype)
    logits = np.asarray(model.logits([ids + output.token_ids]))[0, len(ids) - 1 : -1]
    taken = np.take_along_axis(logits, np.array(output.token_ids)[:, None], axis=-1)[:, 0]
    np.testing.assert_array_less(logits.max(axis=-1) - taken, 0.05 * logits.std())
    together = generate(model, [prompt(130), ids], greedy(12), kv_dtype=kv_dtype, lookup=3)
    assert together[1].token_ids == output.token_ids


@pytest.mark.parametrize("ask", [generate, stream_generate])
def test_an_unknown_kv_dtype_is_refused(ask: Callable[..., object], tiny) -> None:
    with pytest.raises(
        RequestError, match="kv_dtype must be one of float32, bfloat16, float16, int8, or None, got 'int4'"
    ):
        ask(tiny.plain, [1], kv_dtype="int4")


# ---- Neighbours change nothing.

LENGTHS = [1, 130, 64, 5, 200]


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_batch_answers_as_each_prompt_alone(count: int, sampled: bool, tiny, prompt: MakePrompt) -> None:
    prompts = [prompt(length) for length in LENGTHS[:count]]
    params = [
        # Ends at different times, and with different parameters.
        SamplingParams(temperature=1.0 + row % 3, top_k=row % 2 * 50, top_p=0.95, seed=row, max_tokens=5 + 9 * row)
        if sampled
        else greedy(5 + 9 * row)
        for row in range(count)
    ]
    together = generate(tiny.plain, prompts, params)
    for ids, own, output in zip(prompts, params, together, strict=True):
        [alone] = generate(tiny.plain, [ids], own)
        assert output.token_ids == alone.token_ids
        assert output.prompt_token_ids == ids
        assert len(output.token_ids) == own.max_tokens


def test_a_neighbour_that_makes_the_cache_grow_changes_nothing(tiny, prompt: MakePrompt) -> None:
    prompts = [prompt(5), prompt(250)]
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=40)
    together = generate(tiny.plain, prompts, params)
    assert [output.token_ids for output in together] == [
        generate(tiny.plain, [ids], params)[0].token_ids for ids in prompts
    ]


@pytest.mark.parametrize("held", [4, 3])
def test_more_prompts_than_a_batch_holds(held: int, tiny, prompt: MakePrompt, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [prompt(1 + seed % 7, seed) for seed in range(11)]
    expected = [generate(tiny.plain, [ids], greedy(4))[0].token_ids for ids in prompts]
    monkeypatch.setattr("jllm_runtime.generation.MAX_BATCH", held)
    before = contiguous_batch.decode._cache_size()
    outputs = generate(tiny.plain, prompts, greedy(4))
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert [output.token_ids for output in outputs] == expected
    assert (
        contiguous_batch.decode._cache_size() <= before + 1
    )  # four rows at most: the program may be new, a larger one is not


def test_the_same_seed_repeats_and_no_seed_does_not(tiny, prompt: MakePrompt) -> None:
    seeded = SamplingParams(temperature=2.0, seed=5, max_tokens=20)
    free = SamplingParams(temperature=2.0, max_tokens=20)
    first, second, third, fourth = generate(tiny.plain, [prompt(5)] * 4, [seeded, seeded, free, free])
    assert first.token_ids == second.token_ids
    assert third.token_ids != fourth.token_ids


# ---- The end of the context.


def test_a_prompt_as_long_as_the_context_gets_no_answer(tiny, prompt: MakePrompt) -> None:
    [output] = generate(tiny.plain, [prompt(tiny.config.context_length)], greedy(5))
    assert (output.token_ids, output.text, output.finish_reason) == ([], "", "length")
    assert output.timings.decode_tokens_per_s == 0


@pytest.mark.parametrize("room", [1, 2, 9])
def test_the_answer_ends_with_the_context(room: int, tiny, prompt: MakePrompt) -> None:
    ids = prompt(tiny.config.context_length - room)
    [output] = generate(tiny.plain, [ids], greedy(100))
    assert output.token_ids == tiny.naive_greedy(tiny.plain, ids, room)
    assert output.finish_reason == "length"


def test_a_full_neighbour_changes_nothing(tiny, prompt: MakePrompt) -> None:
    prompts = [prompt(tiny.config.context_length), prompt(5)]
    full, other = generate(tiny.plain, prompts, greedy(6))
    assert full.token_ids == []
    assert other.token_ids == generate(tiny.plain, prompts[1:], greedy(6))[0].token_ids


def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers(tiny, prompt: MakePrompt) -> None:
    for ask in (generate, stream_generate):
        with pytest.raises(RequestError, match=r"301 tokens.* context .*300"):
            ask(tiny.plain, prompt(301))


def test_one_token(tiny, prompt: MakePrompt) -> None:
    [output] = generate(tiny.plain, [prompt(9)], greedy(1))
    assert output.token_ids == tiny.naive_greedy(tiny.plain, prompt(9), 1)
    assert output.finish_reason == "length"


# ---- What can be asked.


def test_a_single_prompt_needs_no_list(tiny) -> None:
    model = dataclasses.replace(tiny.plain, tokenizer=tiny.tokenizer)
    expected = generate(model, [[104, 105]], greedy(3))
    for prompts in ("hi", ["hi"], [104, 105], (104, 105), np.array([104, 105]), [np.array([104, 105])]):
        outputs = generate(model, prompts, greedy(3))
        assert [output.prompt_token_ids for output in outputs] == [[104, 105]]
        assert outputs[0].token_ids == expected[0].token_ids


def test_no_prompts_no_outputs(tiny) -> None:
    assert generate(tiny.plain, []) == []


def test_params_for_all_or_one_each(tiny, prompt: MakePrompt) -> None:
    prompts = [prompt(3), prompt(4)]
    assert [len(output.token_ids) for output in generate(tiny.plain, prompts, greedy(2))] == [2, 2]
    assert [len(output.token_ids) for output in generate(tiny.plain, prompts, [greedy(2), greedy(3)])] == [2, 3]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_params_is_refused(count: int, tiny, prompt: MakePrompt) -> None:
    with pytest.raises(RequestError, match=f"2 prompts need one SamplingParams or 2, got {count}"):
        generate(tiny.plain, [prompt(3), prompt(4)], [greedy(2)] * count)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[]], "the prompt is empty"),
        ([[1], []], "the prompt is empty"),
        ([[1, 272]], "token id 272 is outside the vocabulary of 272"),
        ([[-1]], "token id -1 is outside the vocabulary"),
        ([[2**70]], "outside the vocabulary"),
        ("hello", "no tokenizer; give the prompt as a list of token ids"),
        ("", "no tokenizer"),
    ],
)
def test_an_impossible_prompt_is_refused(prompts: object, message: str, tiny) -> None:
    with pytest.raises(RequestError, match=message):
        generate(tiny.plain, prompts)


@pytest.mark.parametrize("prompts", [[[1.5, 2.0]], [["a"]], [1, "a"], [[1], 2], [None]])
def test_a_prompt_of_anything_but_whole_numbers_is_refused(prompts: list, tiny) -> None:
    with pytest.raises(RequestError):
        generate(tiny.plain, prompts, greedy(1))


def test_an_empty_text_is_refused(tiny) -> None:
    with pytest.raises(RequestError, match="the prompt is empty"):
        generate(dataclasses.replace(tiny.plain, tokenizer=tiny.tokenizer), "")


def test_one_bad_prompt_stops_the_rest_before_any_work(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contiguous_batch, "prefill", None)
    with pytest.raises(RequestError, match="empty"):
        generate(tiny.plain, [[1]] * MAX_BATCH + [[]])


def test_a_stream_is_refused_before_it_is_read(tiny) -> None:
    with pytest.raises(RequestError, match="empty"):
        stream_generate(tiny.plain, [])


def test_stop_texts_need_a_tokenizer(tiny) -> None:
    with pytest.raises(RequestError, match="stop strings need a tokenizer"):
        generate(tiny.plain, [[1]], SamplingParams(stop="x"))


# ---- Programs and time.


def test_one_program_serves_every_mix_of_requests(tiny, prompt: MakePrompt) -> None:
    def ask(model: Model, lengths: tuple[int, int], **fields: object) -> None:
        generate(model, [prompt(length) for length in lengths], SamplingParams(**fields))

    ask(tiny.plain, (3, 4), max_tokens=5)
    programs = [contiguous_batch.prefill, contiguous_batch.first_token, contiguous_batch.decode]
    before = [program._cache_size() for program in programs]
    ask(tiny.plain, (200, 65), max_tokens=40)
    ask(tiny.plain, (1, 2), max_tokens=20, temperature=1.0, top_k=3, top_p=0.5, min_p=0.1, seed=9)
    ask(dataclasses.replace(tiny.plain, eos_ids=(1, 2, 3)), (7, 100), max_tokens=33)
    ask(dataclasses.replace(tiny.plain, tokenizer=tiny.tokenizer), (7, 100), max_tokens=33, stop=["a"])
    assert [program._cache_size() for program in programs] == before


def test_a_stream_uses_the_programs_of_a_batch_of_one(tiny, prompt: MakePrompt) -> None:
    generate(tiny.plain, [prompt(5)], greedy(3))
    before = contiguous_batch.decode._cache_size()
    list(stream_generate(tiny.plain, prompt(5), greedy(60)))
    assert contiguous_batch.decode._cache_size() == before


def test_few_batch_sizes_are_compiled(tiny, prompt: MakePrompt) -> None:
    sizes = set()
    for count in (5, 6, 7, 8):
        generate(tiny.plain, [prompt(3)] * count, greedy(3))
        sizes.add(contiguous_batch.decode._cache_size())
    assert len(sizes) == 1


def test_timings_fit_together(tiny, prompt: MakePrompt) -> None:
    generate(tiny.plain, [prompt(100), prompt(50)], greedy(20))
    outputs = generate(tiny.plain, [prompt(100), prompt(50)], greedy(20))
    timings = outputs[0].timings
    assert timings == outputs[1].timings
    assert min(timings.compile_s, timings.prefill_s, timings.decode_s) > 0
    assert timings.prefill_tokens_per_s == pytest.approx(150 / timings.prefill_s)
    assert timings.decode_tokens_per_s == pytest.approx(2 * 19 / timings.decode_s)


def test_compilation_counts_as_nothing_else(tiny, prompt: MakePrompt, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def on_event(event: str, duration: float, **_: object) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(duration)

    # A clock that only ticks when a program has been compiled.
    monkeypatch.setattr("jllm_runtime.generation.time.perf_counter", lambda: float(len(compiled)))
    model = tiny.random(dataclasses.replace(tiny.config, num_layers=1, vocab_size=280))
    jax.monitoring.register_event_duration_secs_listener(on_event)
    try:
        [output] = generate(model, [prompt(250)], greedy(20))  # the cache grows on the way
    finally:
        # Releases of JAX before 0.9 keep every listener.
        getattr(jax.monitoring, "unregister_event_duration_listener", lambda listener: None)(on_event)
    assert output.timings.compile_s >= 4
    assert (output.timings.prefill_s, output.timings.decode_s) == (0, 0)


# ---- The plain model.


def test_logits_of_a_filled_up_text_are_those_of_the_text(tiny, prompt: MakePrompt) -> None:
    ids = prompt(20)
    short = np.asarray(tiny.plain.logits([ids]))
    filled = np.asarray(tiny.plain.logits([ids + prompt(10)]))
    assert short.shape == (1, 20, tiny.config.vocab_size)
    np.testing.assert_allclose(short, filled[:, :20], atol=1e-4)


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([1, 2], r"whole numbers \[B, T\], at least one, got int64 \[2\]"),
        ([[[1]]], r"\[1, 1, 1\]"),
        ([[]], r"\[1, 0\]"),
        (np.zeros((1, 0), np.int32), r"got int32 \[1, 0\]"),
        ([], r"\[0\]"),
        ([[1.0]], "float64"),
        ([[True]], "bool"),
        ("text", "<U4"),
        ([[0] * 301], "301 tokens are more than the context of 300"),
        ([[0, 272]], "272 is outside the vocabulary of 272"),
        ([[0, -1]], "-1 is outside"),
        ([[1, 2], [3]], "one length"),
    ],
)
def test_logits_of_anything_else_are_refused(token_ids: object, message: str, tiny) -> None:
    with pytest.raises(RequestError, match=message):
        tiny.plain.logits(token_ids)
