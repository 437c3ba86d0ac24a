"""What a case must move and compute on each device, from the arrays as they lie there.

Decoding is held against the bandwidth of the memory, prefill against the arithmetic (Williams et al., Roofline,
CACM 52(4), 2009).
"""

import math
from collections import Counter
from typing import Any

import jax
from jllm_core.config import ModelConfig

from jllm_runtime.benchmarking.cases import Case
from jllm_runtime.cache.contiguous import cache_info
from jllm_runtime.loading import Model
from jllm_runtime.planner.memory import bytes_per_device, local_size
from jllm_runtime.planner.roofline import expert_matrices, multiplied_elements, touched_experts


def bytes_of_decode(model: Model, case: Case) -> int:
    """What each device cannot but read in all decode steps of a case.

    Each step reads every weight, but of an untied embedding only some rows, and of the experts those that a token goes
    to; and the filled part of the cache, which grows by a slot a step.
    """
    weights, config = model.weights, model.config
    read = local_bytes(weights)
    if weights.lm_head is not None:
        read -= local_bytes(weights.embedding)
    if config.moe is not None:
        read -= int((1 - touched_experts(config.moe, case.batch)) * local_bytes(expert_matrices(weights)))
    slot = cache_info(config, case.batch, 1, weights.dtype, model.placement)
    slots = _slots_seen(config, range(case.context, case.context + case.decode_tokens))
    return case.decode_tokens * read + 2 * slots * bytes_per_device(slot, model.placement)


def flops_of_prefill(model: Model, case: Case) -> int:
    """What each device computes from the prompts to their first tokens: the matrices for every token, but the head for
    the last one only, and attention from each token to those before it and itself."""
    config, placement = model.config, model.placement
    head = local_size(config.vocab_size, "vocab", placement) * config.hidden_size
    layers = multiplied_elements(config, placement) - head
    heads = local_size(config.num_heads, "heads", placement)
    attention = 4 * heads * config.head_dim * _slots_seen(config, range(case.prompt_tokens))
    rows = local_size(case.batch, "batch", placement)
    return rows * (2 * case.prompt_tokens * layers + 2 * head + attention)


def _slots_seen(config: ModelConfig, positions: range) -> int:
    """How many keys the tokens at these positions attend to, themselves among them, added up over all layers."""
    windows = [config.window(layer) for layer in range(config.num_layers)]
    return sum(
        count * sum(min(position + 1, window or position + 1) for position in positions)
        for window, count in Counter(windows).items()
    )


def local_bytes(tree: Any) -> int:
    """Bytes of arrays on one of their devices."""
    return sum(
        math.prod(array.sharding.shard_shape(array.shape)) * int(array.dtype.itemsize)
        for array in jax.tree.leaves(tree)
    )
