"""The process around the app: its socket, its signals, and its end."""

import errno
import os
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from jllm_runtime.engine.engine import Engine
from jllm_runtime.errors import ServerError
from jllm_runtime.server.app import create_app
from jllm_runtime.server.config import ServerConfig
from jllm_runtime.server.middleware.request_head import heads_within
from jllm_runtime.server.service import Service

LAST_WORDS = 5
"""Seconds that clients have to read the end of their streams, once everything has ended."""

KEEP_ALIVE = 30
"""Seconds that a connection may be idle."""


class PortTakenError(ServerError):
    """Somebody else listens there."""


class DrainingServer(uvicorn.Server):
    """Ends in order: at a first signal new work is refused and streams may go on for a while, at a second they end."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal to end has come."""
        if self._deadline is None:
            self.drain()
        else:
            self._deadline = time.monotonic()

    def drain(self) -> None:
        """Refuse new work, and end when what is under way has ended or has had its time."""
        self._service.draining = True
        self._deadline = time.monotonic() + self._service.config.drain_timeout

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; tells whether to end."""
        if self._deadline is not None and (self._service.idle or time.monotonic() >= self._deadline):
            self._service.end_all()
            self.should_exit = True
        return await super().on_tick(counter)


def bind(config: ServerConfig) -> socket.socket:
    """The socket that the server will listen at. Until it does, clients are refused by the system.

    Raises:
        PortTakenError: somebody else listens there.
        ServerError: the address cannot be had for other reasons.
    """
    listener: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # The kernel lets go of clients that have vanished, or take nothing of what was left for them.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(config.stall_timeout * 1000))
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise _refused(config, error) from error
    return listener


def settings(app: FastAPI, log_level: str = "info", access_log: bool = False) -> uvicorn.Config:
    """How the app is run."""
    return uvicorn.Config(
        app,
        http=heads_within(app.state.service.config.receive_timeout),
        ws="none",
        lifespan="on",
        log_level=log_level,
        access_log=access_log,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=LAST_WORDS,
    )


def run(engine: Engine, config: ServerConfig, listener: socket.socket, log_level: str, access_log: bool) -> None:
    """Serve until a signal comes and what is under way has ended.

    Args:
        engine: what answers.
        config: the settings.
        listener: from ``bind``.
        log_level: of uvicorn.
        access_log: log every request.

    Raises:
        PortTakenError: somebody else has begun to listen there.
        ServerError: the model takes no texts.
    """
    app = create_app(engine, config)
    server = DrainingServer(settings(app, log_level, access_log), app.state.service)
    try:
        server.run(sockets=[listener])
    except OSError as error:  # what was bound may turn out to be taken when it is listened at
        raise _refused(config, error) from error


def _refused(config: ServerConfig, error: OSError) -> ServerError:
    message = f"the server cannot listen at {config.host} port {config.port}: {error.strerror or error}"
    if error.errno == errno.EADDRINUSE:
        return PortTakenError(f"{message}; is another server running there? --port takes another port")
    return ServerError(message)
