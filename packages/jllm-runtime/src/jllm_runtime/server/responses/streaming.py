"""Server-sent events, and cancellation when the client disconnects."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jllm_runtime.server.errors import ApiError, ClientDisconnectedError, as_api_error
from jllm_runtime.server.requests.engine_requests import EngineRequests
from jllm_runtime.server.requests.ignored_fields import as_sent

_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}

EVENT_STREAM_RESPONSES: dict[int | str, dict[str, Any]] = {
    # A schema would be of each event for some readers and of the whole stream for others; OpenAPI 3.2 tells them apart.
    200: {"content": {"text/event-stream": {"itemSchema": _EVENT}}, "description": "The answer."}
}
"""OpenAPI entry of the endpoints that may respond with a stream."""

T = TypeVar("T")
Chunks = AsyncIterator[list[BaseModel]]


class EventStream(Response):
    """A streamed response in OpenAI's form: ``data:`` lines with a JSON object each, ``[DONE]`` at the end.

    An error before the first chunk has an HTTP status of its own. A later one is the last event, without ``[DONE]``.

    Args:
        engine_requests: closed at the end of the stream, whatever ends it.
        chunks: the objects; those that come together in one list.
        stall_timeout: seconds that the client may read nothing. What it has not read by then is dropped with it.
    """

    media_type = "text/event-stream"

    def __init__(self, engine_requests: EngineRequests, chunks: Chunks, stall_timeout: float) -> None:
        # nginx and others would collect the events into larger blocks.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        # Starlette's Response states the length of its (empty) content.
        del self.headers["content-length"]
        self._engine_requests = engine_requests
        self._chunks = chunks
        self._stall_timeout = stall_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # To a client that has disconnected no error can be sent.
        with contextlib.suppress(ClientDisconnectedError):
            async with self._engine_requests:
                await cancel_on_disconnect(receive, self._send_all(scope, send))

    async def _send_all(self, scope: Scope, send: Send) -> None:
        # The status is sent with the first chunk in hand: an error until here becomes an error response.
        first = await anext(self._chunks)
        async with asyncio.timeout(self._stall_timeout):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await self._send(send, _events(first))
        try:
            async for chunks in self._chunks:
                await self._send(send, _events(chunks))
        except ClientDisconnectedError:
            raise
        except Exception as error:
            await self._send(send, _event(_json(as_sent(as_api_error(error), scope))), more=False)
        else:
            await self._send(send, _event(b"[DONE]"), more=False)

    async def _send(self, send: Send, body: bytes, more: bool = True) -> None:
        try:
            async with asyncio.timeout(self._stall_timeout):
                await send({"type": "http.response.body", "body": body, "more_body": more})
        except TimeoutError:
            raise ClientDisconnectedError from None


async def cancel_on_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of the work, which is cancelled when the client disconnects.

    Args:
        receive: ASGI's; the body has been read.
        work: what the client waits for.

    Raises:
        ClientDisconnectedError: the client has disconnected.
    """
    task = asyncio.create_task(work)
    tasks: list[asyncio.Task[Any]] = [task, asyncio.create_task(_wait_for_disconnect(receive))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        # Both may be done; the result counts then.
        if not task.done():
            raise ClientDisconnectedError
        return await task
    finally:
        for each in tasks:
            each.cancel()
        # Cancelled tasks are awaited: their cleanup has run before the caller goes on.
        await asyncio.gather(*tasks, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _events(chunks: list[BaseModel]) -> bytes:
    # One write for all chunks of a piece, since each write may be a packet.
    return b"".join(_event(chunk.model_dump_json().encode()) for chunk in chunks)


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def _json(error: ApiError) -> bytes:
    return bytes(error.response().body)
