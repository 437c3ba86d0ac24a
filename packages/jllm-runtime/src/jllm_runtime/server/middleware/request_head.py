"""The head of a request: bounded in time, before there is a request that anything else could look at."""

import asyncio
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from jllm_runtime.server.errors import ApiError

TIMER_STEP = 0.001
"""Seconds that a timer may be early: uvloop, which uvicorn takes where it is installed, counts whole milliseconds."""


class TimedHeads(H11Protocol):
    """HTTP/1.1 whose heads must come in time; uvicorn by itself waits for the end of one for ever.

    The time runs from the connection on, and later from the first byte after an answer. Between them is uvicorn's time
    for idle connections, and from the end of the head on the time of the body and of the answer.
    """

    receive_timeout: ClassVar[float] = 60.0
    """Seconds from its beginning to its end."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop()

    def _look(self) -> None:
        """Start the time where a head is awaited and it does not run yet, end it where none is."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.receive_timeout + TIMER_STEP, self._let_go)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _let_go(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        received, _ = self.conn.trailing_data
        if received:  # who has said nothing may be a browser that has connected ahead, and would take it for an answer
            message = f"the head of the request has not come within {self.receive_timeout:g} s"
            reply = ApiError(408, message, "head_timeout").response()
            headers = [*reply.raw_headers, (b"connection", b"close")]
            for event in (
                h11.Response(status_code=408, headers=headers, reason=b"Request Timeout"),
                h11.Data(data=bytes(reply.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def heads_within(seconds: float) -> type[TimedHeads]:
    """The protocol with this limit; uvicorn makes one of it for each connection."""

    class Limited(TimedHeads):
        receive_timeout = seconds

    return Limited
