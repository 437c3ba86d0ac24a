"""How fast decoding can be at best: what a step must move and compute, against what a device can (Williams et al.,
Roofline, CACM 52(4), 2009).

Communication between devices and everything that a program does besides are left out: no program is faster than this.
"""

import math
from dataclasses import dataclass

import jax
from jllm_core.array_info import ArrayInfo
from jllm_core.config import ModelConfig, MoEConfig
from jllm_core.sharding import Placement
from jllm_core.weight_specs import abstract_weights
from jllm_core.weights import MoELayer, Weights

from jllm_runtime.planner.memory import (
    Workload,
    bytes_per_device,
    kv_info,
    local_shape,
    local_size,
    weights_info,
)
from jllm_runtime.planner.topologies import Device


@dataclass(frozen=True)
class Roofline:
    """One decode step, which gives every text a token.

    Attributes:
        bytes_per_step: what each device reads of weights and cache.
        flops_per_step: what each device computes, a multiply-add counted as two.
        seconds_per_step: the longer of the two at the device's bandwidth and peak.
        decode_tokens_per_s: tokens of the whole batch.
        bound: which of the two is longer, ``memory`` or ``compute``.
    """

    bytes_per_step: int
    flops_per_step: int
    seconds_per_step: float
    decode_tokens_per_s: float
    bound: str


def decode_roofline(config: ModelConfig, workload: Workload, placement: Placement, device: Device) -> Roofline:
    """The roofline of a decode step at the end of the context."""
    moved = _bytes_moved(config, workload, placement)
    computed = _flops(config, workload, placement)
    reading, computing = moved / device.bytes_per_s, computed / device.flops_per_s
    seconds = max(reading, computing)
    bound = "memory" if reading >= computing else "compute"
    return Roofline(moved, computed, seconds, workload.batch / seconds, bound)


def _bytes_moved(config: ModelConfig, workload: Workload, placement: Placement) -> int:
    """All weights and the whole cache, but of an untied embedding only the rows of the tokens, and of the experts those
    that a token goes to."""
    weights = weights_info(config, workload)
    total = bytes_per_device(weights, placement) + 2 * config.num_layers * bytes_per_device(
        kv_info(config, workload, placement), placement
    )
    if weights.lm_head is not None:
        total -= bytes_per_device(weights.embedding, placement)
    if config.moe is not None:
        total -= int(
            (1 - touched_experts(config.moe, workload.rows)) * bytes_per_device(expert_matrices(weights), placement)
        )
    return total


def _flops(config: ModelConfig, workload: Workload, placement: Placement) -> int:
    """Two for each element of a matrix and each row, and attention's two products."""
    rows, _, slots, width = local_shape(kv_info(config, workload, placement), placement)
    heads = local_size(config.num_heads, "heads", placement)
    attention = 4 * rows * config.num_layers * heads * slots * width
    return 2 * rows * multiplied_elements(config, placement) + attention


def multiplied_elements(config: ModelConfig, placement: Placement) -> int:
    """The elements of the matrices on one device that a token is multiplied with, the head's among them."""
    weights = abstract_weights(config)

    def elements(tree: object) -> int:
        matrices = [info for info in jax.tree.leaves(tree) if isinstance(info, ArrayInfo) and len(info.shape) > 1]
        return sum(math.prod(local_shape(info, placement)) for info in matrices)

    multiplied = elements(weights)
    if weights.lm_head is not None:
        multiplied -= elements(weights.embedding)
    if config.moe is not None:
        idle = 1 - config.moe.experts_per_token / config.moe.num_experts
        multiplied -= int(idle * elements(expert_matrices(weights)))
    return multiplied


def expert_matrices(weights: Weights) -> list[object]:
    """The matrices of every expert, layer by layer; empty where there are none."""
    layers = [layer.ffw for layer in weights.layers if isinstance(layer.ffw, MoELayer)]
    return [[ffw.we_gate, ffw.we_up, ffw.we_down] for ffw in layers]


def touched_experts(moe: MoEConfig, rows: int) -> float:
    """The share of a layer's experts that at least one of the rows goes to, if all are equally likely."""
    return float(1 - (1 - moe.experts_per_token / moe.num_experts) ** rows)
