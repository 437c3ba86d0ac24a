"""Server: text of a tokenizer such as SentencePiece, and bytes that are no character."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from jllm_runtime import Model, Tokenizer
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers

IS, PARIS, END = 256, 257, 258
NEW = {"model": "tiny", "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def model(tiny) -> Model:
    """Says " Paris\\xc3" after "is", the last of it being half of a character."""
    texts = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁is", "▁Paris", "</s>"]
    vocab = {text: number for number, text in enumerate(texts)}
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, ignore_merges=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(raw, {}, "{% for message in messages %}{{ message.content }}{% endfor %}")
    assert tokenizer.encode("is") == [IS]
    return dataclasses.replace(tiny.saying([IS, PARIS, 0xC3, END], eos_ids=(END,)), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def server(model: Model, request: pytest.FixtureRequest) -> Iterator[Any]:
    from .conftest import served

    with served(model) as running:
        yield running


def completion(server: Any, prompt: Any, **fields: Any) -> list[str]:
    with server.openai() as client:
        if not fields.get("stream"):
            return [choice.text for choice in client.completions.create(prompt=prompt, **{**NEW, **fields}).choices]
        texts = [""] * fields.get("n", 1)
        for chunk in client.completions.create(prompt=prompt, **{**NEW, **fields}):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        return texts


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["is", [IS]], ids=["text", "ids"])
def test_a_completion_keeps_the_space_before_its_first_word(server: Any, prompt: Any, stream: bool) -> None:
    """As in vLLM, which decodes it behind its prompt."""
    assert completion(server, prompt, stream=stream) == [" Paris\ufffd"]
    assert completion(server, prompt, stream=stream, n=2, max_tokens=1) == [" Paris"] * 2
    assert completion(server, prompt, stream=stream, echo=True, max_tokens=1) == ["is Paris"]
    assert completion(server, prompt, echo=True, max_tokens=0) == ["is"]


@pytest.mark.parametrize("n", [1, 2])
def test_a_chat_answer_begins_without_it(server: Any, n: int) -> None:
    messages: Any = [{"role": "user", "content": "is"}]
    with server.openai() as client:
        reply = client.chat.completions.create(messages=messages, n=n, **NEW)
        assert [choice.message.content for choice in reply.choices] == ["Paris\ufffd"] * n
        text = "".join(
            choice.delta.content or ""
            for chunk in client.chat.completions.create(messages=messages, stream=True, **NEW)
            for choice in chunk.choices
        )
    assert text == "Paris\ufffd"


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_end_of_a_text_leaves_incomplete_comes(server: Any, stream: bool) -> None:
    assert completion(server, "is", stream=stream, max_tokens=3) == [" Paris\ufffd"]  # the last token ends it


def test_an_echo_and_its_completion_make_one_text(server: Any) -> None:
    """Where token ids end within a character, its other bytes come with the output."""
    assert completion(server, [IS, 0xC3], echo=True, max_tokens=0) == ["is\ufffd"]
    assert completion(server, [IS, PARIS, 0xC3], echo=True, max_tokens=1) == ["is Paris\ufffd"]
