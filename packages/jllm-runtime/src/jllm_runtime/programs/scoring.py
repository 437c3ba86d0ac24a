"""Compiled programs of scoring and of embeddings: whole texts, and nothing generated."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from jllm_core.backends.base import XLA, Backend
from jllm_core.config import ModelConfig
from jllm_core.model import Capture, Captured, forward, hidden_states
from jllm_core.sharding import Placement
from jllm_core.weights import Weights

from jllm_runtime.cache.contiguous import ContiguousCache, cache_info, zero_cache
from jllm_runtime.programs.contiguous_batch import replicated


@partial(jax.jit, static_argnames=("config", "placement"))
def all_logits(
    weights: Weights, tokens: Int[Array, "B T"], config: ModelConfig, placement: Placement | None
) -> Float[Array, "B T V"]:
    """The logits after each token, without a cache."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    # Named, for gradients may be asked for: the only backend that has them.
    backend = XLA(placement)
    return replicated(forward(tokens, positions, weights, config, backend=backend)[0], backend)


@partial(jax.jit, static_argnames=("capture", "config", "placement"))
def inspect(
    weights: Weights, tokens: Int[Array, "B T"], capture: Capture, config: ModelConfig, placement: Placement | None
) -> tuple[Float[Array, "B T V"], Captured]:
    """The logits after each token, without a cache, and what ``capture`` asks for."""
    positions, backend = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), XLA(placement)
    logits, _, captured = forward(tokens, positions, weights, config, backend=backend, capture=capture)
    whole: tuple[Array, Captured] = jax.tree.map(lambda x: replicated(x, backend), (logits, captured))
    return whole


@partial(jax.jit, static_argnames=("chunk", "config", "backend"))
def pooled_states(
    weights: Weights,
    tokens: Int[Array, "B S"],
    lengths: Int[Array, " B"],
    chunk: int,
    config: ModelConfig,
    backend: Backend,
) -> tuple[Float[Array, "B D"], Float[Array, "B D"]]:
    """What each text's hidden states, after the last norm, come to.

    Args:
        weights: the model.
        tokens: the texts, filled up with anything.
        lengths: tokens in each text; 0 in rows without one, whose results mean nothing.
        chunk: tokens of each text that are taken at a time; divides S.
        config: the model's architecture.
        backend: where the model runs.

    Returns:
        The mean of the states, and the last of them; float32.
    """
    batch, capacity = tokens.shape
    info = cache_info(config, batch, capacity, weights.gamma_final.dtype, backend.placement)

    # Summed chunk by chunk: the states of a whole text, [B, S, D], are never in memory.
    def take(number: Array, carry: tuple[ContiguousCache, Array, Array]) -> tuple[ContiguousCache, Array, Array]:
        cache, total, last = carry
        piece = jax.lax.dynamic_slice_in_dim(tokens, number * chunk, chunk, axis=1)
        positions = jnp.broadcast_to(number * chunk + jnp.arange(chunk), piece.shape)
        cache = cache.counting(jnp.clip(lengths - number * chunk, 0, chunk))
        hidden, cache = hidden_states(piece, positions, weights, config, cache, backend, lengths)

        def add(token: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            total, last = sums
            state, behind = hidden[:, token].astype(jnp.float32), (number * chunk + token - lengths + 1)[:, None]
            return total + jnp.where(behind <= 0, state, 0), jnp.where(behind == 0, state, last)

        # Token by token, so that a sum has the same order and the same bits whatever the chunk is.
        return cache.counting(None), *jax.lax.fori_loop(0, chunk, add, (total, last))

    zeros = jnp.zeros((batch, config.hidden_size), jnp.float32)
    carry = (zero_cache(info.shape, info.dtype, config, backend), zeros, zeros)
    # As many chunks as the longest text has, not as the capacity: the bound is an array, and no new program.
    _, total, last = jax.lax.fori_loop(0, -(-jnp.max(lengths) // chunk), take, carry)
    mean = total / jnp.maximum(lengths, 1)[:, None]
    return replicated(mean, backend), replicated(last, backend)
