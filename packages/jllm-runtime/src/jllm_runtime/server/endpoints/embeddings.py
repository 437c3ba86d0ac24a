"""Endpoint: POST /v1/embeddings."""

import asyncio
import base64
import contextlib
import threading
from concurrent.futures import Future
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Depends, Request

from jllm_runtime.embedding import batches
from jllm_runtime.errors import RequestError
from jllm_runtime.server.errors import ApiError, timeout_error
from jllm_runtime.server.requests.json_body import JSONRoute
from jllm_runtime.server.responses.streaming import cancel_on_disconnect
from jllm_runtime.server.schemas.completions import prompt_list
from jllm_runtime.server.schemas.embeddings import CreateEmbeddingResponse, Embedding, EmbeddingRequest, EmbeddingUsage
from jllm_runtime.server.service import Service, get_service

router = APIRouter(route_class=JSONRoute)


@router.post("/v1/embeddings")
async def embeddings(
    body: EmbeddingRequest, request: Request, service: Annotated[Service, Depends(get_service)]
) -> CreateEmbeddingResponse:
    """Vectors of texts."""
    service.check_model(body.model)
    handler = EmbeddingHandler(service, body)
    try:
        async with asyncio.timeout(service.config.request_timeout):
            return await cancel_on_disconnect(request.receive, handler.collect())
    except TimeoutError:
        raise timeout_error(service.config.request_timeout) from None
    finally:
        handler.cancelled.set()


class EmbeddingHandler:
    """One request for embeddings, which runs on the service's embedder thread.

    Attributes:
        cancelled: set when nobody waits for the vectors any more.

    Raises:
        ApiError: the server is full or shutting down.
    """

    def __init__(self, service: Service, body: EmbeddingRequest) -> None:
        service.check_accepting()
        service.concurrency.acquire(1)
        self.cancelled = threading.Event()
        self._service = service
        self._body = body
        self._tokens = 0
        self._future: Future[list[np.ndarray]] = service.embedder.submit(self._run)
        loop = asyncio.get_running_loop()

        # Released when the thread is done, not when the client goes: until then the work is still there.
        def release(_: Future[list[np.ndarray]]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(service.concurrency.release, 1)

        self._future.add_done_callback(release)

    async def collect(self) -> CreateEmbeddingResponse:
        """The response, when all vectors are complete."""
        # The thread cannot be interrupted. When this task is cancelled, "cancelled" ends it at its next group.
        vectors = await asyncio.wrap_future(self._future)
        data = [Embedding(index=index, embedding=self._encoded(vector)) for index, vector in enumerate(vectors)]
        usage = EmbeddingUsage(prompt_tokens=self._tokens, total_tokens=self._tokens)
        return CreateEmbeddingResponse(data=data, model=self._body.model, usage=usage)

    def _run(self) -> list[np.ndarray]:
        service, inputs = self._service, prompt_list(self._body.input)
        prompts = [self._token_ids(number, given) for number, given in enumerate(inputs)]
        self._tokens = sum(map(len, prompts))
        vectors: dict[int, np.ndarray] = {}
        # A batch in one call: only between two calls can a request be cancelled.
        for batch in batches(service.engine.model, [*map(len, prompts)]):
            if self.cancelled.is_set():
                break
            given = [prompts[number] for number in batch.numbers]
            found = service.engine.embed(given, self._body.pooling, self._body.normalize)
            vectors |= zip(batch.numbers, found, strict=True)
        return [vectors[number] for number in sorted(vectors)]

    def _token_ids(self, number: int, given: str | list[int]) -> list[int]:
        """Token ids of one input, checked.

        Raises:
            ApiError: it cannot be embedded; the error names it.
        """
        listed = isinstance(self._body.input, list) and not isinstance(self._body.input[0], int)
        param = f"input[{number}]" if listed else "input"
        try:
            token_ids = self._service.prompt_ids(given, param, generates=False)
        except RequestError as error:
            raise ApiError(400, f"{param}: {error}", "invalid_value", param) from error
        if not token_ids:
            raise ApiError(400, f"{param} is empty: it has no tokens", "invalid_value", param)
        return token_ids

    def _encoded(self, vector: np.ndarray) -> list[float] | str:
        if self._body.encoding_format == "float":
            return [float(value) for value in vector]
        # OpenAI's clients read little-endian float32, whatever the server's machine.
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
