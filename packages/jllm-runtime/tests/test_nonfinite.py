"""Logits and hidden states that are NaN or infinite: an error of that request, and its neighbours go on."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from jllm_core import ModelConfig
from jllm_runtime import Engine, EngineConfig, EngineError, Grammar, Model, SamplingParams, embed, generate
from jllm_runtime import stream_generate as stream
from jllm_runtime.errors import NonfiniteError

from .conftest import chain_weights, random_weights

MakePrompt = Callable[..., list[int]]
BAD = 7
GREEDY = SamplingParams(max_tokens=20)
WAYS = {
    "greedy": {},
    "drawn": {"temperature": 0.7, "seed": 1},
    "filtered": {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 1},
    "penalized": {"repetition_penalty": 1.2, "frequency_penalty": 0.1},
    "biased": {"logit_bias": {9: 50.0}},
}


def broken(tiny: Any, config: ModelConfig, part: str, number: float = np.nan) -> Model:
    """A model with a bad number: in the embedding of the token BAD, in its column of the head, or in the last norm."""
    weights = random_weights(config)
    assert weights.lm_head is not None
    embedding, head, gamma = weights.embedding.copy(), weights.lm_head.copy(), weights.gamma_final.copy()
    {"embedding": embedding[BAD], "head": head[:, BAD], "norm": gamma}[part][3] = number
    return tiny.model(config, dataclasses.replace(weights, embedding=embedding, lm_head=head, gamma_final=gamma))


@pytest.fixture(scope="module", params=[8, 16], ids=["XLA", "kernels"])
def config(request: pytest.FixtureRequest, tiny: Any) -> ModelConfig:
    """Heads of 16 are those that the CPU kernels take, where they are installed."""
    return dataclasses.replace(tiny.config, head_dim=request.param)


@pytest.fixture(scope="module")
def touchy(tiny: Any, config: ModelConfig) -> Model:
    """A model that fails the texts with the token BAD, and no others."""
    return broken(tiny, config, "embedding")


@pytest.fixture
def good(prompt: MakePrompt) -> list[int]:
    return [token for token in prompt(70) if token != BAD]


def without_bad(model: Model, prompts: list[list[int]], **fields: Any) -> list[list[int]]:
    """The answers, in which the token BAD is forbidden."""
    params = SamplingParams(max_tokens=20, logit_bias={BAD: -1e9}, **fields)
    return [output.token_ids for output in generate(model, prompts, params)]


@pytest.mark.parametrize(
    ("part", "number", "way"),
    [
        *[("embedding", np.nan, way) for way in WAYS],
        *[("embedding", np.inf, "greedy"), ("norm", np.nan, "greedy"), ("norm", -np.inf, "greedy")],
        *[("head", np.nan, "greedy"), ("head", np.nan, "drawn")],
    ],
)
def test_an_answer_without_numbers_is_an_error(
    tiny: Any, config: ModelConfig, good: list[int], part: str, number: float, way: str
) -> None:
    model = broken(tiny, config, part, number)
    with pytest.raises(NonfiniteError, match="the logits of token 1 of the answer are NaN or infinite: the model's"):
        generate(model, [[*good, BAD]], SamplingParams(max_tokens=20, **WAYS[way]))


@pytest.mark.parametrize("lookup", [0, 7])
@pytest.mark.parametrize("count", [1, 40])
def test_an_answer_fails_where_its_numbers_end(
    tiny: Any, config: ModelConfig, good: list[int], lookup: int, count: int
) -> None:
    """The token BAD comes after so many others of the answer, in the middle of a block of tokens or at its end."""
    # Says 100, 101, ... whatever comes before, and then BAD.
    follows = {**{100 + i: 101 + i for i in range(count - 1)}, 99 + count: BAD}
    chain = chain_weights(config, {**follows, BAD: BAD})
    embedding = chain.embedding.copy()
    embedding[BAD] = np.nan
    model = tiny.model(config, dataclasses.replace(chain, embedding=embedding))
    message = f"the logits of token {count + 1} of the answer"
    with pytest.raises(NonfiniteError, match=message):
        generate(model, [[100]], SamplingParams(max_tokens=60), lookup=lookup)
    pieces = stream(model, [100], SamplingParams(max_tokens=60), lookup=lookup)
    with pytest.raises(NonfiniteError, match=message):
        list(pieces)


def test_a_mask_or_a_bias_of_minus_infinity_is_none_of_it(tiny: Any, config: ModelConfig, good: list[int]) -> None:
    model = dataclasses.replace(tiny.random(config), tokenizer=tiny.tokenizer, eos_ids=(tiny.end,))
    with Engine(model, EngineConfig(pages=64)) as engine:
        answer = engine.submit(good, SamplingParams(max_tokens=20, grammar=Grammar.choice(["the", "other"]))).result()
        assert answer.text in ("the", "other")
        params = SamplingParams(max_tokens=5, min_tokens=5, stop_token_ids=tuple(range(200)))
        assert len(engine.submit(good, params).result().token_ids) == 5


def test_neighbours_in_the_engine_go_on(touchy: Model, good: list[int], prompt: MakePrompt) -> None:
    prompts = [[token for token in prompt(length) if token != BAD] for length in (5, 64, 90)]
    expected = without_bad(touchy, prompts)
    params = SamplingParams(max_tokens=20, logit_bias={BAD: -1e9})
    # Few pages, so that those of the failed ones are given to others.
    with Engine(touchy, EngineConfig(pages=40, page_size=16)) as engine:
        for _ in range(2):
            failing = [engine.submit([*each, BAD, 9], params) for each in prompts]
            going = [engine.submit(each, params) for each in prompts]
            assert [request.result().token_ids for request in going] == expected
            for request in failing:
                with pytest.raises(EngineError, match="the logits of token 1 of the answer are NaN") as caught:
                    request.result()
                assert isinstance(caught.value.__cause__, NonfiniteError)
        assert engine.stats().pages_in_use == 0
        assert engine.stats().running == 0


def test_what_float16_cannot_hold_fails_the_request(tiny: Any, prompt: MakePrompt) -> None:
    """By XLA, which computes in float16: a text whose numbers grow too large fails, others do not."""
    config = dataclasses.replace(tiny.config, head_dim=8)
    plain = random_weights(config)
    # Feature 0 is that of the token BAD alone, and what attention's values make of it ends beyond 65504. (Not of a
    # product in the middle of a layer: XLA may keep those in float32.)
    embedding, v = plain.embedding.copy(), plain.layers[0].attn.v.copy()
    embedding[:, 0], embedding[BAD, 0], v[0] = 0, 10, 6e4
    first = dataclasses.replace(plain.layers[0], attn=dataclasses.replace(plain.layers[0].attn, v=v))
    weights = dataclasses.replace(plain, embedding=embedding, layers=[first, *plain.layers[1:]])
    params = SamplingParams(max_tokens=4, logit_bias={BAD: -1e9})
    good = [token for token in prompt(20) if token != BAD]
    wide, narrow = (tiny.model(config, weights, dtype) for dtype in (np.float32, np.float16))
    assert all(len(output.token_ids) == 4 for output in generate(wide, [good, [*good, BAD]], params))
    assert len(generate(narrow, [good], params)[0].token_ids) == 4
    with pytest.raises(NonfiniteError, match="as it may in float16 beyond 65,504"):
        generate(narrow, [[*good, BAD]], params)


def test_several_answers_and_log_probabilities_fail_alike(touchy: Model, good: list[int]) -> None:
    with Engine(touchy, EngineConfig(pages=64)) as engine:
        for fields in ({"n": 3, "temperature": 1.0}, {"logprobs": 5, "prompt_logprobs": 3}):
            with pytest.raises(EngineError, match="are NaN or infinite"):
                engine.submit([*good, BAD], SamplingParams(max_tokens=20, **fields)).result()
        # Whoever iterates gets the error too, and no end beside it.
        with pytest.raises(EngineError, match="are NaN or infinite"):
            assert [piece.output for piece in engine.submit([*good, BAD], GREEDY)] == []


def test_embeddings_without_numbers_are_an_error(touchy: Model, good: list[int]) -> None:
    assert np.isfinite(embed(touchy, [good, good[:5]])).all()
    for pooling in ("mean", "last"):
        with pytest.raises(NonfiniteError, match="the hidden states of prompt 1 are NaN or infinite"):
            embed(touchy, [good, [*good, BAD]], pooling)
