"""The app: endpoints, and what every request goes through before it reaches them."""

from fastapi import FastAPI

from jllm_runtime.__about__ import __version__
from jllm_runtime.engine.engine import Engine
from jllm_runtime.server import chat
from jllm_runtime.server.bodies import BodyLimit
from jllm_runtime.server.config import ServerConfig
from jllm_runtime.server.errors import install_handlers
from jllm_runtime.server.service import Service


def create_app(engine: Engine, config: ServerConfig) -> FastAPI:
    """The app that serves an engine.

    Args:
        engine: the caller closes it when the app has ended.
        config: the settings.

    Raises:
        ServerError: the model takes no texts.
    """
    # The pages of documentation that FastAPI has would load scripts from elsewhere.
    app = FastAPI(title="JLLM", version=__version__, docs_url=None, redoc_url=None)
    app.state.service = Service(engine, config)
    install_handlers(app)
    app.include_router(chat.router)
    app.add_middleware(BodyLimit, max_bytes=config.max_body, stall_timeout=config.stall_timeout)
    return app
