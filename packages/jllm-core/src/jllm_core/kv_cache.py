"""What the model asks of a KV cache, and the case without one."""

from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import jax
from jaxtyping import Array, Float, Int

from jllm_core.quantization.keys_values import Slots

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
    ) -> tuple[Cache, Slots, Slots, Int[Array, "B S"] | None]:
        """Add one layer's keys and values.

        Args:
            layer: the layer's number, from 0.
            k: the new keys, rotated.
            v: the new values.
            positions: where in its text each new token stands.

        Returns:
            The cache with the new entries; the keys and values ``[B, K, S, H]`` to attend to; and where in its text
            each of them stands.
            A query sees those that stand at or before its own position (and within its window, where there is one),
            so slots that hold nothing yet must have positions beyond those of every query. None in place of the
            positions says that slot s is for position s and, where T > 1 and this is not a CPU, that ``positions`` is
            the same in every row: kernels that need this order may then be used.
        """
        ...


@runtime_checkable
class SlotCache(KVCache, Protocol):
    """A cache whose arrays ``[R, K, S, H]`` kernels may write to and read where they lie, in place of ``append``.

    R counts the rows of a batch, whose slot s is for position s, or pages of S tokens.
    """

    @property
    def tables(self) -> Int[Array, "B n"] | None:
        """The pages of each row in the order of its text; what is no page's number stands for none. None says that
        row b is text b."""
        ...

    def slots(self, layer: int) -> tuple[Slots, Slots]:
        """A layer's keys and values."""
        ...

    def places(self, positions: Int[Array, "B T"]) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
        """The row (or page) and slot that the token at each position goes to; those outside are dropped."""
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
        """``append``, without a copy of what is to be seen."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NoCache:
    """Nothing is kept: each token sees itself and the ones before it in the same call. Differentiable."""

    def append(
        self, layer: int, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], positions: Int[Array, "B T"]
    ) -> tuple["NoCache", Float[Array, "B K T H"], Float[Array, "B K T H"], Int[Array, "B T"]]:
        """Give back what came, head by head."""
        return self, k.swapaxes(1, 2), v.swapaxes(1, 2), positions
