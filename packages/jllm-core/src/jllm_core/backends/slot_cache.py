"""Cache protocols of kernels: where the slots of a KV cache lie, and the states of delta nets."""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int

from jllm_core.kv_cache import Cache, KVCache
from jllm_core.quantization.keys_values import Slots
from jllm_core.recurrent_state import RecurrentState, StateCache


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


@runtime_checkable
class StateSlotCache(StateCache, Protocol):
    """A cache with more states than a batch has rows, which a backend's kernels may read and write where they lie.

    What ``state`` gives are copies of them, and ``set_state`` copies them back.
    """

    def state_places(self) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
        """Which state each row of the batch has (a number that no state has stands for none), and whether its text
        begins with the tokens that come: then its state is zeros, whatever lies there."""
        ...

    def states_of(self, layer: int) -> RecurrentState:
        """All states of a layer."""
        ...

    def with_states(self: Cache, layer: int, states: RecurrentState) -> Cache:
        """The cache with these states of a layer."""
        ...
