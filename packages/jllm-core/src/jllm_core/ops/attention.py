"""Grouped-query attention (Ainslie et al., arXiv:2305.13245)."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jllm_core.kv_cache import PagedSlots
from jllm_core.ops.linear import matmul_precision
from jllm_core.quantization.keys_values import QuantizedSlots, split_slots


@partial(jax.jit, static_argnames="window", inline=True)
def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"] | QuantizedSlots | PagedSlots,
    v: Float[Array, "B K S H"] | QuantizedSlots | PagedSlots,
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"] | None = None,
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """``softmax(q k^T / sqrt(H)) v``, each query head with the kv head that its group shares.

    Scores and softmax are in float32; the result has the type of ``q``. A query that sees no key (padding) gets a
    finite value that means nothing.

    Args:
        q: queries; N is a multiple of K, and query heads ``g*G .. g*G + G-1`` share kv head ``g``.
        k: keys ``[B, K, S, H]``, or pages of them.
        v: values, the same.
        q_positions: where in its text each query stands.
        k_positions: the same of each key; None is key s at position s.
        window: how many positions a query sees, its own included (arXiv:2004.05150); None is all that came before.
    """
    b, t, n, h = q.shape
    weights = attention_probabilities(q, k, q_positions, k_positions, window)
    # A small probability times a scale is below what float16 can hold: there the product is in float32.
    wide = jnp.float32 if q.dtype == jnp.float16 else q.dtype
    v, v_scales = split_slots(v.gathered(q_positions[:, -1:]) if isinstance(v, PagedSlots) else v, wide)
    if v_scales is not None:
        # A scale for each cached token: on the probabilities, so that v is read as it is stored.
        weights *= v_scales[:, :, None, None]
    # K stays in front of T: in this order of axes XLA reads v as it lies in the cache, without a transposed copy.
    out = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), v, precision=matmul_precision(q.dtype))
    heads_last: Array = jnp.moveaxis(out, 3, 1)
    return heads_last.reshape(b, t, n, h).astype(q.dtype)


def attention_probabilities(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"] | QuantizedSlots | PagedSlots,
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"] | None = None,
    window: int | None = None,
) -> Float[Array, "B K G T S"]:
    """``softmax(q k^T / sqrt(H))`` in float32; head ``g*G + i`` is ``[:, g, i]``.

    The arguments are as ``attention`` takes them.
    """
    b, t, n, h = q.shape
    k, k_scales = split_slots(k.gathered() if isinstance(k, PagedSlots) else k, q.dtype)
    kv_heads, slots = k.shape[1:3]
    if k_positions is None:
        k_positions = jnp.broadcast_to(jnp.arange(slots), (b, slots))
    # [.., N, H] as [.., K, G, H]: a kv head meets its G queries in one product, and is never repeated in memory.
    grouped = q.reshape(b, t, kv_heads, n // kv_heads, h)
    scores = jnp.einsum(
        "BTKGH,BKSH->BKGTS",
        grouped,
        k,
        precision=matmul_precision(q.dtype),
        # bfloat16 would round scores to 8 bits before the softmax takes their differences.
        preferred_element_type=jnp.float32,
    )
    if k_scales is not None:
        scores *= k_scales[:, :, None, None]
    seen = visible(q_positions, k_positions, window)
    # The lowest float32, not minus infinity: a row that sees nothing then gives no NaN.
    scores = jnp.where(seen[:, None, None], scores * h**-0.5, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1)


def visible(
    q_positions: Int[Array, "B T"], k_positions: Int[Array, "B S"], window: int | None = None
) -> Bool[Array, "B T S"]:
    """The causal mask: True where the key stands at the query's position or before, and within its window."""
    queries, keys = q_positions[:, :, None], k_positions[:, None, :]
    seen: Array = keys <= queries
    return seen if window is None else seen & (keys > queries - window)
