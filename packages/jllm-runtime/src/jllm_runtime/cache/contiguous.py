"""Contiguous KV cache: one row a request, one slot a position, in capacities that come in buckets."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, Self, TypeVar, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from jllm_core.array_info import ArrayInfo
from jllm_core.backends.base import XLA, Backend
from jllm_core.config import ModelConfig
from jllm_core.quantization.keys_values import QuantizedSlots, Slots, quantize_slots
from jllm_core.recurrent_state import STATE_AXES, RecurrentState, abstract_state
from jllm_core.sharding import Placement

from jllm_runtime.errors import RequestError

PREFILL_CHUNK = 64
"""Tokens of a prompt that one prefill step takes. Chunks start at multiples of it, so a prefix is always computed in
the same pieces, whatever follows it and whoever asks."""

# Each capacity is another program: powers of two from here on, so that few are compiled.
MIN_CAPACITY = 256

Slotted = TypeVar("Slotted")
"""A tree of keys and values."""

KVDtype = Literal["float32", "bfloat16", "float16", "int8"]
"""A type that keys and values may be kept as."""

KV_DTYPES: tuple[KVDtype, ...] = get_args(KVDtype)

# Head by head, [B, K, S, H]: attention reads all slots of a head in one piece (docs/decisions, 7).
LOGICAL_AXES = ("batch", "kv_heads", "sequence", "head_dim")

DEFAULT_BACKEND = XLA()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ContiguousCache:
    """Keys and values of every layer, each ``[B, K, S, H]``; the token at position p of row b is in slot ``[b, :, p]``.

    Those of int8 have scales besides. No query sees the slots behind a row's newest position before they are written;
    they hold zeros, what an earlier text left, or, where ``backend.reads_filled_only``, anything.

    Attributes:
        keys: one array a layer; of no heads where the layer is a delta net.
        values: one array a layer, as the keys.
        backend: where they live, so that a program gives back a cache that is laid out like the one it got.
        ragged: whether the tokens that come stand at positions of each row's own, also where there are several a row.
        states: those of the delta nets, by the numbers of their layers.
        counts: how many of the tokens that come count in each row (``StateCache``); None is all of them.
    """

    keys: list[Slots]
    values: list[Slots]
    backend: Backend = field(default=XLA(), metadata={"static": True})
    ragged: bool = field(default=False, metadata={"static": True})
    states: dict[int, RecurrentState] = field(default_factory=dict)
    counts: Int[Array, " B"] | None = None

    @property
    def capacity(self) -> int:
        """Slots in a row."""
        return self.keys[0].shape[2]

    def append(
        self, layer: int, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], positions: Int[Array, "B T"]
    ) -> tuple[Self, Slots, Slots, Int[Array, "B S"] | None]:
        """Write one layer's keys and values at their positions, and show all slots, which stand at their own numbers.

        A chunk (T > 1) must start at the same position in every row and lie within the capacity; single tokens, and
        those of a ragged cache, may be anywhere, and those beyond the capacity are dropped.
        """
        # Written before it is read: a token attends to itself, and to those before it in the same chunk.
        cache = self.append_in_place(layer, k, v, positions)
        keys, values = cache.slots(layer)
        if not self.ragged or positions.shape[1] == 1 or self.backend.ragged_queries:
            return cache, keys, values, None
        # Said slot by slot, so that no attention is chosen that takes all rows to stand at the same positions.
        slots = jnp.arange(self.capacity, dtype=positions.dtype)
        return cache, keys, values, jnp.broadcast_to(slots, (len(positions), self.capacity))

    def state(self, layer: int) -> RecurrentState:
        """The state of a delta net."""
        return self.states[layer]

    def set_state(self, layer: int, state: RecurrentState) -> Self:
        """The cache with this state of a delta net."""
        return replace(self, states={**self.states, layer: placed_state(state, self.backend.placement)})

    def counting(self, counts: Array | None) -> Self:
        """The cache for tokens of which so many count in each row. Keys and values go by their positions alone."""
        return replace(self, counts=counts) if self.states else self

    @property
    def tables(self) -> None:
        """There are no pages."""
        return None

    def slots(self, layer: int) -> tuple[Slots, Slots]:
        """A layer's keys and values."""
        return self.keys[layer], self.values[layer]

    def places(self, positions: Int[Array, "B T"]) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
        """The row and slot of each token."""
        return jnp.broadcast_to(jnp.arange(len(positions))[:, None], positions.shape), positions

    def with_slots(self, layer: int, keys: Slots, values: Slots) -> Self:
        """The cache with these keys and values of a layer."""
        return replace(
            self,
            keys=with_layer(self.keys, layer, keys),
            values=with_layer(self.values, layer, values),
        )

    def append_in_place(
        self, layer: int, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], positions: Int[Array, "B T"]
    ) -> Self:
        """Write one layer's keys and values at their positions."""
        keys, values = self.slots(layer)
        return self.with_slots(layer, self._write(keys, k, positions), self._write(values, v, positions))

    def _write(self, slots: Slots, new: Array, positions: Array) -> Slots:
        # One token a row may stand anywhere; a chunk at the same place in all rows is one slice, which is far cheaper.
        anywhere = self.ragged or positions.shape[1] == 1
        if anywhere and self.backend.write_slots is not None:
            return self.backend.write_slots(slots, new, positions)  # type: ignore[no-any-return]
        put = partial(self._put_anywhere if anywhere else self._put_chunk, positions)
        if isinstance(slots, QuantizedSlots):
            values, scales = quantize_slots(new)
            return QuantizedSlots(put(slots.values, values), put(slots.scales, scales))
        return put(slots, new.astype(slots.dtype))

    def _put_anywhere(self, positions: Array, slots: Array, new: Array) -> Array:
        # An index for every axis but the last: the TPU compiler copies the whole cache for a slice over the heads.
        rows, heads = jnp.arange(slots.shape[0])[:, None, None], jnp.arange(slots.shape[1])[:, None]
        # [B, K, T] places. Rows that have ended go on beyond the capacity, and are dropped.
        at = slots.at[rows, heads, positions[:, None]]
        return placed(at.set(new.swapaxes(1, 2), mode="drop", unique_indices=True), self.backend.placement)

    def _put_chunk(self, positions: Array, slots: Array, new: Array) -> Array:
        # At the end this would move a chunk that does not fit back over others: chunks are aligned, so that all fit.
        written = jax.lax.dynamic_update_slice_in_dim(slots, new.swapaxes(1, 2), positions[0, 0], axis=2)
        return placed(written, self.backend.placement)


