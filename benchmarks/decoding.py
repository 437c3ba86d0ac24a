"""What the benchmarks of decoding share: caches that are filled up to a context, and greedy steps from there."""

import time

import jax.numpy as jnp
import numpy as np
from jllm_core.backends.base import Backend
from jllm_runtime import Model, SamplingParams
from jllm_runtime.cache.contiguous import PREFILL_CHUNK, ContiguousCache, cache_capacity, cache_info
from jllm_runtime.programs import contiguous_batch
from jllm_runtime.sampling import SamplingArrays

GREEDY = SamplingParams(temperature=0.0, seed=0)


def empty(
    model: Model, batch: int, tokens: int, dtype: str | None = None, backend: Backend | None = None
) -> ContiguousCache:
    """A cache for so many tokens in each row.

    Args:
        model: what is to run.
        batch: rows.
        tokens: in each row.
        dtype: of keys and values; the model's own when None.
        backend: where it runs; the model's own when None.
    """
    backend = backend or model.backend
    capacity = cache_capacity(tokens, model.config.context_length)
    kept = jnp.dtype(dtype or model.weights.dtype)
    info = cache_info(model.config, batch, capacity, kept, model.placement)
    return contiguous_batch.empty_cache(info.shape, info.dtype, model.config, backend)


def filled(model: Model, cache: ContiguousCache, context: int) -> ContiguousCache:
    """The cache after a prompt of so many random tokens in each row, a multiple of PREFILL_CHUNK."""
    batch = cache.keys[0].shape[0]
    prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, cache.capacity)).astype(np.int32)
    hidden = jnp.zeros((batch, model.config.hidden_size), model.weights.dtype)
    chunks = (np.int32(0), np.int32(context // PREFILL_CHUNK))
    lengths = np.full(batch, context, np.int32)
    return contiguous_batch.prefill(model.weights, cache, prompts, lengths, hidden, chunks, model.config)[0]


def decoded(
    model: Model, cache: ContiguousCache, context: int, count: int, params: SamplingParams = GREEDY
) -> tuple[ContiguousCache, list[list[int]], float]:
    """Decode ``count`` tokens of each row from the context on; the tokens, and seconds a step, come with the cache."""
    batch = cache.keys[0].shape[0]
    tokens, positions, limits = (np.full(batch, n, np.int32) for n in (1000, context, context + count + 1))
    rows = (tokens, positions, np.zeros(batch, bool), limits, np.full((batch, 4), -1, np.int32))
    sampling = SamplingArrays.of([params] * batch)
    start = time.perf_counter()
    cache, made = contiguous_batch.decode(model.weights, cache, *rows, sampling, np.int32(count), model.config)
    told = np.asarray(made)[:, :count].tolist()
    return cache, told, (time.perf_counter() - start) / count
