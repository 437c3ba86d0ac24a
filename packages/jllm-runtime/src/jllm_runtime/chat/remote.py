"""Chat session with a model behind an OpenAI-compatible server, by the standard library alone."""

import http.client
import json
import ssl
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import click

from jllm_runtime.errors import ServerError

TIMEOUT = 600
"""Seconds without data after which a server counts as lost."""


class RemoteSession:
    """A conversation through the OpenAI API.

    Args:
        url: the server's address, with or without ``/v1``.
        model: a name that the server lists; None takes its first.
        params: fields of each request, such as ``temperature``.
        system: a system message that opens the conversation.
        api_key: for a server that needs one.

    Attributes:
        messages: the conversation, oldest first, the system message included.
        model: the model's name.

    Raises:
        ServerError: no such server or model, or a wrong key.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        params: Mapping[str, Any] | None = None,
        system: str | None = None,
        api_key: str | None = None,
    ) -> None:
        self._url = _base(url)
        self._params = dict(params or {})
        self._system = system
        self._api_key = api_key
        self.messages: list[dict[str, str]] = []
        self.reset()
        self.model = self._known_model(model)

    def reset(self) -> None:
        """Start the conversation anew, with the system message alone."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def send(self, text: str) -> Generator[str, None, None]:
        """Send a message; the model's message comes piece by piece, its thinking in a fainter colour.

        When the generator is closed or interrupted, the server stops, and the part that has come stays in the
        conversation. When the server refuses the request, the conversation is as it was before.

        Raises:
            ServerError: the server refuses, fails, or cannot be reached.
        """
        sent = [*self.messages, {"role": "user", "content": text}]
        body = {**self._params, "model": self.model, "messages": sent, "stream": True}
        with self._response("POST", "/chat/completions", body) as response:
            content, thinking = "", False
            try:
                for delta in _deltas(response):
                    reasoning, text = delta.get("reasoning_content") or "", delta.get("content") or ""
                    if reasoning:
                        thinking = True
                        yield click.style(reasoning, dim=True)
                    if text:
                        content += text
                        yield f"\n\n{text}" if thinking else text
                        thinking = False
            finally:
                self.messages = [*sent, {"role": "assistant", "content": content}]

    def _known_model(self, model: str | None) -> str:
        with self._response("GET", "/models") as response:
            try:
                names = [str(one["id"]) for one in json.loads(response.read())["data"]]
            except (ValueError, TypeError, KeyError) as error:
                raise ServerError(f"{self._url} does not speak the OpenAI API: no list of models came back") from error
        if not names:
            raise ServerError(f"the server at {self._url} has no model")
        if model is not None and model not in names:
            raise ServerError(f"the server has no model {model}; it has {', '.join(names)}")
        # The server lists its preferred name first.
        return names[0] if model is None else model

    @contextmanager
    def _response(self, method: str, path: str, body: Any = None) -> Iterator[http.client.HTTPResponse]:
        parts = urlsplit(self._url)
        headers = {"Content-Type": "application/json"}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        connection = _connection(parts.scheme, parts.netloc)
        try:
            # A connection for each request: servers close idle ones while a user types.
            content = None if body is None else json.dumps(body).encode()
            connection.request(method, parts.path + path, content, headers)
            response = connection.getresponse()
            if response.status != 200:
                raise ServerError(f"the server refuses: {_message(response)}")
            yield response
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise ServerError(f"the server at {self._url} cannot be reached: {reason}") from error
        finally:
            connection.close()


def _base(url: str) -> str:
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ServerError(f"a server's address must be like http://localhost:8000, got {url!r}")
    # OpenAI's clients want the address with /v1, browsers show it without.
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path if path.endswith('/v1') else f'{path}/v1'}"


def _connection(scheme: str, netloc: str) -> http.client.HTTPConnection:
    if scheme == "https":
        return http.client.HTTPSConnection(netloc, timeout=TIMEOUT, context=ssl.create_default_context())
    return http.client.HTTPConnection(netloc, timeout=TIMEOUT)


def _deltas(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The deltas of an event stream."""
    for line in response:
        data = line.strip().removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
        # Lines that are no data are comments and keep-alives (the HTML standard's event streams).
        if data == b"[DONE]":
            return
        if not data:
            continue
        try:
            event = json.loads(data)
        except ValueError as error:
            raise ServerError(f"the server has sent what is no event: {data[:80]!r}") from error
        if "error" in event:
            raise ServerError(f"the server has failed: {event['error'].get('message')}")
        # The last event has usage and no choices.
        for choice in event.get("choices", []):
            yield choice["delta"]
    # A stream that ends without [DONE] was cut, even if every event of it was whole.
    raise ServerError("the server has hung up before the end of its answer")


def _message(response: http.client.HTTPResponse) -> str:
    # Enough for any error message.
    body = response.read(2**16)
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, TypeError, KeyError):
        return f"{response.status} {response.reason}"
