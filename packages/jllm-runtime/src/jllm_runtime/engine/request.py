"""A request on its way: what the caller holds, and what the engine holds for each of its answers."""

import asyncio
import dataclasses
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from jllm_runtime.engine.scheduler import Job
from jllm_runtime.engine.structured import Matcher
from jllm_runtime.errors import EngineError
from jllm_runtime.outputs import Answer, GenerationOutput, Piece, Timings, TokenLogprob
from jllm_runtime.sampling import SamplingParams


class Request:
    """A request that has been submitted. Iterate over it, or ask for its result; in threads or in asyncio.

    Pieces of its ``n`` answers come as they are made; the last piece of each answer has its output. Leaving an
    iteration before its end cancels the request.

    Attributes:
        prompt_token_ids: what the model is given.
    """

    def __init__(self, prompt_token_ids: list[int], answers: int, cancel: Callable[["Request"], None]) -> None:
        self.prompt_token_ids = prompt_token_ids
        self._outputs: list[GenerationOutput | None] = [None] * answers
        self._cancel = cancel
        self._pieces: deque[Piece] = deque()
        self._failure: Exception | None = None
        self._changed = threading.Condition()
        self._watchers: list[Callable[[], None]] = []

    @property
    def done(self) -> bool:
        """Whether every answer has ended, or the request has failed."""
        return self._failure is not None or all(output is not None for output in self._outputs)

    def cancel(self) -> None:
        """Stop the work. Answers that have not ended keep what they have, as ``"cancelled"``. Any thread may call."""
        if not self.done:
            self._cancel(self)

    def results(self, timeout: float | None = None) -> list[GenerationOutput]:
        """Wait for all answers.

        Args:
            timeout: seconds.

        Raises:
            EngineError: the request failed.
            TimeoutError: it has not ended in time; it goes on.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"the request has not ended within {timeout} s")
        if self._failure is not None:
            raise EngineError(str(self._failure)) from self._failure
        return [output for output in self._outputs if output is not None]

    def result(self, timeout: float | None = None) -> GenerationOutput:
        """Wait for the answer, the first where several were asked for. As ``results``."""
        return self.results(timeout)[0]

    def __iter__(self) -> Iterator[Piece]:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: bool(self._pieces) or self.done)
                    piece = self._pieces.popleft() if self._pieces else None
                if piece is None:
                    break
                yield piece
            self.results()
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
        """Hand over a piece; called by the engine."""
        with self._changed:
            self._pieces.append(piece)
            if piece.output is not None:
                self._outputs[piece.index] = piece.output
            self._notify()

    def fail(self, error: Exception) -> None:
        """End the request with an error; called by the engine."""
        with self._changed:
            if not self.done:
                self._failure = error
            self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        for wake in self._watchers:
            try:
                wake()
            except RuntimeError:  # the caller's event loop has been closed
                continue


class Candidate:
    """One answer of a request, as the engine works on it.

    Attributes:
        request: what the caller holds.
        index: its number among the request's answers.
        params: the request's, with a seed of its own.
        answer: its tokens and its text.
        job: its place in the schedule.
        matcher: where it stands in its grammar.
        logprobs: of its tokens.
        prompt_logprobs: of the prompt's tokens, as far as they are known.

    Args:
        private: its keys depend on the length of its prompt, so that no other may use them.
    """

    def __init__(
        self,
        request: Request,
        index: int,
        params: SamplingParams,
        answer: Answer,
        matcher: Matcher | None = None,
        private: bool = False,
    ) -> None:
        seed = params.seed or 0
        self.request = request
        self.index = index
        self.params = dataclasses.replace(params, seed=(seed + index) % 2**32)
        self.answer = answer
        self.matcher = matcher
        self.job = Job(
            answer.prompt_ids,
            answer.limit + 1,
            needs_host=matcher is not None,
            computes_all=params.prompt_logprobs is not None,
            private=private,
            token_ids=answer.token_ids,
        )
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob | None] = [None]
        self._given = 0
        self._submitted = time.perf_counter()
        self._started: float | None = None
        self._first_token: float | None = None

    def start(self) -> None:
        """It has got a place."""
        self._started = self._started or time.perf_counter()

    def accept(self, token_id: int, logprob: TokenLogprob | None) -> None:
        """Take a new token."""
        self._first_token = self._first_token or time.perf_counter()
        if logprob is not None:
            self.logprobs.append(logprob)
        self.answer.accept(token_id)
        if self.matcher is not None:
            self.matcher.accept([token_id])
            if self.matcher.ended and self.answer.finish_reason is None:
                self.answer.finish("stop")

    def piece(self) -> Piece:
        """What has come since the last piece."""
        new, self._given = self.answer.token_ids[self._given :], len(self.answer.token_ids)
        output = self._output() if self.answer.finish_reason else None
        logprobs = None if self.params.logprobs is None else self.logprobs[self._given - len(new) : self._given]
        return Piece(self.answer.take_text(), new, output, self.index, logprobs)

    def _output(self) -> GenerationOutput:
        prompt = None if self.params.prompt_logprobs is None else list(self.prompt_logprobs)
        return dataclasses.replace(
            self.answer.output(self._timings()),
            index=self.index,
            logprobs=None if self.params.logprobs is None else list(self.logprobs),
            prompt_logprobs=prompt,
            reused_tokens=self.job.reused,
        )

    def _timings(self) -> Timings:
        now = time.perf_counter()
        started = self._started or now
        first = self._first_token or now
        decoded, decode_s, prefill_s = max(len(self.answer.token_ids) - 1, 0), now - first, first - started
        return Timings(
            queue_s=started - self._submitted,
            prefill_s=prefill_s,
            decode_s=decode_s,
            prefill_tokens_per_s=len(self.job.prompt_ids) / prefill_s if prefill_s else 0.0,
            decode_tokens_per_s=decoded / decode_s if decode_s else 0.0,
        )
