"""Request: the caller's handle of what was asked, with the pieces of its answers."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from jllm_runtime.errors import EngineError
from jllm_runtime.outputs import GenerationOutput, Piece


class Request:
    """A submitted request. Iterate over it, or ask for its result; in threads or in asyncio.

    The pieces of its ``n`` answers come as they are made; the last piece of each answer has its output. Leaving an
    iteration before its end cancels the request.

    The caller's threads read, the engine's thread writes; ``_changed`` guards what both of them touch.

    Attributes:
        prompt_token_ids: the prompt, as the model is given it.
    """

    def __init__(self, prompt_token_ids: list[int], answers: int, cancel: Callable[["Request"], None]) -> None:
        self.prompt_token_ids = prompt_token_ids
        self._outputs: list[GenerationOutput | None] = [None] * answers
        self._cancel = cancel
        self._pieces: deque[Piece] = deque()
        self._failure: Exception | None = None
        self._changed = threading.Condition()
        # A thread waits on `_changed`. An event loop must not wait on a lock, so each async iteration is called.
        self._watchers: list[Callable[[], None]] = []

    @property
    def done(self) -> bool:
        """Whether every answer has ended, or the request has failed."""
        return self._failure is not None or all(output is not None for output in self._outputs)

    @property
    def failed(self) -> bool:
        """Whether it has ended with an error."""
        return self._failure is not None

    def cancel(self) -> None:
        """Stop the work. Answers that have not ended keep what they have, as ``"cancelled"``. Any thread may call."""
        if not self.done:
            self._cancel(self)

    def results(self, timeout: float | None = None) -> list[GenerationOutput]:
        """Wait for all answers.

        Args:
            timeout: seconds; None waits without end.

        Raises:
            EngineError: the request failed.
            TimeoutError: it has not ended in time; it goes on.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"the request has not ended within {timeout} s")
        # A new error for each caller: one exception object raised in several threads would mix their tracebacks.
        if self._failure is not None:
            raise EngineError(str(self._failure)) from self._failure
        return [output for output in self._outputs if output is not None]

    def result(self, timeout: float | None = None) -> GenerationOutput:
        """Wait for all answers and return the first, as ``results``."""
        return self.results(timeout)[0]

    def __iter__(self) -> Iterator[Piece]:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: bool(self._pieces) or self.done)
                    piece = self._pieces.popleft() if self._pieces else None
                if piece is None:  # done, and all pieces were given out
                    break
                yield piece  # without the lock: the caller may take its time
            self.results()  # raises where the request failed
        finally:
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(changed.set)

        with self._changed:
            self._watchers.append(wake)
        try:
            while True:
                # Cleared before the look, not after: a piece that comes in between sets it again.
                changed.clear()
                with self._changed:
                    piece = self._pieces.popleft() if self._pieces else None
                    ended = piece is None and self.done
                if piece is not None:
                    yield piece
                elif ended:
                    break
                else:
                    await changed.wait()
            self.results()
        finally:
            with self._changed:
                self._watchers.remove(wake)
            self.cancel()

    def put(self, piece: Piece) -> None:
        """Hand over a piece. Called by the engine. A request that has failed takes none: its error is the last word."""
        with self._changed:
            if self.failed:
                return
            self._pieces.append(piece)
            if piece.output is not None:
                self._outputs[piece.index] = piece.output
            self._notify()

    def fail(self, error: Exception) -> None:
        """End the request with an error, unless it has ended. Called by the engine, on any thread."""
        with self._changed:
            if not self.done:
                self._failure = error
            self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        for wake in self._watchers:
            # `call_soon_threadsafe` is the only method of an event loop that another thread may call.
            try:
                wake()
            except RuntimeError:  # the caller's event loop has been closed
                continue
