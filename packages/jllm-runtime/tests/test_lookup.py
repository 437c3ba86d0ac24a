"""Drafts by prompt lookup: where they come from, and that no token depends on them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jllm_core import RopeScaling
from jllm_core.backends.cpu import ffi
from jllm_runtime import Model, RequestError, SamplingParams, generate, stream_generate
from jllm_runtime.cache.contiguous import cache_info
from jllm_runtime.programs import contiguous_batch
from jllm_runtime.sampling import SamplingArrays
from jllm_runtime.speculative.prompt_lookup import (
    MAX_DRAFT,
    MAX_MATCH,
    MAX_PAUSE,
    MIN_MATCH,
    Patience,
    draft_length,
    find_draft,
)

MakePrompt = Callable[..., list[int]]
SLOTS = 24

find = jax.jit(find_draft, static_argnames="count")


# ---- Finding a draft.


def reference(text: list[int], count: int) -> list[int] | None:
    """Place by place, in plain words."""
    best, end = 0, -1
    for place in range(len(text) - 1):
        agreed = 0
        while agreed < min(MAX_MATCH, place + 1) and text[place - agreed] == text[len(text) - 1 - agreed]:
            agreed += 1
        if agreed and agreed >= best:
            best, end = agreed, place
    if best < MIN_MATCH:
        return None
    followed = text[end + 1 :]
    return [followed[at % len(followed)] for at in range(count)]


@given(
    texts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=SLOTS), min_size=2, max_size=2),
    count=st.sampled_from([1, 4, 7]),
    rest=st.integers(0, 2),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_a_draft_is_what_followed_the_longest_and_latest_match(texts: list[list[int]], count: int, rest: int) -> None:
    filled = np.full((2, SLOTS), rest, np.int32)
    for row, text in zip(filled, texts, strict=True):
        row[: len(text)] = text
    drafts, found = find(filled, np.array([len(text) for text in texts], np.int32), count=count)
    expected = [reference(text, count) for text in texts]
    assert found.tolist() == [draft is not None for draft in expected]
    assert [draft for draft, there in zip(drafts.tolist(), found, strict=True) if there] == [d for d in expected if d]


def test_a_text_that_repeats_one_token_is_taken_to_go_on() -> None:
    drafts, found = find(np.array([[5, 7, 7, 7, 7, 0]], np.int32), np.array([5], np.int32), count=4)
    assert (found.tolist(), drafts.tolist()) == ([True], [[7, 7, 7, 7]])


def test_failures_make_the_pauses_longer_and_a_success_ends_them() -> None:
    patience, yes = Patience.of(1), np.array([True])
    pauses = []
    for kept in (0, 0, 0, 0, 0, 0, 0, 3, 0, 0):
        patience = patience.after(yes, np.array([kept]))
        pauses.append(int(patience.pause[0]))
    assert pauses == [0, 1, 3, 7, 15, MAX_PAUSE, MAX_PAUSE, 0, 0, 1]
    patience = patience.after(~yes, np.array([0]))
    assert (int(patience.pause[0]), int(patience.failures[0])) == (0, 2)


@pytest.mark.parametrize("asked", [-1, MAX_DRAFT + 1, 1.0, True, None, "3"])
def test_a_draft_length_that_is_none_is_refused(asked: Any, tiny) -> None:
    with pytest.raises(RequestError, match=f"lookup must be a whole number from 0 .* to {MAX_DRAFT}, got {asked!r}"):
        generate(tiny.plain, [[1]], lookup=asked)
    with pytest.raises(RequestError, match="lookup must be"):
        stream_generate(tiny.plain, [1], lookup=asked)


def test_drafts_are_no_longer_than_the_kernels_take(tiny) -> None:
    lengths = [draft_length(7, rows, tiny.plain.backend) for rows in (1, 2, 4, 8, 16)]
    assert lengths == ([7, 7, 3, 1, 0] if ffi.available() else [7] * 5)


# ---- The tokens are those without drafts.


@pytest.fixture(params=["xla", "kernels"])
def models(request: pytest.FixtureRequest, tiny, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Model]:
    """Makes random models that run on XLA's operations alone, or on the CPU kernels."""
    kernels = request.param == "kernels"
    if kernels and not ffi.available():
        pytest.skip("the kernels' compiler is not installed")
    if not kernels:
        monkeypatch.setenv(ffi.SWITCH, "xla")
    # The kernels want whole vectors in a head. One that XLA has compiled is not taken for the other.
    shape = {"head_dim": 16, "vocab_size": 272 if kernels else 271}
    return lambda **fields: tiny.random(dataclasses.replace(tiny.config, **shape, **fields))


