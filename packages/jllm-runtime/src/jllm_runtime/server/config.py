"""How a server listens, whom it answers, and what it refuses."""

import math
from dataclasses import dataclass
from urllib.parse import urlsplit

from jllm_runtime.errors import ServerError

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class ServerConfig:
    """The settings of a server.

    Attributes:
        host: the address to listen at.
        port: 0 takes one that is free.
        names: what the model is called, the first in answers; empty takes its folder's name.
        api_keys: who sends one of these is answered; empty answers everybody.
        cors_origins: web pages of these origins may call, ``*`` is any; empty is none but the server's own.
        allowed_hosts: names under which a server without keys may be called, besides those of this machine.
        max_body: most bytes of a request.
        max_prompt: most tokens of a prompt; None is what the context leaves room for.
        max_queue: most answers that may wait for a place among those that are worked on.
        request_timeout: seconds that an answer may take.
        receive_timeout: seconds in which the head of a request must come, and then its body.
        stall_timeout: seconds that a client may take nothing of a stream, or send nothing of a body.
        drain_timeout: seconds that streams may go on when the server is told to end.

    Raises:
        ServerError: a setting that cannot be.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_body: int = 4 * 2**20
    max_prompt: int | None = None
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
        for name in ("request_timeout", "receive_timeout", "stall_timeout", "drain_timeout"):
            seconds = getattr(self, name)
            self._need(math.isfinite(seconds) and seconds > 0, name, "a number of seconds above 0")
        for name in self.names:
            if not name.isprintable() or not name.strip():
                raise ServerError(f"a model's name must be printable text, got {name!r}")
        for key in self.api_keys:
            # What an HTTP header can carry; and a key that was meant to be there, not an empty variable.
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ServerError("an API key must be printable ASCII without spaces, and not empty")
        for origin in self.cors_origins:
            parts = urlsplit(origin)
            if origin != "*" and (not parts.scheme or not parts.netloc or parts.path or parts.query):
                raise ServerError(f"a CORS origin must be like https://example.org, or *, got {origin!r}")

    def _need(self, ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise ServerError(f"{name} must be {expected}, got {getattr(self, name)!r}")
