"""Server settings: address, access, limits, timeouts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from jllm_runtime.errors import ServerError

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class ServerConfig:
    """Settings of a server.

    Attributes:
        host: address to listen at.
        port: port to listen at; 0 takes a free one.
        names: names of the model in requests; empty takes its folder's name.
        api_keys: keys of which a request needs one; empty needs none.
        cors_origins: origins whose web pages may call, ``*`` for any; the server's own page always may.
        allowed_hosts: Host headers that a server without keys accepts, besides those of this machine.
        max_body: most bytes of a request's body.
        max_prompt: most tokens of a prompt; None for what the context leaves room for.
        max_tokens: most tokens of a chat's answer where the request names none; None for 2,048, or 16,384 where the
            model may think first.
        strict: refuse fields of other servers that change nothing, instead of ignoring them.
        template_vars: variables of the chat template that requests get unless they set them.
        max_queue: most sequences that may wait beside those that run.
        request_timeout: seconds that a request may take.
        receive_timeout: seconds for the head of a request, and again for its body.
        stall_timeout: seconds that a client may read nothing of a stream, or send nothing of a body.
        drain_timeout: seconds that running requests may go on after the signal to end.

    Raises:
        ServerError: a setting out of its range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_body: int = 4 * 2**20
    max_prompt: int | None = None
    max_tokens: int | None = None
    strict: bool = False
    template_vars: Mapping[str, Any] = field(default_factory=dict)
    max_queue: int = 256
    request_timeout: float = 600.0
    receive_timeout: float = 60.0
    stall_timeout: float = 30.0
    drain_timeout: float = 30.0

    def __post_init__(self) -> None:
        self._need(0 <= self.port < 2**16, "port", "from 0 to 65535")
        for name in ("max_body", "max_queue"):
            self._need(getattr(self, name) >= 1, name, "1 or above")
        self._need(self.max_prompt is None or self.max_prompt >= 1, "max_prompt", "1 or above")
        self._need(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "1 or above")
        for name in ("request_timeout", "receive_timeout", "stall_timeout", "drain_timeout"):
            seconds = getattr(self, name)
            self._need(math.isfinite(seconds) and seconds > 0, name, "a number of seconds above 0")
        for name in self.names:
            # Names appear in responses, error messages and the server's log.
            if not name.isprintable() or not name.strip():
                raise ServerError(f"a model's name must be printable text, got {name!r}")
        for key in self.api_keys:
            # A key must fit into an HTTP header. An empty one comes from an empty variable, and would let nobody in.
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ServerError("an API key must be printable ASCII without spaces, and not empty")
        for origin in self.cors_origins:
            # Browsers compare an origin letter by letter, without a path.
            parts = urlsplit(origin)
            if origin != "*" and (not parts.scheme or not parts.netloc or parts.path or parts.query):
                raise ServerError(f"a CORS origin must be like https://example.org, or *, got {origin!r}")

    def _need(self, ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise ServerError(f"{name} must be {expected}, got {getattr(self, name)!r}")