def cache_dtype(activations: jnp.dtype, asked: str | None) -> jnp.dtype:
    """What keys and values are kept as: what is asked for, or the type of the activations.

    Raises:
        RequestError: it is none of KV_DTYPES.
    """
    if asked is not None and asked not in KV_DTYPES:
        raise RequestError(f"kv_dtype must be one of {', '.join(KV_DTYPES)}, or None, got {asked!r}")
    return jnp.dtype(asked or activations)


def placed(slots: Array, placement: Placement | None, axes: tuple[str | None, ...] = LOGICAL_AXES) -> Array:
    """Keys or values, or scales of them, laid out over the mesh."""
    return slots if placement is None else placement.constrain(slots, *axes[: slots.ndim])


def empty_slots(
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    placement: Placement | None,
    axes: tuple[str | None, ...] = LOGICAL_AXES,
) -> Slots:
    """Keys or values of zeros."""
    # Zeros, for XLA's attention multiplies what is not filled by a weight of zero, which does not silence a NaN.
    zeros = placed(jnp.zeros(shape, dtype), placement, axes)
    if dtype != jnp.int8:
        return zeros
    return QuantizedSlots(zeros, placed(jnp.zeros(shape[:-1], jnp.float32), placement, axes))


def started(
    make: Callable[[], Slotted], backend: Backend, anything: bool, axes: tuple[str | None, ...] = LOGICAL_AXES
) -> Slotted:
    """An empty cache.

    Args:
        make: makes it of zeros.
        backend: where it lives.
        anything: what is not filled is never read. Where the backend can, the arrays then hold whatever was in memory,
            and take it up only as they are filled.
        axes: the logical axes of the arrays.
    """
    if not anything or backend.uninitialized is None:
        return make()
    arrays: Slotted = jax.tree.map(
        lambda slots: placed(slots, backend.placement, axes), backend.uninitialized(jax.eval_shape(make))
    )
    return arrays


