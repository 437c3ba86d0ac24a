"""POST /v1/embeddings."""

import asyncio
import base64
import contextlib
import threading
from concurrent.futures import Future
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Depends, Request

from jllm_runtime.server.errors import timeout_error
from jllm_runtime.server.middleware.request_body import JSONRoute
from jllm_runtime.server.prompts import prompt_ids, prompt_list
from jllm_runtime.server.schemas.embeddings import Embedding, EmbeddingReply, EmbeddingRequest, EmbeddingUsage
from jllm_runtime.server.service import Service, service_of
from jllm_runtime.server.responses.streaming import unless_gone

GROUP = 16
"""Texts between two looks at whether anybody still waits."""

router = APIRouter(route_class=JSONRoute)


@router.post("/v1/embeddings")
async def embeddings(
    body: EmbeddingRequest, request: Request, service: Annotated[Service, Depends(service_of)]
) -> EmbeddingReply:
    """Turn texts into vectors."""
    service.check_model(body.model)
    work = EmbeddingWork(service, body)
    try:
        async with asyncio.timeout(service.config.request_timeout):
            return await unless_gone(request.receive, work.reply())
    except TimeoutError:
        raise timeout_error(service.config.request_timeout) from None
    finally:
        work.unwanted.set()


class EmbeddingWork:
    """The vectors of one request, made on the embedder's thread.

    Attributes:
        unwanted: set when nobody waits any more.

    Raises:
        ApiError: there is no place for it.
    """

    def __init__(self, service: Service, body: EmbeddingRequest) -> None:
        service.check_accepting()
        service.admission.take(1)
        self.unwanted = threading.Event()
        self._service = service
        self._body = body
        self._tokens = 0
        self._future: Future[list[np.ndarray]] = service.embedder.submit(self._run)
        loop = asyncio.get_running_loop()

        def ended(_: Future[list[np.ndarray]]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(service.admission.give_back, 1)

        self._future.add_done_callback(ended)

    async def reply(self) -> EmbeddingReply:
        """The answer, when all vectors are there."""
        vectors = await asyncio.wrap_future(self._future)
        data = [Embedding(index=index, embedding=self._encoded(vector)) for index, vector in enumerate(vectors)]
        usage = EmbeddingUsage(prompt_tokens=self._tokens, total_tokens=self._tokens)
        return EmbeddingReply(data=data, model=self._body.model, usage=usage)

    def _run(self) -> list[np.ndarray]:
        service, vectors = self._service, list[np.ndarray]()
        prompts = [prompt_ids(service, prompt, "input", answered=False) for prompt in prompt_list(self._body.input)]
        self._tokens = sum(map(len, prompts))
        for first in range(0, len(prompts), GROUP):
            if self.unwanted.is_set():
                break
            vectors += list(service.engine.embed(prompts[first : first + GROUP], self._body.pooling))
        return vectors

    def _encoded(self, vector: np.ndarray) -> list[float] | str:
        if self._body.encoding_format == "float":
            return [float(value) for value in vector]
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
