"""Inference engine: continuous batching of requests from any thread, by one thread that owns the devices."""

import asyncio
import atexit
import dataclasses
import os
import secrets
import threading
from collections import abc, deque
from types import TracebackType
from typing import Any, Self

import numpy as np

from jllm_runtime.cache.prefix import PrefixCache
from jllm_runtime.chat_answer import ChatAnswer, answer_chat
from jllm_runtime.distributed.peers import Peers
from jllm_runtime.embedding import Pooling
from jllm_runtime.engine.config import EngineConfig
from jllm_runtime.engine.executor import Executor, accept_tokens
from jllm_runtime.engine.grammar_masks import GrammarCompiler
from jllm_runtime.engine.protocol import connect_followers
from jllm_runtime.engine.recorder import Recorder
from jllm_runtime.engine.request import Request
from jllm_runtime.engine.scheduler import Batch, PromptPage, Scheduler
from jllm_runtime.engine.sequence import Sequence, is_private
from jllm_runtime.engine.stats import EngineStats, statistics
from jllm_runtime.engine.trace import TraceFile, check_trace
from jllm_runtime.engine.warm_up import prepared_pages
from jllm_runtime.errors import EngineError, NonfiniteError, QueueFullError, RequestError
from jllm_runtime.model import Conversation, Model
from jllm_runtime.outputs import GenerationOutput, OutputStream, Prompt, Prompts, params_of_each, prompt_list
from jllm_runtime.progress_bar import progress_bar
from jllm_runtime.sampling import SamplingParams


