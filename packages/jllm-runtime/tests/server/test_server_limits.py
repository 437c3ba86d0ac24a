"""Limits, timeouts and cancelled requests: the right status, and no page that stays in use."""

import dataclasses
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from jllm_runtime import EngineConfig, Model

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
LONG = {"model": "tiny", "messages": HELLO, "max_tokens": 250, "ignore_eos": True}
ENDLESS = {"model": "tiny", "messages": HELLO, "max_tokens": 100_000, "ignore_eos": True}
FOR_EVER = {"ignore_eos": True, "max_tokens": 100_000}
WAIT = 60


@pytest.fixture(scope="module")
def endless(tiny) -> Model:
    """Says anything for a very long time."""
    model = tiny.random(dataclasses.replace(tiny.config, context_length=100_000), tokenizer=tiny.tokenizer)
    return dataclasses.replace(model, eos_ids=(tiny.end,))


LARGE = EngineConfig(pages=1600, batch_sizes=(16,))


def error_of(reply: httpx.Response, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    return reply.json()["error"]


# ---- Bodies and prompts.


def test_a_body_over_the_limit(serve, talker) -> None:
    body = {"model": "tiny", "prompt": "x", "user": "u" * 1000}
    with serve(talker, max_body=len(json.dumps(body)) + 100) as server:
        assert server.post("/v1/completions", body).is_success
        body["user"] *= 2
        error = error_of(server.post("/v1/completions", body), 413)
        assert error["code"] == "request_too_large"
        assert "the body may have" in error["message"]
        # Nor if it does not say how long it is.
        parts = (json.dumps(body)[at : at + 100].encode() for at in range(0, 3000, 100))
        headers = {"Content-Type": "application/json"}
        error_of(server.post("/v1/completions", content=parts, headers=headers), 413)
        assert server.get("/health").is_success


def test_a_prompt_over_the_limit(serve, talker) -> None:
    with serve(talker, max_prompt=10) as server:
        assert server.post("/v1/completions", {"model": "tiny", "prompt": "x" * 10}).is_success
        error = error_of(server.post("/v1/completions", {"model": "tiny", "prompt": "x" * 11}), 400)
        assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
        assert error["message"] == "the prompt has 11 tokens, at most 10 are taken"


def test_the_pages_are_a_limit_too(serve, babbler) -> None:
    """The cache holds less than the context."""
    with serve(babbler, EngineConfig(pages=3)) as server:
        assert server.get("/v1/models").json()["data"][0]["context_length"] == 192
        reply = server.post("/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 290, "ignore_eos": True})
        assert reply.json()["usage"]["total_tokens"] == 192
        error_of(server.post("/v1/completions", {"model": "tiny", "prompt": "x" * 192}), 400)


# ---- Many at a time.


def test_more_than_may_wait(serve, endless: Model) -> None:
    sizes = dataclasses.replace(LARGE, max_batch=1)
    with serve(endless, sizes, max_queue=2) as server:
        with httpx.stream("POST", server.url + CHAT, json=ENDLESS | {"stream": True, "n": 3}, timeout=WAIT) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: {")
            reply = server.post(CHAT, LONG)
            error = error_of(reply, 429)
            assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
            assert "3 answers are under way and 1 more are asked for, the limit is 3" in error["message"]
            assert reply.headers["retry-after"] == "1"
            with server.openai() as client, pytest.raises(openai.RateLimitError):
                client.chat.completions.create(model="tiny", messages=HELLO)
            error = error_of(server.post(CHAT, LONG | {"n": 4}), 400)
            assert error["message"] == "4 answers are asked for, the server takes 3 at a time"
        server.wait_until_empty()
        assert server.post(CHAT, LONG | {"max_tokens": 1, "n": 3}).is_success


def test_openai_s_client_comes_again(serve, endless: Model) -> None:
    with serve(endless, dataclasses.replace(LARGE, max_batch=1), max_queue=1) as server:
        with ThreadPoolExecutor(4) as pool, server.openai(max_retries=20) as client:

            def ask(number: int) -> int:
                reply = client.completions.create(model="tiny", prompt="x", max_tokens=5, seed=number)
                return reply.usage.completion_tokens

            assert sum(pool.map(ask, range(6))) <= 30
        server.wait_until_empty()


# ---- Time.


def test_an_answer_that_takes_too_long(serve, endless: Model) -> None:
    with serve(endless, LARGE, request_timeout=3.0) as server:  # the first token comes in time on a busy machine
        server.post(CHAT, LONG | {"max_tokens": 2})  # compiles
        error = error_of(server.post(CHAT, ENDLESS), 504)
        assert (error["code"], error["type"]) == ("timeout", "server_error")
        assert "more than 3 s" in error["message"]
        reply = server.post(CHAT, ENDLESS | {"stream": True})
        *_, last = [line for line in reply.text.split("\n\n") if line]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        with server.openai() as client:
            stream = client.chat.completions.create(model="tiny", messages=HELLO, stream=True, extra_body=FOR_EVER)
            with pytest.raises(openai.APIError, match="more than 3 s"):
                list(stream)
        server.wait_until_empty()


def test_an_answer_whose_turn_does_not_come(serve, endless: Model) -> None:
    with serve(endless, dataclasses.replace(LARGE, max_batch=1), request_timeout=1.5) as server:
        server.post(CHAT, LONG | {"max_tokens": 2})
        with httpx.stream("POST", server.url + CHAT, json=ENDLESS | {"stream": True}, timeout=WAIT) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: {")
            # The first may end in time for the second to begin, but the second's time runs from its arrival.
            asked = time.monotonic()
            assert server.post(CHAT, ENDLESS | {"stream": True}).status_code in (200, 504)
            assert time.monotonic() - asked < 5
        server.wait_until_empty()


# ---- Clients that vanish or read slowly.


def connection(url: str, body: dict[str, Any], receive_buffer: int | None = None) -> socket.socket:
    """A connection over which this has been asked, and nothing is read."""
    host, port = url.removeprefix("http://").split(":")
    sock = socket.socket()
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.connect((host, int(port)))
    content = json.dumps(body).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    )
    sock.sendall(head.encode() + b"\r\n" + content)
    return sock


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up(stream: bool, serve, endless: Model) -> None:
    with serve(endless, LARGE) as server:
        sock = connection(server.url, ENDLESS | {"stream": stream})
        server.wait_until(lambda: server.engine.stats().generated_tokens > 20, WAIT)
        assert server.engine.stats().pages_in_use > 0
        sock.close()
        server.wait_until_empty()
        assert server.engine.stats().cancelled == 1
        assert server.server._service.idle
        metrics = server.get("/metrics").text
        assert ('jllm_http_requests_total{route="/v1/chat/completions",status="499"} 1.0' in metrics) != stream


def test_a_stream_that_is_left(serve, endless: Model) -> None:
    with serve(endless, LARGE) as server, server.openai() as client:
        with client.chat.completions.create(model="tiny", messages=HELLO, stream=True, n=4) as stream:
            for _ in zip(stream, range(20), strict=False):
                pass
        server.wait_until_empty()
        assert server.engine.stats().cancelled == 1


def test_a_client_that_hangs_up_while_it_waits(serve, endless: Model) -> None:
    with serve(endless, dataclasses.replace(LARGE, max_batch=1)) as server:
        first = connection(server.url, ENDLESS | {"stream": True})
        server.wait_until(lambda: server.engine.stats().running == 1, WAIT)
        second = connection(server.url, ENDLESS | {"stream": True})
        server.wait_until(lambda: server.engine.stats().waiting == 1)
        second.close()
        server.wait_until(lambda: server.engine.stats().waiting == 0)
        assert server.engine.stats().running == 1
        first.close()
        server.wait_until_empty()


def test_a_client_that_does_not_read(serve, endless: Model) -> None:
    """What it leaves is kept for it, up to a limit in time; then its answer ends, and its connection."""
    with serve(endless, LARGE, stall_timeout=1.0) as server:
        body = ENDLESS | {"stream": True, "logprobs": True, "top_logprobs": 20}
        sock = connection(server.url, body, receive_buffer=4096)
        server.wait_until(lambda: server.engine.stats().generated_tokens > 20, WAIT)
        # Others are answered meanwhile.
        assert server.post(CHAT, LONG | {"max_tokens": 5}).is_success
        server.wait_until(lambda: server.engine.stats().cancelled == 1, WAIT)
        server.wait_until_empty()
        assert server.server._service.idle
        server.wait_until(lambda: not server.server.server_state.connections, WAIT)
        sock.close()


def test_a_client_that_reads_slowly_gets_all_of_it(serve, endless: Model) -> None:
    with serve(endless, LARGE, stall_timeout=5.0) as server:
        body = LONG | {"stream": True, "logprobs": True, "top_logprobs": 20, "max_tokens": 400, "temperature": 0}
        expected = server.post(CHAT, body | {"stream": False}).json()["choices"][0]["message"]["content"]
        sock = connection(server.url, body, receive_buffer=4096)
        server.wait_until(lambda: server.engine.stats().finished == 2, WAIT)
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            received += sock.recv(2048)
        sock.close()
    lines = [line for line in received.split(b"\n") if line.startswith(b"data: {")]
    chunks = [json.loads(line.removeprefix(b"data: ")) for line in lines]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected


def test_a_body_that_does_not_come(serve, talker) -> None:
    with serve(talker, stall_timeout=0.3) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as sock:
            head = (
                f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
            )
            sock.sendall(head.encode() + b"{")
            assert sock.recv(1000).startswith(b"HTTP/1.1 408 ")
        with socket.create_connection((host, int(port)), timeout=10) as sock:
            sock.sendall(head.encode() + b"{")
        assert server.get("/health").is_success


def test_what_is_prepared_for_nobody_is_not_computed(serve, babbler, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client hangs up while its conversation is still being encoded."""
    began, go_on = threading.Event(), threading.Event()
    encode = babbler.tokenizer.__class__.encode

    def slowly(*arguments: Any, **options: Any) -> list[int]:
        began.set()
        go_on.wait(10)
        return encode(*arguments, **options)

    with serve(babbler) as server:
        monkeypatch.setattr(babbler.tokenizer.__class__, "encode", slowly)
        sock = connection(server.url, LONG | {"stream": True})
        assert began.wait(10)
        sock.close()
        time.sleep(0.2)
        go_on.set()
        server.wait_until(lambda: server.server._service.idle)
        server.wait_until_empty()
        assert server.engine.stats().generated_tokens < 250
