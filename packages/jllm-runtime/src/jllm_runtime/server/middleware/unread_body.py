"""What becomes of a connection when a request is answered before its body has come."""

import asyncio

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SILENCE = 1.0
"""Seconds in which nothing comes any more from a client that has its answer."""


class UnreadBodies:
    """ASGI middleware, the outermost: an answer to a request whose body has not been read ends its connection.

    The rest would have to be read before another request could come, however long it is. The answer says ``Connection:
    close``. What still comes is taken for a while and thrown away: to close a connection while there is something to be
    read resets it, and a client that is told so while it sends may never look at the answer.

    Args:
        app: what follows.
        seconds: most time that the rest is taken for.
    """

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app = app
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Later versions of HTTP have a stream for each request, and know no such header.
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
                await send({**message, "more_body": True})  # the client has all of it, the server does not know yet
                await self._take_rest(receive)
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        await self._app(scope, receive_and_note, send_and_close)

    async def _take_rest(self, receive: Receive) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                more = True
                while more:
                    async with asyncio.timeout(SILENCE):
                        message = await receive()
                    more = message.get("more_body", False)
        except TimeoutError:
            return


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
