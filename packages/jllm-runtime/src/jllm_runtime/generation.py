"""Text generation: prompts in, texts out, a batch at a time."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jllm_runtime.cache.contiguous import (
    ContiguousCache,
    KVDtype,
    cache_capacity,
    cache_dtype,
    cache_info,
    prefill_chunks,
)
from jllm_runtime.errors import RequestError
from jllm_runtime.model import Model
from jllm_runtime.outputs import (
    GenerationOutput,
    OutputStream,
    Piece,
    Prompt,
    Prompts,
    Timings,
    params_of_each,
    prompt_list,
)
from jllm_runtime.penalties import Penalties
from jllm_runtime.programs import contiguous_batch
from jllm_runtime.progress import compile_status
from jllm_runtime.sampling import SamplingArrays, SamplingParams
from jllm_runtime.speculative.prompt_lookup import Patience, draft_length

if TYPE_CHECKING:
    from jllm_runtime.batch_compiler import BatchCompiler

MAX_BATCH = 16
"""Requests that run side by side; more are run one batch after another."""

STREAM_BLOCK = 8
"""Most tokens between two pieces of a stream."""


def generate(
    model: Model,
    prompts: Prompts,
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    lookup: int = 0,
    kv_dtype: KVDtype | None = None,
    progress: bool | None = None,
) -> list[GenerationOutput]:
    """Answer prompts. A prompt's answer is the same alone and beside others.

    For a few prompts at a time that are all there, in a script or a notebook: no threads, and nothing to close. For
    requests that come and go, prompts that begin alike (the turns of a chat), or more than ``MAX_BATCH`` of them, use
    ``Engine``: a row that has ended makes room for the next one there, and a prompt's beginning is computed once.
    Log-probabilities, grammars, ``min_tokens`` and several answers to a prompt are the Engine's alone.

    Args:
        model: from ``load_model``.
        prompts: texts (encoded with the model's special tokens, without a chat template) or lists of token ids.
        params: for all prompts, or one each; those of the model's publisher when None (``SamplingParams.of(model)``).
        lookup: most tokens that are guessed at a time from what the text has said before, for the model to check in one
            step; 0 is off, 7 a good choice. Answers that repeat parts of the prompt or of themselves come faster, and
            consist of the same tokens (see ``jllm_runtime.speculative.prompt_lookup``). They are the same to the bit
            where the CPU kernels of jllm-core run and the layers have no experts; elsewhere a step of several tokens
            may round otherwise than one of a single token, as a batch of another size may, which decides between tokens
            that nearly tie.
        kv_dtype: what keys and values are kept as: ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"int8"`` (with a
            scale for each token and head); the type of the activations when None. Fewer bits take less memory, and
            change the answer a little.
        progress: show a line on standard error while programs are compiled; None shows it on a terminal or in a
            notebook.

    Returns:
        An output for each prompt, in order.

    Raises:
        RequestError: a prompt that is empty, longer than the context or outside the vocabulary, a text for a model
            without a tokenizer, a lookup that is no whole number from 0 to 15, or any for a model with delta nets, or
            an unknown kv_dtype.
        ModelError: the publisher's parameters are impossible.
    """
    prompts = prompt_list(prompts)
    each = params_of_each(model, params, len(prompts))
    for own in each:
        _refuse_engine_fields(own)
    rows = [OutputStream(model, prompt, own) for prompt, own in zip(prompts, each, strict=True)]
    outputs: list[GenerationOutput] = []
    for first in range(0, len(rows), MAX_BATCH):
        batch = Batch(model, rows[first : first + MAX_BATCH], lookup, kv_dtype, progress)
        for _ in batch.run(contiguous_batch.DECODE_BLOCK):
            pass
        outputs += [row.output(batch.timings()) for row in batch.rows]
    return outputs


def stream_generate(
    model: Model,
    prompt: Prompt,
    params: SamplingParams | None = None,
    lookup: int = 0,
    kv_dtype: KVDtype | None = None,
    progress: bool | None = None,
) -> Iterator[Piece]:
    """Answer one prompt piece by piece. Closing the iterator stops the work.

    The tokens are those of ``generate``, and the request is checked before the first piece is asked for.

    Args:
        model: from ``load_model``.
        prompt: a text or a list of token ids.
        params: those of the model's publisher when None.
        lookup: as ``generate`` has it.
        kv_dtype: as ``generate`` has it.
        progress: as ``generate`` has it.

    Raises:
        RequestError, ModelError: as ``generate``.
    """
    params = params or SamplingParams.of(model)
    _refuse_engine_fields(params)
    row = OutputStream(model, prompt, params)
    batch = Batch(model, [row], lookup, kv_dtype, progress)

    def pieces() -> Iterator[Piece]:
        seen = 0
        for _ in batch.run(STREAM_BLOCK, first_block=1):
            text, new = row.take_text(), row.token_ids[seen:]
            seen += len(new)
            yield Piece(text, new, row.output(batch.timings()) if row.finish_reason else None)

    return pieces()


def _refuse_engine_fields(params: SamplingParams) -> None:
    if names := params.for_engine:
        raise RequestError(f"generate does not do {', '.join(names)}; use jllm_runtime.Engine, which does")


class Batch:
    """Rows that run side by side: their cache, and the arrays that the compiled steps take."""

    def __init__(
        self, model: Model, rows: list[OutputStream], lookup: int, kv_dtype: KVDtype | None, progress: bool | None
    ) -> None:
        self.model = model
        self._progress = progress
        self.rows = rows
        # Few batch sizes, so that few programs are compiled; the rows without a request have ended from the start.
        size = 1 << (len(rows) - 1).bit_length()
        blank = size - len(rows)
        self._kv_dtype = cache_dtype(model.weights.dtype, kv_dtype)
        self._draft = draft_length(lookup, size, model.backend)
        if lookup and model.config.delta_net:
            raise RequestError(
                f"lookup is {lookup}, but {model.config.model_type} has delta nets, whose states do not go back behind "
                "a token that was guessed wrongly; leave lookup out"
            )
        # On the devices, as a step gives it back: the second step would else be another program.
        self._patience = jax.device_put(Patience.of(size), model.replicated)
        self.lengths = np.array([len(row.prompt_ids) for row in rows] + [0] * blank, np.int32)
        self.limits = np.array([row.limit for row in rows] + [0] * blank, np.int32)
        params = [row.params for row in rows] + [SamplingParams(seed=0)] * blank
        self._sampling = SamplingArrays.of(params)
        self._penalties: Penalties | None = None
        if any(row.is_penalized for row in params):
            prompts = [row.prompt_ids for row in rows] + [[]] * blank
            penalties = Penalties.of(params, prompts, model.config.vocab_size)
            # On the devices once, for every block of tokens.
            self._penalties = jax.device_put(penalties, model.replicated)
        eos_ids = [row.eos_ids for row in rows] + [()] * blank
        self._eos_ids = np.full((size, max(4, *map(len, eos_ids))), -1, np.int32)
        for row_ids, ids in zip(self._eos_ids, eos_ids, strict=True):
            row_ids[: len(ids)] = ids
        self._compile_s = self._prefill_s = self._decode_s = 0.0
        self._compiled_for = 0
        self._compiler = _compiler(self)

    def run(self, block: int, first_block: int = contiguous_batch.DECODE_BLOCK) -> Iterator[None]:
        """Generate until every row has ended; yields whenever rows have got new tokens.

        Args:
            block: most tokens between two yields, at most DECODE_BLOCK.
            first_block: the same for the first yields; it doubles up to ``block``.
        """
        if any(row.finish_reason is None for row in self.rows):
            with compile_status(self._progress):
                self._accept(self._prefill(min(first_block, block))[:, None])
        yield
        block_now = min(first_block, block)
        while any(row.finish_reason is None for row in self.rows):
            with compile_status(self._progress):
                self._accept(self._decode(block_now))
            yield
            block_now = min(2 * block_now, block)

    def timings(self) -> Timings:
        """The time spent so far."""
        prompt = sum(len(row.prompt_ids) for row in self.rows)
        decoded = sum(max(len(row.token_ids) - 1, 0) for row in self.rows)
        return Timings(
            compile_s=self._compile_s,
            prefill_s=self._prefill_s,
            decode_s=self._decode_s,
            prefill_tokens_per_s=prompt / self._prefill_s if self._prefill_s else 0.0,
            decode_tokens_per_s=decoded / self._decode_s if self._decode_s else 0.0,
        )

    def _prefill(self, block: int) -> np.ndarray:
        """Take in the prompts and choose the first token of each, ``[B]``; ``block`` more are to come at first."""
        size, start = len(self.lengths), time.perf_counter()
        cache, hidden = self.empty(self.capacity(int(self.lengths.max()) + 1))

        def prefill(*chunk: int) -> None:
            nonlocal cache, hidden
            cache, hidden = contiguous_batch.prefill(*self.of_prefill(cache, hidden, *chunk))

        def choose() -> np.ndarray:
            return np.asarray(contiguous_batch.first_token(*self.of_first_token(hidden)))

        chunks = prefill_chunks(size, int(self.lengths.max()), cache.capacity, self.model.backend)
        if self._compiler is not None:
            self._compiler.begin(cache, hidden, [tokens for tokens, _, _ in chunks], block)
        for tokens, _, _ in chunks:
            prefill(tokens, 0, 0)  # nothing but the compilation
        choose()
        self._compile_s += time.perf_counter() - start
        start = time.perf_counter()
        for chunk in chunks:
            prefill(*chunk)
        chosen = choose()
        self._prefill_s += time.perf_counter() - start
        self._cache = cache
        return chosen

    def _decode(self, block: int) -> np.ndarray:
        """Up to ``block`` more tokens, or one draft more, for each row that has not ended, ``[B, L]``, filled up with
        -1."""
        blank = len(self.lengths) - len(self.rows)
        done = np.array([row.finish_reason is not None for row in self.rows] + [True] * blank)
        generated = np.array([len(row.token_ids) for row in self.rows] + [0] * blank, np.int32)
        positions = self.lengths + generated - 1
        start = time.perf_counter()
        capacity = self.capacity(self.needed(positions, block, ~done))
        if capacity > self._cache.capacity:
            if self._compiler is not None:
                self._compiler.wait()
            self._cache = replace(contiguous_batch.grow_cache(self._cache, capacity), states=self._cache.states)
        step = partial(self._step, positions, done)
        if capacity != self._compiled_for:
            step(0).block_until_ready()  # nothing but the compilation
            self._compiled_for = capacity
            self._compile_s += time.perf_counter() - start
            start = time.perf_counter()
        made = np.asarray(step(block))
        self._decode_s += time.perf_counter() - start
        if self._compiler is not None:
            self._compiler.look_ahead(self._cache, int(positions[~done].max()))
        return made

    def empty(self, capacity: int) -> tuple[ContiguousCache, jax.Array]:
        """A cache, and what stands for the hidden state of each prompt's last token as long as there is none."""
        model, config, size = self.model, self.model.config, len(self.lengths)
        info = cache_info(config, size, capacity, self._kv_dtype, model.placement)
        cache = contiguous_batch.empty_cache(info.shape, info.dtype, config, model.backend)
        return cache, jax.device_put(np.zeros((size, config.hidden_size), model.weights.dtype), model.replicated)

    def of_prefill(self, cache: ContiguousCache, hidden: jax.Array, size: int, first: int, end: int) -> tuple[Any, ...]:
        """The arguments of ``prefill``."""
        prompts = np.zeros((len(self.lengths), cache.capacity), np.int32)
        for row, ids in zip(prompts, self.rows, strict=False):
            row[: len(ids.prompt_ids)] = ids.prompt_ids
        chunks = (np.int32(first), np.int32(end))
        return self.model.weights, cache, prompts, self.lengths, hidden, chunks, self.model.config, size

    def of_first_token(self, hidden: jax.Array) -> tuple[Any, ...]:
        """The arguments of ``first_token``."""
        return self.model.weights, hidden, self.lengths, self._sampling, self.model.backend, self._penalties

    def needed(self, positions: np.ndarray, block: int, going: Any = slice(None)) -> int:
        """Slots for so many more tokens behind these positions."""
        # The token at a row's limit is never read back, so it needs no slot.
        return int(np.minimum(positions + block + self._draft, self.limits)[going].max())

    def _step(self, positions: np.ndarray, done: np.ndarray, count: int) -> jax.Array:
        made: jax.Array
        program, arguments = self.of_step(self._cache, positions, done, count)
        self._cache, *patience, made = program(*arguments)
        if patience:
            [self._patience] = patience
        return made

    def of_step(self, cache: ContiguousCache, positions: np.ndarray, done: np.ndarray, count: int) -> tuple[Any, Any]:
        """The program of a step over this cache, and its arguments."""
        weights, config = self.model.weights, self.model.config
        rows = (positions, done, self.limits, self._eos_ids)
        if not self._draft:
            newest = np.zeros(len(done), np.int32)
            newest[: len(self.rows)] = [(row.token_ids or [0])[-1] for row in self.rows]
            return contiguous_batch.decode, (
                *(weights, cache, newest, *rows, self._sampling, np.int32(count), config, self._counted()),
            )
        text = np.zeros((len(done), cache.capacity + 1), np.int32)
        for tokens, row in zip(text, self.rows, strict=False):
            tokens[: len(row.prompt_ids) + len(row.token_ids)] = row.prompt_ids + row.token_ids
        return contiguous_batch.decode_by_lookup, (
            *(weights, cache, text, *rows, self._patience, self._sampling, np.int32(count), config),
            *(self._draft, self._counted()),
        )

    def _counted(self) -> Penalties | None:
        """The penalties, with the tokens so far."""
        if self._penalties is None:
            return None
        tokens = self._penalties.tokens
        generated = np.zeros(tokens.generated.shape, np.int32)
        for counts, row in zip(generated, self.rows, strict=False):
            np.add.at(counts, row.token_ids, 1)
        return replace(self._penalties, tokens=replace(tokens, generated=generated))

    def capacity(self, tokens: int) -> int:
        """The capacity of a cache for so many tokens."""
        return cache_capacity(tokens, self.model.config.context_length)

    def _accept(self, made: np.ndarray) -> None:
        for row, tokens in zip(self.rows, made, strict=False):
            for token in tokens:
                if row.finish_reason is None and token != -1:
                    row.accept(int(token))


def _compiler(batch: Batch) -> "BatchCompiler | None":
    """What compiles the batch's programs side by side and ahead; None where each is compiled when it is called.

    That is so on a CPU, where the compiler takes the cores that the model needs; and where several processes share the
    devices, for their compilers may wait for each other and must come in one order.
    """
    if batch.model.mesh.devices.flat[0].platform == "cpu" or jax.process_count() > 1:
        return None
    from jllm_runtime.batch_compiler import BatchCompiler

    return BatchCompiler(batch)
