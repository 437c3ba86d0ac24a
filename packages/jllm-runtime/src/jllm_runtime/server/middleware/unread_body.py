"""ASGI middleware: connections whose request body was not read."""

import asyncio

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SILENCE_TIMEOUT = 1.0
"""Seconds without data after which a client, which has its response, is taken to have stopped sending."""


class UnreadBodyMiddleware:
    """The outermost middleware: a response to a request whose body was not read closes the connection.

    The rest of the body would have to be read before the next request on the connection, however long it is. So the
    response says ``Connection: close``. What the client still sends is read for a while and thrown away: closing a
    socket with unread data resets the connection, and a client that is still sending may then never see the response
    (RFC 9112, section 9.6).

    Args:
        app: the next application.
        timeout: most seconds that the rest is read for.
    """

    def __init__(self, app: ASGIApp, timeout: float) -> None:
        self._app = app
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # HTTP/2 and later have a stream for each request, and no such header.
        unread = scope["type"] == "http" and scope["http_version"].startswith("1") and _has_body(Headers(scope=scope))
        closes = False

        async def receive_and_note() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and bool(message.get("more_body", False))
            return message

        async def send_and_close(message: Message) -> None:
            nonlocal closes
            if message["type"] == "http.response.start" and unread:
                closes = True
                MutableHeaders(scope=message)["Connection"] = "close"
            if closes and message["type"] == "http.response.body" and not message.get("more_body", False):
                # The client gets the whole response now; the server learns of its end, and closes, only afterwards.
                await send({**message, "more_body": True})
                await self._discard_rest(receive)
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        await self._app(scope, receive_and_note, send_and_close)

    async def _discard_rest(self, receive: Receive) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                more = True
                while more:
                    async with asyncio.timeout(SILENCE_TIMEOUT):
                        message = await receive()
                    more = message.get("more_body", False)
        except TimeoutError:
            return


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
