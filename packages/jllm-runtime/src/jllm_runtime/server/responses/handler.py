"""How a request for answers is answered, whole or as a stream, whatever it asks of the engine."""

import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any, Protocol, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel

from jllm_runtime.__about__ import __version__
from jllm_runtime.server.requests.engine_requests import Ask, Generation
from jllm_runtime.server.service import Service
from jllm_runtime.server.responses.streaming import EventStream, unless_gone

Reply_co = TypeVar("Reply_co", bound=BaseModel, covariant=True)


class Answering(Protocol[Reply_co]):
    """One request of a client's, in the form of one endpoint."""

    def asks(self) -> Iterator[Ask]:
        """What the engine is asked. Takes its time, and runs on any thread."""
        ...

    async def reply(self, generation: Generation) -> Reply_co:
        """The answers, when all have come."""
        ...

    def chunks(self, generation: Generation) -> AsyncIterator[list[BaseModel]]:
        """The events of a stream."""
        ...


async def respond(
    service: Service, request: Request, answering: Answering[Reply_co], answers: int, stream: bool
) -> Response | Reply_co:
    """Ask the engine, and answer.

    Args:
        service: what answers.
        request: the client's.
        answering: the same in the form of its endpoint.
        answers: how many are asked for.
        stream: whether they go out as they come.
    """
    generation = service.begin(answers)
    try:
        await generation.submit(answering.asks)
    except BaseException:
        generation.close()
        raise
    if stream:
        return EventStream(generation, answering.chunks(generation), service.config.stall_timeout)
    async with generation:
        return await unless_gone(request.receive, answering.reply(generation))


def reply_head(kind: str, model: str) -> dict[str, Any]:
    """What every reply to a request, and every event of its stream, begins with.

    Args:
        kind: what its id begins with.
        model: by the name that the request has for it.
    """
    return {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": f"jllm-{__version__}",
    }
