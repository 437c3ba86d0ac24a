"""Blocked attention from XLA's own operations: only over the slots that the queries see, for CPUs.

The plain version multiplies by every slot of the cache, the empty ones and those behind each query too, and writes all
scores to memory. Here a loop takes one block of keys after another, from the first that a query sees to the last, and
keeps the running maximum and sum of each query's softmax (Milakov and Gimelshein, arXiv:1805.02867; Dao et al.,
arXiv:2205.14135).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jllm_core.quantization.keys_values import QuantizedSlots, split_slots

# Scores of a block of keys for some hundred queries stay in the processor's cache.
BLOCKS = (256, 128, 64)
MIN_QUERIES = 16
_MIN_FLOAT32 = float(jnp.finfo(jnp.float32).min)


def supports(queries: int, slots: int) -> bool:
    """Whether ``attention`` below serves: many queries of a row, over slots that come in whole blocks."""
    return queries >= MIN_QUERIES and slots % BLOCKS[-1] == 0


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"] | QuantizedSlots,
    v: Float[Array, "B K S H"] | QuantizedSlots,
    q_positions: Int[Array, "B T"],
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """``ops.attention.attention`` where key s stands at position s, without gradients."""
    batch, t, n, h = q.shape
    kv_heads, slots = k.shape[1], k.shape[2]
    queries = n // kv_heads * t
    # One matrix of queries for each kv head: [B*K, G*T, H].
    scaled = q.astype(jnp.float32) * h**-0.5
    rows = jnp.moveaxis(scaled.reshape(batch, t, kv_heads, -1, h), 1, 3).reshape(batch * kv_heads, queries, h)
    keys, values = (jax.tree.map(lambda x: x.reshape(batch * kv_heads, slots, -1), x) for x in (k, v))
    stands = jnp.broadcast_to(q_positions[:, None, None], (batch, kv_heads, n // kv_heads, t)).reshape(-1, queries, 1)
    block = next(size for size in BLOCKS if slots % size == 0)

    def take(number: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, total, weighted = carry
        k_block, v_block = (_block(x, number * block, block) for x in (keys, values))
        positions = number * block + jnp.arange(block)
        seen = positions <= stands
        if window is not None:
            seen &= positions > stands - window
        scores = jnp.where(seen, jnp.einsum("XTH,XSH->XTS", rows, k_block, precision="highest"), _MIN_FLOAT32)
        risen = jnp.maximum(highest, jnp.max(scores, axis=-1))
        # Not seen is nothing, even where a query has seen no key yet and all scores are the lowest.
        weights = jnp.where(seen, jnp.exp(scores - risen[..., None]), 0.0)
        kept = jnp.exp(highest - risen)
        added = jnp.einsum("XTS,XSH->XTH", weights, v_block, precision="highest")
        return risen, total * kept + jnp.sum(weights, axis=-1), weighted * kept[..., None] + added

    first = 0 if window is None else jnp.maximum(jnp.min(q_positions) - window + 1, 0) // block
    last = jnp.minimum(jnp.max(q_positions), slots - 1) // block
    shape = (batch * kv_heads, queries)
    carry = (jnp.full(shape, _MIN_FLOAT32), jnp.zeros(shape), jnp.zeros((*shape, h)))
    _, total, weighted = jax.lax.fori_loop(first, last + 1, take, carry)
    # A query that sees no key (padding) gets a finite value that means nothing.
    attended = weighted / jnp.where(total == 0, 1.0, total)[..., None]
    heads_last = jnp.moveaxis(attended.reshape(batch, kv_heads, -1, t, h), 3, 1)
    result: Array = heads_last.reshape(batch, t, n, h).astype(q.dtype)
    return result


def _block(slots: Any, first: Array, size: int) -> Float[Array, "X S H"]:
    """So many of the slots, as float32."""
    numbers, scales = split_slots(
        jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, size, axis=1), slots), jnp.float32
    )
    wide: Array = numbers.astype(jnp.float32)
    return wide if scales is None else wide * scales