def repeating(prompt: MakePrompt, length: int, times: int = 2) -> list[int]:
    """A prompt that says the same several times, and begins to once more."""
    part = [token % 271 for token in prompt(length)]
    return part * times + part[: length // 2]


def both(model: Model, prompts: list[list[int]], params: Any, lookup: int = 7) -> list[list[int]]:
    """The answers, which must be the same with drafts as without."""
    plain, looked_up = generate(model, prompts, params), generate(model, prompts, params, lookup=lookup)
    assert [o.token_ids for o in looked_up] == [o.token_ids for o in plain]
    assert [o.finish_reason for o in looked_up] == [o.finish_reason for o in plain]
    return [output.token_ids for output in plain]


@pytest.mark.parametrize("lookup", [1, 7])
def test_greedy_tokens(lookup: int, models: Callable[..., Model], prompt: MakePrompt) -> None:
    model = models()
    for ids in (repeating(prompt, 20), [token % 271 for token in prompt(70)], [3]):
        both(model, [ids], SamplingParams(max_tokens=60), lookup)


def test_drawn_tokens(models: Callable[..., Model], prompt: MakePrompt) -> None:
    model = models()
    for seed in range(4):
        params = SamplingParams(temperature=0.3 + 0.4 * seed, top_p=0.9, top_k=20 * seed, seed=seed, max_tokens=60)
        both(model, [repeating(prompt, 20)], params)


def test_rows_of_a_batch(models: Callable[..., Model], prompt: MakePrompt) -> None:
    """They make different progress, end at different times, and may be drawn or not."""
    model = models()
    prompts = [repeating(prompt, length) for length in (8, 40, 3)]
    params = [SamplingParams(max_tokens=5 + 25 * row, temperature=row % 2 * 0.5, seed=row) for row in range(3)]
    assert both(model, prompts, params)[1] == both(model, prompts[1:2], params[1:2])[0]


def test_scaling_that_goes_by_the_length_and_windows(models: Callable[..., Model], prompt: MakePrompt) -> None:
    scaling = RopeScaling(kind="dynamic", factor=3.0, original_context_length=32)
    model = models(rope_scaling=scaling, windows=(None, 20))
    both(model, [repeating(prompt, 20)], SamplingParams(max_tokens=40))


def test_bfloat16_by_the_kernels(tiny, prompt: MakePrompt) -> None:
    if not ffi.available():
        pytest.skip("the kernels' compiler is not installed")
    model = tiny.random(dataclasses.replace(tiny.config, head_dim=16), "bfloat16")
    both(model, [repeating(prompt, 20)], SamplingParams(max_tokens=60))


@pytest.mark.parametrize("length", [240, 255, 290, 299])
def test_a_cache_that_grows_and_ends(length: int, models: Callable[..., Model], prompt: MakePrompt) -> None:
    ids = repeating(prompt, 20, times=20)[:length]
    [tokens] = both(models(), [ids], SamplingParams(max_tokens=100))
    assert length + len(tokens) == 300


# ---- Several tokens a step.

WORDS = [*range(100, 110)]


@pytest.fixture
def parrot(tiny) -> Model:
    """Says ten tokens over and over again."""
    return tiny.following(dict(zip(WORDS, [*WORDS[1:], WORDS[0]], strict=True)))


def decode_rows(
    model: Model, texts: list[list[int]], count: int, eos: int = -1, limit: int = 200, patience: Any = None
) -> tuple[list[list[int]], Patience]:
    """The new tokens of each row, and the patience, after ``count`` tokens or a step more."""
    rows = len(texts)
    info = cache_info(model.config, rows, 256, model.weights.embedding.dtype)
    cache = contiguous_batch.empty_cache(info.shape, info.dtype, model.config, model.backend)
    filled = np.zeros((rows, 257), np.int32)
    for row, text in zip(filled, texts, strict=True):
        row[: len(text)] = text
    _, patience, made = contiguous_batch.decode_by_lookup(
        model.weights,
        cache,
        filled,
        np.array([len(text) - 1 for text in texts], np.int32),
        np.zeros(rows, bool),
        np.full(rows, limit, np.int32),
        np.array([[eos, -1, -1, -1]] * rows, np.int32),
        patience or Patience.of(rows),
        SamplingArrays.of([SamplingParams(seed=0)] * rows),
        np.int32(count),
        model.config,
        7,
    )
    return [[token for token in row if token >= 0] for row in made.tolist()], patience


def decode(model: Model, text: list[int], count: int, **options: Any) -> tuple[list[int], Patience]:
    [made], patience = decode_rows(model, [text], count, **options)
    return made, patience


def test_a_step_takes_a_whole_draft_and_one_token_more(parrot: Model) -> None:
    text = WORDS + WORDS[:3]
    assert decode(parrot, text, 1)[0] == [*WORDS[3:], WORDS[0]]
    assert decode(parrot, text, 9)[0] == [*WORDS[3:], *WORDS[:9]]


def test_a_step_without_a_draft_takes_one_token(parrot: Model) -> None:
    assert decode(parrot, WORDS[:4], 1)[0] == WORDS[4:5]
    assert decode(parrot, WORDS, 0)[0] == []


def test_a_draft_holds_as_far_as_it_agrees(parrot: Model) -> None:
    """The text has gone on otherwise the last time: after two tokens."""
    text = [*WORDS[:5], 7, 8, 9, *WORDS[:3]]
    assert decode(parrot, text, 1)[0] == WORDS[3:6]


def test_a_row_ends_within_a_draft(parrot: Model) -> None:
    text = WORDS + WORDS[:3]
    assert decode(parrot, text, 32, eos=WORDS[5])[0] == WORDS[3:6]
    assert decode(parrot, text, 32, limit=14)[0] == WORDS[3:5]


def test_what_comes_after_a_wrong_draft_ends_no_row(tiny) -> None:
    """The second row's draft goes on with 7, after which the model would say the end of the text."""
    model = tiny.following(dict(zip(WORDS, [*WORDS[1:], WORDS[0]], strict=True)) | {7: 5})
    made, _ = decode_rows(model, [WORDS + WORDS[:3], [*WORDS[:5], 7, 8, 9, *WORDS[:3]]], 9, eos=5)
    assert made == [[*WORDS[3:], *WORDS[:9]], WORDS[3:7]]


def test_drafts_that_fail_become_rare(parrot: Model) -> None:
    """The text seems to repeat itself, and never does as it did."""
    text = [*WORDS[:3], 7, *WORDS[:3]]
    made, patience = decode(parrot, text, 1)
    assert (made, patience.failures.tolist(), patience.pause.tolist()) == (WORDS[3:4], [1], [0])
    _, patience = decode(parrot, text, 1, patience=patience)
    assert (patience.failures.tolist(), patience.pause.tolist()) == ([2], [1])
    made, patience = decode(parrot, WORDS + WORDS[:3], 1, patience=patience)  # this draft would have been a good one
    assert (made, patience.failures.tolist(), patience.pause.tolist()) == (WORDS[3:4], [2], [0])


def test_pieces_of_a_stream(parrot: Model) -> None:
    params = SamplingParams(max_tokens=70)
    [output] = generate(parrot, [WORDS[:2]], params)
    pieces = list(stream_generate(parrot, WORDS[:2], params, lookup=7))
    assert [token for piece in pieces for token in piece.token_ids] == output.token_ids
    assert all(piece.token_ids for piece in pieces)


def test_one_program_serves_every_mix_of_requests(tiny, prompt: MakePrompt) -> None:
    generate(tiny.plain, [prompt(3)], SamplingParams(max_tokens=5), lookup=7)
    before = contiguous_batch.decode_by_lookup._cache_size()
    generate(tiny.plain, [prompt(90)], SamplingParams(max_tokens=40, temperature=1.0, top_k=3, seed=9), lookup=7)
    generate(dataclasses.replace(tiny.plain, eos_ids=(1, 2, 3)), [prompt(7)], SamplingParams(max_tokens=33), lookup=7)
    assert contiguous_batch.decode_by_lookup._cache_size() == before