class Engine:
    """Continuous batching: answers many requests at a time, with one model.

    For requests that come and go, from any thread or event loop: a server, a chat whose turns begin alike, thousands of
    prompts. For a few prompts in a script, ``generate`` is simpler: it has no threads, and nothing to close.

    The tokens of an answer are those that it would have alone. Close it, or use it as a context manager (``with`` or
    ``async with``): leaving the block waits for what runs, or cancels it where the block has raised an error.

    Over several processes (``jax.distributed``) it is the first one's; the others call ``follow``. When one of them is
    lost, or a step fails in some of them only, its requests fail and the process ends with exit code 1.

    Args:
        model: from ``load_model``.
        config: sizes and limits.
        companions: the peers (other processes) from ``distributed.processes.join``. Where there are none, and the
            model's mesh is over several processes, they are connected here.
        trace: path of a file that gets a trace of all steps (``TraceFile``), for https://ui.perfetto.dev. What is there
            is replaced. Prefill is waited for then, so that the times are those of the devices.

    Attributes:
        recorder: tells its listeners of every step.

    Raises:
        EngineError: the config is impossible, its pages do not fit, or the trace cannot be written.
        DistributedError: of several processes this is not the first; the mesh is over some of them only; or they have
            another model or mesh.
    """

    def __init__(
        self,
        model: Model,
        config: EngineConfig | None = None,
        companions: Peers | None = None,
        trace: str | os.PathLike[str] | None = None,
    ) -> None:
        check_trace(trace)
        self.model = model
        self.config = (config or EngineConfig()).fitted(model)
        # What does not fit is refused before other processes are connected, which would wait for orders.
        pages = prepared_pages(model, self.config)
        given = companions if companions is not None and companions.indexes else None
        self._own_peers = connect_followers(model) if given is None else None
        peers = given or self._own_peers
        self._cache = PrefixCache(pages, self.config.page_size, self.config.state_snapshots(model))
        self._scheduler: Scheduler[Sequence] = Scheduler(self._cache, **self.config.scheduler_limits(model))
        self._executor = Executor(model, self.config, self._cache.pages, peers)
        # All of them, in the order of their arrival. The scheduler has the same, but for those that ended at once.
        self._sequences: list[Sequence] = []
        self._counts = EngineStats()
        # Guards what callers' threads share with the engine's: the two queues, the list of sequences, the counts, and
        # whether it is closing. It is never held while a program runs, so that nobody waits for a step to submit or
        # cancel. It is reentrant.
        self._changed = threading.Condition()
        self._arrived: deque[Sequence] = deque()
        self._cancelled: deque[Request] = deque()
        self._closing = False
        self._grammars: GrammarCompiler | None = None
        self._grammars_lock = threading.Lock()
        self.recorder = Recorder(self.stats, lambda: self._scheduler.running, self._executor.wait)
        if trace is not None:
            self.recorder.add(TraceFile(trace))
        self._thread = threading.Thread(target=self._work, name="jllm-engine", daemon=True)
        if peers is not None:
            # The engine's thread may be inside a program that waits for the lost process, so it is not asked.
            peers.on_loss(lambda reason: self._stop(EngineError(reason)))
        self._thread.start()
        # A daemon thread that is inside XLA when the interpreter ends would crash it.
        atexit.register(self.close)

    # ---- For callers, on any thread.

    def submit(self, prompt: Prompt, params: SamplingParams | None = None) -> Request:
        """Submit a request, without waiting for its answer.

        Args:
            prompt: a text (encoded with the model's special tokens, without a chat template) or token ids.
            params: those of the model's publisher when None, ``SamplingParams.of(model)``.

        Raises:
            RequestError: a prompt or parameter that cannot be honoured, or that needs more pages than there are.
            QueueFullError: ``max_queue`` answers wait already.
            EngineError: the engine is closed.
        """
        return self._submit(prompt, params or SamplingParams.of(self.model), self.config.max_queue)

    def generate(
        self,
        prompts: Prompts,
        params: SamplingParams | abc.Sequence[SamplingParams] | None = None,
        progress: bool | None = None,
    ) -> list[GenerationOutput]:
        """Answer all prompts, and wait for the answers.

        Args:
            prompts: as for ``submit``.
            params: for all prompts, or one each; ``SamplingParams.of(model)`` when None.
            progress: show a bar on standard error; None shows it on a terminal or in a notebook.

        Returns:
            The outputs in the order of the prompts; with ``n`` answers to a prompt, they follow each other.
        """
        prompts = prompt_list(prompts)
        each = params_of_each(self.model, params, len(prompts))
        requests: list[Request] = []
        # Where one prompt is refused, or the user interrupts, the others must not go on.
        try:
            requests += [self._submit(prompt, own, None) for prompt, own in zip(prompts, each, strict=True)]
            outputs: list[GenerationOutput] = []
            with progress_bar("Generating", len(requests), progress) as advance:
                for request in requests:
                    outputs += request.results()
                    advance()
            return outputs
        finally:
            for request in requests:
                request.cancel()

    def chat(self, messages: Conversation, params: SamplingParams | None = None, **variables: Any) -> ChatAnswer:
        """Answer a conversation, and wait for the (first) answer; the arguments are those of ``Model.chat``."""
        return answer_chat(self.model, messages, params, variables, lambda *given: self.submit(*given).result())

    def embed(self, prompts: Prompts, pooling: Pooling = "mean", normalize: bool = True) -> np.ndarray:
        """Embed texts as ``jllm_runtime.embed`` does, a vector for each; over several processes, too.

        It runs on the caller's thread, beside the engine's. Over several processes the engine's steps wait meanwhile.

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
        """Statistics of this moment, and counts since the start."""
        with self._changed:
            return statistics(self._counts, len(self._arrived), self._scheduler, self.config)

    def close(self, drain: bool = False) -> None:
        """End the engine's thread. Further requests are refused.

        Args:
            drain: finish what was submitted; else it is cancelled.
        """
        with self._changed:
            self._closing = True
            if not drain:
                self._cancelled.extend({sequence.request for sequence in [*self._sequences, *self._arrived]})
            self._changed.notify_all()
        # The engine's own thread cannot wait for its own end.
        if threading.current_thread() is not self._thread:
            self._thread.join()
            self._executor.close()
            self.recorder.close()
            if self._own_peers is not None:
                self._own_peers.farewell()
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=error is None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # To wait for the engine's thread would stop the event loop, and with it whoever reads the last answers.
        await asyncio.to_thread(self.close, drain=error is None)

    def _submit(self, prompt: Prompt, params: SamplingParams, max_queue: int | None) -> Request:
        # A seed is drawn here, once: after a preemption or a failed step the same tokens must be drawn again.
        if params.seed is None:
            params = dataclasses.replace(params, seed=secrets.randbits(32))
        if params.grammar is not None and params.min_tokens:
            raise RequestError("min_tokens cannot be combined with a grammar, which says itself where an answer ends")
        request: Request | None = None
        sequences: list[Sequence] = []
        for index in range(params.n):
            # The prompt is encoded once.
            stream = OutputStream(self.model, prompt if request is None else request.prompt_token_ids, params)
            request = request or Request(stream.prompt_ids, params.n, self._request_cancel)
            matcher = None if params.grammar is None else self._grammar_compiler().matcher(params.grammar)
            private = is_private(self.model.config, len(stream.prompt_ids))
            sequences.append(Sequence(request, index, params, stream, matcher, private))
            self._scheduler.check(sequences[-1])
        if request is None:
            raise RequestError("a request needs at least one answer")
        with self._changed:
            if self._closing:
                raise EngineError("the engine is closed")
            waiting = len(self._arrived) + len(self._scheduler.waiting)
            if max_queue is not None and waiting + len(sequences) > max_queue:
                raise QueueFullError(f"{waiting} answers wait already, the limit is {max_queue}; try again later")
            self._arrived.extend(sequences)
            self._count(requests=1)
            self._changed.notify_all()
        return request

    def _grammar_compiler(self) -> GrammarCompiler:
        # Not `_changed`: to read a large tokenizer takes a second, in which the engine must go on.
        with self._grammars_lock:
            self._grammars = self._grammars or GrammarCompiler(self.model)
            return self._grammars

    def _request_cancel(self, request: Request) -> None:
        with self._changed:
            self._cancelled.append(request)
            self._changed.notify_all()

    # ---- The engine's own thread. It alone calls the scheduler and the executor, but for `check` and `embed`.

    def _work(self) -> None:
        try:
            while self._update_queue():
                try:
                    with self.recorder.step():
                        self._prefill()
                        self._decode()
                except Exception as error:  # a bug of the engine: no sequence can be trusted
                    self._fail(list(self._sequences), error)
        except BaseException as error:  # not even empty pages can be had; nobody must wait for ever
            self._stop(error if isinstance(error, Exception) else EngineError(f"the engine has stopped: {error!r}"))
            raise

    def _stop(self, error: Exception) -> None:
        """Fail every request, and take no more. Any thread may call."""
        with self._changed:
            self._closing = True
            left = {sequence.request for sequence in [*self._sequences, *self._arrived]}
        for request in left:
            request.fail(error)

    def _update_queue(self) -> bool:
        """Take in new sequences, and end those that were cancelled. Sleep while there is nothing to do.

        Returns:
            Whether to go on.
        """
        with self._changed:
            while not (self._arrived or self._cancelled or self._sequences or self._closing):
                self._changed.wait()
            arrived, self._arrived = list(self._arrived), deque()
            # A request that is cancelled before its sequences were taken in is in both queues: arrivals come first.
            cancelled, self._cancelled = set(self._cancelled), deque()
            for sequence in arrived:
                self._sequences.append(sequence)
                # A prompt that fills the context has ended already.
                if sequence.stream.finish_reason is None:
                    self._scheduler.add(sequence)
        self.recorder.arrive(arrived)
        for sequence in list(self._sequences):
            if sequence.request in cancelled and sequence.stream.finish_reason is None:
                sequence.stream.finish("cancelled")
            if sequence.stream.finish_reason:
                self._end(sequence)
        # A closed engine works until nothing is left: what was not to be finished has been cancelled.
        return bool(self._sequences or self._arrived) or not self._closing

    def _prefill(self) -> None:
        for sequence in self._scheduler.admit():
            sequence.note_start()
            self._executor.start(sequence)
        chunks = self._executor.chunks(self._scheduler.prompt_pages())
        restores = self._scheduler.take_restores()
        works = self._try(self._executor.restore, restores, [sequence for sequence, _ in restores])
        for chunk in chunks:
            # Where one has failed, the others were for pages that are gone.
            works = works and self._try(self._prefill_chunk, chunk, [page.sequence for page in chunk])

    def _prefill_chunk(self, chunk: list[PromptPage[Sequence]]) -> None:
        with self.recorder.prefill(chunk):
            self._executor.prefill(chunk)
        for row, page in enumerate(chunk):
            sequence, top = page.sequence, page.sequence.params.prompt_logprobs
            # After a preemption the earlier pages are computed again, and their log-probabilities are there already.
            if top is not None and len(sequence.prompt_logprobs) == page.start + 1:
                sequence.prompt_logprobs += self._executor.prompt_logprobs(row, page, top)
            self._executor.keep(sequence, self._scheduler.page_done(page))
            self._count(prompt_tokens=page.stop - page.start)

    def _decode(self) -> None:
        batch = self._scheduler.batch()
        if batch.sequences:
            self._try(self._decode_batch, batch, batch.sequences)

    def _try(self, work: abc.Callable[[Any], None], given: Any, sequences: abc.Sequence[Sequence]) -> bool:
        """Do a part of a step. Where it fails, the requests of these sequences do."""
        try:
            work(given)
        except Exception as error:
            self._fail(sequences, error)
            return False
        return True

    def _decode_batch(self, batch: Batch[Sequence]) -> None:
        with self.recorder.decode(batch.sequences, batch.decode_steps):
            tokens, logprobs = self._executor.decode(batch.sequences, batch.decode_steps)
        for row, sequence in enumerate(batch.sequences):
            before = len(sequence.token_ids)
            try:
                accept_tokens(sequence, row, tokens[:, : batch.decode_steps], logprobs)
            except (RequestError, NonfiniteError) as error:  # its grammar or logits: no fault of its neighbours
                sequence.stream.finish("cancelled")
                sequence.request.fail(error)
                # Nobody waits for its request's other answers any more.
                self._request_cancel(sequence.request)
            self._count(generated_tokens=len(sequence.token_ids) - before)
            if sequence.stream.finish_reason:
                self._end(sequence)
            elif len(sequence.token_ids) > before:
                sequence.request.put(sequence.piece())

    def _end(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended. Its pages are free before the caller gets the last piece."""
        with self._changed:
            self._scheduler.remove(sequence)
            self._sequences.remove(sequence)
            is_last = all(other.request is not sequence.request for other in self._sequences)
            self._count(reused_tokens=sequence.reused, prompt_tokens=sequence.reused, preemptions=sequence.preemptions)
            if is_last:
                ended = "cancelled" if sequence.stream.finish_reason == "cancelled" else "finished"
                self._count(**{"failed" if sequence.request.failed else ended: 1})
        self.recorder.end(sequence)
        sequence.request.put(sequence.piece())

    def _fail(self, sequences: abc.Sequence[Sequence], error: Exception) -> None:
        """End the requests of these sequences with an error, and begin with empty pages.

        A program that failed may have taken the donated pages with it. All other sequences are computed again.
        """
        left = set(self._sequences)
        requests = {sequence.request for sequence in sequences if sequence in left}
        ended = [sequence for sequence in self._sequences if sequence.request in requests]
        with self._changed:
            for sequence in ended:
                self._scheduler.remove(sequence)
                self._sequences.remove(sequence)
            self._scheduler.restart()
            self._count(failed=len(requests))
        for sequence in ended:
            self.recorder.end(sequence, failed=True)
        failure = EngineError(f"a step of the engine failed: {type(error).__name__}: {error}")
        failure.__cause__ = error
        for request in requests:
            request.fail(failure)
        self._executor.reset()

    def _count(self, **more: int) -> None:
        # A new object each time, so that `stats` hands out one that no longer changes.
        with self._changed:
            counts = {name: getattr(self._counts, name) + count for name, count in more.items()}
            self._counts = dataclasses.replace(self._counts, **counts)
