"""ASGI middleware: allowed Host headers, against DNS rebinding."""

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from jllm_runtime.server.config import LOOPBACK
from jllm_runtime.server.errors import ApiError


class AllowedHostsMiddleware:
    """Host check of a server without keys: a request for another host than this machine ends with 403.

    Such a server trusts everybody who reaches it on the loopback address. A web page from anywhere can point its own
    domain name at that address, and then call the server as its own origin (DNS rebinding). The browser sends the
    page's name as Host, so that name tells such requests apart.

    Args:
        app: the next application.
        hosts: allowed names beside those of this machine.
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


def _host_name(host: str) -> str:
    """The name in a Host header, without its port: ``[::1]:8000`` is ``::1``."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
