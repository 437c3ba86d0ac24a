"""Paged KV cache: one pool of pages a layer, and for each row a table of the pages that hold its text."""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from jllm_core.array_info import ArrayInfo
from jllm_core.backends.base import XLA, Backend
from jllm_core.config import ModelConfig
from jllm_core.kv_cache import PagedSlots
from jllm_core.mesh_axes import LANES
from jllm_core.quantization.keys_values import QuantizedSlots, Slots, quantize_slots
from jllm_core.recurrent_state import RecurrentState
from jllm_core.sharding import Placement

from jllm_runtime.cache.contiguous import placed, with_layer
from jllm_runtime.cache.state_pool import put_states, take_states

SCALE_BYTES = 4
"""Of each token and head, beside values of int8."""

MIN_TABLE = 4
"""Pages in the shortest table where its width costs something; the others are powers of two, so that few programs are
compiled."""

LONG_TEXT = 32768
"""Tokens that the shortest table holds where its width costs nothing."""

MIN_STATE_PAGE = 256
"""Tokens in the smallest page of a model with states on an accelerator: the pages of a prompt go one after another, so
that each has to keep the device busy by itself."""

# A page holds its tokens on one device; the pool is whole along the data axis, since any row may use any page.
LOGICAL_AXES = (None, "kv_heads", None, "head_dim")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pages:
    """The keys and values of every layer, each ``[P, K, C, H]``: P pages of C tokens. Those of int8 have scales, too.

    Attributes:
        keys: one array a layer; of no heads where the layer is a delta net.
        values: one array a layer, as the keys.
        backend: where they live, so that a program gives back pages that are laid out like those it got.
        states: those of the delta nets, by the numbers of their layers: one for each state row (``state_pool``).
    """

    keys: list[Slots]
    values: list[Slots]
    backend: Backend = field(default=XLA(), metadata={"static": True})
    states: dict[int, RecurrentState] = field(default_factory=dict)

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.keys[0].shape[2]

    def __len__(self) -> int:
        # Also the number that no page has, which tables are filled up with.
        return self.keys[0].shape[0]

    def nbytes(self) -> int:
        """Bytes of all pages together, without the states."""
        return sum(array.nbytes for array in self.keys + self.values)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedCache:
    """The pages as the rows of one step see them: the token at position p of row b is in page ``tables[b, p // C]``.

    It meets core's protocols ``KVCache`` and ``StateCache``, and those of kernels (``SlotCache``, ``StateSlotCache``).
    Pages and states are written in place. Attention reads the pages where they lie, or a copy of the rows' own
    (``PagedSlots.gathered``); the pools are never copied.

    Attributes:
        pages: the pool.
        tables: each row's pages in the order of its text. Behind them, and in rows without a request, stands a number
            that no page has: what is written there is dropped, and no query sees what is read.
        state_rows: where the states of each row's text are; a number that no state row has stands for nowhere, as in
            the tables. The rows of one step have different ones. None: row b's are in state row b.
        counts: how many of the tokens that come count in each row (``StateCache``); None is all of them.
        begins: rows whose text begins with the tokens that come: their states are zeros. None where none does.
    """

    pages: Pages
    tables: Int[Array, "B n"]
    state_rows: Int[Array, " B"] | None = None
    counts: Int[Array, " B"] | None = None
    begins: Bool[Array, " B"] | None = None

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.pages.page_size

    def append(
        self, layer: int, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], positions: Int[Array, "B T"]
    ) -> tuple[Self, PagedSlots, PagedSlots, None]:
        """Write one layer's keys and values, and show each row's pages. That slot s of a row is for position s lets a
        backend pass over what no query sees.

        Several tokens of a row (T > 1) must be one whole page of its text; single tokens may be anywhere. Rows may be
        pages of the same text: all are written before any is read.
        """
        cache = self.append_in_place(layer, k, v, positions)
        keys, values = (PagedSlots(pool, self.tables) for pool in cache.slots(layer))
        return cache, keys, values, None

    def state(self, layer: int) -> RecurrentState:
        """The states of a delta net that the earlier tokens of the rows have left."""
        return take_states(self.states_of(layer), self.state_rows, self.begins, self.pages.backend.placement)

    def set_state(self, layer: int, state: RecurrentState) -> Self:
        """The cache with these states of a delta net."""
        put = put_states(self.states_of(layer), self.state_rows, state, self.pages.backend.placement)
        return self.with_states(layer, put)

    def state_places(self) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
        """The state row of each row, and the rows whose text begins."""
        rows = len(self.tables)
        state_rows = jnp.arange(rows) if self.state_rows is None else self.state_rows
        return state_rows, jnp.zeros(rows, bool) if self.begins is None else self.begins

    def states_of(self, layer: int) -> RecurrentState:
        """The states of all state rows of a delta net."""
        return self.pages.states[layer]

    def with_states(self, layer: int, states: RecurrentState) -> Self:
        """The cache with these states of all state rows of a delta net."""
        return replace(self, pages=replace(self.pages, states={**self.pages.states, layer: states}))

    def slots(self, layer: int) -> tuple[Slots, Slots]:
        """All pages of a layer."""
        return self.pages.keys[layer], self.pages.values[layer]

    def places(self, positions: Int[Array, "B T"]) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
        """The page of each token, and its place there; behind a row's table is no page."""
        # fill, not clip: a token beyond the table must not land in the row's last page.
        at = jnp.take_along_axis(
            self.tables, positions // self.page_size, axis=1, mode="fill", fill_value=len(self.pages)
        )
        return at, positions % self.page_size

    def with_slots(self, layer: int, keys: Slots, values: Slots) -> Self:
        """The cache with these keys and values of a layer."""
        pages = replace(
            self.pages,
            keys=with_layer(self.pages.keys, layer, keys),
            values=with_layer(self.pages.values, layer, values),
        )
        return replace(self, pages=pages)

    def append_in_place(
        self, layer: int, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], positions: Int[Array, "B T"]
    ) -> Self:
        """Write one layer's keys and values."""
        keys, values = self.slots(layer)
        return self.with_slots(layer, self._write(keys, k, positions), self._write(values, v, positions))

    def _write(self, pool: Slots, new: Array, positions: Array) -> Slots:
        at, slots = self.places(positions)
        if self.pages.backend.write_slots is not None:
            return self.pages.backend.write_slots(pool, new, slots, at)  # type: ignore[no-any-return]
        put = partial(self._put_tokens, at, slots) if new.shape[1] == 1 else partial(self._put_pages, at[:, 0])
        if isinstance(pool, QuantizedSlots):
            values, scales = quantize_slots(new)
            return QuantizedSlots(put(pool.values, values), put(pool.scales, scales))
        return put(pool, new.astype(pool.dtype))

    def _put_tokens(self, pages: Array, slots: Array, pool: Array, new: Array) -> Array:
        placement = self.pages.backend.placement
        if _on_tpu(placement) and (pool.ndim == 3 or pool.shape[3] % LANES):
            # Such an array lies otherwise on a TPU than a scatter of tokens wants it, and would be copied whole, there
            # and back. The page of each row is taken out, and put back with the token: no row has another's.
            taken = jnp.take(pool, pages[:, 0], axis=0, mode="clip")
            here = jnp.arange(self.page_size) == slots[:, :, None]
            here = here.reshape(here.shape + (1,) * (pool.ndim - 3))
            written = pool.at[pages[:, 0]].set(jnp.where(here, new[:, 0, :, None], taken), mode="drop")
        else:
            # An index for every axis but the last, as in the contiguous cache: one scatter, no copy of the pool.
            written = pool.at[pages, jnp.arange(pool.shape[1]), slots].set(new[:, 0], mode="drop")
        return placed(written, placement, LOGICAL_AXES)

    def _put_pages(self, pages: Array, pool: Array, new: Array) -> Array:
        return placed(pool.at[pages].set(new.swapaxes(1, 2), mode="drop"), self.pages.backend.placement, LOGICAL_AXES)


