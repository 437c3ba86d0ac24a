"""Where top-k and top-p draw the line: the largest threshold above which enough is left (docs/decisions, 4)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jllm_core.kernels import cpu_ffi
from jllm_core.kernels.cpu_layer import is_one_cpu
from jllm_core.sharding import Placement

Enough = Callable[[Array], Array]


def thresholds(
    logits: Float[Array, "B V"], k: Int[Array, " B"], p: Float[Array, " B"], placement: Placement | None = None
) -> Float[Array, " B"]:
    """For each row the largest threshold that both filters leave enough at or above; all that tie there stay.

    Args:
        logits: float32, over the temperature.
        k: keep so many of the most probable tokens; 0 is all.
        p: of what the first filter keeps, keep the fewest of the most probable tokens whose probabilities reach this;
            1 is all.
        placement: where this runs; on one CPU by a kernel, if it is installed.

    Returns:
        The threshold of each row, minus infinity where no token is taken out.
    """
    if is_one_cpu(placement) and cpu_ffi.available():
        return _by_kernel(logits, k, p)
    order = _ordered_bits(logits)
    everything = jnp.zeros(len(logits), jnp.uint32)

    def of_top_k() -> Array:
        return _largest(order, lambda kept: jnp.sum(kept, axis=-1) >= k)

    def of_top_p() -> Array:
        left = order >= first[:, None]
        probabilities = jax.nn.softmax(jnp.where(left, logits, -jnp.inf), axis=-1)
        return _largest(order, lambda kept: jnp.sum(jnp.where(kept, probabilities, 0), axis=-1) >= p)

    # A filter's passes over the vocabulary are only made where a row wants it.
    first = jnp.where(k > 0, jax.lax.cond(jnp.any(k > 0), of_top_k, lambda: everything), 0)
    second = jnp.where(p < 1, jax.lax.cond(jnp.any(p < 1), of_top_p, lambda: everything), 0)
    return _from_ordered_bits(jnp.maximum(first, second))


def _by_kernel(logits: Array, k: Array, p: Array) -> Array:
    from jllm_core.kernels.cpu_thresholds import Threshold

    operands = {"logits": logits, "k": k.astype(jnp.int32), "p": p.astype(jnp.float32)}
    return cpu_ffi.call(Threshold(), operands, [(len(logits),), logits.shape])[0]


def _ordered_bits(x: Float[Array, "B V"]) -> Array:
    """uint32 that compare as the floats do (IEEE 754: flip all bits of a negative, the sign bit of a positive)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _from_ordered_bits(order: Array) -> Float[Array, " B"]:
    """The floats again; minus infinity for what is below all of them."""
    bits = jnp.where(order >> 31 == 1, order ^ jnp.uint32(1 << 31), ~order)
    floats: Array = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(jnp.isnan(floats), -jnp.inf, floats)


def _largest(order: Array, enough: Enough) -> Array:
    """For each row the largest threshold t with ``enough(order >= t)``, or 0 where none is. A search bit by bit: no
    sort of the vocabulary."""

    def try_bit(step: Array, threshold: Array) -> Array:
        candidate = threshold | (jnp.uint32(1 << 31) >> step.astype(jnp.uint32))
        return jnp.where(enough(order >= candidate[:, None]), candidate, threshold)

    found: Array = jax.lax.fori_loop(0, 32, try_bit, jnp.zeros(len(order), jnp.uint32))
    return found
