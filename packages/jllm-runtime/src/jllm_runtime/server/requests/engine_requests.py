"""Engine requests of one HTTP request: submission, pieces of the outputs, timeout, cancellation."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Self

import anyio
import anyio.to_thread

from jllm_runtime.sampling import SamplingParams
from jllm_runtime.server.errors import timeout_error
from jllm_runtime.server.metrics import LatencyTimer, Metrics

if TYPE_CHECKING:
    from jllm_runtime.engine.engine import Engine
    from jllm_runtime.engine.request import Request
    from jllm_runtime.outputs import Piece

EngineInput = tuple[list[int], SamplingParams]
"""Arguments of ``Engine.submit``: token ids of a prompt, and parameters."""


class EngineRequests:
    """The engine's requests for one HTTP request, one for each prompt. Closing them cancels what still runs.

    It belongs to the event loop's thread. Whatever ends it (the engine, an error, the timeout, the client, the
    server's shutdown), the done callbacks run exactly once.

    Attributes:
        requests: the engine's requests, in the order of the prompts.

    Args:
        engine: runs the requests.
        metrics: takes the latencies.
        workers: limit of the threads that prepare requests.
        timeout: seconds until the request fails.
    """

    def __init__(self, engine: "Engine", metrics: Metrics, workers: anyio.CapacityLimiter, timeout: float) -> None:
        self.requests: list[Request] = []
        self._engine = engine
        self._workers = workers
        self._latency = LatencyTimer(metrics)
        self._events: asyncio.Queue[tuple[int, Piece] | Exception | None] = asyncio.Queue()
        self._readers: list[asyncio.Task[None]] = []
        self._done_callbacks: list[Callable[[], None]] = []
        self._closed = False
        loop = asyncio.get_running_loop()
        self._failure: asyncio.Future[Exception] = loop.create_future()
        # From the arrival on, so that preparation and waiting count.
        self._timer = loop.call_later(timeout, self.fail, timeout_error(timeout))

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Call this at the end."""
        self._done_callbacks.append(callback)

    async def submit(
        self, prepare: Callable[[], Awaitable[None]], make_inputs: Callable[[], Iterable[EngineInput]]
    ) -> None:
        """Prepare the prompts and submit them to the engine.

        Args:
            prepare: is awaited first, since a template may take long.
            make_inputs: runs on a worker thread, since tokenizers and grammars may take long.

        Raises:
            RequestError, ApiError: a request that cannot be honoured.
            Exception: the one given to ``fail``.
        """

        def run() -> None:
            for prompt, params in make_inputs():
                # Listed as soon as it is submitted: if the caller is cancelled meanwhile, close() still finds it.
                self.requests.append(self._engine.submit(prompt, params))
                # Nobody waits for a thread whose request has ended: it comes here later.
                if self._closed:
                    self.cancel()
                    return

        async def work() -> None:
            await prepare()
            await anyio.to_thread.run_sync(run, limiter=self._workers, abandon_on_cancel=True)

        task = asyncio.create_task(work())
        try:
            await asyncio.wait((task, self._failure), return_when=asyncio.FIRST_COMPLETED)
            if self._failure.done():
                raise self._failure.result()
            await task
        finally:
            task.cancel()
        # Reading starts only now that all prompts are in: an error in a later one has ended the request by then.
        self._readers = [asyncio.create_task(self._read(*each)) for each in enumerate(self.requests)]

    async def pieces(self) -> AsyncIterator[tuple[int, "Piece"]]:
        """The pieces of all outputs as they come, each with the index of its prompt.

        Raises:
            Exception: the engine's error, or the one given to ``fail``.
        """
        running = len(self.requests)
        while running:
            # The queue is unbounded on purpose: a slow client must not hold back the engine, which frees the pages at
            # the end.
            event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            if event is None:
                running -= 1
                continue
            prompt, piece = event
            self._latency.add_tokens((prompt, piece.index), len(piece.token_ids))
            yield prompt, piece

    def cancel(self) -> None:
        """Stop the engine's work. The outputs end with what they have."""
        for request in self.requests:
            request.cancel()

    def fail(self, error: Exception) -> None:
        """Stop the engine's work, and raise this error in ``submit`` or ``pieces``."""
        self._events.put_nowait(error)
        if not self._failure.done():
            self._failure.set_result(error)
        self.cancel()

    def close(self) -> None:
        """Cancel what still runs, and call the done callbacks. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._timer.cancel()
        self.cancel()
        for reader in self._readers:
            reader.cancel()
        self._latency.end()
        for callback in self._done_callbacks:
            callback()

    async def _read(self, prompt: int, request: "Request") -> None:
        """Put the pieces of one engine request into the queue that all of them share."""
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
