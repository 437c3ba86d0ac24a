"""KV cache protocol of kernels: where the slots of a cache lie."""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from jllm_core.kv_cache import Cache, KVCache
from jllm_core.quantization.keys_values import Slots


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
