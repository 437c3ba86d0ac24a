"""Flash attention by a Pallas kernel for GPUs, over pages or contiguous slots, from one query a row to many.

Scores stay on the chip: a program of the kernel takes some queries that share a kv head, goes through the blocks of
slots that they see, and keeps the running maximum and sum of their softmax (Dao et al., arXiv:2205.14135). Where a row
has few queries, as in decoding, several programs share its blocks out and their sums are joined afterwards
(Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html).

JAX ships kernels for decoding, over contiguous slots and over pages (``pallas.ops.gpu``). They are not used: they take
no window and no more than one query a row, multiply what a page holds of its last user by zero, which does not silence
a NaN, and keep unfinished sums in the type of the queries, which overflow in float16.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jllm_core.kv_cache import PagedSlots
from jllm_core.quantization.keys_values import QuantizedSlots, Slots

DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
"""Types of activations that are multiplied as they are, with sums in float32."""

MIN_ROWS, MAX_ROWS = 16, 64
"""Queries of one program of the kernel: a product takes 16 at least; more than 64 do not fit into the registers."""
MIN_BLOCK, MAX_BLOCK = 16, 128
"""Slots that a program takes at a time."""
BLOCK_ELEMENTS = 64 * 128
"""Features of that many slots, at most: two such blocks of keys and two of values fit into any shared memory from
Ampere on."""
SPLITS = 8
"""Programs that share the slots of a row in decoding: with 8 kv heads even a single row keeps half of a GPU busy."""
_MIN_FLOAT32 = float(jnp.finfo(jnp.float32).min)


def supports(q_dtype: Any, k_dtype: Any, page_shape: tuple[int, ...]) -> bool:
    """Whether ``attention`` below takes queries of this type over keys of this type, in pages ``[P, K, C, H]``."""
    _, _, slots, features = page_shape
    return (
        jnp.dtype(q_dtype) in DTYPES
        and jnp.dtype(k_dtype) in (jnp.dtype(q_dtype), jnp.dtype(jnp.int8))
        and 16 <= features <= 256
        and features & (features - 1) == 0
        and _block(slots, features) >= MIN_BLOCK
    )


def attention(
    q: Float[Array, "B T N H"],
    k: Slots | PagedSlots,
    v: Slots | PagedSlots,
    positions: Int[Array, "B T"],
    window: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """``ops.attention.attention`` where slot s stands at position s, on one device.

    Args:
        q: queries; those of a row may stand anywhere.
        k: keys, in pages or one after another.
        v: values, the same.
        positions: where in its text each query stands.
        window: how many positions a query sees; None is all that came before.
        interpret: run by Pallas' interpreter, for tests.
    """
    batch, tokens, heads, features = q.shape
    k, v = (slots if isinstance(slots, PagedSlots) else one_page_a_row(slots) for slots in (k, v))
    pages, kv_heads, slots = k.pages.shape[:3]
    # Rows that have ended may stand anywhere; one without a page sees nothing.
    positions = jnp.minimum(positions, k.shape[2] - 1)
    positions = jnp.where(k.tables[:, :1] < pages, positions, -1).astype(jnp.int32)
    block = _block(slots, features)
    parts = slots // block
    # Pages, kv heads and the blocks within them are one axis: a block has one number, and no array is copied.
    tables = jnp.minimum(k.tables, pages - 1)[:, None, :, None].astype(jnp.int32)
    places = (tables * kv_heads + jnp.arange(kv_heads)[:, None, None]) * parts + jnp.arange(parts)
    places = places.reshape(batch, kv_heads, -1)
    keys, values = (jax.tree.map(lambda x: x.reshape(-1, block, *x.shape[3:]), each.pages) for each in (k, v))
    # The queries that share a kv head are rows of one matrix: [B, K, R, H], filled up to whole blocks of rows.
    group = heads // kv_heads
    count = tokens * group
    rows = min(MAX_ROWS, max(MIN_ROWS, 1 << (count - 1).bit_length()))
    padding = -count % rows
    matrix = jnp.moveaxis(q.reshape(batch, tokens, kv_heads, group, features), 1, 2)
    matrix = jnp.pad(matrix.reshape(batch, kv_heads, count, features), ((0, 0), (0, 0), (0, padding), (0, 0)))
    stands = jnp.pad(jnp.repeat(positions, group, axis=1), ((0, 0), (0, padding)), constant_values=-1)
    splits = SPLITS if tokens == 1 else 1
    summed, total, highest = _call(matrix, keys, values, places, stands, window, count, rows, splits, interpret)
    if splits == 1:
        summed = summed[0]
    else:
        # Sums of different maxima, brought to the largest. A part that saw nothing has a sum of zero.
        factors = jnp.exp(highest - jnp.max(highest, axis=0))
        total = jnp.sum(total * factors, axis=0)
        summed = jnp.sum(summed * factors[..., None], axis=0) / jnp.where(total == 0, 1.0, total)[..., None]
    attended = jnp.moveaxis(summed.reshape(batch, kv_heads, tokens, group, features), 2, 1)
    result: Array = attended.reshape(batch, tokens, heads, features).astype(q.dtype)
    return result


def one_page_a_row(slots: Slots) -> PagedSlots:
    """Contiguous slots ``[B, K, S, H]``, seen as a pool in which row b's text is page b."""
    return PagedSlots(slots, jnp.arange(slots.shape[0], dtype=jnp.int32)[:, None])


