"""Root-mean-square normalisation (RMSNorm)."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.named_scope("rms_norm")
@partial(jax.jit, static_argnames=("eps", "centered"), inline=True)
def rms_norm(
    x: Float[Array, "*rows D"], gamma: Float[Array, " D"], eps: float, centered: bool = False
) -> Float[Array, "*rows D"]:
    """``x / sqrt(mean(x^2) + eps) * gamma`` over the last axis (Zhang and Sennrich, arXiv:1910.07467).

    The result has the type of ``x``. Where ``gamma`` is centered, it is how far the factor is from one.
    """
    # In float32 whatever the type of x: a mean of squares in bfloat16 is off in the second digit.
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    # Gemma's way, which Qwen3-Next took over: rounded once, at the end (Qwen3NextRMSNorm).
    if centered:
        return (x32 * scale * (1 + gamma.astype(jnp.float32))).astype(x.dtype)
    # Rounded before gamma is applied, as the reference models have it (LlamaRMSNorm, Qwen3RMSNorm).
    return (x32 * scale).astype(x.dtype) * gamma
