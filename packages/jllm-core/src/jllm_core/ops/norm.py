"""RMSNorm."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*rows D"], gamma: Float[Array, " D"], eps: float) -> Float[Array, "*rows D"]:
    """``x / sqrt(mean(x^2) + eps) * gamma`` over the last axis (Zhang and Sennrich, arXiv:1910.07467).

    The statistics are taken in float32 whatever the type of ``x``; the result has the type of ``x``, and is rounded
    to it before ``gamma`` is applied, as the reference models have it.
    """
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype) * gamma
