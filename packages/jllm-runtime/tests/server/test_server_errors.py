"""Error responses: OpenAI's error object and the status."""

import dataclasses
import json
import re
from typing import Any

import httpx
import pytest
from jllm_runtime.programs import paged_batch
from jllm_runtime.server.requests.json_body import MAX_DEPTH

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
JSON = {"Content-Type": "application/json"}


def error_of(reply: httpx.Response, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    body = reply.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    return body["error"]


@pytest.mark.parametrize("path", ["/v1/nothing", "/v1", "/v2/models", "/static/../../etc/passwd", "/docs", "/%2e%2e/"])
def test_an_address_that_is_none(path: str, server) -> None:
    error = error_of(server.get(path), 404)
    assert error["code"] == "unknown_url"
    assert "GET /openapi.json lists what there is" in error["message"]


def test_a_method_that_is_not_allowed(server) -> None:
    reply = server.get(CHAT)
    error = error_of(reply, 405)
    assert (error["code"], reply.headers["allow"]) == ("method_not_allowed", "POST")
    error_of(server.post("/stats"), 405)
    error_of(httpx.delete(f"{server.url}/v1/models"), 405)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a JSON object"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON in UTF-8"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b"[" * MAX_DEPTH + b"1" + b"]" * MAX_DEPTH, "nests more than"),
        (b"[" * 200_000, "nests more than"),
        (b'{"model": ' + b"9" * 5000 + b"}", "not JSON"),
        (json.dumps(dict.fromkeys(map(str, range(10_001)))).encode(), "object of more than 10000 members"),
        (b"[]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b"{}", "is missing"),
    ],
    ids=lambda value: f"{value[:30]!r}-{len(value)}",
)
def test_a_body_that_is_none(content: bytes, message: str, server) -> None:
    assert message in error_of(server.post(CHAT, content=content, headers=JSON), 400)["message"]


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ('[{"role": "user", "content": "a\\ud83d"}]', "messages[0].content"),
        (
            '[{"role": "user", "content": [{"type": "text", "text": "\\udc00"}]}]',
            "messages[0].content[0].text",
        ),
        (
            '[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "\\ud800"}}]}]',
            "messages[0].tool_calls[0].function.arguments",
        ),
        ('[{"role": "user", "\\ud800": ""}]', None),
    ],
    ids=str,
)
def test_a_text_that_is_none_is_named_by_its_place(messages: str, place: str | None, server) -> None:
    body = f'{{"model": "tiny", "messages": {messages}}}'.encode()
    error = error_of(server.post(CHAT, content=body, headers={"Content-Type": "application/json"}), 400)
    assert (error["param"], error["code"]) == (place, "invalid_json")
    assert error["message"].startswith(f"{place or 'a text of the body'} is not valid text")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_body_that_calls_itself_something_else(kind: str, server) -> None:
    """Such as those that a web page of any origin may send without asking."""
    reply = server.post(CHAT, content=json.dumps(BODY), headers={"Content-Type": kind})
    assert error_of(reply, 415)["code"] == "unsupported_media_type"
    assert server.post(
        CHAT, content=json.dumps(BODY), headers={"Content-Type": "application/json; charset=utf-8"}
    ).is_success


