"""Paged attention for TPUs, over a pool of pages ``[P, K, C, H]`` that is read where it lies.

One kernel serves decode (a query a row) and prefill (a page of them a row). Its grid is flat: a step for each row and
block of pages that some query of the row sees, and none for the rest of its table, so that a wide table costs nothing.
The tables lie in scalar memory, and each step has the pages of the next one fetched while it computes
(PagedAttention, arXiv:2309.06180). Scores never go to memory: the softmax runs along the blocks (arXiv:2205.14135).

Blocks of a row begin at its first slot, whatever else is in the batch, so that neighbours change none of its bits.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jllm_core.backends.tpu.paged_kernel import Blocks, attend, heads_at_once
from jllm_core.kv_cache import PagedSlots
from jllm_core.quantization.keys_values import QuantizedSlots, Slots
from jllm_core.sharding import Placement

DEVICE_KINDS = ("TPU v4", "TPU v5", "TPU v5 lite", "TPU v6 lite")
"""Devices that the kernel compiles for. Mosaic, in which it is written, does not know TPU v2 and v3."""

SUBLANES, LANES = 8, 128
"""The last two axes of an array lie in tiles of so many numbers of 32 bits."""

DECODE_SLOTS, PREFILL_SLOTS = 1024, 512
"""Slots of a row that a step takes at most, where the row has one query and where it has more."""
MAX_BLOCK_BYTES = 2 * 2**20
"""Keys and values of a step, at most. Two blocks are in vector memory at a time."""
MAX_QUERIES = 2048
"""Queries of all heads that a step takes at most; more of one row become rows of their own."""
MAX_SCALAR_BYTES = 768 * 2**10
"""Tables and steps, in a scalar memory of 1 MiB."""
MAX_VECTOR_BYTES = 32 * 2**20
"""Vector memory that the kernel may take."""

QUERY_AXES = ("batch", None, "heads", None)
ROW_AXES = ("batch", None)
POOL_AXES = (None, "kv_heads", None, "head_dim")


def supports(
    q_shape: tuple[int, ...], dtype: Any, slots: PagedSlots, placement: Placement, interpret: Any = False
) -> bool:
    """Whether ``attention`` below takes queries ``[B, T, N, H]`` of this type and keys like these.

    Each device needs the kv heads of its query heads. Pages must be whole tiles, so that none is copied to be read:
    those of heads that are no multiple of 128, and scales of int8, only are with pages of a multiple of 128 tokens.
    """
    batch, _, heads, _ = placement.spec(q_shape, *QUERY_AXES)
    pages = _values(slots.pages)
    if tuple(placement.spec(pages.shape, *POOL_AXES)) != (None, heads, None, None):
        return False
    if placement.spec(slots.tables.shape, *ROW_AXES)[0] != batch or _scalar_bytes(q_shape, slots) > MAX_SCALAR_BYTES:
        return False
    quantized = isinstance(slots.pages, QuantizedSlots)
    if not quantized and pages.dtype != dtype:
        return False
    if interpret:
        return True
    tile = SUBLANES * 4 // pages.dtype.itemsize
    devices = math.prod(placement.mesh.shape[name] for name in placement.axes_of("heads", q_shape[2]))
    size, features = pages.shape[2:]
    tiled = size % LANES == 0 and features % tile == 0 if features % LANES else size % tile == 0
    return (
        placement.device_kind in DEVICE_KINDS
        and dtype in (jnp.bfloat16, jnp.float32)
        and tiled
        and (not quantized or size % LANES == 0)
        and 2 * pages.dtype.itemsize * math.prod(pages.shape[1:]) // devices <= MAX_BLOCK_BYTES
    )


def attention(
    q: Float[Array, "B T N H"],
    k: PagedSlots,
    v: PagedSlots,
    positions: Int[Array, "B T"],
    window: int | None,
    placement: Placement,
    interpret: Any = False,
) -> Float[Array, "B T N H"]:
    """``ops.attention.attention`` over pages, on each device for its own heads.

    Args:
        q: queries; those of a row stand at positions that follow one another.
        k: keys.
        v: values, by the same tables.
        positions: where in its text each query stands.
        window: how many positions a query sees; None is all that came before.
        placement: the mesh; XLA cannot split a kernel over it by itself.
        interpret: what Pallas calls so: True, or ``pltpu.InterpretParams``, to run the kernel without a TPU.
    """
    queries = placement.spec(q.shape, *QUERY_AXES)

    def of_pool(array: Array) -> PartitionSpec:
        return placement.spec(array.shape, *POOL_AXES[: array.ndim])

    pool = jax.tree.map(of_pool, k.pages)
    rows = placement.spec(positions.shape, *ROW_AXES)
    local = partial(paged_attention, window=window, interpret=interpret)
    split = placement.shard_map(local, (queries, pool, pool, rows, rows), queries)
    attended: Array = split(q, k.pages, v.pages, k.tables, positions)
    return attended


def paged_attention(
    q: Float[Array, "B T N H"],
    keys: Slots,
    values: Slots,
    tables: Int[Array, "B n"],
    positions: Int[Array, "B T"],
    window: int | None = None,
    interpret: Any = False,
) -> Float[Array, "B T N H"]:
    """The kernel on one device; arguments as for ``attention``, the pool ``[P, K, C, H]`` and the tables apart."""
    (_, t, n, h), (pool, kv_heads, size, _) = q.shape, keys.shape
    queries = query_tile(t, n)
    tiles = -(-t // queries)
    pages = pages_per_step(t, keys)
    blocks = Blocks(
        page_size=size,
        pages=pages,
        width=tables.shape[1],
        queries=queries,
        tiles=tiles,
        window=window,
        quantized=isinstance(keys, QuantizedSlots),
        features_first=h % LANES != 0,
    )
    scalars = _steps(tables, positions, blocks, pool)
    grouped = _by_kv_head(q, kv_heads, blocks)
    height = grouped.shape[2]
    pools, buffers = [], []
    for array in jax.tree.leaves((keys, values)):
        shape = [kv_heads, blocks.slots, *array.shape[3:]]
        if array.ndim == 4 and blocks.features_first:
            # So the TPU compiler lays out an array whose last axis is no multiple of 128: nothing is moved.
            array, shape = array.swapaxes(2, 3), [kv_heads, h, blocks.slots]
        # Pinned, or XLA copies a pool that fits into vector memory, whole, ahead of the kernel.
        pools.append(array if interpret else pltpu.with_memory_space_constraint(array, pltpu.HBM))
        buffers.append(pltpu.VMEM((2, *shape), array.dtype))
    of_row = pl.BlockSpec((1, kv_heads, height, h), lambda step, row_of, *_: (row_of[step], 0, 0, 0))
    out = pl.pallas_call(
        partial(attend, blocks=blocks),
        name="paged_attention",
        out_shape=jax.ShapeDtypeStruct(grouped.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars) - 1,
            grid=(scalars[0],),
            in_specs=[of_row, *[pl.BlockSpec(memory_space=pltpu.HBM)] * len(pools)],
            out_specs=of_row,
            scratch_shapes=[
                *buffers,
                pltpu.VMEM((heads_at_once(kv_heads, height), height, blocks.slots), jnp.float32),
                pltpu.VMEM((kv_heads, height, h), jnp.float32),
                pltpu.VMEM((kv_heads, height, 1), jnp.float32),
                pltpu.VMEM((kv_heads, height, 1), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=MAX_VECTOR_BYTES,
            # Two thirds of the instructions that start a copy. Tables are cut to pages that there are.
            disable_bounds_checks=True,
        ),
        interpret=interpret,
    )(*scalars[1:], grouped, *pools)
    return _by_query(out, q.shape, blocks)


def query_tile(queries: int, heads: int) -> int:
    """Positions that a row of the grid has queries at, of a row of so many with so many query heads on a device."""
    if queries == 1:
        return 1
    tile = -(-queries // SUBLANES) * SUBLANES
    while tile * heads > MAX_QUERIES and tile % (2 * SUBLANES) == 0:
        tile //= 2
    return tile


def pages_per_step(queries: int, keys: Slots) -> int:
    """Pages of a block. It goes by the shapes of a row alone, so that a row is summed up in the same pieces always."""
    _, kv_heads, size, features = keys.shape
    per_slot = 2 * kv_heads * features * int(_values(keys).dtype.itemsize)
    slots = min(MAX_BLOCK_BYTES // per_slot, DECODE_SLOTS if queries == 1 else PREFILL_SLOTS)
    return max(1, slots // size)


def _steps(tables: Array, positions: Array, blocks: Blocks, pool: int) -> tuple[Array, ...]:
    """The number of steps, and what the kernel reads of them: see ``paged_kernel.attend``."""
    rows = len(tables) * blocks.tiles
    starts = (positions[:, :1] + jnp.arange(blocks.tiles) * blocks.queries).reshape(rows)
    # Rows without a request have no page, and rows that have ended may stand behind their last one.
    held = jnp.repeat(jnp.sum(tables < pool, axis=1) * blocks.page_size, blocks.tiles)
    ends = jnp.minimum(starts + blocks.queries, held)
    seen_from = jnp.zeros_like(starts) if blocks.window is None else jnp.maximum(starts - blocks.window + 1, 0)
    first = jnp.minimum(seen_from, jnp.maximum(ends - 1, 0)) // blocks.slots
    # At least one, which writes the row's result.
    last = jnp.maximum(-(-ends // blocks.slots) - 1, first)
    behind = jnp.cumsum(last - first + 1)
    steps = jnp.arange(rows * -(-blocks.width // blocks.pages))
    row_of = jnp.minimum(jnp.sum(steps[:, None] >= behind, axis=1), rows - 1)
    block_of = last[row_of] - (behind[row_of] - 1 - steps)
    pages = jnp.clip(tables, 0, pool - 1).reshape(-1)
    scalars = (behind[-1], row_of, block_of, first, last, starts, ends, pages)
    return tuple(scalar.astype(jnp.int32) for scalar in scalars)


def _by_kv_head(q: Array, kv_heads: int, blocks: Blocks) -> Array:
    """Queries ``[B, T, N, H]`` as ``[rows, K, R, H]``: those that share a kv head are rows of one product."""
    b, t, n, h = q.shape
    padded = jnp.pad(q, ((0, 0), (0, blocks.tiles * blocks.queries - t), (0, 0), (0, 0)))
    parts = padded.reshape(b, blocks.tiles, blocks.queries, kv_heads, n // kv_heads, h).transpose(0, 1, 3, 4, 2, 5)
    grouped = parts.reshape(b * blocks.tiles, kv_heads, -1, h)
    return jnp.pad(grouped, ((0, 0), (0, 0), (0, -grouped.shape[2] % SUBLANES), (0, 0)))


def _by_query(out: Array, shape: tuple[int, ...], blocks: Blocks) -> Array:
    """``_by_kv_head``, undone."""
    (b, t, n, h), kv_heads = shape, out.shape[1]
    group = n // kv_heads
    parts = out[:, :, : group * blocks.queries].reshape(b, blocks.tiles, kv_heads, group, blocks.queries, h)
    return parts.transpose(0, 1, 4, 2, 3, 5).reshape(b, -1, n, h)[:, :t]


def _scalar_bytes(q_shape: tuple[int, ...], slots: PagedSlots) -> int:
    rows, queries, heads, _ = q_shape
    width = slots.tables.shape[1]
    tiles = -(-queries // query_tile(queries, heads))
    # A table for each row; for each step its row and block; and four numbers a row of the grid.
    return 4 * rows * (width + tiles * (2 * width + 4))


def _values(slots: Slots) -> Any:
    return slots.values if isinstance(slots, QuantizedSlots) else slots
