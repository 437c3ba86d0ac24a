"""The engine's sizes on a machine: pages of its pool, and the rows and tables of its programs."""

from dataclasses import replace

import jax.numpy as jnp
from jllm_core.backends.select import select_backend
from jllm_core.config import ModelConfig
from jllm_core.sharding import Placement

from jllm_runtime.cache.descriptions import described_slots
from jllm_runtime.cache.paged import chunk_pages, least_page_size, pages_info, rounded_down, shortest_table, table_width
from jllm_runtime.cache.snapshots import snapshot_count
from jllm_runtime.cache.state_pool import state_pool_info
from jllm_runtime.planner.memory import (
    FLOAT32,
    SAMPLING_ARRAYS,
    Memory,
    Workload,
    bytes_per_device,
    delta_net_code,
    delta_net_temporaries,
    local_size,
    weights_info,
)
from jllm_runtime.planner.topologies import Device
from jllm_runtime.programs.paged_sizes import PagedSizes, reserved_bytes

# Values of the engine's own modules, which a plan does not import. Tests compare them.
DEFAULT_PAGE_SIZE, DECODE_STEPS, EOS_IDS, PAGES_BITS = 64, 4, 8, 4
SHARE, USABLE = 0.9, 0.97
"""Parts of the free memory that an engine gives to its pool, and to pool and programs together."""


def engine_sizes(
    config: ModelConfig,
    workload: Workload,
    placement: Placement,
    device: Device,
    page_size: int = DEFAULT_PAGE_SIZE,
    pages: int | None = None,
) -> PagedSizes:
    """The sizes with which an engine of ``workload.batch`` rows would run when its texts reach ``workload.context``.

    Args:
        config: the model.
        workload: rows, context and types.
        placement: how the model is laid out.
        device: the machine's device.
        page_size: tokens in a page.
        pages: pages of the pool; None for as many as the engine takes by itself.
    """
    backend = select_backend(weights_info(config, workload, placement), config, placement)
    page_size = max(page_size, least_page_size(config, workload.cache_dtype, backend))
    sizes = PagedSizes(
        rows=workload.rows,
        # More would serve nobody but the prefix cache.
        pages=workload.batch * -(-config.context_length // page_size),
        page_size=page_size,
        table_width=table_width(-(-workload.context // page_size), shortest_table(backend, config, page_size)),
        chunk_pages=chunk_pages(backend, config, page_size),
        state_rows=workload.batch,
        snapshots=0,
        decode_steps=DECODE_STEPS,
        eos_ids=EOS_IDS,
    )
    memory, one = (
        engine_estimate(config, workload, placement, sizes),
        page_bytes(config, workload, placement, page_size),
    )
    free, taken = device.usable_bytes - memory.weights, one * (pages or 0)
    each = bytes_per_device(state_pool_info(config, 1), placement)
    sizes = replace(sizes, snapshots=snapshot_count(workload.batch, each, int(free * SHARE) - memory.states, taken))
    if pages is None:
        states = memory.states + each * sizes.snapshots
        reserved = reserved_bytes(config, workload.batch, jnp.dtype(workload.dtype), placement)
        room = min(int(free * SHARE) - states, int((free - states) * USABLE) - memory.temp - reserved)
        pages = max(1, min(sizes.pages, rounded_down(max(room, 0) // one, PAGES_BITS)))
    return replace(sizes, pages=pages)


def engine_estimate(config: ModelConfig, workload: Workload, placement: Placement, sizes: PagedSizes) -> Memory:
    """What an engine of these sizes needs on each device, without asking a compiler."""
    pool = sizes.pages * page_bytes(config, workload, placement, sizes.page_size)
    states, snapshots = (
        bytes_per_device(state_pool_info(config, rows), placement) for rows in (sizes.state_rows, sizes.snapshots)
    )
    temporaries = {
        "prefill": _temporaries(config, workload, placement, sizes, sizes.chunk_pages, sizes.page_size),
        "decode": _temporaries(config, workload, placement, sizes, sizes.rows, 1),
    }
    weights = bytes_per_device(weights_info(config, workload, placement), placement)
    return Memory(weights, pool, temporaries, states, snapshots)


def _temporaries(
    config: ModelConfig, workload: Workload, placement: Placement, sizes: PagedSizes, rows: int, tokens: int
) -> int:
    """What a program holds besides weights and pages: as ``memory`` has it for the contiguous cache, with a copy of the
    pages of all tables where attention wants one."""
    slots, size = sizes.table_width * sizes.page_size, int(jnp.dtype(workload.dtype).itemsize)
    backend = select_backend(weights_info(config, workload, placement), config, placement)
    attention = 0
    if not backend.one_table_width:
        gathered = pages_info(config, rows * sizes.table_width, sizes.page_size, workload.cache_dtype, placement)
        scores = rows * tokens * local_size(config.num_heads, "heads", placement) * slots * (FLOAT32 + size)
        attention = 2 * bytes_per_device(gathered, placement) + scores
    width = max(
        config.intermediate_size, config.moe.intermediate_size * config.moe.experts_per_token if config.moe else 0
    )
    feed_forward = 2 * rows * tokens * local_size(width, "ffw", placement) * size
    # A chunk of prefill has no logits.
    logits = SAMPLING_ARRAYS * rows * local_size(config.vocab_size, "vocab", placement) * FLOAT32 if tokens == 1 else 0
    recurrence = delta_net_temporaries(config, rows, tokens, placement)
    residual = 3 * rows * tokens * config.hidden_size * size
    return residual + delta_net_code(config, tokens, placement) + max(attention, feed_forward, logits, recurrence)


def largest_batch(config: ModelConfig, workload: Workload, placement: Placement, sizes: PagedSizes) -> int:
    """Texts of the workload's context that the memory of pages, states and snapshots holds, each text with the states
    of its own and a snapshot."""
    one = page_bytes(config, workload, placement, sizes.page_size)
    state = bytes_per_device(state_pool_info(config, 1), placement)
    room = sizes.pages * one + (sizes.state_rows + sizes.snapshots) * state
    return room * sizes.page_size // (workload.context * one + 2 * state * sizes.page_size)


def page_bytes(config: ModelConfig, workload: Workload, placement: Placement, page_size: int) -> int:
    """Bytes of a page's keys and values in all layers of attention, on one device."""
    info = pages_info(config, 1, page_size, workload.cache_dtype, placement)
    return config.kv_arrays * bytes_per_device(described_slots(info), placement)


def live_bytes(config: ModelConfig, workload: Workload, placement: Placement, rows: int | None = None) -> int:
    """Bytes of the keys and values of all rows at the end of the context, on one device, those of a layer with a
    window within it: what attention of a step must read.

    Args:
        config: the model.
        workload: context and types.
        placement: how the model is laid out.
        rows: rows of the program; None for those of the workload, split over the mesh.
    """
    local = local_size(workload.rows, "batch", placement) if rows is None else rows
    token = bytes_per_device(described_slots(pages_info(config, 1, 1, workload.cache_dtype, placement)), placement)
    windows = [config.window(layer) for layer in config.layers_with("attention")]
    return 2 * local * token * sum(min(workload.context, window or workload.context) for window in windows)
