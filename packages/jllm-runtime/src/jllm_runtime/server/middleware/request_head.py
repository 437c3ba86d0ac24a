"""Uvicorn protocol: time limit of request heads."""

import asyncio
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from jllm_runtime.server.errors import ApiError

TIMER_STEP = 0.001
"""Seconds that a timer may be early: uvloop, which uvicorn uses where it is installed, counts whole milliseconds."""


class RequestHeadProtocol(H11Protocol):
    """HTTP/1.1 with a time limit for the request line and headers. Uvicorn alone waits for their end for ever.

    This is no ASGI middleware, because ASGI begins with a complete head. The time runs from the start of the
    connection, and for later requests from the first byte after a response. Between two requests uvicorn's keep-alive
    timeout counts; after the head, the limits of the body and of the request.
    """

    receive_timeout: ClassVar[float] = 60.0
    """Seconds from the first byte of a head to its end."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._update_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()

    def _update_timer(self) -> None:
        """Run the timer exactly while a head is incomplete: h11's IDLE is the state before the end of the head."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.receive_timeout + TIMER_STEP, self._time_out)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_out(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        received, _ = self.conn.trailing_data
        # A client that has sent nothing may be a browser that connects ahead of its first request. It would take a 408
        # for the response to that request.
        if received:
            message = f"the head of the request has not come within {self.receive_timeout:g} s"
            # Sent past uvicorn's request cycle, which begins with a complete head.
            reply = ApiError(408, message, "head_timeout").response()
            headers = [*reply.raw_headers, (b"connection", b"close")]
            for event in (
                h11.Response(status_code=408, headers=headers, reason=b"Request Timeout"),
                h11.Data(data=bytes(reply.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def request_head_protocol(timeout: float) -> type[RequestHeadProtocol]:
    """A protocol class with this limit in seconds. Uvicorn takes a class, of which it makes one object a connection."""

    class Limited(RequestHeadProtocol):
        receive_timeout = timeout

    return Limited
