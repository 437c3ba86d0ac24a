"""Answers that go out while they are made, to clients that may hang up or read slowly."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jllm_runtime.server.requests.engine_requests import Generation
from jllm_runtime.server.errors import ApiError, ClientGoneError, as_api_error

EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "The answer."}
}
"""What the API's document says of answers that may be streams."""

T = TypeVar("T")
Chunks = AsyncIterator[list[BaseModel]]


class EventStream(Response):
    """Server-sent events, as the OpenAI API has them: JSON objects, and ``[DONE]`` at the end.

    What fails before the first event has a status of its own; later it is the last event.

    Args:
        generation: closed when the stream ends, however it does.
        chunks: the objects, those that come together in one list.
        stall_timeout: seconds that the client may take nothing. What it has not read meanwhile is kept for it.
    """

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, chunks: Chunks, stall_timeout: float) -> None:
        # No proxy should collect the events.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._generation = generation
        self._chunks = chunks
        self._stall_timeout = stall_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Nobody is left to be told.
        with contextlib.suppress(ClientGoneError):
            async with self._generation:
                await unless_gone(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        first = await anext(self._chunks)
        async with asyncio.timeout(self._stall_timeout):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await self._send(send, _events(first))
        try:
            async for chunks in self._chunks:
                await self._send(send, _events(chunks))
        except ClientGoneError:
            raise
        except Exception as error:
            await self._send(send, _event(_json(as_api_error(error))), more=False)
        else:
            await self._send(send, _event(b"[DONE]"), more=False)

    async def _send(self, send: Send, body: bytes, more: bool = True) -> None:
        try:
            async with asyncio.timeout(self._stall_timeout):
                await send({"type": "http.response.body", "body": body, "more_body": more})
        except TimeoutError:
            raise ClientGoneError from None


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of the work. When the client hangs up, it is cancelled.

    Args:
        receive: of ASGI, with the body read.
        work: what the client waits for.

    Raises:
        ClientGoneError: the client has hung up.
    """
    task = asyncio.create_task(work)
    tasks: list[asyncio.Task[Any]] = [task, asyncio.create_task(_hung_up(receive))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return await task
    finally:
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _events(chunks: list[BaseModel]) -> bytes:
    return b"".join(_event(chunk.model_dump_json().encode()) for chunk in chunks)


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def _json(error: ApiError) -> bytes:
    return bytes(error.response().body)