def placed_state(state: RecurrentState, placement: Placement | None) -> RecurrentState:
    """A state, laid out over the mesh."""
    if placement is None:
        return state
    axes = vars(STATE_AXES)
    return RecurrentState(**{name: placement.constrain(array, *axes[name]) for name, array in vars(state).items()})


def zero_cache(
    shape: tuple[int, ...], dtype: jnp.dtype, config: ModelConfig, backend: Backend, anything: bool = False
) -> ContiguousCache:
    """A cache without tokens.

    Args:
        shape: of an attention layer's keys (``cache_info``).
        dtype: of keys and values.
        config: the architecture.
        backend: where it lives.
        anything: as ``started`` takes it; states are zeros all the same, for the first token reads them.
    """
    # Delta nets have slots of no heads: no memory, and no layer counted otherwise than the model counts it.
    none = (shape[0], 0, *shape[2:])

    def zeros() -> list[Slots]:
        shapes = [shape if config.mixer(layer) == "attention" else none for layer in range(config.num_layers)]
        return [empty_slots(each, dtype, backend.placement) for each in shapes]

    cache = started(lambda: ContiguousCache(zeros(), zeros(), backend), backend, anything)
    if config.delta_net is not None:
        info = abstract_state(config.delta_net, shape[0])
        for layer in config.layers_with("delta_net"):
            cache = cache.set_state(layer, jax.tree.map(lambda info: jnp.zeros(info.shape, info.dtype), info))
    return cache


def with_layer(arrays: list[Slots], layer: int, slots: Slots) -> list[Slots]:
    """The arrays of all layers, with another one of this layer."""
    # One array a layer, not one of all layers: a write to one of them leaves the others alone.
    return [*arrays[:layer], slots, *arrays[layer + 1 :]]


def cache_info(
    config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype, placement: Placement | None = None
) -> ArrayInfo:
    """The description of one layer's keys (or values), on that mesh."""
    copies = 1 if placement is None else placement.kv_copies(config.num_heads, config.num_kv_heads)
    return ArrayInfo((batch, config.num_kv_heads * copies, capacity, config.head_dim), dtype, LOGICAL_AXES)


def largest_chunk(batch: int, backend: Backend = DEFAULT_BACKEND) -> int:
    """Tokens of each prompt that a prefill step takes while the prompts are long, a multiple of PREFILL_CHUNK."""
    return max(backend.prefill_tokens // batch // PREFILL_CHUNK, 1) * PREFILL_CHUNK


def prefill_chunks(
    batch: int, tokens: int, capacity: int, backend: Backend = DEFAULT_BACKEND
) -> list[tuple[int, int, int]]:
    """The steps that take in prompts of up to so many tokens: large chunks, and smaller ones for what is left.

    Args:
        batch: rows.
        tokens: of the longest prompt.
        capacity: slots in a row of the cache, which a chunk must lie within.
        backend: where they run.

    Returns:
        For each size of chunk that is needed: the size, the first chunk of that size, and the one to stop before.
    """
    # Two sizes and no more, for each is a program: large ones while there are enough tokens, small ones for the rest.
    large = largest_chunk(batch, backend)
    whole, rest = divmod(tokens, large)
    small_steps = -(-rest // PREFILL_CHUNK)
    # On an accelerator a large chunk that is not full takes less time than many small ones, none of which is faster
    # than the weights are read.
    small, one = (max(batch * chunk, backend.min_step_tokens) for chunk in (PREFILL_CHUNK, large))
    if one < small_steps * small and (whole + 1) * large <= capacity:
        whole, small_steps = whole + 1, 0
    ends = whole * large // PREFILL_CHUNK + small_steps
    chunks = [(large, 0, whole), (PREFILL_CHUNK, whole * large // PREFILL_CHUNK, ends)]
    return [(size, first, end) for size, first, end in chunks if end > first]


def cache_capacity(tokens: int, context_length: int) -> int:
    """The capacity for that many tokens: a power of two from 256 up, at most the context in whole prefill chunks."""
    capacity = MIN_CAPACITY
    while capacity < tokens:
        capacity *= 2
    whole_chunks = -(-context_length // PREFILL_CHUNK) * PREFILL_CHUNK
    return min(capacity, whole_chunks)
