"""Pallas kernel of paged attention: one block of one row's pages, and the fetching of the next."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jllm_core.ops.linear import matmul_precision

HIDDEN = float(jnp.finfo(jnp.float32).min)
"""The score of a slot that a query does not see: the lowest, not minus infinity, whose differences are no numbers."""

TOGETHER = 128
"""Queries that are taken in one piece, those of several kv heads where a head has few."""


@dataclass(frozen=True)
class Blocks:
    """The shapes that the kernel is compiled for, beside those of its arrays.

    Attributes:
        page_size: C, tokens in a page.
        pages: of a block.
        width: pages in a row's table.
        queries: positions that a row of the grid has queries at; the first query head of a kv head has the first of
            its rows, one a position, then the second.
        tiles: rows of the grid for each row of the batch.
        window: how many positions a query sees; None is all that came before.
        quantized: keys and values are int8, each array followed by its scales.
        features_first: a page lies as ``[K, H, C]``.
    """

    page_size: int
    pages: int
    width: int
    queries: int
    tiles: int
    window: int | None
    quantized: bool
    features_first: bool

    @property
    def slots(self) -> int:
        """Slots of a block."""
        return self.pages * self.page_size


def attend(
    row_of: Any,
    block_of: Any,
    first_blocks: Any,
    last_blocks: Any,
    starts: Any,
    ends: Any,
    tables: Any,
    q_ref: Any,
    *refs: Any,
    blocks: Blocks,
) -> None:
    """One step of the grid.

    Args:
        row_of, block_of: the row and the block of each step, ``[steps]``.
        first_blocks, last_blocks: of each row, ``[rows]``.
        starts: the position of each row's first query.
        ends: slots of each row that hold something which one of its queries sees.
        tables: the pages of each row of the batch, one row after another.
        q_ref: ``[1, K, R, H]``, the queries of the row.
        refs: the pools of keys and values (of int8: each with its scales) in HBM; the result, as ``q_ref``; two blocks
            of each pool; scores ``[k, R, S]`` of some kv heads; for each query ``[K, R, .]`` the sum of its weighted
            values, the sum of its weights, and its largest score; a semaphore for each of the two blocks.
        blocks: the shapes.
    """
    count = 4 if blocks.quantized else 2
    pools, out_ref, buffers = refs[:count], refs[count], refs[count + 1 : 2 * count + 1]
    scores_ref, total_ref, weight_ref, top_ref, semaphores = refs[2 * count + 1 :]
    step = pl.program_id(0)
    row, block = row_of[step], block_of[step]
    place, begin, start, end = step % 2, block * blocks.slots, starts[row], ends[row]

    def each_copy(step: Any, act: Callable[[Any], None]) -> None:
        """``act`` on the copy of each page that a step needs. What is behind the last one is never read."""
        row, block, place = row_of[step], block_of[step], step % 2
        at = row // blocks.tiles * blocks.width + block * blocks.pages
        needed = pl.cdiv(ends[row], blocks.page_size) - block * blocks.pages

        def of_page(i: Any, _: None) -> None:
            slots = pl.ds(pl.multiple_of(i * blocks.page_size, blocks.page_size), blocks.page_size)
            for pool, buffer in zip(pools, buffers, strict=True):
                last = blocks.features_first and len(buffer.shape) == 4
                target = buffer.at[place, :, :, slots] if last else buffer.at[place, :, slots]
                act(pltpu.make_async_copy(pool.at[tables[at + i]], target, semaphores.at[place]))

        jax.lax.fori_loop(0, jnp.minimum(needed, blocks.pages), of_page, None)

    @pl.when(step == 0)
    def _() -> None:
        each_copy(0, lambda copy: copy.start())

    @pl.when(step + 1 < pl.num_programs(0))
    def _() -> None:
        each_copy(step + 1, lambda copy: copy.start())

    @pl.when(block == first_blocks[row])
    def _() -> None:
        total_ref[...] = jnp.zeros_like(total_ref)
        weight_ref[...] = jnp.zeros_like(weight_ref)
        top_ref[...] = jnp.full_like(top_ref, HIDDEN)

    each_copy(step, lambda copy: copy.wait())

    @pl.when(end < begin + blocks.slots)
    def _() -> None:
        # Weights of zero do not silence what is not a number, which memory that nobody has written may hold.
        values = buffers[-1]
        axis = 2 if blocks.features_first and not blocks.quantized else 1
        held = begin + jax.lax.broadcasted_iota(jnp.int32, values.shape[1:], axis) < end
        values[place] = jnp.where(held, values[place], jnp.zeros_like(values[place]))

    kv_heads, height = q_ref.shape[1:3]
    at_once = heads_at_once(kv_heads, height)

    def of_heads(i: Any, _: None) -> None:
        heads = pl.ds(i * at_once, at_once)
        _attend_to_block(
            q_ref.at[0, heads],
            [buffer.at[place, heads] for buffer in buffers],
            (scores_ref, total_ref.at[heads], weight_ref.at[heads], top_ref.at[heads]),
            (begin, start, end),
            blocks,
        )

    if at_once == kv_heads:
        of_heads(0, None)
    else:
        # A loop, and not one product of all heads: a program of a quarter of the size, which compiles so much faster.
        jax.lax.fori_loop(0, kv_heads // at_once, of_heads, None)

    @pl.when(block == last_blocks[row])
    def _() -> None:
        out_ref[0] = (total_ref[...] / weight_ref[...]).astype(out_ref.dtype)


def heads_at_once(kv_heads: int, height: int) -> int:
    """The kv heads, each with so many queries, that are taken in one piece."""
    fitting = [heads for heads in range(2, kv_heads + 1) if kv_heads % heads == 0 and heads * height <= TOGETHER]
    return max(fitting, default=1)


def _attend_to_block(
    q_ref: Any, buffers: Sequence[Any], sums: Sequence[Any], where: Sequence[Any], blocks: Blocks
) -> None:
    """Some kv heads' queries meet a block: its weighted values are added to what they have seen before."""
    scores_ref, total_ref, weight_ref, top_ref = sums
    begin, start, end = where
    dtype = q_ref.dtype
    height, features = q_ref.shape[1:]
    precision = matmul_precision(dtype)
    key, key_scale = (buffers[0], buffers[1]) if blocks.quantized else (buffers[0], None)
    value, value_scale = (buffers[2], buffers[3]) if blocks.quantized else (buffers[1], None)
    axes = "khs" if blocks.features_first else "ksh"

    scores = jnp.einsum(
        f"krh,{axes}->krs", q_ref[...], key[...].astype(dtype), preferred_element_type=jnp.float32, precision=precision
    )
    if key_scale is not None:
        scores *= key_scale[...][:, None, :]
    scores_ref[...] = scores

    # Of most blocks every query sees every slot.
    whole = begin + blocks.slots <= start + 1
    if blocks.window is not None:
        whole &= begin > start + blocks.queries - 1 - blocks.window

    @pl.when(~whole)
    def _() -> None:
        slot = begin + jax.lax.broadcasted_iota(jnp.int32, (1, 1, blocks.slots), 2)
        position = start
        if blocks.queries > 1:
            shape = (height // blocks.queries, blocks.queries, blocks.slots)
            position += jax.lax.broadcasted_iota(jnp.int32, shape, 1).reshape(1, height, blocks.slots)
        seen = (slot <= position) & (slot < end)
        if blocks.window is not None:
            seen &= slot > position - blocks.window
        scores_ref[...] = jnp.where(seen, scores_ref[...], HIDDEN)

    # exp(x / sqrt(H)) as a power of two, which is what the hardware computes: one multiplication for both.
    scale = features**-0.5 * math.log2(math.e)
    top = top_ref[...]
    new_top = jnp.maximum(top, jnp.max(scores_ref[...], axis=-1, keepdims=True))
    weights = jnp.exp2((scores_ref[...] - new_top) * scale)
    # What a query that has seen nothing yet has summed up is silenced by its first score: this is then zero.
    earlier = jnp.exp2((top - new_top) * scale)
    top_ref[...] = new_top
    weight_ref[...] = weight_ref[...] * earlier + jnp.sum(weights, axis=-1, keepdims=True)
    if value_scale is not None:
        weights *= value_scale[...][:, None, :]
    total_ref[...] = total_ref[...] * earlier + jnp.einsum(
        f"krs,{axes}->krh",
        weights.astype(dtype),
        value[...].astype(dtype),
        preferred_element_type=jnp.float32,
        precision=precision,
    )
