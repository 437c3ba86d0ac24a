"""Chat session with a model behind an OpenAI-compatible server, by the standard library alone."""

import http.client
import json
import ssl
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

from jllm_runtime.chat.conversation import DEFAULT, ENABLE_THINKING, SETTINGS, THINK, Conversation, Message, Thinking
from jllm_runtime.errors import ServerError

TIMEOUT = 600
"""Seconds without data after which a server counts as lost."""

TEMPLATE_FIELD = "chat_template_kwargs"
"""Field of a request for variables of the chat template, as vLLM has it, too."""


class ServerLostError(ServerError):
    """Server that cannot be reached, or that is gone before the end of its answer, so that another try may succeed."""

    exit_code = 1


class RemoteSession(Conversation):
    """A conversation through the OpenAI API.

    Args:
        url: the server's address, with or without ``/v1``.
        model: a name that the server lists; None takes its first.
        params: fields of each request, such as ``temperature``.
        system: a system message that opens the conversation.
        api_key: for a server that needs one.

    Attributes:
        messages: the conversation, oldest first, the system message included, without thinking.
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
        self._variables = dict(self._params.pop(TEMPLATE_FIELD, {}))
        self._first_params, self._first_variables = dict(self._params), dict(self._variables)
        self._api_key = api_key
        super().__init__(system)
        self.model = self._known_model(model)

    def settings(self) -> dict[str, Any]:
        known = {name: self._params.get(name) for name in SETTINGS}
        return {**known, THINK: self._variables.get(ENABLE_THINKING, DEFAULT)}

    def set(self, name: str, value: Any) -> None:
        first = self._first_variables if name == THINK else self._first_params
        fields = self._variables if name == THINK else self._params
        key = ENABLE_THINKING if name == THINK else name
        fields.pop(key, None)
        if value != DEFAULT or key in first:
            fields[key] = first[key] if value == DEFAULT else value

    def describe(self) -> str:
        known = ", ".join(f"{name} {value}" for name, value in self.settings().items() if value not in (None, DEFAULT))
        return f"{known}; all else as the server has it" if known else "all settings as the server has them"

    def _answer(self, sent: list[Message]) -> Generator[str, None, None]:
        # What was loaded from a file may have thinking beside it, which not every server takes.
        messages = [{"role": message["role"], "content": message["content"]} for message in sent]
        variables = {TEMPLATE_FIELD: self._variables} if self._variables else {}
        params = dict(self._params)
        if "seed" in params:
            params["seed"] += self._retries
        body = {**params, **variables, "model": self.model, "messages": messages, "stream": True}
        with self._response("POST", "/chat/completions", body) as response:
            _check_ignored(response)
            content, reason = "", None
            try:
                for choice in _choices(response):
                    delta, reason = choice["delta"], choice.get("finish_reason") or reason
                    if thinking := delta.get("reasoning_content"):
                        yield Thinking(thinking)
                    if text := delta.get("content"):
                        content += text
                        yield text
            finally:
                self.messages = [*sent, {"role": "assistant", "content": content}]
                self.cut_at = self._params.get("max_tokens", 0) if reason == "length" else None

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
            raise ServerLostError(f"the server at {self._url} cannot be reached: {reason}") from error
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


def _check_ignored(response: http.client.HTTPResponse) -> None:
    """Refuse what this server ignores: its user has asked for it, other than a program that sends all that it knows."""
    names = [unquote(name) for name in response.headers.get("X-JLLM-Ignored", "").split(", ")]
    unread = [name.removeprefix(f"{TEMPLATE_FIELD}.") for name in names if name.startswith(f"{TEMPLATE_FIELD}.")]
    if unread:
        raise ServerError(f"the model's chat template has no variable {', '.join(map(repr, unread))}")


def _choices(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The choices of an event stream, each with a delta."""
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
        yield from event.get("choices", [])
    # A stream that ends without [DONE] was cut, even if every event of it was whole.
    raise ServerLostError("the server has hung up before the end of its answer")


def _message(response: http.client.HTTPResponse) -> str:
    # Enough for any error message.
    body = response.read(2**16)
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, TypeError, KeyError):
        return f"{response.status} {response.reason}"
