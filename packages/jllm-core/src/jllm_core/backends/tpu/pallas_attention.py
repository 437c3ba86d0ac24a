"""Pallas attention: the kernels that JAX ships for TPUs, over a contiguous cache ``[B, K, S, H]``.

Several queries a row (prefill) go through splash attention, which never writes the scores to memory and skips blocks
that no query sees; a single one (decode) through paged attention, which reads only the slots that are filled. For both,
the slots of a row and kv head are one piece of memory, so the cache is taken as it lies.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jllm_core.ops.attention import visible
from jllm_core.sharding import Placement

DEVICE_KINDS = ("TPU v5 lite", "TPU v6 lite")
"""Devices that these kernels compile for. Mosaic, in which they are written, does not know TPU v2 and v3."""

SUBLANES, LANES = 8, 128
BLOCKS = (512, 256, 128)
"""Slots that are fetched at a time: the largest of these that divides the capacity."""

MAX_QUERIES = 1024
"""Queries that are taken at a time; at 4,096, their scores overflow the vector memory of a v5e."""

QUERY_AXES = ("batch", None, "heads", None)
CACHE_AXES = ("batch", "kv_heads", "sequence", None)


def supports(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], dtype: Any, window: int | None, placement: Placement
) -> bool:
    """Whether ``attention`` below takes queries ``[B, T, N, H]`` and keys ``[B, K, S, H]`` of these shapes.

    The kernels work in bfloat16 on whole lanes and blocks; each device needs the kv heads of its query heads, and all
    of their slots. Paged attention knows no window.
    """
    batch, _, heads, _ = placement.spec(q_shape, *QUERY_AXES)
    return (
        placement.device_kind in DEVICE_KINDS
        and dtype == jnp.bfloat16
        and q_shape[3] % LANES == 0
        and k_shape[2] % BLOCKS[-1] == 0
        and (window is None or q_shape[1] > 1)
        and tuple(placement.spec(k_shape, *CACHE_AXES)) == (batch, heads, None, None)
    )


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    positions: Int[Array, "B T"],
    window: int | None,
    placement: Placement,
) -> Float[Array, "B T N H"]:
    """``ops.attention.attention`` over slots that stand at their own numbers, on each device for its own heads.

    Args:
        q: queries; where there are several a row, they stand at the same positions in every row.
        k: keys; slot s holds position s.
        v: values.
        positions: where in its text each query stands.
        window: how many positions a query sees; None is all that came before.
        placement: the mesh; XLA cannot split a kernel over it by itself.
    """
    one = q.shape[1] == 1
    local = decode_attention if one else partial(prefill_attention, window=window)
    queries, cache = placement.spec(q.shape, *QUERY_AXES), placement.spec(k.shape, *CACHE_AXES)
    rows = placement.spec(positions.shape, "batch", None)
    split = placement.shard_map(local, (queries, cache, cache, rows), queries)
    attended: Array = split(q, k, v, positions)
    return attended


def prefill_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    positions: Int[Array, "B T"],
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """Splash attention. All rows see the same, so a kv head of a row is a head; the query heads that share it are taken
    as further queries of it, so that its keys are read once."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    b, t, n, h = q.shape
    kv_heads, slots = k.shape[1:3]
    group = n // kv_heads
    seen = visible(positions[:1], jnp.arange(slots)[None], window)
    kernel = splash.make_splash_mha(
        jnp.tile(seen, (1, group, 1)),
        block_sizes=splash.BlockSizes(block_q=query_block(group * t), block_kv=_block(slots)),
        head_shards=1,
        q_seq_shards=1,
    )
    # Inside a trace this flag, too, has become an array, and JAX 0.10 asks whether it is true.
    kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
    grouped = jnp.moveaxis(q.reshape(b, t, kv_heads, group, h), 1, 3).reshape(b * kv_heads, group * t, h)
    out = kernel(_scaled(grouped), k.reshape(-1, slots, h), v.reshape(-1, slots, h))
    return jnp.moveaxis(out.reshape(b, kv_heads, group, t, h), 3, 1).reshape(b, t, n, h)


def decode_attention(
    q: Float[Array, "B 1 N H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"], positions: Int[Array, "B 1"]
) -> Float[Array, "B 1 N H"]:
    """Paged attention. Each row and kv head is a sequence of its own, whose pages lie one after another."""
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    b, _, n, h = q.shape
    kv_heads, slots = k.shape[1:3]
    sequences, page = b * kv_heads, _block(slots)
    # Rows that have ended may stand anywhere.
    lengths = jnp.repeat(jnp.clip(positions[:, 0] + 1, 1, slots), kv_heads)
    out = paged_attention(
        _scaled(q).reshape(sequences, n // kv_heads, h),
        k.reshape(1, -1, page, h),
        v.reshape(1, -1, page, h),
        lengths.astype(jnp.int32),
        jnp.arange(sequences * slots // page, dtype=jnp.int32).reshape(sequences, -1),
        pages_per_compute_block=1,
    )
    attended: Array = out.reshape(b, 1, n, h)
    return attended


def query_block(queries: int) -> int:
    """Queries that the kernel for prompts takes at a time, of so many that share a kv head."""
    # Of all of them, the scores of a block would fill the vector memory.
    fitting = [size for size in range(SUBLANES, MAX_QUERIES + 1, SUBLANES) if queries % size == 0]
    return max(fitting, default=queries)


def _block(slots: int) -> int:
    return next(block for block in BLOCKS if slots % block == 0)


def _scaled(q: Array) -> Array:
    """``q / sqrt(H)``, which the kernels leave to their callers."""
    scaled: Array = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    return scaled
