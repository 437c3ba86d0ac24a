"""Roofline of decoding: bytes and FLOPs of a step against the device's bandwidth and peak (Williams et al., Roofline,
CACM 52(4), 2009).

This is an upper bound: it leaves out communication between devices and all other work of a program. Bytes of
quantised matrices are those that are stored; with ``--compile`` the report has those that the program moves, too.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jllm_core.array_info import ArrayInfo
from jllm_core.config import ModelConfig, MoEConfig
from jllm_core.sharding import Placement
from jllm_core.weight_specs import abstract_weights
from jllm_core.weights import MoELayer, Weights

from jllm_runtime.planner.memory import (
    Workload,
    bytes_per_device,
    kv_bytes,
    kv_info,
    local_shape,
    local_size,
    states_info,
    weights_info,
)
from jllm_runtime.planner.topologies import Device


@dataclass(frozen=True)
class Roofline:
    """Bounds of one decode step, which gives every sequence a token.

    Attributes:
        bytes_per_step: bytes of weights and cache that each device reads, and of states that it reads and writes.
        flops_per_step: FLOPs of each device, a multiply-add counted as two.
        seconds_per_step: the longest of the two at the device's bandwidth and peak, and ``feed_seconds``.
        decode_tokens_per_s: tokens of the whole batch in a second.
        bound: what takes longest: ``memory``, ``compute``, or ``matrix units``, which take in a matrix more slowly than
            the memory gives it.
        feed_seconds: time of the matrix units to take in the matrices; 0 where the memory is slower.
    """

    bytes_per_step: int
    flops_per_step: int
    seconds_per_step: float
    decode_tokens_per_s: float
    bound: str
    feed_seconds: float = 0.0


def decode_roofline(config: ModelConfig, workload: Workload, placement: Placement, device: Device) -> Roofline:
    """The roofline of a decode step at the end of the context."""
    moved = _bytes_moved(config, workload, placement)
    multiplied = multiplied_elements(config, placement)
    computed = _flops(config, workload, placement, multiplied)
    reading, computing = moved / device.bytes_per_s, computed / device.peak(workload.dtype)
    feeding = _feed_seconds(config, workload, placement, device, multiplied)
    # The first of those that take equally long.
    times = {"memory": reading, "compute": computing, "matrix units": feeding}
    bound = max(times, key=lambda name: times[name])
    return Roofline(moved, computed, times[bound], workload.batch / times[bound], bound, feeding)


def _bytes_moved(config: ModelConfig, workload: Workload, placement: Placement) -> int:
    """Bytes that each device reads: all weights and the whole cache, without an untied embedding, of which a step reads
    a few rows, and without the experts that no token is expected to go to; and recurrent states, read and written."""
    weights = weights_info(config, workload, placement)
    # Keys and values of every layer with attention, read to the end of the context.
    cache = kv_bytes(config, workload, placement)
    states = 2 * bytes_per_device(states_info(config, workload.rows), placement)
    total = bytes_per_device(weights, placement) + cache + states
    if weights.lm_head is not None:
        total -= bytes_per_device(weights.embedding, placement)
    if config.moe is not None:
        total -= int(
            (1 - touched_experts(config.moe, workload.rows)) * bytes_per_device(expert_matrices(weights), placement)
        )
    return total


def _flops(config: ModelConfig, workload: Workload, placement: Placement, multiplied: int) -> int:
    """FLOPs of each device: two for each element of a matrix and each row, and attention's two products."""
    rows, _, capacity, head_dim = local_shape(kv_info(config, workload, placement), placement)
    heads = local_size(config.num_heads, "heads", placement)
    # A multiply-add for each element of the keys (scores) and one of the values (weighted sum).
    attention = 4 * rows * len(config.layers_with("attention")) * heads * capacity * head_dim
    return 2 * rows * multiplied + attention


def _feed_seconds(
    config: ModelConfig, workload: Workload, placement: Placement, device: Device, elements: int
) -> float:
    """How long the matrix units take in the matrices of a step, each once."""
    bits = 8 * jnp.dtype(workload.dtype).itemsize if workload.quantization is None else workload.quantization.bits
    fed = device.fed_per_cycle.get(bits)
    if fed is None or device.clock_hz is None:
        return 0.0
    if config.moe is not None:
        # Of the experts those that any row goes to, in place of those that one row goes to.
        of_experts = sum(
            math.prod(local_shape(info, placement))
            for info in jax.tree.leaves(expert_matrices(abstract_weights(config)))
        )
        one_row = config.moe.experts_per_token / config.moe.num_experts
        elements += int((touched_experts(config.moe, workload.rows) - one_row) * of_experts)
    return elements / (fed * device.clock_hz)


def multiplied_elements(config: ModelConfig, placement: Placement) -> int:
    """Elements of the matrices on one device that a token is multiplied with, the head included."""
    weights = abstract_weights(config)

    def elements(tree: object) -> int:
        matrices = [info for info in jax.tree.leaves(tree) if isinstance(info, ArrayInfo) and len(info.shape) > 1]
        return sum(math.prod(local_shape(info, placement)) for info in matrices)

    multiplied = elements(weights)
    if weights.lm_head is not None:
        # The embedding is looked up. A tied one stays in: it is the head.
        multiplied -= elements(weights.embedding)
    if config.moe is not None:
        # A token is multiplied with the chosen experts alone.
        idle = 1 - config.moe.experts_per_token / config.moe.num_experts
        multiplied -= int(idle * elements(expert_matrices(weights)))
    return multiplied


def expert_matrices(weights: Weights) -> list[object]:
    """The matrices of the experts, layer by layer; empty for a model without experts."""
    layers = [layer.ffw for layer in weights.layers if isinstance(layer.ffw, MoELayer)]
    return [[ffw.we_gate, ffw.we_up, ffw.we_down] for ffw in layers]


def touched_experts(moe: MoEConfig, rows: int) -> float:
    """Expected share of a layer's experts that at least one row goes to, if all experts are equally likely."""
    # A row leaves an expert out with probability 1 - k/E, and all rows do with that to the power of rows.
    return float(1 - (1 - moe.experts_per_token / moe.num_experts) ** rows)
