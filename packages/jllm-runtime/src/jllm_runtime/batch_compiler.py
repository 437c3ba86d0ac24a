"""Compilation of the programs of ``generate``: side by side, for the next capacity, and ahead of the first call."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
from jax.stages import Lowered

from jllm_runtime.cache.contiguous import PREFILL_CHUNK, ContiguousCache, KVDtype, prefill_chunks
from jllm_runtime.cache.descriptions import resized
from jllm_runtime.compile_ahead import BackgroundCompilation, compile_together
from jllm_runtime.errors import RequestError
from jllm_runtime.generation import MAX_BATCH, Batch
from jllm_runtime.model import Model
from jllm_runtime.outputs import OutputStream
from jllm_runtime.programs import contiguous_batch
from jllm_runtime.sampling import SamplingParams

Programs = dict[str, Callable[[], Lowered]]


class BatchCompiler:
    """Compiler of the programs that a batch calls; the calls then find them compiled."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._background: BackgroundCompilation | None = None
        self._begun_for = 0

    def begin(self, cache: ContiguousCache, hidden: jax.Array, sizes: Sequence[int], block: int) -> None:
        """Compile what takes in the prompts, in chunks of these sizes, and what adds the first so many tokens."""
        batch = self._batch
        programs = self._prompt_programs(cache, hidden, sizes)
        if (batch.limits > batch.lengths).any():
            needed = batch.needed(batch.lengths - 1, block)
            programs |= self._answer_programs(cache, batch.capacity(needed))
        compile_together(programs)

    def look_ahead(self, cache: ContiguousCache, position: int) -> None:
        """Begin to compile for the next capacity when half of this one is filled, where a row may come so far."""
        capacity = cache.capacity
        following = self._batch.capacity(min(capacity + 1, int(self._batch.limits.max())))
        if following > max(capacity, self._begun_for) and 2 * position >= capacity:
            self._begun_for = following
            # From a description: the cache itself is donated to the next step meanwhile.
            self._background = BackgroundCompilation(self._answer_programs(resized(cache, capacity), following))

    def wait(self) -> None:
        """Wait until what was begun is compiled."""
        if self._background is not None:
            self._background.wait()

    def compile_all(self, tokens: int, on_done: Callable[[str, float], None] | None = None) -> None:
        """Compile the programs for texts of up to so many tokens, one capacity after another."""
        batch = self._batch
        capacity, largest = batch.capacity(1), batch.capacity(tokens)
        while True:
            cache, hidden = batch.empty(capacity)
            # A prompt of any length may need this capacity, with its answer.
            sizes = sorted(
                {
                    size
                    for tokens in range(PREFILL_CHUNK - 1, capacity, PREFILL_CHUNK)
                    for size, _, _ in prefill_chunks(len(batch.lengths), tokens, capacity, batch.model.backend)
                },
                reverse=True,
            )
            programs = self._prompt_programs(cache, hidden, sizes) | self._answer_programs(cache, capacity)
            if capacity == largest:
                compile_together(programs, on_done)
                return
            following = batch.capacity(capacity + 1)
            growth = self._answer_programs(cache, following)
            # What the next round begins with is left to it.
            compile_together(programs | {name: growth[name] for name in list(growth)[:1]}, on_done)
            capacity = following

    def _prompt_programs(self, cache: ContiguousCache, hidden: jax.Array, sizes: Sequence[int]) -> Programs:
        """What takes prompts into this cache, in chunks of these sizes, and chooses the first token."""
        programs: Programs = {
            f"prefill in chunks of {size}, {cache.capacity} slots": partial(
                contiguous_batch.prefill.lower, *self._batch.of_prefill(cache, hidden, size, 0, 0)
            )
            for size in sizes
        }
        first_token = partial(contiguous_batch.first_token.lower, *self._batch.of_first_token(hidden))
        return {**programs, "first token": first_token}

    def _answer_programs(self, cache: ContiguousCache, capacity: int) -> Programs:
        """What goes on from a cache, or its description, with so many slots; growth comes first, if there is any."""
        programs: Programs = {}
        if capacity > cache.capacity:
            programs[f"growth from {cache.capacity} slots"] = partial(
                contiguous_batch.grow_cache.lower, cache, capacity
            )
            cache = resized(cache, capacity)
        program, arguments = self._batch.of_step(cache, self._batch.lengths - 1, self._batch.lengths < 0, 0)
        return {**programs, f"decode, {capacity} slots": partial(program.lower, *arguments)}


def compile_ahead(
    model: Model,
    batch: int = 1,
    context: int | None = None,
    lookup: int = 0,
    kv_dtype: KVDtype | None = None,
    on_done: Callable[[str, float], None] | None = None,
) -> None:
    """Compile what ``generate`` runs, before it is called; with a compilation cache on disk, also for later processes.

    The programs of requests with penalties are others, and are not among them.

    Args:
        model: from ``load_model``.
        batch: prompts side by side, at most ``MAX_BATCH``.
        context: tokens of the longest text, prompt and answer together; the model's context when None.
        lookup, kv_dtype: as ``generate`` has them.
        on_done: called with the name of each program that is compiled, and the seconds that it took.

    Raises:
        RequestError: a batch or context that is impossible, or as ``generate``.
    """
    longest = model.config.context_length
    context = longest if context is None else context
    for name, given, most in (("batch", batch, MAX_BATCH), ("context", context, longest)):
        if not 1 <= given <= most:
            raise RequestError(f"{name} must be from 1 to {most:,}, got {given:,}")
    rows = [OutputStream(model, [0], SamplingParams(max_tokens=1, seed=0)) for _ in range(batch)]
    BatchCompiler(Batch(model, rows, lookup, kv_dtype, progress=False)).compile_all(context, on_done)
