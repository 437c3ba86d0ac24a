"""Endpoint /v1/completions, through OpenAI's own client."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from jllm_runtime import SamplingParams

GO_ON = "Hi"  # whose "i" is followed by ", you!" and the end


@pytest.fixture
def complete(client: openai.OpenAI) -> Callable[..., Any]:
    """Asks the model that says "Hi, you!"."""
    return lambda prompt=GO_ON, **fields: client.completions.create(model="tiny", prompt=prompt, **fields)


@pytest.fixture
def babble(babbling) -> Iterator[Callable[..., Any]]:
    """Asks the model that says anything."""
    with babbling.openai() as client:
        drawn = {"model": "tiny", "seed": 1, "temperature": 1}
        yield lambda prompt, **fields: client.completions.create(**{**drawn, "prompt": prompt, **fields})


def texts(reply: Any) -> list[str]:
    assert [choice.index for choice in reply.choices] == list(range(len(reply.choices)))
    return [choice.text for choice in reply.choices]


def streamed(chunks: Any, count: int) -> list[str]:
    found = [""] * count
    for chunk in chunks:
        for choice in chunk.choices:
            found[choice.index] += choice.text
    return found


# ---- Prompts.


def test_a_text_is_gone_on_with(complete) -> None:
    reply = complete()
    assert (texts(reply), reply.choices[0].finish_reason, reply.object) == ([", you!"], "stop", "text_completion")
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (2, 7)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (["Hi", "you"], [", you!", "!"]),
        ([72, 105], [", you!"]),
        ([[72, 105], [121]], [", you!", "ou!"]),
    ],
)
def test_prompts_of_every_kind(prompt: Any, expected: list[str], complete) -> None:
    assert texts(complete(prompt)) == expected
    assert streamed(complete(prompt, stream=True), len(expected)) == expected


def test_several_answers_to_several_prompts(babble) -> None:
    reply = babble(["one", "two"], n=2, max_tokens=8)
    assert len(set(texts(reply))) == 4
    assert reply.usage.completion_tokens <= 32
    assert texts(babble("two", n=2, max_tokens=8)) == texts(reply)[2:]
    assert streamed(babble(["one", "two"], n=2, max_tokens=8, stream=True), 4) == texts(reply)


def test_sixteen_tokens_are_usual(babble) -> None:
    reply = babble("abc", extra_body={"ignore_eos": True})
    assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (16, "length")


def test_a_stream_with_its_usage(complete) -> None:
    *_, last = complete(stream=True, stream_options={"include_usage": True})
    assert (last.choices, last.usage) == ([], complete().usage)


def test_the_engine_is_asked_what_the_client_asks(babbling, babble) -> None:
    fields = {"temperature": 0.7, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.25, "stop": ["zz"]}
    ours = {"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1}
    params = SamplingParams(**fields, **ours, logit_bias={5: 1.5}, seed=1, max_tokens=20)
    expected = babbling.engine.submit("abc", params).result()
    reply = babble("abc", **fields, logit_bias={"5": 1.5}, max_tokens=20, extra_body=ours)
    assert texts(reply) == [expected.text]


# ---- Echo and probabilities.


def test_the_prompt_can_come_back(complete) -> None:
    assert texts(complete(["Hi", "you"], echo=True)) == ["Hi, you!", "you!"]
    assert streamed(complete([72, 105], echo=True, stream=True), 1) == ["Hi, you!"]


def test_the_probabilities_of_tokens(complete) -> None:
    found = complete(logprobs=2).choices[0].logprobs
    assert "".join(found.tokens) == ", you!<|im_end|>"  # the one that ends the text, too, as in vLLM
    assert found.text_offset == list(range(7))
    assert [math.exp(one) for one in found.token_logprobs] == pytest.approx([1] * 7, abs=1e-3)
    assert [len(top) for top in found.top_logprobs] == [2] * 7
    chunks = list(complete(logprobs=2, stream=True))
    tokens = [
        token for chunk in chunks for choice in chunk.choices if choice.logprobs for token in choice.logprobs.tokens
    ]
    assert tokens == found.tokens


def test_the_token_itself_is_always_among_the_likeliest(babble) -> None:
    found = babble("abc", logprobs=0, max_tokens=5).choices[0].logprobs
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert top == {token: logprob}


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_a_prompt_can_be_scored(max_tokens: int, babble, babbling) -> None:
    prompt = "the é at " * 10
    reply = babble(prompt, echo=True, logprobs=1, max_tokens=max_tokens, temperature=0)
    found = reply.choices[0].logprobs
    params = SamplingParams(max_tokens=max(1, max_tokens), prompt_logprobs=1, logprobs=1)
    expected = babbling.engine.submit(prompt, params).result()
    scores = [one and one.logprob for one in expected.prompt_logprobs] + [one.logprob for one in expected.logprobs]
    count = len(expected.prompt_token_ids) + max_tokens
    assert found.token_logprobs == pytest.approx(scores[:count])
    assert found.token_logprobs[0] is None
    assert found.top_logprobs[0] is None
    assert found.tokens[:6] == ["the", " ", "\\xc3", "\\xa9", " ", "a"]
    assert found.text_offset[:6] == [0, 3, 4, 4, 5, 6]  # half a character takes no room
    assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (max_tokens, "length")
    assert reply.choices[0].text.startswith(prompt)
    assert (reply.choices[0].text == prompt) == (max_tokens == 0)


CASES: list[tuple[dict[str, Any], str]] = [
    ({}, ", you!"),
    ({"stop": "u!"}, ", yo"),  # the stop's own tokens begin where the text ends
    ({"stop": "ou<|im_end|>"}, ", you!"),
    ({"stop": "u!<|im_end|>"}, ", yo"),
    ({"max_tokens": 3}, ", y"),
    ({"prompt": [72, 105]}, ", you!"),
    ({"prompt": "<|im_start|>Hi"}, ", you!"),  # shown in an echo, for it is the client's own text
    ({"prompt": [258, 72, 105]}, ", you!"),  # not shown: of token ids, the echo has the text
]


@pytest.mark.parametrize(("fields", "text"), CASES, ids=str)
@pytest.mark.parametrize("echo", [False, True])
def test_every_token_has_an_entry_and_its_place_in_the_text(
    fields: dict[str, Any], text: str, echo: bool, complete, server
) -> None:
    """As in vLLM: prompt and answer, the token that ends it too. lm-eval takes the last entry for a generated one."""
    reply = complete(**fields, echo=echo, logprobs=1)
    [choice] = reply.choices
    found, count = choice.logprobs, reply.usage.completion_tokens + (reply.usage.prompt_tokens if echo else 0)
    assert {len(getattr(found, name)) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")} == {
        count
    }
    assert found.text_offset == sorted(found.text_offset)
    prompt = fields.get("prompt", "Hi")
    shown = prompt if isinstance(prompt, str) else "Hi"
    assert choice.text == (shown if echo else "") + text
    for token, at in zip(found.tokens, found.text_offset, strict=True):
        hidden = at == len(choice.text) or token.startswith("<|")
        assert hidden or choice.text.startswith(token, at)
    if choice.finish_reason == "stop" and not fields:
        assert (found.tokens[-1], found.text_offset[-1]) == ("<|im_end|>", len(choice.text))
    chunks = [one for chunk in complete(**fields, echo=echo, logprobs=1, stream=True) for one in chunk.choices]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [x for one in chunks if one.logprobs for x in getattr(one.logprobs, name)] == getattr(found, name)


@pytest.mark.parametrize("prompt", ["<|bos|>Hi", [258, 72, 105]], ids=["text", "ids"])
def test_an_echo_shows_special_tokens_that_are_asked_for(prompt: Any, complete) -> None:
    fields = {"prompt": prompt, "echo": True, "logprobs": 1, "extra_body": {"skip_special_tokens": False}}
    [choice] = complete(**fields).choices
    assert choice.text == "<|bos|>Hi, you!"
    assert choice.logprobs.text_offset == [0, *range(7, len(choice.text) + 1)]
    assert streamed(complete(**fields, stream=True), 1) == [choice.text]


def test_in_a_stream_a_token_comes_with_its_text(serve, tiny) -> None:
    """Before, nobody knows whether there will be any: a stop may cut it off."""
    with serve(tiny.saying(">aé漢bc!", eos_ids=(tiny.im_end,))) as server, server.openai() as client:
        asked = {"model": "tiny", "prompt": ">", "logprobs": 0, "max_tokens": 9, "stop": "bcd"}
        text, tokens = "", 0
        for chunk in client.completions.create(**asked, stream=True):
            text += chunk.choices[0].text
            for at in chunk.choices[0].logprobs.text_offset if chunk.choices[0].logprobs else []:
                assert at < len(text)
                tokens += 1
        assert (text, tokens) == ("aé漢bc!", 9)


def test_of_two_tokens_with_one_text_the_likelier_one_is_listed(serve, tiny) -> None:
    """Ids without a token have no text, all of them. lm-eval compares with the largest value."""
    model = tiny.following({ord(">"): 270, 270: 271, 271: 270})
    model = dataclasses.replace(model, tokenizer=tiny.tokenizer, eos_ids=(tiny.im_end,))
    with serve(model) as server, server.openai() as client:
        found = client.completions.create(model="tiny", prompt=">", logprobs=20, max_tokens=3).choices[0].logprobs
        assert [max(top.values()) for top in found.top_logprobs] == found.token_logprobs


def test_a_scored_prompt_in_a_stream(babble) -> None:
    whole = babble("the rest", echo=True, logprobs=1, max_tokens=6).choices[0]
    chunks = list(babble("the rest", echo=True, logprobs=1, max_tokens=6, stream=True))
    assert streamed(chunks, 1) == [whole.text]
    scores = [
        score for chunk in chunks for one in chunk.choices if one.logprobs for score in one.logprobs.token_logprobs
    ]
    assert scores == whole.logprobs.token_logprobs


# ---- What is refused.


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": ""}, None, "the prompt is empty"),
        ({"prompt": [[]]}, "prompt[0]", "at least 1 item"),
        ({"prompt": [272]}, None, "token id 272 is outside the vocabulary"),
        ({"prompt": [-1], "echo": True}, None, "token id -1 is outside"),
        ({"prompt": [10**30]}, None, "is outside the vocabulary"),
        ({"prompt": {"a": 1}}, "prompt", "valid string"),
        ({"prompt": "x" * 300}, "prompt", "300 tokens, at most 299 are taken"),
        ({"prompt": ["x"] * 129}, "prompt", "at most 128 items"),
        ({"prompt": ["x"] * 100, "n": 100}, None, "10000 answers are asked for, the server takes 272"),
        ({"max_tokens": 0}, "max_tokens", "needs echo: true"),
        ({"best_of": 2}, "best_of", "should be 1, got 2; ask for n answers"),
        ({"suffix": "x"}, "suffix", "the tokenizer of this one has no tokens for it"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"logprobs": True}, "logprobs", "valid integer"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_honoured_is_refused(fields: dict[str, Any], param: str | None, message: str, server) -> None:
    reply = server.post("/v1/completions", {"model": "tiny", "prompt": "a", **fields})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param)
    assert message in error["message"]
    server.wait_until_empty()


def test_one_bad_prompt_of_several_leaves_nothing_behind(server) -> None:
    reply = server.post("/v1/completions", {"model": "tiny", "prompt": [[1, 2], [999]]})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_value")
    server.wait_until_empty()
