"""ASGI middleware: API keys."""

import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from jllm_runtime.server.errors import ApiError

OPEN_PATHS = frozenset({"/", "/health", "/ready"})
OPEN_FOLDER = "/static/"
"""Paths that need no key: the probes of a load balancer, and the page, which asks its user for one."""


class APIKeyMiddleware:
    """Bearer authentication: a request without one of the keys ends with 401.

    Args:
        app: the next application.
        keys: at least one.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_open(scope["path"]) or self._is_authorized(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        message = "an API key is needed: send Authorization: Bearer KEY, with one that this server was given"
        error = ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        await error.response()(scope, receive, send)

    def _is_authorized(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return False
        # All keys, each in constant time: the time of the answer says neither which key nor how much of it was right.
        equal = [hmac.compare_digest(given.strip().encode(), key) for key in self._keys]
        return any(equal)


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)
