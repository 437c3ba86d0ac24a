"""GET /health, /ready, /stats and /metrics: how the server is."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from jllm_runtime.engine.stats import EngineStats
from jllm_runtime.server.service import Service, service_of

router = APIRouter()


class Status(BaseModel):
    """That all is well."""

    status: Literal["ok"] = "ok"


@dataclass(frozen=True)
class Stats(EngineStats):
    """What the engine is doing.

    Attributes:
        tokens_per_second: tokens of answers, over the last seconds.
    """

    tokens_per_second: float = 0.0


@router.get("/health")
async def health(service: Annotated[Service, Depends(service_of)]) -> Status:
    """Whether the server works. When it does not, only a new start helps."""
    service.check_working()
    return Status()


@router.get("/ready")
async def ready(service: Annotated[Service, Depends(service_of)]) -> Status:
    """Whether the server takes new work."""
    service.check_accepting()
    return Status()


@router.get("/stats")
async def stats(service: Annotated[Service, Depends(service_of)]) -> Stats:
    """What the engine is doing, and what it has done since it began."""
    numbers = dataclasses.asdict(service.engine.stats())
    return Stats(**numbers, tokens_per_second=service.metrics.tokens_per_second.value())


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(service: Annotated[Service, Depends(service_of)]) -> Response:
    """The same and more, for Prometheus."""
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)
