"""The engine's side of one HTTP request: from its prompts to the pieces of its answers, and an end in every case."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from types import TracebackType
from typing import Self

import anyio
import anyio.to_thread

from jllm_runtime.engine.engine import Engine
from jllm_runtime.engine.request import Request
from jllm_runtime.outputs import Piece
from jllm_runtime.sampling import SamplingParams
from jllm_runtime.server.errors import timeout_error
from jllm_runtime.server.metrics import Metrics, TokenClock

Ask = tuple[list[int], SamplingParams]
"""A prompt and what is asked for."""


class Generation:
    """The engine's requests for one HTTP request. Leaving its context cancels what has not ended.

    Attributes:
        requests: the engine's, one for each prompt.

    Args:
        engine: what answers.
        metrics: what counts.
        threads: how many threads may prepare requests.
        timeout: seconds until it fails.
    """

    def __init__(self, engine: Engine, metrics: Metrics, threads: anyio.CapacityLimiter, timeout: float) -> None:
        self.requests: list[Request] = []
        self._engine = engine
        self._threads = threads
        self._clock = TokenClock(metrics)
        self._events: asyncio.Queue[tuple[int, Piece] | Exception | None] = asyncio.Queue()
        self._feeds: list[asyncio.Task[None]] = []
        self._at_end: list[Callable[[], None]] = []
        self._ended = False
        self._timer = asyncio.get_running_loop().call_later(timeout, self.fail, timeout_error(timeout))

    def at_end(self, call: Callable[[], None]) -> None:
        """Have this called when all is over."""
        self._at_end.append(call)

    async def submit(self, make: Callable[[], Iterable[Ask]]) -> None:
        """Ask the engine.

        Args:
            make: makes what is asked for: on a thread, since templates, tokenizers and grammars take their time.

        Raises:
            RequestError, ApiError: it cannot be asked.
        """

        def run() -> None:
            for prompt, params in make():
                # In the list as soon as it is submitted: whatever happens to the caller, the end will cancel it.
                self.requests.append(self._engine.submit(prompt, params))

        await anyio.to_thread.run_sync(run, limiter=self._threads)
        self._feeds = [asyncio.create_task(self._feed(*each)) for each in enumerate(self.requests)]

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces of all answers as they come, each with the number of its prompt.

        Raises:
            Exception: the engine's, or that of ``fail``.
        """
        running = len(self.requests)
        while running:
            event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            if event is None:
                running -= 1
                continue
            prompt, piece = event
            self._clock.tokens((prompt, piece.index), len(piece.token_ids))
            yield prompt, piece

    def cancel(self) -> None:
        """Let the engine stop. The answers end with what they have."""
        for request in self.requests:
            request.cancel()

    def fail(self, error: Exception) -> None:
        """Let the engine stop, and whoever waits for pieces get this error."""
        self._events.put_nowait(error)
        self.cancel()

    def close(self) -> None:
        """Let everything go."""
        if self._ended:
            return
        self._ended = True
        self._timer.cancel()
        self.cancel()
        for feed in self._feeds:
            feed.cancel()
        self._clock.end()
        for call in self._at_end:
            call()

    async def _feed(self, prompt: int, request: Request) -> None:
        try:
            async for piece in request:
                self._events.put_nowait((prompt, piece))
        except Exception as error:
            self._events.put_nowait(error)
        else:
            self._events.put_nowait(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