def _block(slots: int, features: int) -> int:
    """The slots of a page that are taken at a time: the largest power of two that divides them and is not too much."""
    return min(slots & -slots, MAX_BLOCK, BLOCK_ELEMENTS // features)


def _call(
    q: Array,
    k: Any,
    v: Any,
    places: Array,
    stands: Array,
    window: int | None,
    count: int,
    rows: int,
    splits: int,
    interpret: bool,
) -> tuple[Array, Array, Array]:
    """The kernel's sums of values ``[S, B, K, R, H]``, sums of weights and largest scores ``[S, B, K, R]``, for the
    first ``count`` queries, from blocks ``[X, C, H]``. With one split the sums of values are divided by those of the
    weights already."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    batch, kv_heads, padded, features = q.shape
    scaled = isinstance(k, QuantizedSlots)
    arrays = [*_parts(k), *_parts(v)]

    def whole(array: Array) -> Any:
        return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)

    of_rows = pl.BlockSpec((None, None, None, rows), lambda i, s, h, b: (s, b, h, i))
    sums = jax.ShapeDtypeStruct((splits, batch, kv_heads, count), jnp.float32)
    call = pl.pallas_call(
        partial(_kernel, window=window, scaled=scaled, count=count, splits=splits, scale=features**-0.5),
        grid=(padded // rows, splits, kv_heads, batch),
        in_specs=[
            pl.BlockSpec((None, None, rows, features), lambda i, s, h, b: (b, h, i, 0)),
            pl.BlockSpec((None, rows), lambda i, s, h, b: (b, i)),
            pl.BlockSpec((None, None, places.shape[2]), lambda i, s, h, b: (b, h, 0)),
            *map(whole, arrays),
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, rows, features), lambda i, s, h, b: (s, b, h, i, 0)),
            of_rows,
            of_rows,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((*sums.shape, features), jnp.float32 if splits > 1 else q.dtype),
            sums,
            sums,
        ],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="flash_attention",
    )
    summed, total, highest = call(q, stands, places, *arrays)
    return summed, total, highest


def _parts(slots: Any) -> list[Array]:
    return [slots.values, slots.scales] if isinstance(slots, QuantizedSlots) else [slots]


def _kernel(
    q_ref: Any,
    stands_ref: Any,
    places_ref: Any,
    *refs: Any,
    window: int | None,
    scaled: bool,
    count: int,
    splits: int,
    scale: float,
) -> None:
    """One program: ``rows`` queries ``[R, H]`` of a row and kv head, over its share of the blocks that they see."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    *slots, summed_ref, total_ref, highest_ref = refs
    (k_ref, k_scales_ref, v_ref, v_scales_ref) = slots if scaled else (slots[0], None, slots[1], None)
    block = k_ref.shape[1]
    q, stands = q_ref[...], stands_ref[...]
    # From the first block that any of the queries sees to the last; where they see none, the loop has no turn.
    newest = jnp.max(stands)
    last = (newest + block) // block
    first = 0
    if window is not None:
        oldest = jnp.min(jnp.where(stands < 0, newest, stands))
        first = jnp.maximum(oldest - window + 1, 0) // block
    # By the row's own length, not by the table's width: its bits depend on nothing else, and all programs have work.
    share = (last - first + splits - 1) // splits
    begin = first + pl.program_id(1) * share
    end = jnp.minimum(begin + share, last)

    def take(number: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, total, summed = carry
        place = places_ref[number]
        k, v = k_ref[place].astype(q.dtype), v_ref[place].astype(q.dtype)
        at = number * block + jnp.arange(block)
        seen = at[None, :] <= stands[:, None]
        if window is not None:
            seen &= at[None, :] > stands[:, None] - window
        scores = jnp.dot(q, k.T, preferred_element_type=jnp.float32) * scale
        if k_scales_ref is not None:
            scores *= k_scales_ref[place][None, :]
        scores = jnp.where(seen, scores, _MIN_FLOAT32)
        risen = jnp.maximum(highest, jnp.max(scores, axis=1))
        # Not seen is nothing, even where a query has seen no key yet and all scores are the lowest.
        weights = jnp.where(seen, jnp.exp(scores - risen[:, None]), 0.0)
        kept = jnp.exp(highest - risen)
        total = total * kept + jnp.sum(weights, axis=1)
        # A slot that nothing was written to yet may hold a NaN of the page's last user; zero does not silence that.
        filled = at <= newest
        if v_scales_ref is not None:
            weights *= jnp.where(filled, v_scales_ref[place], 0.0)[None, :]
        else:
            v = jnp.where(filled[:, None], v, 0)
        added = jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return risen, total, summed * kept[:, None] + added

    rows = q.shape[0]
    carry = (
        jnp.full((rows,), _MIN_FLOAT32, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    highest, total, summed = jax.lax.fori_loop(begin, end, take, carry)
    if splits == 1:
        # A query that sees no key (padding) gets zero.
        summed = summed / jnp.where(total == 0, 1.0, total)[:, None]
    # What rows were filled up with is not written.
    asked = pl.program_id(0) * rows + jnp.arange(rows) < count
    triton.store(summed_ref.at[...], summed.astype(summed_ref.dtype), mask=asked[:, None])
    triton.store(total_ref.at[...], total, mask=asked)
    triton.store(highest_ref.at[...], highest, mask=asked)
