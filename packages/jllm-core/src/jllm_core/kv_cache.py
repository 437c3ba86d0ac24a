"""KV cache protocol: what the model asks of a cache, and the case without one."""

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jllm_core.quantization.keys_values import QuantizedSlots, Slots

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
    ) -> tuple[Cache, "Slots | PagedSlots", "Slots | PagedSlots", Int[Array, "B S"] | None]:
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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedSlots:
    """Keys (or values) in pages ``[P, K, C, H]`` of a pool: slot s of row b is in page ``tables[b, s // C]``; a number
    that no page has stands for none."""

    pages: Slots
    tables: Int[Array, "B n"]

    @property
    def shape(self) -> tuple[int, ...]:
        """``(B, K, S, H)`` of what this stands for, S = n * C."""
        (rows, width), (_, kv_heads, page_size, features) = self.tables.shape, self.pages.shape
        return rows, kv_heads, width * page_size, features

    def gathered(self, last: Int[Array, "B 1"] | None = None) -> Slots:
        """The slots of each row, one after another; with ``last``, zeros behind that slot of each row."""

        def gather(pool: Array) -> Array:
            # clip, not fill, for no query sees it. Whole pages: for some heads of them TPUs would first copy the pool.
            taken = jnp.moveaxis(jnp.take(pool, self.tables, axis=0, mode="clip"), 2, 1)
            return taken.reshape(self.shape[:3] + pool.shape[3:])

        slots: Slots = jax.tree.map(gather, self.pages)
        if last is None:
            return slots
        # A page may hold what is no number from its last user; values that no query sees are still multiplied by zero.
        filled = (jnp.arange(self.shape[2]) <= last)[:, None]
        if isinstance(slots, QuantizedSlots):
            return QuantizedSlots(slots.values, jnp.where(filled, slots.scales, 0))
        return jnp.where(filled[..., None], slots, 0)


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

    counts = None  # all tokens do (``recurrent_state.StateCache``)

    def state(self, layer: int) -> None:
        """No state: a delta net begins with the first token of the call."""

    def set_state(self, layer: int, state: Any) -> "NoCache":
        """The state behind the last token is left."""
        return self
