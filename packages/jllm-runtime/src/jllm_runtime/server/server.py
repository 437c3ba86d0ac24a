"""Uvicorn server: listening socket, signals, graceful shutdown."""

import errno
import math
import os
import socket
import time
from types import FrameType
from typing import TYPE_CHECKING

import click
import uvicorn
from fastapi import FastAPI

from jllm_runtime.errors import ServerError
from jllm_runtime.server.app import create_app
from jllm_runtime.server.config import ServerConfig
from jllm_runtime.server.middleware.request_head import request_head_protocol
from jllm_runtime.server.service import Service

if TYPE_CHECKING:
    from jllm_runtime.engine.engine import Engine

GRACEFUL_SHUTDOWN_TIMEOUT = 5
"""Seconds that clients have to read the rest of their streams after all requests have ended."""

KEEP_ALIVE_TIMEOUT = 30
"""Seconds that a connection may be idle between two requests."""


class PortTakenError(ServerError):
    """Another process listens on the port."""


class DrainingServer(uvicorn.Server):
    """A server that drains on the first signal: it refuses new requests and lets running ones go on for the drain
    timeout. A second signal ends them at once."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._said = -1

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle SIGINT or SIGTERM."""
        # Uvicorn's own handler would stop listening at once: no 503 for new requests, and none for /ready.
        if self._service.deadline is None:
            self.drain()
        else:
            self._service.deadline = time.monotonic()

    def drain(self) -> None:
        """Refuse new requests, and exit when the running ones have ended or the drain timeout is over."""
        self._service.deadline = time.monotonic() + self._service.config.drain_timeout

    async def on_tick(self, counter: int) -> bool:
        """Check the deadline. Uvicorn calls this ten times a second; True ends the server."""
        draining = self._service.draining
        # Said here and not in the handler of the signal, which may have interrupted another print.
        if draining is not None and draining.answers not in (0, self._said):
            self._said = draining.answers
            answers = "1 answer" if draining.answers == 1 else f"{draining.answers} answers"
            click.echo(
                f"Waiting for {answers}, at most {math.ceil(draining.seconds_left)} s; Ctrl-C again ends it", err=True
            )
        if draining is not None and (self._service.idle or not draining.seconds_left):
            # The streams get an event with the error; uvicorn then waits for them to be written.
            self._service.fail_all()
            self.should_exit = True
        return await super().on_tick(counter)


def bind(config: ServerConfig) -> socket.socket:
    """A socket bound to the address of the settings. Until the server listens on it, the system refuses clients.

    Raises:
        PortTakenError: another process listens there.
        ServerError: the address is not available for another reason.
    """
    listener: socket.socket | None = None
    try:
        # The first answer, as for a name with IPv4 and IPv6 addresses.
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        if os.name == "posix":
            # On Windows this option would let two servers bind the same port.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # The kernel drops connections whose client has vanished, or does not acknowledge what was sent to it.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(config.stall_timeout * 1000))
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise _bind_error(config, error) from error
    return listener


def listen(config: ServerConfig, listener: socket.socket) -> None:
    """Let clients connect to a bound socket. They wait until the server runs.

    Raises:
        PortTakenError: another process has begun to listen there.
    """
    try:
        listener.listen()
    except OSError as error:  # with SO_REUSEADDR a port may be bound twice, and then be listened on only once
        raise _bind_error(config, error) from error


def uvicorn_config(app: FastAPI, log_level: str = "info", access_log: bool = False) -> uvicorn.Config:
    """Uvicorn's settings for an application from ``create_app``."""
    return uvicorn.Config(
        app,
        http=request_head_protocol(app.state.service.config.receive_timeout),
        # No WebSocket endpoints, and no reason to trust a proxy's headers: nothing here depends on the client's
        # address.
        ws="none",
        lifespan="on",
        log_level=log_level,
        access_log=access_log,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_TIMEOUT,
        timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_TIMEOUT,
    )


def run(engine: "Engine", config: ServerConfig, listener: socket.socket, log_level: str, access_log: bool) -> None:
    """Serve until a signal comes and the running requests have ended.

    Args:
        engine: runs the requests.
        config: the settings.
        listener: from ``bind``.
        log_level: of uvicorn.
        access_log: log every request.

    Raises:
        PortTakenError: another process has begun to listen there.
        ServerError: the model has no tokenizer.
    """
    app = create_app(engine, config)
    server = DrainingServer(uvicorn_config(app, log_level, access_log), app.state.service)
    try:
        server.run(sockets=[listener])
    except OSError as error:  # where ``listen`` was not called before
        raise _bind_error(config, error) from error


def _bind_error(config: ServerConfig, error: OSError) -> ServerError:
    message = f"the server cannot listen at {config.host} port {config.port}: {error.strerror or error}"
    if error.errno == errno.EADDRINUSE:
        return PortTakenError(f"{message}; is another server running there? --port takes another port")
    return ServerError(message)
