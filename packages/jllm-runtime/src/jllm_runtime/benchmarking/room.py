"""Whether a device has room for what is to be measured."""

import os
from collections.abc import Iterable

from jllm_runtime.benchmarking.cases import Case
from jllm_runtime.benchmarking.traffic import local_bytes
from jllm_runtime.cache.contiguous import cache_capacity, cache_info
from jllm_runtime.errors import RequestError
from jllm_runtime.loading import Model
from jllm_runtime.planner.memory import bytes_per_device


def check_room(model: Model, cases: Iterable[Case]) -> None:
    """Refuse a case whose cache does not fit beside the weights, before anything is measured.

    Raises:
        RequestError: such a case, with the numbers.
    """
    device = model.mesh.devices.flat[0]
    devices = 1
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        # Devices of the CPU share the machine's memory.
        available, devices = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), model.mesh.size
    elif limit := (device.memory_stats() or {}).get("bytes_limit"):
        available = limit
    else:
        return
    weights = devices * local_bytes(model.weights)
    for case in cases:
        cache = devices * cache_bytes(model, case)
        if weights + cache > available:
            raise RequestError(
                f"{case.name}: the cache needs {cache / 2**30:.1f} GiB beside {weights / 2**30:.1f} GiB of weights on "
                f"{device.device_kind}, which has {available / 2**30:.1f} GiB; ask for a smaller batch or context"
            )


def cache_bytes(model: Model, case: Case) -> int:
    """Bytes on each device of the larger of the case's two caches."""
    tokens = max(case.prompt_tokens + 1, case.context + case.decode_tokens)
    capacity = cache_capacity(tokens, model.config.context_length)
    info = cache_info(model.config, case.rows, capacity, model.weights.dtype, model.placement)
    return 2 * model.config.num_layers * bytes_per_device(info, model.placement)
