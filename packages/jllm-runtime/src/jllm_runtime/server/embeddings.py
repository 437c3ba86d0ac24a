"""POST /v1/embeddings."""

import asyncio
import base64
import importlib
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Depends, Request

from jllm_runtime.server.bodies import JSONRoute
from jllm_runtime.server.errors import ApiError, timeout_error
from jllm_runtime.server.schemas.embeddings import Embedding, EmbeddingReply, EmbeddingRequest, EmbeddingUsage
from jllm_runtime.server.service import Service, service_of
from jllm_runtime.server.streams import unless_gone

router = APIRouter(route_class=JSONRoute)


@router.post("/v1/embeddings")
async def embeddings(
    body: EmbeddingRequest, request: Request, service: Annotated[Service, Depends(service_of)]
) -> EmbeddingReply:
    """Turn texts into vectors."""
    service.check_model(body.model)
    service.check_accepting()
    prompts = _prompts(body)
    service.admission.take(len(prompts))
    # One request at a time, on a thread of its own: the device is shared with the answers that are under way.
    work = service.embedder.submit(_embed, service, prompts, body)
    work.add_done_callback(_give_back_later(service, len(prompts)))
    try:
        async with asyncio.timeout(service.config.request_timeout):
            vectors, tokens = await unless_gone(request.receive, _result(work))
    except TimeoutError:
        raise timeout_error(service.config.request_timeout) from None
    data = [Embedding(index=index, embedding=_encoded(vector, body)) for index, vector in enumerate(vectors)]
    usage = EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)
    return EmbeddingReply(data=data, model=body.model, usage=usage)
