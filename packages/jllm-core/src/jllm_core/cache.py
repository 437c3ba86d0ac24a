"""What the model asks of a KV cache, and the case without one."""

from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import jax
from jaxtyping import Array, Bool, Float, Int

Cache = TypeVar("Cache", bound="KVCache")


@runtime_checkable
class KVCache(Protocol):
    """Keeps keys and values between calls of ``forward``. The model asks; the cache decides where things go.

    Implementations are pytrees, so that they pass through jit, and are never changed in place.
    """

    def append(
        self: Cache,
        layer: int,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        positions: Int[Array, "B T"],
    ) -> tuple[Cache, Float[Array, "B S K H"], Float[Array, "B S K H"], Bool[Array, "B T S"]]:
        """Add one layer's keys and values.

        Args:
            layer: the layer's number, from 0.
            k: the new keys, rotated.
            v: the new values.
            positions: where in its text each new token stands.

        Returns:
            The cache with the new entries; the keys and values to attend to; and which of them each query may see.
        """
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NoCache:
    """Nothing is kept: each token sees itself and the ones before it in the same call. Differentiable."""

    def append(
        self, layer: int, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], positions: Int[Array, "B T"]
    ) -> tuple["NoCache", Float[Array, "B T K H"], Float[Array, "B T K H"], Bool[Array, "B T T"]]:
        """Give back what came, with the causal mask of the positions."""
        return self, k, v, positions[:, :, None] >= positions[:, None, :]
