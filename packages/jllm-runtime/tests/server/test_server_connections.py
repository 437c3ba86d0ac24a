"""Connections: clients that speak HTTP slowly, in part or not at all."""

import contextlib
import dataclasses
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from jllm_runtime import EngineConfig

PATH = "/v1/completions"
BODY = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 1}).encode()
WAIT = 60
"""Far more than anything takes here, also beside much other work."""


class Client:
    """A connection whose bytes are all in the test's hands."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._held = b""

    def send(self, *parts: bytes) -> None:
        self.sock.sendall(b"".join(parts))

    def ask(self, *parts: bytes) -> int:
        """Send a whole request and read a whole answer; returns the status."""
        self.send(*parts)
        while b"\r\n\r\n" not in self._held:
            self._more()
        found, _, self._held = self._held.partition(b"\r\n\r\n")
        length = int(found.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        while len(self._held) < length:
            self._more()
        self._held = self._held[length:]
        return int(found.split()[1])

    def trickle(self, seconds: float = WAIT) -> bytes:
        """Send a byte now and then until the server has had enough; returns what it said."""
        end = time.monotonic() + seconds
        received = b""
        self.sock.settimeout(0.05)
        while time.monotonic() < end:
            with contextlib.suppress(TimeoutError):
                try:
                    self.sock.sendall(b"x")
                    part = self.sock.recv(4096)
                except (ConnectionResetError, BrokenPipeError):
                    return received
                if not part:
                    return received
                received += part
        pytest.fail(f"still connected after {seconds} s, {received!r}")

    def rest(self) -> bytes:
        """What comes until the server ends the connection. A reset is an error."""
        received = b""
        while part := self.sock.recv(4096):
            received += part
        return received

    def _more(self) -> None:
        part = self.sock.recv(4096)
        assert part, self._held
        self._held += part


@pytest.fixture
def connect() -> Iterator[Callable[[Any], Client]]:
    """Connects to a server."""
    with contextlib.ExitStack() as stack:

        def connected(server: Any) -> Client:
            host, port = server.url.removeprefix("http://").split(":")
            return Client(stack.enter_context(socket.create_connection((host, int(port)), timeout=WAIT)))

        yield connected


def head(length: int, host: str = "localhost") -> bytes:
    fields = f"Host: {host}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n"
    return f"POST {PATH} HTTP/1.1\r\n{fields}\r\n".encode()


HALF = head(100)[:30]
EXPECTING = head(100).replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")
CHUNKED = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
LOOK = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def refused(reply: bytes, status: int, code: str) -> str:
    """The message of an answer after which nothing comes."""
    fields, _, body = reply.partition(b"\r\n\r\n")
    assert int(fields.split()[1]) == status, reply
    assert b"\r\nconnection: close" in fields.lower()
    error = json.loads(body)["error"]
    assert error["code"] == code
    return error["message"]


# ---- Heads.


@pytest.fixture
def hasty(serve, talker) -> Iterator[Any]:
    """A server that gives a request half a second to come."""
    with serve(talker, receive_timeout=0.5) as running:
        yield running


def test_half_a_head(hasty, connect) -> None:
    began = time.monotonic()
    client = connect(hasty)
    client.send(HALF)
    message = refused(client.rest(), 408, "head_timeout")
    assert message == "the head of the request has not come within 0.5 s"
    assert time.monotonic() - began >= 0.5
    assert hasty.get("/health").is_success


def test_no_head_at_all(hasty, connect) -> None:
    """Nothing is said to a client that has said nothing."""
    began = time.monotonic()
    assert connect(hasty).rest() == b""
    assert time.monotonic() - began >= 0.5


def test_a_head_that_trickles(hasty, connect) -> None:
    client = connect(hasty)
    client.send(b"GET /health HTTP/1.1\r\nX-")
    refused(client.trickle(), 408, "head_timeout")


def test_half_a_head_after_an_answer(serve, talker, connect) -> None:
    """The first byte ends the time for idle connections."""
    with serve(talker, receive_timeout=2.0) as server:
        client = connect(server)
        assert client.ask(LOOK) == 200
        client.send(HALF)
        refused(client.rest(), 408, "head_timeout")


def test_what_has_come_in_time_is_left_alone(serve, tiny, connect) -> None:
    """A stream, and a connection that is idle between two requests."""
    endless = tiny.random(dataclasses.replace(tiny.config, context_length=100_000), tokenizer=tiny.tokenizer)
    body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 90_000, "ignore_eos": True, "stream": True})
    with serve(endless, EngineConfig(pages=1600, batch_sizes=(16,)), receive_timeout=2.0) as server:
        idle, reader = connect(server), connect(server)
        assert idle.ask(LOOK) == 200
        reader.send(head(len(body)), body.encode())
        assert reader.sock.recv(4096).startswith(b"HTTP/1.1 200 ")
        end = time.monotonic() + 3
        while time.monotonic() < end:
            assert reader.sock.recv(4096)
        assert idle.ask(LOOK) == 200
        reader.sock.close()
        server.wait_until_empty()


def test_a_server_that_ends_does_not_wait_for_a_head(serve, talker, connect) -> None:
    with serve(talker) as server:
        half, silent = connect(server), connect(server)
        half.send(HALF)
        server.wait_until(lambda: len(server.server.server_state.connections) == 2)
        began = time.monotonic()
    assert time.monotonic() - began < 30
    assert half.rest() == silent.rest() == b""


# ---- Bodies.


def test_a_body_that_trickles(serve, talker, connect) -> None:
    with serve(talker, receive_timeout=1.0, stall_timeout=3.0) as server:
        client = connect(server)
        client.send(head(100_000))
        assert refused(client.trickle(), 408, "body_timeout") == "the body has not come within 1 s"


def test_a_body_that_stalls_ends_the_connection(serve, talker, connect) -> None:
    with serve(talker, stall_timeout=0.3) as server:
        client = connect(server)
        client.send(head(100), b"{")
        assert refused(client.rest(), 408, "body_timeout") == "nothing has come for 0.3 s"


@pytest.mark.parametrize(
    ("options", "sent", "status", "code"),
    [
        ({}, head(100, "evil.example") + b"{", 403, "host_not_allowed"),
        ({"api_keys": ("key",)}, head(100) + b"{", 401, "invalid_api_key"),
        ({"max_body": 99}, head(100) + b"{", 413, "request_too_large"),
        ({"max_body": 99}, EXPECTING, 413, "request_too_large"),
        ({"max_body": 99}, CHUNKED + b"64\r\n" + b"x" * 100, 413, "request_too_large"),
        ({}, head(100).replace(b"POST", b"DELETE") + b"{", 405, "method_not_allowed"),
    ],
)
def test_an_answer_before_the_body_ends_the_connection(
    options: dict[str, Any], sent: bytes, status: int, code: str, serve, talker, connect
) -> None:
    with serve(talker, **options) as server:
        client = connect(server)
        client.send(sent)
        refused(client.rest(), status, code)


def test_an_answer_to_a_whole_body_does_not(server, connect) -> None:
    client = connect(server)
    for _ in range(2):
        assert client.ask(head(1), b"{") == 400
        assert client.ask(head(len(BODY)), BODY) == 200
        assert client.ask(LOOK) == 200


def test_a_client_that_sends_on_still_gets_its_answer(serve, talker, connect) -> None:
    """The connection is not reset under what it sends."""
    with serve(talker, max_body=1000) as server:
        client = connect(server)
        client.send(head(20_000_000))
        for _ in range(20):
            client.send(b"x" * 1_000_000)
        refused(client.rest(), 413, "request_too_large")


def test_a_client_that_sends_on_for_ever_is_let_go(serve, talker, connect) -> None:
    with serve(talker, max_body=1000, stall_timeout=1.0) as server:
        client = connect(server)
        client.send(head(10**9))
        refused(client.trickle(), 413, "request_too_large")
