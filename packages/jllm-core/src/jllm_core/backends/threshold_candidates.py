"""Thresholds of top-k and top-p from the largest logits of each device, where passes over the vocabulary are dear.

``ops.sampling.thresholds`` searches a threshold bit by bit: 64 passes over the vocabulary, and over a mesh as many sums
over its devices, one after another. Here the largest logits of each device are gathered once, and the threshold is
found among them. Where they do not decide, it is searched, four bits a pass.

A threshold is a logit: of top-k the k-th largest, of top-p the largest at which the probabilities so far reach p. So
both ways give what ``ops.sampling.thresholds`` gives to the bit (of zeros but the sign), with one exception that is
avoided: sums of probabilities are rounded, and their last bits depend on the order of the sum. Candidates decide only
where no sum is so near p that this could matter.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jllm_core.ops.sampling import from_ordered_bits, ordered_bits
from jllm_core.sharding import Placement, partition

CANDIDATES = 64
"""Logits that each device contributes, of a row."""

ROUNDING = 2.0**-14
"""Most that the order of a sum of probabilities changes. A term goes through at most some 160 additions where 1,024
lanes share 151,936 of them out, and each rounds by 2**-24 at most; likewise in the total that is divided by."""

SEARCH_BITS = 4
"""Bits of a threshold that one pass of the search finds, by the sums above each of 15 candidates."""


def for_placement(placement: Placement | None) -> Callable[..., Array] | None:
    """``ops.sampling.thresholds`` for these devices; None for one CPU, whose passes are cheap, and without kernels."""
    if placement is None or not placement.kernels:
        return None
    kind = placement.device_kind or "cpu"
    if not placement.is_single or kind.startswith("TPU"):
        return partial(thresholds, placement)
    # On one GPU, whose compiler has no kernel for so many candidates but sorts, they cost more than the search.
    return None if kind == "cpu" else partial(searched_thresholds, placement)


@jax.named_scope("thresholds")
def thresholds(
    placement: Placement, logits: Float[Array, "B V"], k: Int[Array, " B"], p: Float[Array, " B"]
) -> Float[Array, " B"]:
    """``ops.sampling.thresholds``, over a mesh whose devices share the vocabulary out.

    Args:
        placement: the devices.
        logits, k, p: as ``ops.sampling.thresholds`` takes them.
    """
    device = _Device(placement, logits.shape)
    best = device.map(device.best)(logits)
    # Without top-k, the probabilities of the candidates are shares of a sum over all tokens.
    mass = jax.lax.cond(
        jnp.any((p < 1) & (k == 0)),
        lambda: device.map(device.mass, 1)(logits, best[:, 0]),
        lambda: jnp.ones(len(logits), logits.dtype),
    )
    found, decided = _among_candidates(best, mass, k, p, whole=best.shape[1] == logits.shape[1])
    settled: Array = jax.lax.cond(jnp.all(decided), lambda: found, lambda: searched_thresholds(placement, logits, k, p))
    return settled


def searched_thresholds(
    placement: Placement, logits: Float[Array, "B V"], k: Int[Array, " B"], p: Float[Array, " B"]
) -> Float[Array, " B"]:
    """``thresholds`` by the search alone."""
    device = _Device(placement, logits.shape)
    # The same on all devices, for those that do not share a row must not part ways.
    return device.map(device.search, 2, 2)(logits, k, p, jnp.any(k > 0), jnp.any(p < 1))


def _among_candidates(
    best: Float[Array, "B C"], mass: Float[Array, " B"], k: Int[Array, " B"], p: Float[Array, " B"], whole: bool
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """The threshold of each row, as far as its largest logits tell, and whether they do.

    Args:
        best: the largest logits, falling.
        mass: the sum of ``exp(logit - best[0])`` over all tokens, for rows without top-k.
        k, p: the filters.
        whole: whether there are no more tokens than candidates.
    """
    count = best.shape[1]
    first = jnp.where(k > 0, _at(best, jnp.clip(k - 1, 0, count - 1)), -jnp.inf)
    # Whether all that top-k leaves are candidates. Others may tie with the last one.
    listed = whole | jnp.isneginf(best[:, -1]) | (best[:, -1] < first)
    weights = jnp.where(best >= first[:, None], jnp.exp(best - best[:, :1]), 0)
    shares = jnp.cumsum(weights, axis=1) / jnp.where(k > 0, jnp.sum(weights, axis=1), mass)[:, None]
    enough = shares >= p[:, None]
    second = jnp.where(p < 1, _at(best, jnp.argmax(enough, axis=1)), -jnp.inf)
    clear = jnp.all(jnp.abs(shares - p[:, None]) > ROUNDING, axis=1)
    top_p = (p >= 1) | (jnp.any(enough, axis=1) & clear & ((k == 0) | listed))
    return jnp.maximum(first, second), (k <= count) & top_p


def _at(best: Float[Array, "B C"], places: Int[Array, " B"]) -> Float[Array, " B"]:
    # No gather: a TPU takes one number after another, and wants another layout of the logits for it.
    here = jnp.arange(best.shape[1]) == places[:, None]
    return jnp.max(jnp.where(here, best, -jnp.inf), axis=1)


class _Device:
    """What a device does with its own part of the vocabulary, and what is joined over those that share it out."""

    def __init__(self, placement: Placement, shape: tuple[int, ...]) -> None:
        self.placement = placement
        self.rows, self.vocabulary = placement.axes_of("batch", shape[0]), placement.axes_of("vocab", shape[1])
        self.count = min(CANDIDATES, shape[1])

    def map(self, function: Callable[..., Array], per_row: int = 0, whole: int = 0) -> Callable[..., Array]:
        """``function`` of the logits, of ``per_row`` arrays ``[B]`` and of ``whole`` numbers, on every device."""
        if self.placement.is_single:
            return function
        rows = partition(self.rows)
        specs = (partition(self.rows, self.vocabulary), *[rows] * per_row, *[PartitionSpec()] * whole)
        return self.placement.shard_map(function, specs, rows)

    def best(self, logits: Float[Array, "B V"]) -> Float[Array, "B C"]:
        """The largest logits of each row, falling."""
        # The TPU's compiler would cut what is read of the largest out of a sort of all.
        own: Array = jax.lax.optimization_barrier(jax.lax.top_k(logits, min(self.count, logits.shape[1]))[0])
        if not self.vocabulary:
            return own
        gathered = jax.lax.all_gather(own, self.vocabulary, axis=1, tiled=True)
        largest: Array = jax.lax.top_k(gathered, self.count)[0]
        return largest

    def mass(self, logits: Float[Array, "B V"], largest: Float[Array, " B"]) -> Float[Array, " B"]:
        """The sum of ``exp(logit - largest)`` of each row."""
        return self.sum(jnp.sum(jnp.exp(logits - largest[:, None]), axis=-1))

    def search(
        self,
        logits: Float[Array, "B V"],
        k: Int[Array, " B"],
        p: Float[Array, " B"],
        any_k: Bool[Array, ""],
        any_p: Bool[Array, ""],
    ) -> Float[Array, " B"]:
        """``ops.sampling.thresholds``, several bits a pass."""
        order = ordered_bits(logits)
        nothing_out = jnp.zeros(len(logits), jnp.uint32)

        def of_top_k() -> Array:
            return self.largest(order, lambda kept: jnp.sum(kept, axis=-1), k)

        def of_top_p() -> Array:
            left = jnp.where(order >= first[:, None], logits, -jnp.inf)
            largest = jnp.max(left, axis=-1)
            if self.vocabulary:
                largest = jax.lax.pmax(largest, self.vocabulary)
            weights = jnp.exp(left - largest[:, None])
            probabilities = weights / self.sum(jnp.sum(weights, axis=-1))[:, None]
            return self.largest(order, lambda kept: jnp.sum(jnp.where(kept, probabilities, 0), axis=-1), p)

        first = jnp.where(k > 0, jax.lax.cond(any_k, of_top_k, lambda: nothing_out), 0)
        second = jnp.where(p < 1, jax.lax.cond(any_p, of_top_p, lambda: nothing_out), 0)
        return from_ordered_bits(jnp.maximum(first, second))

    def largest(self, order: Array, measure: Callable[[Array], Array], wanted: Array) -> Array:
        """For each row the largest threshold t with ``measure(order >= t) >= wanted``, or 0 where there is none."""
        digits = range(1, 1 << SEARCH_BITS)

        def add_digit(step: Array, threshold: Array) -> Array:
            shift = (32 - SEARCH_BITS * (step + 1)).astype(jnp.uint32)
            tried = [threshold | (jnp.uint32(digit) << shift) for digit in digits]
            sums = self.sum(jnp.stack([measure(order >= each[:, None]) for each in tried]))
            # The larger the digit, the less is kept: those that leave enough come first.
            return threshold | (jnp.sum(sums >= wanted, axis=0, dtype=jnp.uint32) << shift)

        found: Array = jax.lax.fori_loop(0, 32 // SEARCH_BITS, add_digit, jnp.zeros(len(order), jnp.uint32))
        return found

    def sum(self, x: Array) -> Array:
        """The sum of what the devices have that share the vocabulary out."""
        total: Array = jax.lax.psum(x, self.vocabulary) if self.vocabulary else x
        return total
