"""Filling in the middle: prompts in the tokens of each family, and ``suffix`` of /v1/completions."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import openai
import pytest
from jllm_runtime import Model, SamplingParams, Tokenizer
from jllm_runtime.server.errors import ApiError
from jllm_runtime.server.requests.fill_in_middle import ENDS, MARKERS, FillInMiddle
from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as RawTokenizer

QWEN = ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|file_sep|>"]  # in the order of its ids
FIRST = 262  # id of the first token that is added


def with_tokens(tokenizer: Tokenizer, names: Sequence[str], special: bool = False) -> Tokenizer:
    raw = RawTokenizer.from_str(tokenizer.to_json())
    raw.add_tokens([AddedToken(name, normalized=False, special=special) for name in names])
    return Tokenizer(raw, {"eos_token": "<|end|>"}, None)


@pytest.fixture
def coder(tiny) -> Callable[..., Model]:
    """A model whose tokenizer has these tokens, and which says what follows the marker of the middle."""

    def make(said: Sequence[int] = (), names: Sequence[str] = QWEN, special: bool = False) -> Model:
        tokenizer = with_tokens(tiny.tokenizer, names, special)
        # Of the models that were trained on it, the middle's marker is the last token of the prompt.
        middle = next(tokenizer.token_id(names[2]) for names in MARKERS if tokenizer.token_id(names[2]))
        return dataclasses.replace(tiny.saying([middle, *said], eos_ids=(tiny.end,)), tokenizer=tokenizer)

    return make


# ---- Prompts.


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("names", MARKERS, ids=lambda names: names[0])
def test_every_family_has_the_order_prefix_suffix_middle(
    names: tuple[str, str, str], special: bool, coder, tiny
) -> None:
    model = coder(names=names, special=special)
    found = FillInMiddle.of(model.tokenizer, 272)
    prompt = found.prompt(model.tokenizer, "def f(", "):\n    pass")
    assert prompt == [FIRST, *b"def f(", FIRST + 1, *b"):\n    pass", FIRST + 2]
    if special:  # what Qwen2.5-Coder's and StarCoder's cards show is the same as one text
        assert prompt == model.tokenizer.encode(f"{names[0]}def f({names[1]}):\n    pass{names[2]}")


def test_a_prompt_begins_with_the_token_that_the_model_wants_there(coder) -> None:
    model = coder()
    raw = RawTokenizer.from_str(model.tokenizer.to_json())
    raw.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 258)])
    tokenizer = Tokenizer(raw, {}, None)
    found = FillInMiddle.of(tokenizer, 272)
    for before in ("ab", [*b"ab"]):
        assert found.prompt(tokenizer, before, "c") == [258, FIRST, *b"ab", FIRST + 2, ord("c"), FIRST + 1]


@pytest.mark.parametrize(
    "names", [(), ("<|fim_prefix|>", "<|fim_suffix|>"), ("<fim_prefix>", "<|fim_suffix|>", "<|fim_middle|>")], ids=str
)
def test_a_tokenizer_without_the_tokens_is_refused_by_the_name_of_the_field(names: tuple[str, ...], tiny) -> None:
    with pytest.raises(ApiError, match="suffix needs a model that fills in the middle") as caught:
        FillInMiddle.of(with_tokens(tiny.tokenizer, names), 272)
    assert (caught.value.status_code, caught.value.param) == (400, "suffix")


def test_tokens_that_the_model_does_not_know_do_not_count(coder) -> None:
    with pytest.raises(ApiError, match="no tokens for it"):
        FillInMiddle.of(coder().tokenizer, FIRST + 1)


def test_the_ends_of_a_middle(coder) -> None:
    model = coder(names=[*QWEN, "<|endoftext|>"])
    found = FillInMiddle.of(model.tokenizer, 272)
    assert sorted(found.ends) == [FIRST + number for number in range(6)]
    ended = found.ended(SamplingParams(stop=["\n"], stop_token_ids=[7]), model.tokenizer)
    assert set(ended.stop) == {"\n", "<|endoftext|>", *QWEN}
    assert set(ended.stop_token_ids) == {7, *found.ends}
    free = SamplingParams(ignore_eos=True)
    assert found.ended(free, model.tokenizer) is free
    assert len(ENDS) == len(set(ENDS))


# ---- The endpoint.


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("end", ["<|end|>", "<|fim_pad|>", "<|file_sep|>", "<|fim_prefix|>"])
def test_the_middle_is_filled_in(end: str, special: bool, coder, serve, tiny) -> None:
    """Instruct models end a chat with another token than they end a middle with."""
    model = coder(special=special)
    said = [*b"x, y", model.tokenizer.token_id(end), *b"more"]
    with serve(coder(said, special=special)) as server, server.openai() as client:
        asked = {"model": "tiny", "prompt": "def f(", "suffix": "): pass"}
        reply = client.completions.create(**asked)
        [choice] = reply.choices
        assert (choice.text, choice.finish_reason) == ("x, y", "stop")
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (6 + 7 + 3, 5)
        chunks = client.completions.create(**asked, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == "x, y"
        goes_on = client.completions.create(**asked, extra_body={"ignore_eos": True}).choices[0]
        assert goes_on.finish_reason == "length"
        assert goes_on.text.startswith("x, y")


def test_the_suffix_is_what_the_engine_is_given(coder, serve) -> None:
    with serve(coder()) as server, server.openai() as client:
        model = server.engine.model
        draws = {"seed": 1, "temperature": 1.0, "max_tokens": 12}
        found = FillInMiddle.of(model.tokenizer, 272)

        def text(suffix: Any, prompt: Any = "ab", **fields: Any) -> list[str]:
            asked = {"model": "tiny", "prompt": prompt, "suffix": suffix, **draws, **fields}
            return [choice.text for choice in client.completions.create(**asked).choices]

        for suffix in ("c", "de", " \N{GRINNING FACE}"):
            params = found.ended(SamplingParams(**draws), model.tokenizer)
            expected = server.engine.submit(found.prompt(model.tokenizer, "ab", suffix), params).result().text
            assert text(suffix) == text(suffix, [*b"ab"]) == [expected]
            assert text(suffix, ["ab", "b"], n=2)[0] == expected
        # None and an empty one are no suffix: the prompt goes on as it is.
        assert text("") == text(None) == [server.engine.submit("ab", SamplingParams(**draws)).result().text]


def test_an_echo_beside_a_suffix_is_refused(coder, serve) -> None:
    with serve(coder()) as server, server.openai() as client:
        with pytest.raises(openai.BadRequestError, match="echo and suffix exclude each other"):
            client.completions.create(model="tiny", prompt="a", suffix="b", echo=True)
        with pytest.raises(openai.BadRequestError, match="303 tokens, at most 299 are taken"):
            client.completions.create(model="tiny", prompt="a" * 150, suffix="b" * 150)
        server.wait_until_empty()
