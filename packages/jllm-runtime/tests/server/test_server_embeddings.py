"""Endpoint /v1/embeddings, through OpenAI's own client."""

import base64
import threading
import time
from typing import Any

import numpy as np
import openai
import pytest
from jllm_runtime import Engine
from jllm_runtime.embedding import embed

TEXTS = ["one", "two and three", "x" * 90]


@pytest.mark.parametrize("pooling", [None, "mean", "last"])
def test_vectors_are_those_of_the_library(pooling: str | None, server, client: openai.OpenAI) -> None:
    extra = {} if pooling is None else {"pooling": pooling}
    reply = client.embeddings.create(model="tiny", input=TEXTS, extra_body=extra)  # asks for base64
    expected = embed(server.engine.model, TEXTS, pooling or "mean")  # type: ignore[arg-type]
    assert np.array_equal(np.array([one.embedding for one in reply.data], np.float32), expected)
    assert [one.index for one in reply.data] == [0, 1, 2]
    assert np.linalg.norm(reply.data[0].embedding) == pytest.approx(1)
    tokens = sum(len(server.engine.model.tokenizer.encode(text)) for text in TEXTS)
    assert (reply.usage.prompt_tokens, reply.usage.total_tokens, reply.model) == (tokens, tokens, "tiny")


@pytest.mark.parametrize(
    ("fields", "normalize"),
    [
        ({"normalize": False}, False),
        ({"normalize": True}, True),
        ({"normalize_embeddings": False}, False),
        ({"embd_normalize": -1}, False),
        ({"embd_normalize": 2}, True),
    ],
)
def test_vectors_of_their_own_length(fields: dict[str, Any], normalize: bool, server, client: openai.OpenAI) -> None:
    """TEI's, sentence-transformers' and llama.cpp's names."""
    reply = client.embeddings.create(model="tiny", input=TEXTS, extra_body=fields)
    expected = embed(server.engine.model, TEXTS, normalize=normalize)
    assert np.array_equal(np.array([one.embedding for one in reply.data], np.float32), expected)
    assert np.allclose(np.linalg.norm(expected, axis=-1), 1) == normalize


def test_many_texts_come_in_their_order(server, client: openai.OpenAI) -> None:
    texts = [str(number) * (1 + number % 4) for number in range(150)]
    reply = client.embeddings.create(model="tiny", input=texts)
    assert [one.index for one in reply.data] == list(range(150))
    for number in range(0, 150, 13):
        [alone] = embed(server.engine.model, texts[number])
        np.testing.assert_allclose(reply.data[number].embedding, alone, atol=2e-6)


def test_inputs_and_encodings_of_every_kind(server) -> None:
    def ask(given: Any, **fields: Any) -> list[Any]:
        reply = server.post("/v1/embeddings", {"model": "tiny", "input": given, **fields})
        assert reply.is_success, reply.text
        return [one["embedding"] for one in reply.json()["data"]]

    [text] = ask("Hi")
    assert ask([72, 105]) == ask([[72, 105]]) == ask(["Hi"]) == [text]
    [encoded] = ask("Hi", encoding_format="base64")
    assert np.frombuffer(base64.b64decode(encoded), "<f4").tolist() == text
    assert len(ask(["a"] * 100)) == 100  # more than one batch


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"dimensions": 8}, "dimensions", "there is no parameter dimensions"),
        ({"pooling": "max"}, "pooling", "should be 'mean' or 'last', got 'max'"),
        ({"encoding_format": "int8"}, "encoding_format", "should be 'float' or 'base64'"),
        ({"input": []}, "input", "at least 1 item"),
        ({"input": ""}, "input", "input is empty: it has no tokens"),
        ({"input": ["a"] * 40 + [""]}, "input[40]", "input[40] is empty: it has no tokens"),
        ({"input": ["a", "x" * 301]}, "input[1]", "301 tokens, at most 300 are taken"),
        ({"input": [[1], [2, 272]]}, "input[1]", "input[1]: token id 272 is outside"),
        ({"input": "x" * 301}, "input", "301 tokens, at most 300 are taken"),
        ({"input": [272]}, "input", "input: token id 272 is outside"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused(fields: dict[str, Any], param: str | None, message: str, server) -> None:
    reply = server.post("/v1/embeddings", {"model": "tiny", "input": "a", **fields})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param), error
    assert message in error["message"]
    assert server.post("/v1/embeddings", {"model": "other", "input": "a"}).status_code == 404


def test_one_that_takes_too_long(serve, talker, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up, what comes after it is answered, and its place is free when it has really ended."""
    go_on = threading.Event()

    def wait(engine: Engine, *arguments: Any) -> np.ndarray:
        go_on.wait(10)
        return embed(engine.model, *arguments)

    monkeypatch.setattr(Engine, "embed", wait)
    with serve(talker, request_timeout=0.5) as server:
        began = time.monotonic()
        reply = server.post("/v1/embeddings", {"model": "tiny", "input": ["a"] * 100})
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
        assert time.monotonic() - began < 5
        assert not server.server._service.idle
        go_on.set()
        server.wait_until(lambda: server.server._service.idle)
        assert server.post("/v1/embeddings", {"model": "tiny", "input": "a"}).is_success
