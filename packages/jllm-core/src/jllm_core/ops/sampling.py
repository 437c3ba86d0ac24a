"""Sampling: the thresholds of top-k and top-p (docs/decisions, 4), the draw, and the argmax."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

Enough = Callable[[Array], Array]


@jax.named_scope("thresholds")
def thresholds(logits: Float[Array, "B V"], k: Int[Array, " B"], p: Float[Array, " B"]) -> Float[Array, " B"]:
    """For each row the largest threshold that both filters leave enough at or above; all that tie there stay.

    Args:
        logits: float32, over the temperature.
        k: keep so many of the most probable tokens; 0 is all.
        p: of what the first filter keeps, keep the fewest of the most probable tokens whose probabilities reach this;
            1 is all.

    Returns:
        The threshold of each row, minus infinity where no token is taken out. It may be one that no token stands at,
        with the same tokens above it.
    """
    # Compared as whole numbers, a threshold can be built bit by bit from the highest on: 32 passes, and no sort.
    order = ordered_bits(logits)
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
    return from_ordered_bits(jnp.maximum(first, second))


@jax.named_scope("draw")
def draw(logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
    """A token of each row, with the probabilities of the softmax of its logits.

    Gumbel-max: the argmax of logits plus Gumbel noise has the distribution of their softmax.

    Args:
        logits: float32; minus infinity for tokens that may not come.
        keys: threefry keys; with the logits they make the token, whatever the other rows are.
    """
    # XLA would draw the noise once for each of two reductions.
    return argmax(jax.lax.optimization_barrier(logits + gumbel_noise(keys, logits.shape[1])))


@jax.named_scope("argmax")
def argmax(x: Float[Array, "B V"]) -> Int[Array, " B"]:
    """``argmax`` of numbers that are none of them NaN.

    Args:
        x: float32.
    """
    # Two plain reductions: XLA on a CPU takes a pair of numbers ten times as long to reduce.
    largest = jnp.max(x, axis=-1, keepdims=True)
    places = jnp.arange(x.shape[1], dtype=jnp.int32)
    return jnp.min(jnp.where(x == largest, places, x.shape[1] - 1), axis=-1)


def gumbel_noise(keys: Key[Array, " B"], count: int) -> Float[Array, "B V"]:
    """``jax.random.gumbel`` of each key, the same numbers, whatever JAX's settings are; in one pass over memory."""
    first, second = (jax.random.key_data(keys)[:, word, None] for word in (0, 1))
    places = jnp.arange(count, dtype=jnp.uint32)[None]
    # The counters are those of jax.random.bits for a shape of one axis: a 64-bit index, of which the upper half is 0.
    high, low = _threefry(first, second, jnp.zeros_like(places), places)
    tiny = jnp.finfo(jnp.float32).tiny
    # The upper bits are those of a float between 1 and 2.
    fraction = jax.lax.bitcast_convert_type((high ^ low) >> 9 | jnp.uint32(0x3F800000), jnp.float32) - 1.0
    uniform = jnp.maximum(fraction * (1.0 - tiny) + tiny, tiny)
    noise: Array = -jnp.log(-jnp.log(uniform))
    return noise


def _threefry(key0: Array, key1: Array, x0: Array, x1: Array) -> tuple[Array, Array]:
    """Threefry-2x32 with 20 rounds (Salmon et al., SC11), written out: JAX's own is a loop on a CPU."""
    keys = (key0, key1, key0 ^ key1 ^ jnp.uint32(0x1BD11BDA))
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for turn in range(5):
        for bits in ((13, 15, 26, 6), (17, 29, 16, 24))[turn % 2]:
            x0 = x0 + x1
            x1 = (x1 << bits | x1 >> (32 - bits)) ^ x0
        x0, x1 = x0 + keys[(turn + 1) % 3], x1 + keys[(turn + 2) % 3] + jnp.uint32(turn + 1)
    return x0, x1


def ordered_bits(x: Float[Array, "B V"]) -> Array:
    """uint32 that compare as the floats do (IEEE 754: flip all bits of a negative, the sign bit of a positive)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def from_ordered_bits(order: Array) -> Float[Array, " B"]:
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
