"""Blocked attention from XLA's own operations: over pages or contiguous slots, only as far as the queries see.

For accelerators where no kernel takes the case. A loop takes one block of every row's slots after another, from the
first that a query sees to the last, and keeps the running maximum and sum of each query's softmax (Milakov and
Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135). The scores of all slots are never there together, and of
pages one block of each row is gathered at a time, so a table may be wide.

A row's bits depend on its own slots alone: a block of which it sees nothing multiplies its sums by exactly 1 and adds
nothing.
"""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from jllm_core.kv_cache import PagedSlots
from jllm_core.ops.attention import visible
from jllm_core.ops.linear import matmul_precision
from jllm_core.quantization.keys_values import Slots, split_slots

BLOCK = 512
"""Slots of each row that are taken at a time, or the most that make whole blocks."""
_MIN_FLOAT32 = float(jnp.finfo(jnp.float32).min)


def attention(
    q: Float[Array, "B T N H"],
    k: Slots | PagedSlots,
    v: Slots | PagedSlots,
    q_positions: Int[Array, "B T"],
    window: int | None = None,
    block: int = BLOCK,
    by_sums: bool = False,
) -> Float[Array, "B T N H"]:
    """``ops.attention.attention`` where slot s stands at position s, without gradients.

    Args:
        q, k, v, q_positions, window: as that takes them.
        block: slots at a time, a power of two.
        by_sums: multiply and sum each number instead of calling for a matrix product. XLA then reads the slots where
            they lie, where a product by a library wants a copy of what was gathered; for one query a row.
    """
    batch, tokens, heads, features = q.shape
    kv_heads, slots = k.shape[1:3]
    size = _block_size(k, block)
    # A kv head meets its G queries in one product: [B, K, G, T, H].
    grouped = jnp.moveaxis(q.reshape(batch, tokens, kv_heads, -1, features), 1, 3)
    # Rows that have ended may stand anywhere; one without a page sees nothing.
    q_positions = jnp.minimum(q_positions, slots - 1)
    if isinstance(k, PagedSlots):
        q_positions = jnp.where(k.tables[:, :1] < k.pages.shape[0], q_positions, -1)
    newest = jnp.max(q_positions, axis=1)

    def take(number: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, total, weighted = carry
        at = number * size + jnp.arange(size)
        keys, key_scales = split_slots(_slice(k, number, size, by_sums), q.dtype)
        values, value_scales = split_slots(_slice(v, number, size, by_sums), q.dtype)
        scores = _scores(grouped, keys, by_sums) * features**-0.5
        if key_scales is not None:
            scores *= key_scales[:, :, None, None]
        seen = visible(q_positions, jnp.broadcast_to(at, (batch, size)), window)[:, None, None]
        scores = jnp.where(seen, scores, _MIN_FLOAT32)
        risen = jnp.maximum(highest, jnp.max(scores, axis=-1))
        # Not seen is nothing, even where a query has seen no key yet and all scores are the lowest.
        weights = jnp.where(seen, jnp.exp(scores - risen[..., None]), 0.0)
        kept = jnp.exp(highest - risen)
        total = total * kept + jnp.sum(weights, axis=-1)
        # A page may hold what is no number from its last user, which a weight of zero does not silence.
        filled = at <= newest[:, None]
        if value_scales is not None:
            weights *= jnp.where(filled[:, None], value_scales, 0)[:, :, None, None]
        else:
            values = jnp.where(filled[:, None, :, None], values, 0)
        added = _weighted_sum(weights, values, by_sums)
        return risen, total, weighted * kept[..., None] + added

    first: Array | int = 0
    if window is not None:
        first = jnp.maximum(jnp.min(q_positions) - window + 1, 0) // size
    shape = (batch, kv_heads, heads // kv_heads, tokens)
    begun = (jnp.full(shape, _MIN_FLOAT32), jnp.zeros(shape), jnp.zeros((*shape, features)))
    _, total, weighted = jax.lax.fori_loop(first, jnp.max(newest) // size + 1, take, begun)
    # A query that sees no key (padding) gets a finite value that means nothing.
    attended = weighted / jnp.where(total == 0, 1.0, total)[..., None]
    result: Array = jnp.moveaxis(attended, 3, 1).reshape(batch, tokens, heads, features).astype(q.dtype)
    return result


def _scores(q: Float[Array, "B K G T H"], keys: Float[Array, "B K S H"], by_sums: bool) -> Float[Array, "B K G T S"]:
    if by_sums:
        product: Array = jnp.sum(_wide(q)[..., None, :] * _wide(keys)[:, :, None, None], axis=-1)
        return product
    return jnp.einsum(
        "BKGTH,BKSH->BKGTS", q, keys, precision=matmul_precision(q.dtype), preferred_element_type=jnp.float32
    )


def _weighted_sum(
    weights: Float[Array, "B K G T S"], values: Float[Array, "B K S H"], by_sums: bool
) -> Float[Array, "B K G T H"]:
    if by_sums:
        # In the order of the axes, or XLA writes a transposed copy of the values to sum along its rows.
        layout = Layout(tuple(range(weights.ndim + 1)))
        product = with_layout_constraint(weights[..., None] * _wide(values)[:, :, None, None], layout)
        summed: Array = jnp.sum(product, axis=-2)
        return summed
    return jnp.einsum(
        "BKGTS,BKSH->BKGTH",
        weights.astype(values.dtype),
        values,
        precision=matmul_precision(values.dtype),
        preferred_element_type=jnp.float32,
    )


def _wide(array: Array) -> Array:
    return array.astype(jnp.float32)


def _block_size(slots: Slots | PagedSlots, block: int) -> int:
    """Slots of a block: a divisor of a row's slots, or whole pages."""
    if isinstance(slots, PagedSlots):
        page = slots.pages.shape[2]
        return int(page * max(block // page, 1))
    return min(block, slots.shape[2] & -slots.shape[2])


def _slice(slots: Slots | PagedSlots, number: Array, size: int, by_heads: bool) -> Slots:
    """The slots of that block of each row, ``[B, K, size, H]``; of pages with ``by_heads`` in one gather that gives
    them in this order, which GPUs make part of what reads them. TPUs would copy the pool for it."""
    if not isinstance(slots, PagedSlots):
        taken: Slots = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, number * size, size, axis=2), slots)
        return taken
    width = size // slots.pages.shape[2]
    # Behind a table there are no pages, so that its last block is whole.
    padded = jnp.pad(slots.tables, ((0, 0), (0, -slots.tables.shape[1] % width)), constant_values=slots.pages.shape[0])
    tables = jax.lax.dynamic_slice_in_dim(padded, number * width, width, axis=1)
    if not by_heads:
        return PagedSlots(slots.pages, tables).gathered()
    batch, kv_heads = tables.shape[0], slots.pages.shape[1]

    def gather(pool: Array) -> Array:
        taken = pool.at[tables[:, None], jnp.arange(kv_heads)[:, None]].get(mode="clip")
        return taken.reshape(batch, kv_heads, size, *pool.shape[3:])

    gathered: Slots = jax.tree.map(gather, slots.pages)
    return gathered
