"""The one place where activations meet a weight matrix."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def linear(equation: str, x: Float[Array, "..."], w: Float[Array, "..."], bias: Array | None = None) -> Array:
    """``einsum(equation, x, w) + bias`` in the type of ``x``.

    In float32 the product is asked for at the highest precision: the defaults of TPU (bfloat16 passes) and of
    recent GPUs (TF32) would be off by more than the 1e-4 that float32 users are promised.

    Args:
        equation: such as ``"BTD,DF->BTF"``.
        x: activations.
        w: weights.
        bias: added to the trailing axes of the result; None adds nothing.
    """
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    y: Array = jnp.einsum(equation, x, w, precision=precision)
    return y if bias is None else y + bias
