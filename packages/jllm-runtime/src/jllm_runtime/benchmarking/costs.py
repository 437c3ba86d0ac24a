"""Costs of a benchmark case on each device: bytes read, FLOPs, memory.

Decoding is compared with the bandwidth of the memory, prefill with the peak of the arithmetic (Williams et al.,
Roofline, CACM 52(4), 2009).
"""

import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

import jax
from jllm_core.array_info import array_bytes
from jllm_core.config import ModelConfig

from jllm_runtime.benchmarking.cases import Case
from jllm_runtime.cache.contiguous import cache_capacity, cache_info
from jllm_runtime.errors import RequestError
from jllm_runtime.model import Model
from jllm_runtime.planner.memory import bytes_per_device, local_size, states_info
from jllm_runtime.planner.roofline import expert_matrices, multiplied_elements, touched_experts


def bytes_of_decode(model: Model, case: Case) -> int:
    """The least that each device reads in all decode steps of a case.

    Each step reads all weights, but only a few rows of an untied embedding, and only the experts that tokens are
    expected to go to; the filled part of the cache, which grows by one position in each step; and recurrent states,
    which it writes as well.
    """
    weights, config = model.weights, model.config
    read = local_bytes(weights)
    # An untied embedding is only looked up; a tied one is read in full, as the head.
    if weights.lm_head is not None:
        read -= local_bytes(weights.embedding)
    if config.moe is not None:
        read -= int((1 - touched_experts(config.moe, case.batch)) * local_bytes(expert_matrices(weights)))
    position = cache_info(config, case.batch, 1, weights.dtype, model.placement)
    positions = _attended_positions(config, range(case.context, case.context + case.decode_tokens))
    states = 2 * bytes_per_device(states_info(config, case.batch), model.placement)
    return case.decode_tokens * (read + states) + 2 * positions * bytes_per_device(position, model.placement)


def flops_of_prefill(model: Model, case: Case) -> int:
    """FLOPs of each device from the prompts to their first tokens, a multiply-add counted as two.

    All matrices for each token, but the head for the last token only; and attention from each token to itself and those
    before it.
    """
    config, placement = model.config, model.placement
    # Only the last token of a prompt needs logits.
    head = local_size(config.vocab_size, "vocab", placement) * config.hidden_size
    layers = multiplied_elements(config, placement) - head
    heads = local_size(config.num_heads, "heads", placement)
    # Scores and weighted sum of values: a multiply-add of head_dim numbers each.
    attention = 4 * heads * config.head_dim * _attended_positions(config, range(case.prompt_tokens))
    rows = local_size(case.batch, "batch", placement)
    return rows * (2 * case.prompt_tokens * layers + 2 * head + attention)


def _attended_positions(config: ModelConfig, positions: range) -> int:
    """Number of keys that the tokens at these positions attend to, themselves included, over all layers that do."""
    windows = [config.window(layer) for layer in config.layers_with("attention")]
    return sum(
        count * sum(min(position + 1, window or position + 1) for position in positions)
        for window, count in Counter(windows).items()
    )


def local_bytes(tree: Any) -> int:
    """Bytes that arrays take on one of their devices."""
    return sum(array_bytes(array.sharding.shard_shape(array.shape), array.dtype) for array in jax.tree.leaves(tree))


def check_memory(model: Model, cases: Iterable[Case]) -> None:
    """Refuse cases whose cache does not fit beside the weights, before anything is measured.

    Raises:
        RequestError: a case that does not fit, with the numbers.
    """
    device = model.mesh.devices.flat[0]
    devices = 1
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        # Several CPU devices (--xla_force_host_platform_device_count) share the machine's memory.
        available, devices = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), model.mesh.size
    elif limit := (device.memory_stats() or {}).get("bytes_limit"):
        available = limit
    else:
        return
    # On the CPU the devices' shares add up in one memory; elsewhere each device has its own.
    weights = devices * local_bytes(model.weights)
    for case in cases:
        cache = devices * cache_bytes(model, case)
        if weights + cache > available:
            raise RequestError(
                f"{case.name}: the cache needs {cache / 2**30:.1f} GiB beside {weights / 2**30:.1f} GiB of weights on "
                f"{device.device_kind}, which has {available / 2**30:.1f} GiB; ask for a smaller batch or context"
            )


def cache_bytes(model: Model, case: Case) -> int:
    """Bytes on each device of a case's cache and states: the larger of those of prefill and decode."""
    # A prefill has room for the first token, which is not decoded.
    tokens = max(case.prompt_tokens + 1, case.context + case.decode_tokens)
    capacity = cache_capacity(tokens, model.config.context_length)
    info = cache_info(model.config, case.rows, capacity, model.weights.dtype, model.placement)
    states = bytes_per_device(states_info(model.config, case.rows), model.placement)
    # Keys and values.
    return model.config.kv_arrays * bytes_per_device(info, model.placement) + states
