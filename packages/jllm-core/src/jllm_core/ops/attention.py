"""Grouped-query attention (Ainslie et al., arXiv:2305.13245)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """Each query head attends, through ``softmax(q k^T / sqrt(H))``, to the kv head that its group shares.

    Scores and softmax are in float32; the result has the type of ``q``. A query whose mask is all False (padding)
    gets a finite value that means nothing.

    Args:
        q: queries; N is a multiple of K, and query heads ``g*G .. g*G + G-1`` share kv head ``g``.
        k: keys.
        v: values.
        mask: True where the query may see the key.
    """
    b, t, n, h = q.shape
    kv_heads = k.shape[2]
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    grouped = q.reshape(b, t, kv_heads, n // kv_heads, h)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k, precision=precision, preferred_element_type=jnp.float32)
    # The lowest float32, not minus infinity: an all-masked row then gives no NaN.
    scores = jnp.where(mask[:, None, None], scores * h**-0.5, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out: Array = jnp.einsum("BKGTS,BSKH->BTKGH", probabilities, v, precision=precision)
    return out.reshape(b, t, n, h)
