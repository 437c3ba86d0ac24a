"""The kernels for attention on TPUs, compiled by libtpu for machines that are not there, in the shapes of published
models. Part of ``hatch run plan:test``.

What Mosaic refuses (an array that does not lie in whole tiles, too much vector or scalar memory) shows only here: the
interpreter of the other tests takes everything.
"""

import math
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jllm_core.backends.tpu import paged_attention, pallas_attention
from jllm_core.backends.tpu.backend import TPU
from jllm_core.kv_cache import PagedSlots
from jllm_core.quantization.keys_values import QuantizedSlots
from jllm_core.sharding import Placement
from jllm_runtime.mesh import make_mesh
from jllm_runtime.planner.compile_worker import tpu_devices
from jllm_runtime.planner.hlo_account import account
from jllm_runtime.planner.topologies import TOPOLOGIES

POOL = 3000
"""Pages: those of a device are more than its vector memory holds, or fewer."""

HEADS = {  # query heads, kv heads, features
    "0.6B": (16, 8, 128),
    "4B and 8B": (32, 8, 128),
    "14B": (40, 8, 128),
    "32B": (64, 8, 128),
    "30B-A3B": (32, 4, 128),
    "235B-A22B": (64, 4, 128),
    "Qwen2.5-0.5B": (14, 2, 64),
    "Llama-3.2-1B": (32, 8, 64),
    "Phi-3": (32, 32, 96),
    "heads of 256": (16, 8, 256),
}


@cache
def placement_of(topology: str) -> Placement:
    target = TOPOLOGIES[topology].target
    assert target is not None
    return Placement(make_mesh(None, tpu_devices(target)))


def described(placement: Placement, shape: tuple[int, ...], dtype: Any, *axes: str | None) -> Any:
    spec = placement.spec(shape, *axes) if axes else PartitionSpec()
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(placement.mesh, spec))


def check(topology: str, model: str, rows: int, queries: int, page: int, context: int, **types: Any) -> None:
    """Compile the kernel, and see that it is one, and that it reads the pool where it lies."""
    placement, (heads, kv_heads, features) = placement_of(topology), HEADS[model]
    kv_heads *= placement.kv_copies(heads, kv_heads)
    dtype, window = types.get("dtype", jnp.bfloat16), types.get("window")
    shape = (POOL, kv_heads, page, features)
    pool = described(placement, shape, types.get("kv", dtype), *paged_attention.POOL_AXES)
    if pool.dtype == jnp.int8:
        scales = described(placement, shape[:3], jnp.float32, *paged_attention.POOL_AXES[:3])
        pool = QuantizedSlots(pool, scales)
    q = described(placement, (rows, queries, heads, features), dtype, *paged_attention.QUERY_AXES)
    tables = described(placement, (rows, context // page), jnp.int32)
    positions = described(placement, (rows, queries), jnp.int32)

    def attend(q: jax.Array, keys: Any, values: Any, tables: jax.Array, positions: jax.Array) -> jax.Array:
        slots = [PagedSlots(pages, tables) for pages in (keys, values)]
        return TPU(placement).attention(q, *slots, positions, None, window)

    compiled = jax.jit(attend).lower(q, pool, pool, tables, positions).compile()
    hlo, memory = compiled.as_text() or "", compiled.memory_analysis()
    assert memory is not None
    assert hlo.count('custom_call_target="tpu_custom_call"') == 1
    # Neither pages nor scales are made anew.
    made = [array for each in account(hlo).operations for array in each.made]
    assert all(array.dims[:1] != (POOL,) for array in made)
    queried = math.prod(q.sharding.shard_shape(q.shape)) * q.dtype.itemsize
    print(f"\n{topology} {model}: {memory.temp_size_in_bytes / 2**20:.1f} MiB")
    assert memory.temp_size_in_bytes <= 4 * queried + 12 * 2**20


@pytest.mark.parametrize("topology", ["v5e-1", "v5e-8", "v6e-1", "v6e-8", "v4-8"])
@pytest.mark.parametrize("model", ["0.6B", "4B and 8B", "14B", "32B", "30B-A3B"])
@pytest.mark.parametrize(("rows", "queries", "page"), [(64, 1, 64), (16, 1, 128), (16, 64, 64), (8, 128, 128)])
def test_decode_and_prefill_of_long_texts(topology: str, model: str, rows: int, queries: int, page: int) -> None:
    check(topology, model, rows, queries, page, 32768)


@pytest.mark.parametrize("topology", ["v5e-1", "v6e-8"])
@pytest.mark.parametrize("context", [1024, 8192])
@pytest.mark.parametrize("rows", [16, 64])
def test_narrower_tables(topology: str, context: int, rows: int) -> None:
    check(topology, "4B and 8B", rows, 1, 64, context)


@pytest.mark.parametrize("topology", ["v5e-1", "v6e-8", "v4-8"])
@pytest.mark.parametrize("queries", [1, 128])
@pytest.mark.parametrize(
    ("model", "types"),
    [
        ("4B and 8B", {"kv": jnp.int8}),
        ("14B", {"kv": jnp.int8}),
        ("14B", {"dtype": jnp.float32}),
        ("4B and 8B", {"window": 4096}),
        ("235B-A22B", {"window": 1000}),
        ("Llama-3.2-1B", {}),
        ("Phi-3", {}),
        ("heads of 256", {}),
    ],
)
def test_other_types_windows_and_heads(topology: str, queries: int, model: str, types: dict[str, Any]) -> None:
    check(topology, model, 16, queries, 128, 8192, **types)


@pytest.mark.parametrize("queries", [1, 128])
def test_two_kv_heads_of_64(queries: int) -> None:
    check("v5e-1", "Qwen2.5-0.5B", 16, queries, 128, 8192)


@pytest.mark.parametrize("topology", ["v5e-1", "v6e-1"])
@pytest.mark.parametrize(
    ("kv_heads", "group", "chunk"), [(8, 4, 1024), (1, 16, 256), (2, 16, 1024), (1, 5, 512), (4, 7, 512)]
)
def test_splash_attention_takes_every_published_group(topology: str, kv_heads: int, group: int, chunk: int) -> None:
    placement = Placement(make_mesh(None, list(placement_of(topology).mesh.devices.flat)[:1]))
    q = described(placement, (1, chunk, kv_heads * group, 128), jnp.bfloat16)
    cache = described(placement, (1, kv_heads, 8192, 128), jnp.bfloat16)
    positions = described(placement, (1, chunk), jnp.int32)
    attend = partial(pallas_attention.attention, window=None, placement=placement)
    jax.jit(attend).lower(q, cache, cache, positions).compile()
