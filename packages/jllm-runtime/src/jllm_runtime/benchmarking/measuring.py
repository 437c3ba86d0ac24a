"""Timing of prefill and decode, with the programs that ``generate`` runs."""

import statistics
import time
from dataclasses import dataclass

import jax
import numpy as np

from jllm_runtime.cache.contiguous import ContiguousCache, cache_capacity, cache_info, prefill_chunks
from jllm_runtime.model import Model
from jllm_runtime.programs import contiguous_batch
from jllm_runtime.sampling import SamplingArrays, SamplingParams


@dataclass(frozen=True)
class Measurement:
    """Timed repetitions of the same work.

    Attributes:
        seconds: of each repetition, without the warm-up.
        compile_s: seconds to get the programs, from the compiler or the cache on disk.
        tokens: tokens of each sequence: the first one for a prefill, all from the first on for decoding.
    """

    seconds: tuple[float, ...]
    compile_s: float
    tokens: list[list[int]]

    @property
    def median_s(self) -> float:
        """Seconds of the median repetition."""
        return statistics.median(self.seconds)


def measure_prefill(model: Model, prompts: np.ndarray, repeats: int) -> Measurement:
    """Measure from the prompts to the first token of each.

    Args:
        model: from ``load_model``.
        prompts: token ids ``[B, T]``.
        repeats: number of timed repetitions.
    """
    start = time.perf_counter()
    sequences = _Batch(model, prompts, prompts.shape[1] + 1)
    sequences.compile_prefill()
    compile_s = time.perf_counter() - start
    first = sequences.prefill()  # the warm-up
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        sequences.prefill()
        seconds.append(time.perf_counter() - start)
    return Measurement(tuple(seconds), compile_s, [[int(token)] for token in first])


def measure_decode(model: Model, prompts: np.ndarray, count: int, repeats: int) -> Measurement:
    """Measure greedy decode steps after the prompts and their first tokens; each repetition starts there again.

    Args:
        model: from ``load_model``.
        prompts: token ids ``[B, T]``.
        count: steps, of one token for each sequence; no token ends one.
        repeats: number of timed repetitions.
    """
    sequences = _Batch(model, prompts, prompts.shape[1] + count)
    first = sequences.prefill()
    start = time.perf_counter()
    sequences.decode(first, 0)  # only compiles
    compile_s = time.perf_counter() - start
    made = sequences.decode(first, count)  # the warm-up
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        sequences.decode(first, count)
        seconds.append(time.perf_counter() - start)
    return Measurement(tuple(seconds), compile_s, np.concatenate([first[:, None], made], axis=1).tolist())


class _Batch:
    """A batch of sequences of one length, in as many rows as ``generate`` would use."""

    def __init__(self, model: Model, prompts: np.ndarray, tokens: int) -> None:
        self._model = model
        self._batch, self._length = prompts.shape
        rows = 1 << (self._batch - 1).bit_length()
        dtype, config = model.weights.dtype, model.config
        info = cache_info(config, rows, cache_capacity(tokens, config.context_length), dtype, model.placement)
        # One cache for all repetitions: they overwrite the same positions, and attention reads only as far as these go.
        self._cache: ContiguousCache = contiguous_batch.empty_cache(info.shape, info.dtype, config, model.backend)
        self._prompts = np.zeros((rows, self._cache.capacity), np.int32)
        self._prompts[: self._batch, : self._length] = prompts
        # Rows that fill the batch up: without a token, and done from the start.
        self._blank = np.arange(rows) >= self._batch
        self._lengths = np.where(self._blank, 0, self._length).astype(np.int32)
        self._chunks = prefill_chunks(rows, self._length, self._cache.capacity, model.backend)
        self._sampling = SamplingArrays.of([SamplingParams(temperature=0.0, seed=0)] * rows)

    def compile_prefill(self) -> None:
        """Compile the programs of ``prefill``."""
        self._prefill([(size, 0, 0) for size, _, _ in self._chunks])  # empty bounds: no position is computed

    def prefill(self) -> np.ndarray:
        """Prefill the prompts; the first token of each, ``[B]``."""
        return self._prefill(self._chunks)

    def _prefill(self, chunks: list[tuple[int, int, int]]) -> np.ndarray:
        model, config = self._model, self._model.config
        blank = np.zeros((len(self._lengths), config.hidden_size), model.weights.gamma_final.dtype)
        hidden = jax.device_put(blank, model.replicated)
        for size, first, end in chunks:
            bounds = (np.int32(first), np.int32(end))
            arguments = (self._prompts, self._lengths, hidden, bounds, config, size)
            self._cache, hidden = contiguous_batch.prefill(model.weights, self._cache, *arguments)
        chosen = contiguous_batch.first_token(model.weights, hidden, self._lengths, self._sampling, model.backend)
        return np.asarray(chosen)[: self._batch]

    def decode(self, first: np.ndarray, count: int) -> np.ndarray:
        """Decode ``count`` tokens after the first of each sequence, ``[B, count]``; 0 only compiles."""
        rows = len(self._lengths)
        newest = np.zeros(rows, np.int32)
        newest[: self._batch] = first
        limits = np.full(rows, self._length + count, np.int32)
        # EOS ids of which no token has one: every step is made.
        no_end = np.full((rows, 4), -1, np.int32)
        made = [np.zeros((rows, 0), np.int32)]
        # As generate does it: a program makes a block of tokens before the host looks at them. With count 0, one call
        # of no steps compiles it.
        for done in range(0, max(count, 1), contiguous_batch.DECODE_BLOCK):
            block = min(contiguous_batch.DECODE_BLOCK, count - done)
            positions = np.where(self._blank, 0, self._length + done).astype(np.int32)
            self._cache, tokens = contiguous_batch.decode(
                self._model.weights,
                self._cache,
                newest,
                positions,
                self._blank,
                limits,
                no_end,
                self._sampling,
                np.int32(block),
                self._model.config,
            )
            # Copying to the host waits for the device, which is part of what generate takes.
            made.append(np.asarray(tokens)[:, :block])
            newest = made[-1][:, -1] if block else newest
        return np.concatenate(made, axis=1)[: self._batch]
