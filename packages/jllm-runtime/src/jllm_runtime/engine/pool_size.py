"""Number of pages in an engine's pool: what the free memory of the devices holds.

Each number of pages has programs of its own, so it is rounded to few.
"""

import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from jllm_runtime.cache.paged import page_bytes, pages_info, rounded_down
from jllm_runtime.cache.snapshots import snapshot_count
from jllm_runtime.cache.state_pool import state_pool_info
from jllm_runtime.errors import EngineError
from jllm_runtime.model import Model

CPU_PAGES_BITS, PAGES_BITS = 2, 4
"""Significant bits of the number, which cost at most a third or a ninth of the memory. All that a machine does changes
what is free there for a CPU; elsewhere only what the process itself has put there."""

CPU_SHARE, SHARE, FITTED_SHARE = 0.25, 0.5, 0.9
"""Parts of the free memory for the pool. The rest is for activations and programs; a CPU's memory is shared with other
processes as well. The last is where the programs are compiled first, so that what they need is known."""

USABLE = 0.97
"""Part of an accelerator's free memory that pool and programs may fill together: it comes in pieces."""

MEMORY_FILE = Path("/proc/meminfo")
"""Linux's account of the memory."""

Needs = Callable[[int], int | None]
"""From a number of pages to the bytes that the programs need on a device beside their arguments; None: too many."""


def pool_pages(model: Model, page_size: int, dtype: jnp.dtype, state_rows: int = 0, fitted: bool = False) -> int:
    """Pages that the free memory has room for, beside the states of the delta nets.

    Args:
        model: the model.
        page_size: tokens in a page.
        dtype: of the cached keys and values.
        state_rows: sequences whose states are kept, and snapshots.
        fitted: whether ``fitted_pages`` looks at it again.

    Raises:
        EngineError: the states leave no room for a page.
    """
    one = page_bytes(model.config, page_size, dtype, model.placement)
    is_cpu = model.mesh.devices.flat[0].platform == "cpu"
    states = device_state_bytes(model, state_rows)
    spare = _spare_bytes(model, fitted, states)
    if states and spare < one:
        raise states_refused(states, state_rows)
    return max(1, rounded_down(max(spare, 0) // one, CPU_PAGES_BITS if is_cpu else PAGES_BITS))


def pool_snapshots(model: Model, state_rows: int, taken: int = 0, fitted: bool = False) -> int:
    """Snapshots of states that an engine of so many state rows keeps by itself (``cache/snapshots``).

    Args:
        model: the model.
        state_rows: sequences whose states are kept.
        taken: bytes on a device of pages whose number is given.
        fitted: as ``pool_pages`` has it.
    """
    spare = _spare_bytes(model, fitted, device_state_bytes(model, state_rows)) // _parts(model)
    return snapshot_count(state_rows, device_state_bytes(model, 1), spare, taken)


def states_refused(states: int, state_rows: int) -> EngineError:
    """The error for states that leave no room for pages."""
    return EngineError(
        f"the states of {state_rows:,} texts, those in snapshots included, take {states / 2**20:,.0f} MiB of each "
        "device's memory, and leave no room for pages; give the engine a smaller max_batch or fewer snapshots"
    )


def fitted_pages(pages: int, one: int, free: int, needs: Needs, fixed: bool = False) -> int:
    """The number of pages that leaves room for what the programs need.

    Args:
        pages: to begin with.
        one: bytes of a page on a device.
        free: bytes that are free on a device.
        needs: asks the compiler.
        fixed: whether this very number was asked for.

    Raises:
        EngineError: there is no room, for this number where it is fixed, or for a single page.
    """
    wanted = pages
    while True:
        needed = needs(pages)
        room = pages // 2 if needed is None else (int(free * USABLE) - needed) // one
        if needed is not None and pages <= room:
            return pages
        if fixed or room < 1:
            programs = "more than there is" if needed is None else f"{needed / 2**20:,.0f} MiB"
            raise EngineError(
                f"{wanted:,} pages of {one / 2**20:,.1f} MiB and the programs ({programs}) do not fit in the "
                f"{free / 2**20:,.0f} MiB that are free on each device; give the engine fewer pages, a smaller "
                "max_batch or chunk_tokens, or quantise the model"
            )
        pages = rounded_down(min(room, pages - 1), PAGES_BITS)


def free_bytes(model: Model) -> int | None:
    """Bytes that are free on each device; None where the device does not say, as a CPU."""
    device = next(device for device in model.mesh.devices.flat if device.process_index == jax.process_index())
    stats = device.memory_stats() or {}
    if device.platform == "cpu" or "bytes_limit" not in stats:
        return None
    return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))


def device_page_bytes(model: Model, page_size: int, dtype: jnp.dtype) -> int:
    """Bytes of a page on one device."""
    return page_bytes(model.config, page_size, dtype, model.placement) // _parts(model)


def device_state_bytes(model: Model, state_rows: int) -> int:
    """Bytes of the states of so many sequences on one device; 0 where the model has no delta nets."""
    return sum(
        math.prod(model.rules.sharding(info, model.mesh).shard_shape(info.shape)) * info.dtype.itemsize
        for info in jax.tree.leaves(state_pool_info(model.config, state_rows))
    )


def _spare_bytes(model: Model, fitted: bool = False, states: int = 0) -> int:
    """Bytes that a pool may take on all devices together, beside so many of states on each."""
    if (free := free_bytes(model)) is not None:
        return (int(free * (FITTED_SHARE if fitted else SHARE)) - states) * _parts(model)
    # The devices of a CPU share the memory of one machine.
    return (int(_available_memory() * CPU_SHARE) // len(model.mesh.local_devices) - states) * _parts(model)


def _available_memory() -> int:
    """Bytes that this machine can still give to a process."""
    # What the system keeps files in counts, too: it gives that up when it is asked for memory. SC_AVPHYS_PAGES leaves
    # it out, and so is small after a large file (such as a checkpoint) was read.
    text = MEMORY_FILE.read_text() if MEMORY_FILE.exists() else ""
    if found := re.search(r"^MemAvailable: +(\d+) kB$", text, re.MULTILINE):
        return int(found[1]) * 1024
    # Without sysconf (Windows) nothing is known of the memory, and a small machine is assumed.
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4 * 2**30


def _parts(model: Model) -> int:
    """Number of parts that the mesh cuts the pages into. Copies, as along the data axis, are not counted."""
    info = pages_info(model.config, 1, 1, model.weights.gamma_final.dtype, model.placement)
    return math.prod(info.shape) // math.prod(model.rules.sharding(info, model.mesh).shard_shape(info.shape))
