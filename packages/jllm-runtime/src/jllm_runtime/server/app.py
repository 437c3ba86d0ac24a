"""FastAPI application: endpoints, middleware, error handlers."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from jllm_runtime.__about__ import __version__
from jllm_runtime.server.config import LOOPBACK, ServerConfig
from jllm_runtime.server.endpoints import chat, completions, embeddings, health, models, tokens
from jllm_runtime.server.endpoints.web_page import page_router
from jllm_runtime.server.exception_handlers import add_exception_handlers
from jllm_runtime.server.middleware.allowed_hosts import AllowedHostsMiddleware
from jllm_runtime.server.middleware.api_keys import APIKeyMiddleware
from jllm_runtime.server.middleware.request_body import RequestBodyMiddleware
from jllm_runtime.server.middleware.request_metrics import RequestMetricsMiddleware
from jllm_runtime.server.middleware.unread_body import UnreadBodyMiddleware
from jllm_runtime.server.requests.ignored_fields import HEADER
from jllm_runtime.server.schemas.base import ErrorResponse
from jllm_runtime.server.service import Service

if TYPE_CHECKING:
    from jllm_runtime.engine.engine import Engine


def create_app(engine: "Engine", config: ServerConfig | None = None) -> FastAPI:
    """The ASGI application that serves an engine.

    Args:
        engine: runs the requests. The caller closes it after the application has ended.
        config: the settings; by default, those of a server for this machine alone.

    Raises:
        ServerError: the model has no tokenizer.
    """
    config = config or ServerConfig()
    service = Service(engine, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if service.prompt_renderer.has_template:
            service.template_processes.start()
        yield
        service.close()

    errors: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}}
    # No docs_url or redoc_url: FastAPI's documentation pages load scripts from a CDN.
    app = FastAPI(title="JLLM", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan, responses=errors)
    # Endpoints find it through get_service: no global, since one process may have several applications.
    app.state.service = service
    add_exception_handlers(app)
    for endpoints in (chat, completions, embeddings, models, tokens, health):
        app.include_router(endpoints.router)
    app.include_router(page_router())
    _add_middleware(app, service)
    return app


def _add_middleware(app: FastAPI, service: Service) -> None:
    """Add the middleware. Starlette wraps what is added later around what is added earlier: the innermost is first."""
    config = service.config
    app.add_middleware(
        RequestBodyMiddleware,
        max_bytes=config.max_body,
        stall_timeout=config.stall_timeout,
        receive_timeout=config.receive_timeout,
    )
    # Outside of the body limits: a caller without a key gets its 401 before its body is read.
    if config.api_keys:
        app.add_middleware(APIKeyMiddleware, keys=config.api_keys)
    elif config.host in LOOPBACK:
        app.add_middleware(AllowedHostsMiddleware, hosts=config.allowed_hosts)
    # Outside of the key check: a browser sends its preflight request without the key, and scripts may read a 401.
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-ID", "Retry-After", HEADER],
        )
    # Outside of all that answers: refused requests are counted, too.
    app.add_middleware(RequestMetricsMiddleware, metrics=service.metrics)
    # Around everything, because each of the others may answer before the body has been read.
    app.add_middleware(UnreadBodyMiddleware, timeout=config.stall_timeout)
