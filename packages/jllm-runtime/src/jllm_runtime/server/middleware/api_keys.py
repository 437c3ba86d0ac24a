"""Who may call."""

import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from jllm_runtime.server.config import LOOPBACK
from jllm_runtime.server.errors import ApiError

OPEN_PATHS = frozenset({"/", "/health", "/ready"})
OPEN_FOLDER = "/static/"
"""What needs no key: how the server is, and the page, which asks for one."""


class KeyCheck:
    """ASGI middleware: a request without one of the keys ends here, with 401.

    Args:
        app: what follows.
        keys: at least one.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_open(scope["path"]) or self._knows(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        message = "an API key is needed: send Authorization: Bearer KEY, with one that this server was given"
        error = ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        await error.response()(scope, receive, send)

    def _knows(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return False
        # All of them, each in a time that does not tell how much of it was right.
        right = [hmac.compare_digest(given.strip().encode(), key) for key in self._keys]
        return any(right)


class HostCheck:
    """ASGI middleware: a request for another host than this machine ends here, with 403.

    A server without keys trusts whoever reaches it, and that should be those on this machine. But a web page from
    anywhere can give its own name this machine's address, and then call the server as if it came from there; what it
    cannot do is to call it by another name.

    Args:
        app: what follows.
        hosts: names beside those of this machine.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in (*LOOPBACK, *hosts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = Headers(scope=scope).get("host", "") if scope["type"] == "http" else "localhost"
        if _host_name(host) in self._hosts:
            await self._app(scope, receive, send)
            return
        message = f"the host {host!r:.200} is not this machine; allow it with --allowed-host, or give the server keys"
        await ApiError(403, message, "host_not_allowed").response()(scope, receive, send)


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


def _host_name(host: str) -> str:
    """The name in a Host header, without its port: ``[::1]:8000`` is ``::1``."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
