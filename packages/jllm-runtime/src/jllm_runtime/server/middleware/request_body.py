"""The body of a request: bounded in size, in time and in depth before anything else looks at it."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

import anyio.to_thread
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jllm_runtime.server.errors import ApiError, ClientGoneError

MAX_DEPTH = 64
"""How deep objects and lists may nest. Whatever walks through a body does so recursively."""


MAX_MEMBERS = 10_000
"""How many fields an object may have: each may be an error, and all of them are looked at."""

SMALL = 2**16
"""Bytes that are read without keeping others waiting."""


class BodyLimit:
    """ASGI middleware: reads the whole body before the app is called.

    A body that is too large (413) or too slow (408) ends here.

    Args:
        app: what follows.
        max_bytes: most bytes of a body.
        stall_timeout: seconds that the client may send nothing.
        receive_timeout: seconds in which the body must have come, however steadily it does.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, stall_timeout: float, receive_timeout: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._stall_timeout = stall_timeout
        self._receive_timeout = receive_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read_in_time(Headers(scope=scope), receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        except ClientGoneError:
            return
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            return whole.pop() if whole else await receive()

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
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_bytes:
                self._refuse("more")
        return bytes(body)

    def _refuse(self, size: str) -> NoReturn:
        raise ApiError(413, f"the body may have {self._max_bytes} bytes, it has {size}", "request_too_large")


class JSONRoute(APIRoute):
    """A route whose body is read by ``parse_json``, if it is JSON by its own word (415).

    A web page of another origin cannot send JSON without asking first, so that it cannot use the server of whoever
    looks at it.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                message = f"the Content-Type must be application/json, got {kind!r:.80}"
                raise ApiError(415, message, "unsupported_media_type")
            return await handle(_StrictRequest(request.scope, request.receive))

        return handle_strictly


class _StrictRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        if len(body) < SMALL:
            return parse_json(body)
        return await anyio.to_thread.run_sync(parse_json, body)


def parse_json(body: bytes) -> Any:
    """The value of a body, in which every text can be written as UTF-8 and every number is one.

    Raises:
        ApiError: it is none, or nests too deep.
    """

    def refuse_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=refuse_constant)
    except RecursionError:
        raise ApiError(400, f"the body nests more than {MAX_DEPTH} deep", "invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON in UTF-8: {error}", "invalid_json") from error
    _check(value)
    return value


def _check(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for one in level:
            if isinstance(one, str):
                _check_text(one)
            elif isinstance(one, dict):
                if len(one) > MAX_MEMBERS:
                    raise ApiError(400, f"the body has an object of more than {MAX_MEMBERS} members", "invalid_json")
                below += [*one.keys(), *one.values()]
            elif isinstance(one, list):
                below += one
        if not below:
            return
        level = below
    raise ApiError(400, f"the body nests more than {MAX_DEPTH} deep", "invalid_json")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(400, "the body has half of a surrogate pair (\\ud800 to \\udfff)", "invalid_json") from None
