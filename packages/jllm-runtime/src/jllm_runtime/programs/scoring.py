"""Compiled programs of scoring and of embeddings: whole texts, and nothing generated."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from jllm_core.backends.base import XLA, Backend
from jllm_core.config import ModelConfig
from jllm_core.model import Capture, Captured, forward, hidden_states, unembed
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


@partial(jax.jit, static_argnames=("chunk", "config", "backend"))
def token_losses(
    weights: Weights,
    tokens: Int[Array, "B S"],
    targets: Int[Array, "B S"],
    lengths: Int[Array, " B"],
    chunk: int,
    config: ModelConfig,
    backend: Backend,
) -> Float[Array, "B S"]:
    """The negative log-probability, in nats, of a target after each token.

    Args:
        weights: the model.
        tokens: the texts, filled up with anything.
        targets: what follows each token, filled up likewise.
        lengths: tokens in each text; 0 in rows without one. Without any, nothing is computed.
        chunk: tokens of each text that are taken at a time; divides S.
        config: the model's architecture.
        backend: where the model runs.

    Returns:
        float32; 0 behind the end of a text.
    """
    batch, capacity = tokens.shape
    info = cache_info(config, batch, capacity, weights.gamma_final.dtype, backend.placement)

    # Chunk by chunk: the logits of a whole text, [B, S, V], are never in memory.
    def take(number: Array, carry: tuple[ContiguousCache, Array]) -> tuple[ContiguousCache, Array]:
        cache, losses = carry
        start = number * chunk
        piece = jax.lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1)
        wanted = jax.lax.dynamic_slice_in_dim(targets, start, chunk, axis=1)
        positions = jnp.broadcast_to(start + jnp.arange(chunk), piece.shape)
        cache = cache.counting(jnp.clip(lengths - start, 0, chunk))
        hidden, cache = hidden_states(piece, positions, weights, config, cache, backend, lengths)
        logits = (backend.unembed or unembed)(hidden, weights)
        chosen = jnp.take_along_axis(logits, wanted[..., None], axis=-1)[..., 0]
        lost = jnp.where(positions < lengths[:, None], jax.nn.logsumexp(logits, axis=-1) - chosen, 0)
        return cache.counting(None), jax.lax.dynamic_update_slice_in_dim(losses, lost, start, axis=1)

    carry = (zero_cache(info.shape, info.dtype, config, backend), jnp.zeros((batch, capacity), jnp.float32))
    _, losses = jax.lax.fori_loop(0, -(-jnp.max(lengths) // chunk), take, carry)
    return replicated(losses, backend)
