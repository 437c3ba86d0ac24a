"""The engine: requests in from any thread, pieces of answers out, one thread that owns the devices in between."""

import atexit
import dataclasses
import secrets
import sys
import threading
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import jax
import numpy as np

from jllm_runtime.cache.prefix import PrefixCache
from jllm_runtime.distributed.peers import Companions
from jllm_runtime.distributed.rendezvous import connect
from jllm_runtime.embedding import Pooling
from jllm_runtime.engine.config import EngineConfig
from jllm_runtime.engine.executor import Executor, token_logprobs
from jllm_runtime.engine.follower import is_shared
from jllm_runtime.engine.request import Candidate, Request
from jllm_runtime.engine.scheduler import Batch, Chunk, Job, Scheduler
from jllm_runtime.engine.stats import EngineStats
from jllm_runtime.engine.structured import GrammarCompiler
from jllm_runtime.errors import DistributedError, EngineError, QueueFullError, RequestError
from jllm_runtime.loading import Model
from jllm_runtime.outputs import Answer, GenerationOutput, Prompt, params_of_each, prompt_list
from jllm_runtime.sampling import SamplingParams


class Engine:
    """Answers many requests at a time, with one model.

    The tokens of an answer are those that it would have alone. Close it, or use it as a context manager: leaving the
    block waits for what runs, or cancels it where the block has raised an error.

    Over several processes (``jax.distributed``) it is the first one's; the others call ``follow``. When one of them is
    lost, or a step fails in some of them only, its requests fail and the process ends with exit code 1.

    Args:
        model: from ``load_model``.
        config: how much to do at a time.
        companions: the lines to the other processes, where ``distributed.join`` has made some; made when None and the
            model's mesh is over several processes.

    Raises:
        EngineError: the config is impossible.
        DistributedError: of several processes this is not the first; the mesh is over some of them only; or they have
            another model or mesh.
    """

    def __init__(self, model: Model, config: EngineConfig | None = None, companions: Companions | None = None) -> None:
        self.model = model
        self.config = config or EngineConfig()
        given = companions if companions is not None and companions.indexes else None
        self._own_lines = _lines(model) if given is None else None
        lines = given or self._own_lines
        self._cache = PrefixCache(self.config.page_count(model), self.config.page_size)
        self._scheduler = Scheduler(
            self._cache, self.config.max_batch, self.config.step_tokens, self.config.decode_steps
        )
        self._executor = Executor(model, self.config, self._cache.pages, lines)
        self._candidates: dict[Job, Candidate] = {}
        self._counts = EngineStats()
        self._changed = threading.Condition()
        self._arrived: deque[Candidate] = deque()
        self._cancelled: deque[Request] = deque()
        self._closing = False
        self._grammars: GrammarCompiler | None = None
        self._grammars_lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="jllm-engine", daemon=True)
        if lines is not None:
            lines.at_loss(lambda reason: self._stop(EngineError(reason)))
        self._thread.start()
        atexit.register(self.close)

    # ---- For callers, on any thread.

    def submit(self, prompt: Prompt, params: SamplingParams | None = None) -> Request:
        """Ask for an answer, and go on.

        Args:
            prompt: a text (encoded with the model's special tokens, without a chat template) or token ids.
            params: greedy when None.

        Raises:
            RequestError: a prompt or parameter that cannot be honoured, or that needs more pages than there are.
            QueueFullError: ``max_queue`` answers wait already.
            EngineError: the engine is closed.
        """
        return self._submit(prompt, params or SamplingParams(), self.config.max_queue)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool | None = None,
    ) -> list[GenerationOutput]:
        """Answer all prompts, and wait for it.

        Args:
            prompts: as for ``submit``.
            params: for all prompts, or one each; greedy when None.
            progress: show a bar on standard error; None shows it on a terminal.

        Returns:
            The outputs in the order of the prompts; with ``n`` answers to a prompt, they follow each other.
        """
        prompts = prompt_list(prompts)
        each = params_of_each(params, len(prompts))
        requests: list[Request] = []
        try:
            requests += [self._submit(prompt, own, None) for prompt, own in zip(prompts, each, strict=True)]
            shown = sys.stderr.isatty() if progress is None else progress
            return _results(requests, shown)
        finally:
            for request in requests:
                request.cancel()

    def embed(
        self, prompts: Prompt | Sequence[Prompt], pooling: Pooling = "mean", normalize: bool = True
    ) -> np.ndarray:
        """A vector for each text, as ``jllm_runtime.embed`` has it; over several processes, too.

        It runs on the caller's thread, beside the engine's; over several processes steps wait meanwhile.

        Raises:
            RequestError: as ``jllm_runtime.embed``.
            EngineError: over several processes, the engine is closed.
        """
        return self._executor.embed(prompts, pooling, normalize)

    @property
    def closed(self) -> bool:
        """Whether requests are refused: it was closed, or its thread has failed beyond repair."""
        return self._closing

    def stats(self) -> EngineStats:
        """What the engine is doing now."""
        with self._changed:
            return dataclasses.replace(
                self._counts,
                waiting=len(self._arrived) + len(self._scheduler.waiting),
                running=len(self._scheduler.running),
                max_batch=self.config.max_batch,
                pages=self._cache.pages,
                pages_in_use=self._cache.in_use,
                pages_idle=self._cache.idle,
            )

    def close(self, drain: bool = False) -> None:
        """End the engine's thread. Further requests are refused.

        Args:
            drain: finish what was submitted; else it is cancelled.
        """
        with self._changed:
            self._closing = True
            if not drain:
                self._cancelled.extend({c.request for c in [*self._candidates.values(), *self._arrived]})
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()
            self._executor.close()
            if self._own_lines is not None:
                self._own_lines.farewell()
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=error is None)

    def _submit(self, prompt: Prompt, params: SamplingParams, max_queue: int | None) -> Request:
        if params.seed is None:
            params = dataclasses.replace(params, seed=secrets.randbits(32))
        if params.grammar is not None and params.min_tokens:
            raise RequestError("min_tokens cannot be combined with a grammar, which says itself where an answer ends")
        request: Request | None = None
        candidates: list[Candidate] = []
        for index in range(params.n):
            answer = Answer(self.model, prompt if request is None else request.prompt_token_ids, params)
            request = request or Request(answer.prompt_ids, params.n, self._request_cancel)
            matcher = None if params.grammar is None else self._grammar_compiler().matcher(params.grammar)
            candidates.append(Candidate(request, index, params, answer, matcher, self._is_private(answer)))
            self._scheduler.check(candidates[-1].job)
        if request is None:
            raise RequestError("a request needs at least one answer")
        with self._changed:
            if self._closing:
                raise EngineError("the engine is closed")
            waiting = len(self._arrived) + len(self._scheduler.waiting)
            if max_queue is not None and waiting + len(candidates) > max_queue:
                raise QueueFullError(f"{waiting} answers wait already, the limit is {max_queue}; try again later")
            self._arrived.extend(candidates)
            self._count(requests=1)
            self._changed.notify_all()
        return request

    def _is_private(self, answer: Answer) -> bool:
        scaling = self.model.config.rope_scaling
        if scaling is None or scaling.kind != "dynamic":
            return False
        return len(answer.prompt_ids) > (scaling.original_context_length or 0)

    def _grammar_compiler(self) -> GrammarCompiler:
        with self._grammars_lock:
            self._grammars = self._grammars or GrammarCompiler(self.model)
            return self._grammars

    def _request_cancel(self, request: Request) -> None:
        with self._changed:
            self._cancelled.append(request)
            self._changed.notify_all()

    # ---- The engine's own thread.

    def _work(self) -> None:
        try:
            while self._take_orders():
                try:
                    self._prefill()
                    self._decode()
                except Exception as error:  # a fault of the engine itself: nothing is known of any of them
                    self._fail(list(self._candidates), error)
        except BaseException as error:  # not even empty pages can be had: nobody must wait for ever
            self._stop(error if isinstance(error, Exception) else EngineError(f"the engine has stopped: {error!r}"))
            raise

    def _stop(self, error: Exception) -> None:
        """Fail every request, and take no more."""
        with self._changed:
            self._closing = True
            left = {candidate.request for candidate in [*self._candidates.values(), *self._arrived]}
        for request in left:
            request.fail(error)

    def _take_orders(self) -> bool:
        """Take in what has arrived and let go of what was cancelled; sleep while there is nothing to do."""
        with self._changed:
            while not (self._arrived or self._cancelled or self._candidates or self._closing):
                self._changed.wait()
            arrived, self._arrived = list(self._arrived), deque()
            cancelled, self._cancelled = set(self._cancelled), deque()
            for candidate in arrived:
                self._candidates[candidate.job] = candidate
                if candidate.answer.finish_reason is None:
                    self._scheduler.add(candidate.job)
        for candidate in list(self._candidates.values()):
            if candidate.request in cancelled and candidate.answer.finish_reason is None:
                candidate.answer.finish("cancelled")
            if candidate.answer.finish_reason:
                self._end(candidate)
        return bool(self._candidates or self._arrived) or not self._closing

    def _prefill(self) -> None:
        for job in self._scheduler.admit():
            self._candidates[job].start()
            self._executor.start(self._candidates[job])
        for chunk in self._scheduler.chunks():
            try:
                self._take_in(chunk)
            except Exception as error:
                self._fail([chunk.job], error)
                return

    def _take_in(self, chunk: Chunk) -> None:
        self._executor.prefill(chunk)
        candidate = self._candidates[chunk.job]
        top = candidate.params.prompt_logprobs
        if top is not None and len(candidate.prompt_logprobs) == chunk.start + 1:
            candidate.prompt_logprobs += self._executor.prompt_logprobs(chunk, top)
        self._scheduler.chunk_done(chunk)
        self._count(prompt_tokens=chunk.stop - chunk.start)

    def _decode(self) -> None:
        batch = self._scheduler.batch()
        if not batch.jobs:
            return
        try:
            self._add_tokens(batch)
        except Exception as error:
            self._fail(batch.jobs, error)

    def _add_tokens(self, batch: Batch) -> None:
        candidates = [self._candidates[job] for job in batch.jobs]
        made, logprobs = self._executor.decode(candidates, batch.steps)
        for row, candidate in enumerate(candidates):
            job, answer, before = candidate.job, candidate.answer, len(candidate.answer.token_ids)
            wanted = None if logprobs is None else candidate.params.logprobs
            for step in range(batch.steps):
                job.computed += 1
                if job.computed < len(job.prompt_ids) + len(job.token_ids):
                    continue  # after a preemption: it is there already
                token, logprob = int(made[row, step]), None
                if wanted is not None and logprobs is not None:
                    one = dataclasses.replace(
                        logprobs,
                        token=logprobs.token[row, step : step + 1],
                        top_ids=logprobs.top_ids[row, step : step + 1],
                        top=logprobs.top[row, step : step + 1],
                    )
                    [logprob] = token_logprobs(one, [token], wanted)
                try:
                    candidate.accept(token, logprob)
                except RequestError as error:
                    answer.finish("cancelled")
                    candidate.request.fail(error)
                if answer.finish_reason:
                    break
            self._count(generated_tokens=len(answer.token_ids) - before)
            if answer.finish_reason:
                self._end(candidate)
            elif len(answer.token_ids) > before:
                candidate.request.put(candidate.piece())

    def _end(self, candidate: Candidate) -> None:
        """Let go of an answer that has ended: first its pages, then word to the caller."""
        with self._changed:
            self._scheduler.remove(candidate.job)
            del self._candidates[candidate.job]
            others = any(other.request is candidate.request for other in self._candidates.values())
            reason = candidate.answer.finish_reason
            reused = candidate.job.reused
            self._count(reused_tokens=reused, prompt_tokens=reused, preemptions=candidate.job.preemptions)
            if not others:
                self._count(**{"cancelled" if reason == "cancelled" else "finished": 1})
        candidate.request.put(candidate.piece())

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        """End these sequences' requests with an error, and begin with empty pages: a step that failed may have lost
        them. All others are computed anew."""
        requests = {self._candidates[job].request for job in jobs if job in self._candidates}
        with self._changed:
            for job, candidate in list(self._candidates.items()):
                if candidate.request in requests:
                    self._scheduler.remove(job)
                    del self._candidates[job]
            self._scheduler.restart()
            self._count(failed=len(requests))
        failure = EngineError(f"a step of the engine failed: {type(error).__name__}: {error}")
        failure.__cause__ = error
        for request in requests:
            request.fail(failure)
        self._executor.reset()

    def _count(self, **more: int) -> None:
        with self._changed:
            counts = {name: getattr(self._counts, name) + count for name, count in more.items()}
            self._counts = dataclasses.replace(self._counts, **counts)


def _lines(model: Model) -> Companions | None:
    """Lines to the other processes that the model lies on; None where there are none."""
    if not is_shared(model):
        return None
    if jax.process_index():
        raise DistributedError(
            f"process {jax.process_index()} of {jax.process_count()} takes no requests; make the Engine in process 0, "
            "and call follow(model) in the others"
        )
    return connect()


def _results(requests: list[Request], shown: bool) -> list[GenerationOutput]:
    if not shown:
        return [output for request in requests for output in request.results()]
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    waited = track(requests, "Generating", console=console, total=len(requests))
    return [output for request in waited for output in request.results()]
