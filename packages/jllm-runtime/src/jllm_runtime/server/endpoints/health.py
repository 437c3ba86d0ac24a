"""Endpoints: GET /health, /ready, /stats, /timeline and /metrics."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from jllm_runtime.engine.stats import EngineStats
from jllm_runtime.engine.timeline import TimelineRows
from jllm_runtime.server.service import Draining, Service, get_service

router = APIRouter()


class Status(BaseModel):
    """A server that works."""

    status: Literal["ok"] = "ok"


@dataclass(frozen=True)
class Stats(EngineStats):
    """Statistics of the engine and of the server.

    Attributes:
        tokens_per_second: tokens of outputs, over the last seconds.
        draining: what the server still waits for, once it is shutting down.
    """

    tokens_per_second: float = 0.0
    draining: Draining | None = None


@router.get("/health")
async def health(service: Annotated[Service, Depends(get_service)]) -> Status:
    """Liveness: 503 once the engine has stopped, which only a restart repairs."""
    service.check_alive()
    return Status()


@router.get("/ready")
async def ready(service: Annotated[Service, Depends(get_service)]) -> Status:
    """Readiness: 503 while the server refuses new requests."""
    service.check_accepting()
    return Status()


@router.get("/stats")
async def stats(service: Annotated[Service, Depends(get_service)]) -> Stats:
    """Statistics of the engine, now and since its start."""
    # By name, so that a new statistic of the engine appears without a change here.
    numbers = dataclasses.asdict(service.engine.stats())
    rate = service.metrics.tokens_per_second.value()
    return Stats(**numbers, tokens_per_second=rate, draining=service.draining)


@router.get("/timeline")
async def timeline(service: Annotated[Service, Depends(get_service)]) -> TimelineRows:
    """The last seconds of the engine, sequence by sequence: numbers, and nothing of what they say."""
    return service.timeline.rows()


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(service: Annotated[Service, Depends(get_service)]) -> Response:
    """Metrics in Prometheus's text format."""
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)
