"""ASGI middleware: size and time limits of request bodies."""

import asyncio
from typing import NoReturn

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jllm_runtime.server.errors import ApiError, ClientDisconnectedError


class RequestBodyMiddleware:
    """Body limits. The whole body is read before the application is called.

    A body that is too large ends with 413, one that is too slow with 408.

    Args:
        app: the next application.
        max_bytes: most bytes of a body.
        stall_timeout: seconds that the client may send nothing.
        receive_timeout: seconds until the whole body must have come, however steadily it does.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, stall_timeout: float, receive_timeout: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._stall_timeout = stall_timeout
        self._receive_timeout = receive_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Other methods have no body that an endpoint reads; UnreadBodyMiddleware takes care of one that comes anyway.
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read_in_time(Headers(scope=scope), receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        except ClientDisconnectedError:
            return
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            # First the body, as one message; then what comes behind it, which is the client's disconnect.
            return unread.pop() if unread else await receive()

        await self._app(scope, receive_again, send)

    async def _read_in_time(self, headers: Headers, receive: Receive) -> bytes:
        try:
            async with asyncio.timeout(self._receive_timeout):
                return await self._read(headers, receive)
        except TimeoutError:
            message = f"the body has not come within {self._receive_timeout:g} s"
            raise ApiError(408, message, "body_timeout") from None

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        length = headers.get("content-length", "0")
        # Python refuses to convert thousands of digits; twenty are enough to be too many.
        if length.isdecimal() and int(length[:20]) > self._max_bytes:
            self._refuse(f"{length} bytes")
        body = bytearray()
        more = True
        while more:
            try:
                async with asyncio.timeout(self._stall_timeout):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, f"nothing has come for {self._stall_timeout:g} s", "body_timeout") from None
            # A body that was cut is no body: nothing of it reaches the application.
            if message["type"] == "http.disconnect":
                raise ClientDisconnectedError
            body += message.get("body", b"")
            more = message.get("more_body", False)
            # A chunked body states no length.
            if len(body) > self._max_bytes:
                self._refuse("more")
        return bytes(body)

    def _refuse(self, size: str) -> NoReturn:
        raise ApiError(413, f"the body may have {self._max_bytes} bytes, it has {size}", "request_too_large")
