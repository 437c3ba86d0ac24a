"""Shared flow of the generating endpoints: submit, then respond at once or as a stream."""

import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any, Protocol, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel

from jllm_runtime.__about__ import __version__
from jllm_runtime.server.requests.engine_requests import EngineInput, EngineRequests
from jllm_runtime.server.responses.streaming import EventStream, cancel_on_disconnect
from jllm_runtime.server.service import Service

Response_co = TypeVar("Response_co", bound=BaseModel, covariant=True)


class GenerationHandler(Protocol[Response_co]):
    """One HTTP request to a generating endpoint."""

    async def prepare(self) -> None:
        """What comes before ``engine_inputs``, without a thread."""
        ...

    def engine_inputs(self) -> Iterator[EngineInput]:
        """Prompts and parameters for the engine. Runs on a worker thread."""
        ...

    async def collect(self, engine_requests: EngineRequests) -> Response_co:
        """The whole response, when all outputs are complete."""
        ...

    def stream(self, engine_requests: EngineRequests) -> AsyncIterator[list[BaseModel]]:
        """The chunks of a streamed response; those that come together in one list."""
        ...


async def respond(
    service: Service, request: Request, handler: GenerationHandler[Response_co], sequences: int, stream: bool
) -> Response | Response_co:
    """Run a request on the engine, and respond.

    Args:
        service: the shared state.
        request: the HTTP request.
        handler: the same request, in the terms of its endpoint.
        sequences: prompts times ``n``.
        stream: respond with server-sent events.

    Raises:
        ApiError, RequestError: the request is refused, or cannot be honoured.
        ClientDisconnectedError: nobody waits for the response any more.
    """
    engine_requests = service.start(sequences)
    try:
        submission = engine_requests.submit(handler.prepare, handler.engine_inputs)
        await cancel_on_disconnect(request.receive, submission)
    except BaseException:  # a cancelled task, too, must give back what start() has counted
        engine_requests.close()
        raise
    # The stream closes them itself, at its end.
    if stream:
        return EventStream(engine_requests, handler.stream(engine_requests), service.config.stall_timeout)
    async with engine_requests:
        return await cancel_on_disconnect(request.receive, handler.collect(engine_requests))


def response_header(kind: str, model: str) -> dict[str, Any]:
    """The fields that a response and all chunks of a stream begin with.

    Args:
        kind: the prefix of its id.
        model: the name that the request uses.
    """
    return {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": f"jllm-{__version__}",
    }
