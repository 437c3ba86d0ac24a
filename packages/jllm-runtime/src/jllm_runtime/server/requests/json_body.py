"""JSON request bodies: content type, strict parsing, nesting limit."""

import json
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

import anyio.to_thread
from fastapi import Request, Response
from fastapi.routing import APIRoute

from jllm_runtime.errors import RequestError, check_text
from jllm_runtime.server.errors import ApiError
from jllm_runtime.server.requests.ignored_fields import HEADER, IgnoredFields, take_out
from jllm_runtime.server.service import get_service

MAX_DEPTH = 64
"""Levels of nested objects and lists. Pydantic and the JSON encoder walk through a body by recursion."""

MAX_MEMBERS = 10_000
"""Fields of an object. Each unknown one is an error, and pydantic collects them all."""

MAX_INLINE_BYTES = 2**16
"""A larger body is parsed on a thread, so that the event loop goes on serving other clients."""


class JSONRoute(APIRoute):
    """Route of the endpoints with a JSON body. A body with another content type ends with 415.

    The content type is a protection: a web page of another origin may send forms and plain text without asking, but
    JSON only after a CORS preflight request, which needs ``--cors-origin``.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                message = f"the Content-Type must be application/json, got {kind!r:.80}"
                raise ApiError(415, message, "unsupported_media_type")
            # FastAPI takes the body from Request.json(), which is where strict parsing goes.
            strict = _StrictRequest(request.scope, request.receive)
            strict.state.ignored = ignored = IgnoredFields()
            response = await handle(strict)
            # With the answer: what was ignored is known when its computation has begun.
            if (names := ignored.header()) is not None:
                response.headers[HEADER] = names
            return response

        return handle_strictly


class _StrictRequest(Request):
    async def json(self) -> Any:
        content = await self.body()
        if len(content) < MAX_INLINE_BYTES:
            body = parse_json(content)
        else:
            body = await anyio.to_thread.run_sync(parse_json, content)
        service = get_service(self)
        if not service.config.strict:
            take_out(body, self.scope["path"], self.state.ignored, service.default_params)
        return body


def parse_json(body: bytes) -> Any:
    """Parse a body: JSON in UTF-8, without NaN and Infinity, whose texts can be encoded again.

    Raises:
        ApiError: 400, for other bodies and for those over the limits.
    """

    def refuse_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        # json.loads would also guess UTF-16 and UTF-32, and accept NaN.
        value = json.loads(body.decode("utf-8"), parse_constant=refuse_constant)
    except RecursionError:
        raise ApiError(400, f"the body nests more than {MAX_DEPTH} deep", "invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON in UTF-8: {error}", "invalid_json") from error
    _check_limits(value)
    return value


def _check_limits(value: Any) -> None:
    # Level by level and not by recursion, which a deep body would exhaust.
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for one in level:
            if isinstance(one, str):
                _check_text(one, value)
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


def _check_text(text: str, body: Any) -> None:
    # JSON's escapes can spell half of a surrogate pair, which Python keeps and no tokenizer takes.
    try:
        check_text(text, "a text of the body")
    except RequestError as error:
        place = _place(text, body)
        message = str(error) if place is None else str(error).replace("a text of the body", place, 1)
        raise ApiError(400, message, "invalid_json", place) from error


def _place(text: str, body: Any) -> str | None:
    """The place of this text in a body, such as ``messages[0].content``; None for the name of a field."""
    waiting = [("", body)]
    while waiting:
        place, value = waiting.pop()
        if value is text:
            return place or None
        if isinstance(value, dict):
            waiting += [(f"{place}.{key}".removeprefix("."), one) for key, one in value.items() if key is not text]
        elif isinstance(value, list):
            waiting += [(f"{place}[{number}]", one) for number, one in enumerate(value)]
    return None