def pages_info(
    config: ModelConfig, pages: int, page_size: int, dtype: jnp.dtype, placement: Placement | None = None
) -> ArrayInfo:
    """The description of one layer's keys (or values), with as many copies of a head as the mesh asks for."""
    copies = 1 if placement is None else placement.kv_copies(config.num_heads, config.num_kv_heads)
    return ArrayInfo((pages, config.num_kv_heads * copies, page_size, config.head_dim), dtype, LOGICAL_AXES)


def page_bytes(config: ModelConfig, page_size: int, dtype: jnp.dtype, placement: Placement | None = None) -> int:
    """Bytes of a page's keys and values in all layers of attention, on all devices together."""
    info = pages_info(config, 1, page_size, dtype, placement)
    scales = math.prod(info.shape[:-1]) * SCALE_BYTES if dtype == jnp.int8 else 0
    return config.kv_arrays * (math.prod(info.shape) * jnp.dtype(dtype).itemsize + scales)


def least_page_size(config: ModelConfig, dtype: jnp.dtype, backend: Backend) -> int:
    """Tokens in the smallest page that a device reads where it lies, and that keeps it busy where pages have to go one
    after another."""
    # With as many tokens as a TPU has lanes, features or scales that would not fill them lie in whole tiles, too.
    readable = LANES if _on_tpu(backend.placement) and (config.head_dim % LANES or dtype == jnp.int8) else 1
    return max(readable, MIN_STATE_PAGE if config.delta_net and backend.one_table_width else 1)


def _on_tpu(placement: Placement | None) -> bool:
    return placement is not None and (placement.device_kind or "").startswith("TPU")


def chunk_pages(backend: Backend, config: ModelConfig, page_size: int, tokens: int | None = None) -> int:
    """Pages of prompts that one program takes.

    Args:
        backend: the model's.
        config: its architecture.
        page_size: tokens in a page.
        tokens: what a chunk is to have; None for what keeps the device busy.
    """
    if tokens is None:
        # Where the width of the tables goes by the longest text, the bits of one would go by its neighbours. With
        # states a program takes one page of a prompt: a lone prompt would leave its other rows empty.
        tokens = backend.prefill_tokens if backend.one_table_width and not config.delta_net else page_size
    return max(1, tokens // page_size)


def shortest_table(backend: Backend, config: ModelConfig, page_size: int) -> int:
    """Pages in the shortest table of a program; the others are powers of two."""
    if not backend.one_table_width:
        return MIN_TABLE
    # A wide table costs nothing, a program for each width does: one serves all texts that are not very long.
    return table_width(-(-min(LONG_TEXT, config.context_length) // page_size))


def table_width(pages: int, shortest: int = MIN_TABLE) -> int:
    """The width of the table that a row of that many pages gets: a power of two."""
    # Tables of few widths: each is another program.
    return max(shortest, 1 << (pages - 1).bit_length())


def rounded_down(count: int, bits: int) -> int:
    """The largest number of pages that is at most ``count`` and has so many significant bits."""
    # Each number of pages has programs of its own, so that few are wanted.
    rest = max(count.bit_length() - bits, 0)
    return count >> rest << rest


def page_tables(rows: list[list[int]], count: int, width: int, nowhere: int) -> np.ndarray:
    """The tables ``[count, width]`` of these rows, the rest filled up with ``nowhere``."""
    tables = np.full((count, width), nowhere, np.int32)
    for table, pages in zip(tables, rows, strict=False):
        table[: len(pages)] = pages[:width]
    return tables
