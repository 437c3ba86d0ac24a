"""Engine configuration: sizes and limits."""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from jllm_runtime.cache.contiguous import KV_DTYPES, PREFILL_CHUNK, KVDtype, cache_dtype
from jllm_runtime.cache.paged import page_bytes, pages_info
from jllm_runtime.errors import EngineError
from jllm_runtime.model import Model
from jllm_runtime.programs.contiguous_batch import DECODE_BLOCK

CPU_PAGES_BITS, PAGES_BITS = 2, 4
"""Significant bits of a number of pages that follows from the free memory, which costs at most a third or a ninth of
it. All that a machine does changes what is free there for a CPU; elsewhere only what the process itself has put there.
"""

MEMORY_FILE = Path("/proc/meminfo")
"""Linux's account of the memory."""


@dataclass(frozen=True)
class EngineConfig:
    """Sizes and limits of an engine.

    Attributes:
        max_batch: most sequences (answers) that are computed at a time; others wait.
        page_size: tokens in a page of the cache, which is also the chunk of prefill. 64 suits a CPU; 256 keeps an
            accelerator busier. The same prompt has the same bits only with the same size.
        pages: pages of the cache. None takes what half of the memory that is free on the device holds, a quarter on a
            CPU, rounded down, and at most what ``max_batch`` texts as long as the context need. Each number of pages
            has programs of its own, so it is rounded to few: on a CPU to two significant bits (2, 3, 4, 6, 8, 12, ...),
            elsewhere, where the free memory is nearly the same at every start, to four.
        step_tokens: most prompt tokens that are computed in one step of the engine, before its decode.
        decode_steps: most tokens of each sequence in one step of the engine.
        batch_sizes: numbers of rows that programs are compiled for, the last at least ``max_batch``. None takes those
            among which a row is computed to the same bits: on a CPU powers of two, from 1 where our kernels run, else
            from where XLA's reductions have one order (4 for a width of 1,024); elsewhere ``max_batch`` alone. Smaller
            ones answer a lone request sooner on a CPU, and may round it otherwise than among others.
        max_queue: most sequences that may wait; None is no limit.
        kv_dtype: dtype of cached keys and values: ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"int8"`` (with a
            scale for each token and head); that of the activations when None. Fewer bits make room for more pages, and
            change the answers a little.

    Raises:
        EngineError: a value that is impossible.
    """

    max_batch: int = 16
    page_size: int = PREFILL_CHUNK
    pages: int | None = None
    step_tokens: int = PREFILL_CHUNK
    decode_steps: int = 4
    batch_sizes: tuple[int, ...] | None = None
    max_queue: int | None = None
    kv_dtype: KVDtype | None = None

    def __post_init__(self) -> None:
        for name in ("max_batch", "page_size", "pages", "step_tokens", "decode_steps", "max_queue"):
            value = getattr(self, name)
            if value is None and name in ("pages", "max_queue"):
                continue
            # A bool is an int in Python, and `pages=True` is a mistake.
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise EngineError(f"{name} must be a whole number, 1 or above, got {value!r}")
        if self.page_size & (self.page_size - 1):
            raise EngineError(f"page_size must be a power of two, got {self.page_size}")
        if self.decode_steps > DECODE_BLOCK:
            raise EngineError(f"decode_steps must be at most {DECODE_BLOCK}, got {self.decode_steps}")
        if self.kv_dtype is not None and self.kv_dtype not in KV_DTYPES:
            raise EngineError(f"kv_dtype must be one of {', '.join(KV_DTYPES)}, or None, got {self.kv_dtype!r}")
        sizes = self.batch_sizes
        if sizes is not None and (not sizes or min(sizes) < 1 or max(sizes) < self.max_batch):
            raise EngineError(f"batch_sizes must reach max_batch ({self.max_batch}), got {sizes}")

    def sizes(self, model: Model) -> tuple[int, ...]:
        """Numbers of rows that the decode program is compiled for, smallest first."""
        if self.batch_sizes is not None:
            return tuple(sorted(self.batch_sizes))
        largest = _power_of_two(self.max_batch)
        smallest = model.backend.min_exact_batch
        if smallest is None:
            return (largest,)
        return tuple(1 << power for power in range(smallest.bit_length() - 1, largest.bit_length())) or (largest,)

    def page_count(self, model: Model) -> int:
        """Number of pages of the cache for this model."""
        if self.pages is not None:
            return self.pages
        # More than `enough` pages would serve nobody but the prefix cache.
        one = page_bytes(model.config, self.page_size, self.cache_dtype(model), model.placement)
        enough = self.max_batch * -(-model.config.context_length // self.page_size)
        spare, is_cpu = _spare_bytes(model) // one, model.mesh.devices.flat[0].platform == "cpu"
        return max(1, min(enough, _rounded_down(spare, CPU_PAGES_BITS if is_cpu else PAGES_BITS)))

    def cache_dtype(self, model: Model) -> jnp.dtype:
        """Dtype of the cached keys and values."""
        return cache_dtype(model.weights.gamma_final.dtype, self.kv_dtype)


def _power_of_two(count: int) -> int:
    """Smallest power of two that is at least ``count``."""
    return 1 << (count - 1).bit_length()


def _rounded_down(count: int, bits: int) -> int:
    """Largest number that is at most ``count`` and has so many significant bits."""
    rest = max(count.bit_length() - bits, 0)
    return count >> rest << rest


def _spare_bytes(model: Model) -> int:
    """Bytes that a cache may take on all devices together: half of what is free, a quarter where that is a CPU's.

    The other half is for activations and programs. A CPU's memory is shared with other processes as well.
    """
    device = next(device for device in model.mesh.devices.flat if device.process_index == jax.process_index())
    stats = device.memory_stats() or {}
    if device.platform != "cpu" and "bytes_limit" in stats:
        free = int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
        return free // 2 * _parts(model)
    # The devices of a CPU share the memory of one machine.
    return _available_memory() // 4 * _parts(model) // len(model.mesh.local_devices)


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
