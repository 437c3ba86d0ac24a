"""Recurrent state protocol: what a delta net keeps of earlier tokens, and what the model asks of a cache for it."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Int

from jllm_core.config import DeltaNetConfig
from jllm_core.kv_cache import Cache, KVCache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RecurrentState:
    """What one delta net keeps of each row's tokens: as much for a long text as for a short one. All of it is float32.

    ``memory [B, Hv, dk, dv]``, what was written under each key; ``q`` and ``k [B, W-1, Hk, dk]`` and
    ``v [B, W-1, Hv, dv]``, the last inputs of the convolution, the oldest first. Before the first token all are zeros.
    """

    memory: Any
    q: Any
    k: Any
    v: Any


STATE_AXES = RecurrentState(
    memory=("batch", "value_heads", None, None),
    q=("batch", None, "key_heads", None),
    k=("batch", None, "key_heads", None),
    v=("batch", None, "value_heads", None),
)
"""The logical axes of the arrays of a state."""


@runtime_checkable
class StateCache(KVCache, Protocol):
    """A KV cache that keeps the states of delta nets besides. The model asks for a layer's state and then sets it.

    Keys that are written twice are written over; a state moves with every token that it is fed. So a cache says which
    tokens count: those that only fill up a row, and those of rows that have ended, leave a state as it is to the bit.
    """

    @property
    def counts(self) -> Int[Array, " B"] | None:
        """How many of the tokens of this call count in each row, from its first on; None is all of them."""
        ...

    def state(self, layer: int) -> RecurrentState | None:
        """The state that the layer's earlier tokens have left; None is that of no tokens."""
        ...

    def set_state(self: Cache, layer: int, state: RecurrentState) -> Cache:
        """The cache with this state of a layer."""
        ...


def abstract_state(net: DeltaNetConfig, rows: int) -> RecurrentState:
    """The description of the state of one layer: a RecurrentState whose leaves are ArrayInfo."""
    from jllm_core.array_info import ArrayInfo  # for who makes or plans a cache, not for the maths

    keys = (rows, net.conv_size - 1, net.num_key_heads, net.key_head_dim)
    shapes = RecurrentState(
        memory=(rows, net.num_value_heads, net.key_head_dim, net.value_head_dim),
        q=keys,
        k=keys,
        v=(rows, net.conv_size - 1, net.num_value_heads, net.value_head_dim),
    )
    axes = vars(STATE_AXES)
    return RecurrentState(**{name: ArrayInfo(shape, "float32", axes[name]) for name, shape in vars(shapes).items()})
