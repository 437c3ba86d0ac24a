"""KV cache protocol: what the model asks of a cache, and the case without one."""

from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import jax
from jaxtyping import Array, Float, Int

from jllm_core.quantization.keys_values import Slots

# The model gives back a cache of the type that it got: a caller need not narrow it again.
Cache = TypeVar("Cache", bound="KVCache")


# Checked at run time by the type checks of the tests, which take an argument for a KVCache by its methods.
@runtime_checkable
class KVCache(Protocol):
    """Keys and values of earlier tokens, kept between calls of ``forward``.

    - The model calls ``append`` once a layer; the cache decides where the new entries go.
    - What it gives back to attend to are slots, each with a position: a query sees the slots that stand at or before
      its own position, and within its window where there is one.
    - A slot that holds nothing yet has a position beyond every query's. What it holds must be finite: attention
      multiplies it by a weight of zero.
    - A cache is a pytree and never changed in place; programs donate it, so that XLA reuses its memory.

    Two rows of 8 slots, 3 and 5 tokens long, as one decode step finds them. Row 0 writes its new token to slot 3::

        slot        0   1   2   3   4   5   6   7
        row 0       k0  k1  k2  new .   .   .   .      query at position 3 sees slots 0 to 3
        row 1       k0  k1  k2  k3  k4  new .   .      query at position 5 sees slots 0 to 5
    """

    def append(
        self: Cache,
        layer: int,
        # Token by token as the projections give them; a cache keeps them head by head, as attention reads them.
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        positions: Int[Array, "B T"],
    ) -> tuple[Cache, Slots, Slots, Int[Array, "B S"] | None]:
        """Add one layer's keys and values.

        Args:
            layer: the layer's number, from 0.
            k: the new keys, rotated.
            v: the new values.
            positions: where in its text each new token stands.

        Returns:
            The cache with the new entries; the keys and values ``[B, K, S, H]`` to attend to; and the position of each
            of these slots, or None where slot s stands at position s in every row. Backends have faster attention for
            that order. One whose ``ragged_queries`` is False then takes the queries of a prompt to stand at the same
            positions in every row, so a cache must not say None to it where they do not.
        """
        ...


# Apart from KVCache, for a kernel must know how the slots lie, and a cache need not say so to be used.
@runtime_checkable
class SlotCache(KVCache, Protocol):
    """A cache whose arrays ``[R, K, S, H]`` a backend's kernels may read and write where they lie.

    R counts the rows of a batch, where slot s is for position s, or pages of S tokens.
    """

    # A property and not an argument of append: kernels ask before there is anything to append.
    @property
    def tables(self) -> Int[Array, "B n"] | None:
        """The pages of each row in the order of its text; a number that no page has stands for none. None says that
        row b of the arrays is row b of the batch."""
        ...

    def slots(self, layer: int) -> tuple[Slots, Slots]:
        """A layer's keys and values, all slots of them."""
        ...

    def places(self, positions: Int[Array, "B T"]) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
        """The row (or page) and the slot that the token at each position goes to; those outside are dropped."""
        ...

    def with_slots(self: Cache, layer: int, keys: Slots, values: Slots) -> Cache:
        """The cache with these keys and values of a layer."""
        ...

    def append_in_place(
        self: Cache,
        layer: int,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        positions: Int[Array, "B T"],
    ) -> Cache:
        """``append`` for kernels that read the slots themselves: nothing is gathered for attention."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NoCache:
    """The case without a cache: each token sees itself and the ones before it in the same call. Differentiable."""

    def append(
        self, layer: int, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], positions: Int[Array, "B T"]
    ) -> tuple["NoCache", Float[Array, "B K T H"], Float[Array, "B K T H"], Int[Array, "B T"]]:
        """Keys and values as they came, head by head, at their own positions."""
        # Positions are said, not None: texts may begin anywhere, and the mask goes by what is said.
        return self, k.swapaxes(1, 2), v.swapaxes(1, 2), positions
