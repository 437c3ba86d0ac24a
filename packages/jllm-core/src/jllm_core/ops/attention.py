"""Grouped-query attention (Ainslie et al., arXiv:2305.13245)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jllm_core.quantization.keys_values import QuantizedSlots, split_slots


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"] | QuantizedSlots,
    v: Float[Array, "B K S H"] | QuantizedSlots,
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"] | None = None,
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """Each query head attends, through ``softmax(q k^T / sqrt(H))``, to the kv head that its group shares.

    Scores and softmax are in float32; the result has the type of ``q``. A query that sees no key (padding) gets a
    finite value that means nothing.

    Args:
        q: queries; N is a multiple of K, and query heads ``g*G .. g*G + G-1`` share kv head ``g``.
        k: keys ``[B, K, S, H]``.
        v: values, the same.
        q_positions: where in its text each query stands.
        k_positions: the same of each key; None is key s at position s.
        window: how many positions a query sees, its own included (arXiv:2004.05150); None is all that came before.
    """
    b, t, n, h = q.shape
    kv_heads = k.shape[1]
    (k, k_scales), (v, v_scales) = split_slots(k, q.dtype), split_slots(v, q.dtype)
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    if k_positions is None:
        k_positions = jnp.broadcast_to(jnp.arange(k.shape[2]), (b, k.shape[2]))
    grouped = q.reshape(b, t, kv_heads, n // kv_heads, h)
    scores = jnp.einsum("BTKGH,BKSH->BKGTS", grouped, k, precision=precision, preferred_element_type=jnp.float32)
    if k_scales is not None:
        scores *= k_scales[:, :, None, None]
    # The lowest float32, not minus infinity: an all-masked row then gives no NaN.
    seen = visible(q_positions, k_positions, window)
    scores = jnp.where(seen[:, None, None], scores * h**-0.5, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1)
    if v_scales is not None:
        probabilities *= v_scales[:, :, None, None]
    probabilities = probabilities.astype(v.dtype)
    # In this order of axes XLA reads v as it is stored.
    out = jnp.einsum("BKGTS,BKSH->BKGTH", probabilities, v, precision=precision)
    heads_last: Array = jnp.moveaxis(out, 3, 1)
    return heads_last.reshape(b, t, n, h).astype(q.dtype)


def visible(
    q_positions: Int[Array, "B T"], k_positions: Int[Array, "B S"], window: int | None = None
) -> Bool[Array, "B T S"]:
    """Which keys each query may see: none that stands after it, nor ``window`` or more positions before it."""
    queries, keys = q_positions[:, :, None], k_positions[:, None, :]
    seen: Array = keys <= queries
    return seen if window is None else seen & (keys > queries - window)
