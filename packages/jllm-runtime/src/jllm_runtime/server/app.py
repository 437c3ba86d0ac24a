"""The app: endpoints, and what every request goes through before it reaches them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from jllm_runtime.__about__ import __version__
from jllm_runtime.engine.engine import Engine
from jllm_runtime.server.config import LOOPBACK, ServerConfig
from jllm_runtime.server.endpoints import chat, completions, embeddings, health, models, tokens
from jllm_runtime.server.endpoints.page import page_router
from jllm_runtime.server.errors import install_handlers
from jllm_runtime.server.middleware.api_keys import HostCheck, KeyCheck
from jllm_runtime.server.middleware.request_body import BodyLimit
from jllm_runtime.server.middleware.request_metrics import Watch
from jllm_runtime.server.middleware.unread_body import UnreadBodies
from jllm_runtime.server.schemas.base import ErrorReply
from jllm_runtime.server.service import Service


def create_app(engine: Engine, config: ServerConfig | None = None) -> FastAPI:
    """The app that serves an engine.

    Args:
        engine: the caller closes it when the app has ended.
        config: the settings; those of a server for this machine alone when None.

    Raises:
        ServerError: the model takes no texts.
    """
    config = config or ServerConfig()
    service = Service(engine, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    errors: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorReply}, "5XX": {"model": ErrorReply}}
    # The pages of documentation that FastAPI has would load scripts from elsewhere.
    app = FastAPI(title="JLLM", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan, responses=errors)
    app.state.service = service
    install_handlers(app)
    for endpoints in (chat, completions, embeddings, models, tokens, health):
        app.include_router(endpoints.router)
    app.include_router(page_router())
    _add_middleware(app, service)
    return app


def _add_middleware(app: FastAPI, service: Service) -> None:
    """The innermost first."""
    config = service.config
    app.add_middleware(
        BodyLimit, max_bytes=config.max_body, stall_timeout=config.stall_timeout, receive_timeout=config.receive_timeout
    )
    if config.api_keys:
        app.add_middleware(KeyCheck, keys=config.api_keys)
    elif config.host in LOOPBACK:
        app.add_middleware(HostCheck, hosts=config.allowed_hosts)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-ID", "Retry-After"],
        )
    app.add_middleware(Watch, metrics=service.metrics)
    app.add_middleware(UnreadBodies, seconds=config.stall_timeout)