def test_a_step_that_fails_is_the_server_s_fault(server, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its words are for the log."""

    def fail(*_: object) -> None:
        raise RuntimeError("secret path /home/me")

    for stream in (False, True):  # nothing has come yet, so that a stream can fail with a status, too
        with monkeypatch.context() as patch:
            patch.setattr(paged_batch, "decode_rows", fail)
            error = error_of(server.post(CHAT, BODY | {"stream": stream}), 500)
        assert (error["type"], error["code"]) == ("server_error", "engine_error")
        assert "secret" not in error["message"]
    assert server.post(CHAT, BODY).is_success
    server.wait_until_empty()


def test_a_stream_that_fails_half_way_ends_with_an_error(babbling, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, calls = paged_batch.decode_rows, []

    def fail_later(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of luck")
        return decode(*arguments)

    monkeypatch.setattr(paged_batch, "decode_rows", fail_later)
    reply = babbling.post(CHAT, BODY | {"stream": True, "max_tokens": 100, "ignore_eos": True})
    assert reply.status_code == 200
    *_, last = [line for line in reply.text.split("\n\n") if line]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_error"
    assert "[DONE]" not in reply.text
    babbling.wait_until_empty()


# After "aaaa" no text can follow: a failure in the middle of the answer.
STUCK = {"grammar": 'start: "aaaa" x\nx: x x', "max_tokens": 50}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), [(CHAT, BODY), ("/v1/completions", {"model": "tiny", "prompt": "a"})])
def test_a_grammar_that_fails_in_use_is_the_request_s_fault(path: str, body: Any, stream: bool, babbling) -> None:
    reply = babbling.post(path, body | STUCK | {"stream": stream})
    if stream:  # text has been sent by then
        *_, last = [line for line in reply.text.split("\n\n") if line]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert (reply.status_code, "[DONE]" in reply.text) == (200, False)
    else:
        error = error_of(reply, 400)
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_value")
    assert "the grammar failed: no text can follow here" in error["message"]
    babbling.wait_until_empty()


# More possibilities than llguidance counts, as soon as the first token is taken.
WIDE = "\n".join(
    ["start: " + " | ".join(f"w{i}" for i in range(3000))]
    + [f'w{i}: "a" w{i}z\nw{i}z: "b" w{i} | "{i}"' for i in range(3000)]
)


@pytest.mark.parametrize(
    ("grammar", "cause"), [("start: x\nx: x x", "no text can follow here"), (WIDE, "items; max is 2000")]
)
def test_a_grammar_that_fails_before_the_first_text_has_a_status(grammar: str, cause: str, babbling) -> None:
    for stream in (False, True):
        reply = babbling.post(CHAT, BODY | {"grammar": grammar, "stream": stream})
        assert re.search(f"the grammar failed: .*{cause}", error_of(reply, 400)["message"])


def test_an_answer_whose_logits_are_not_numbers_is_an_error_that_says_so(serve, talker) -> None:
    """Not "!!!!": a 500 as long as nothing has come, and an event in a stream that has begun. Others are answered."""
    weights = talker.weights
    # "Hi, " and then, after the "y", nothing that is a number.
    embedding = weights.embedding.at[ord("y"), 0].set(float("nan"))
    with serve(dataclasses.replace(talker, weights=dataclasses.replace(weights, embedding=embedding))) as server:
        for path, body in (
            (CHAT, BODY),
            ("/v1/completions", {"model": "tiny", "prompt": "\n"}),
            ("/v1/embeddings", {"model": "tiny", "input": "my, my"}),
        ):
            error = error_of(server.post(path, body), 500)
            assert (error["type"], error["code"]) == ("server_error", "nonfinite_numbers")
            assert "are NaN or infinite: the model's weights are damaged or hold such numbers" in error["message"]
        reply = server.post(CHAT, BODY | {"stream": True})
        *chunks, last = [json.loads(line[6:]) for line in reply.text.split("\n\n") if line]
        said = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        assert "Hi, y".startswith(said)
        assert last["error"]["code"] == "nonfinite_numbers"
        assert "[DONE]" not in reply.text
        short = server.post(CHAT, BODY | {"max_tokens": 2})
        assert short.json()["choices"][0]["message"]["content"] == "Hi"
        server.wait_until_empty()


def test_what_nobody_has_foreseen_has_the_same_shape(server, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(server.engine.model.tokenizer.__class__, "encode", fail)
    error = error_of(server.post(CHAT, BODY), 500)
    assert error["code"] == "internal_error"
    assert "secret" not in error["message"]
    assert "ZeroDivisionError: secret" in caplog.text


def test_every_answer_has_a_number(server) -> None:
    numbers = {server.get("/health").headers["x-request-id"] for _ in range(2)}
    assert len(numbers) == 2
    assert all(number.startswith("req_") for number in numbers)
    assert server.get("/nothing").headers["x-content-type-options"] == "nosniff"
