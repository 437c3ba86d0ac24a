"""SamplingParams: what is refused, and with what words."""

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from jllm_runtime import Grammar, RequestError, SamplingParams
from jllm_runtime.answer_length import DEFAULT_MAX_TOKENS, default_max_tokens
from jllm_runtime.sampling import SamplingArrays
from jllm_runtime.sampling_summary import describe

QWEN3 = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *(("temperature", value, "0 or above") for value in (-0.1, NAN, INF, -INF, "hot", None, True)),
        *(("top_k", value, "a whole number, 0 (off) or above") for value in (-1, 2.0, "5", None, True)),
        *(("top_p", value, "from 0 to 1 (off)") for value in (-0.5, 1.01, NAN, "1", None, True)),
        *(("min_p", value, "from 0 (off) to 1") for value in (-0.1, 1.1, NAN, "0", None, False)),
        *(("seed", value, f"a whole number from 0 to {2**64 - 1}") for value in (-1, 2**64, 1.0, "1", True)),
        *(("max_tokens", value, "a whole number, 1 or above") for value in (0, -1, 1.0, "1", None, True)),
        *(("stop_token_ids", value, "a list of token ids") for value in (5, "12", [1.0], [True], None)),
        *(("min_tokens", value, "a whole number, 0 or above") for value in (-1, 1.0, None)),
        ("min_tokens", 257, "at most max_tokens (256)"),
        *(("repetition_penalty", value, "above 0 (1 is off)") for value in (0, -1.0, NAN, INF, None)),
        *(("presence_penalty", value, "a number (0 is off)") for value in (NAN, INF, "1", None)),
        *(("frequency_penalty", value, "a number (0 is off)") for value in (NAN, -INF, True)),
        *(("logit_bias", value, "a number for each of some token ids") for value in ([1], {"a": 1.0}, {1: NAN}, None)),
        *(("logprobs", value, "a whole number from 0 to 20, or None (off)") for value in (-1, 21, 1.0, True)),
        *(("prompt_logprobs", value, "a whole number from 0 to 20, or None (off)") for value in (-1, 21)),
        *(("n", value, "a whole number from 1 to 128") for value in (0, 129, 1.0, None)),
        *(("skip_special_tokens", value, "True or False") for value in (None, 0, "yes")),
        ("grammar", {"type": "object"}, "a Grammar, or None (off)"),
        *(("stop", value, "texts that are not empty") for value in ("", [""], ["a", ""], ["a", 3], b"a")),
    ],
)
def test_a_bad_value_is_refused_by_name(name: str, value: object, expected: str) -> None:
    with pytest.raises(RequestError, match=f"^{re.escape(f'{name} must be {expected}, got ')}") as caught:
        SamplingParams(**{name: value})
    if name != "stop":
        assert str(caught.value).endswith(f"got {value!r}")


@pytest.mark.parametrize("value", [None, 5])
def test_a_stop_that_is_no_list_is_refused_by_name(value: object) -> None:
    with pytest.raises(RequestError, match=r"^stop must be"):
        SamplingParams(stop=value)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 0, "max_tokens": 1},
        {"top_p": 0, "seed": 2**32},
        {"temperature": 100.0, "top_k": 10**12, "top_p": 1e-300, "min_p": 1, "seed": 2**64 - 1, "max_tokens": 10**9},
    ],
)
def test_values_at_the_bounds_are_taken(fields: dict[str, float]) -> None:
    params = SamplingParams(**fields)
    assert {name: getattr(params, name) for name in fields} == fields


def test_one_stop_text_needs_no_list() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_the_defaults_are_greedy_and_unfiltered() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0, 0, 1, 0)
    assert (params.seed, params.max_tokens, params.stop, params.ignore_eos) == (None, 256, (), False)


def test_what_only_the_engine_does_is_named() -> None:
    assert SamplingParams(temperature=1.0, stop="x", seed=1, ignore_eos=True).for_engine == []
    assert SamplingParams(stop_token_ids=[1], logit_bias={1: 1.0}, repetition_penalty=1.1).for_engine == []
    fields = {"n": 2, "logprobs": 0, "prompt_logprobs": 0, "min_tokens": 1, "grammar": Grammar.choice(["a"])}
    assert set(SamplingParams(**fields).for_engine) == set(fields)


def test_the_arrays_have_an_entry_a_row() -> None:
    arrays = SamplingArrays.of(
        [
            SamplingParams(temperature=0.5, top_k=3, top_p=0.25, min_p=0.125, seed=7),
            SamplingParams(top_k=10**12, seed=3 * 2**32 + 5),
        ]
    )
    assert arrays.temperature.tolist() == [0.5, 0]
    assert arrays.top_k.tolist() == [3, 2**31 - 1]
    assert arrays.top_p.tolist() == [0.25, 1]
    assert arrays.min_p.tolist() == [0.125, 0]
    assert arrays.seed.tolist() == [[0, 7], [3, 5]]
    types = [arrays.temperature.dtype, arrays.top_k.dtype, arrays.top_p.dtype, arrays.min_p.dtype, arrays.seed.dtype]
    assert types == [np.float32, np.int32, np.float32, np.float32, np.uint32]


def test_each_row_without_a_seed_draws_its_own() -> None:
    seeds = SamplingArrays.of([SamplingParams(temperature=1.0)] * 64).seed[:, 1].tolist()
    assert len(set(seeds)) > 60


def test_numbers_of_numpy_are_numbers() -> None:
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint32(7))
    assert (params.temperature, params.top_k, params.seed) == (0.5, 3, 7)


@pytest.mark.parametrize(
    ("fields", "published", "words"),
    [
        ({}, {}, "greedy"),
        ({}, QWEN3, "temperature 0.6, top-k 20, top-p 0.95 (the publisher's)"),
        ({"temperature": 0.7}, QWEN3, "temperature 0.7; top-k 20, top-p 0.95 (the publisher's)"),
        ({"temperature": 0}, QWEN3, "greedy"),
        ({"temperature": 1, "min_p": 0.05}, {}, "temperature 1, min-p 0.05"),
        ({}, {"repetition_penalty": 1.1}, "greedy; repetition penalty 1.1 (the publisher's)"),
    ],
)
def test_the_words_for_the_parameters(fields: dict[str, float], published: dict[str, Any], words: str) -> None:
    model = SimpleNamespace(generation_config=published)
    assert describe(SamplingParams.of(model, **fields), model) == words


def test_a_model_that_thinks_may_say_more() -> None:
    assert default_max_tokens(thinks=False) == DEFAULT_MAX_TOKENS < default_max_tokens(thinks=True)
