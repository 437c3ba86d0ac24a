"""The bytes that a model needs on one device, from the description of its arrays alone.

Letters are those of docs/notation.md; a local size (``heads``, ``vocab``) is what one device holds of an axis.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jllm_core.array_info import ArrayInfo, array_bytes
from jllm_core.backends.select import select_backend
from jllm_core.config import ModelConfig
from jllm_core.mesh_axes import LANES
from jllm_core.ops.delta_net import CHUNK
from jllm_core.quantization.arrays import Quantization
from jllm_core.quantization.device_form import Activations, held_weights
from jllm_core.recurrent_state import RecurrentState, abstract_state
from jllm_core.sharding import Placement
from jllm_core.weight_specs import abstract_weights
from jllm_core.weights import MoELayer, Weights

from jllm_runtime.cache.contiguous import (
    KVDtype,
    cache_capacity,
    cache_dtype,
    cache_info,
    largest_chunk,
)
from jllm_runtime.cache.descriptions import described_slots

FLOAT32 = 4
CHUNK_PRODUCTS, CHUNK_VECTORS = 5, 8
"""Arrays that a delta net has together: products of a chunk's tokens, and vectors of its tokens."""
CHUNK_CODE, STEP_CODE = 10 << 20, 2 << 20
"""Bytes of a program for a TPU that are for one delta net, where it takes chunks of tokens and where it takes one: its
products of a float's full precision are long, and no two layers share them. Of other layers it is little."""
SHORT_CHUNK_CODE = {"TPU v2": 4 << 20, "TPU v3": 4 << 20}
"""CHUNK_CODE of devices whose compiler unrolls less."""
SAMPLING_ARRAYS = 6
"""Arrays of the size of the logits that are there together while a token is drawn."""


@dataclass(frozen=True)
class Workload:
    """What a model is to be run with.

    Attributes:
        batch: texts side by side; the steps are compiled for the next power of two.
        context: tokens of the longest text, prompt and answer together.
        dtype: element type of activations, and of weights that are not quantised.
        quantization: how weight matrices are stored; None is ``dtype``.
        activations: ``"int8"`` where int8 matrices are multiplied with activations rounded to 8 bits.
        kv_dtype: what keys and values are kept as; None is ``dtype``.
    """

    batch: int = 1
    context: int = 4096
    dtype: str = "bfloat16"
    quantization: Quantization | None = None
    activations: Activations | None = None
    kv_dtype: KVDtype | None = None

    @property
    def cache_dtype(self) -> jnp.dtype:
        """Dtype of keys and values."""
        return cache_dtype(jnp.dtype(self.dtype), self.kv_dtype)

    @property
    def rows(self) -> int:
        """Rows that the compiled steps have."""
        return 1 << (self.batch - 1).bit_length()


@dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    Attributes:
        weights: the model's arrays.
        kv: keys and values of every layer with attention.
        temporaries: what each program needs besides, by its name; they run one after another.
        states: recurrent states of every delta net.
        snapshots: copies of them that an engine keeps for prompts that begin alike.
    """

    weights: int
    kv: int
    temporaries: dict[str, int]
    states: int = 0
    snapshots: int = 0

    @property
    def temp(self) -> int:
        """The most that any program needs besides weights, cache and states."""
        return max(self.temporaries.values())

    @property
    def total(self) -> int:
        """The most that is in use at any time."""
        return self.weights + self.kv + self.states + self.snapshots + self.temp


def weights_info(config: ModelConfig, workload: Workload, placement: Placement) -> Weights:
    """The description of the weights as these devices are to hold them."""
    return _described(config, workload.dtype, workload.quantization, placement, workload.activations)


@lru_cache(maxsize=8)  # a plan asks it for many batches, contexts and machines; few types
def _described(
    config: ModelConfig,
    dtype: str,
    quantization: Quantization | None,
    placement: Placement,
    activations: Activations | None = None,  # they change no size
) -> Weights:
    held: Weights = held_weights(abstract_weights(config, dtype, quantization), placement, activations)
    return held


def kv_info(config: ModelConfig, workload: Workload, placement: Placement | None = None) -> ArrayInfo:
    """The description of one layer's keys (or values), on that mesh."""
    capacity = cache_capacity(workload.context, config.context_length)
    return cache_info(config, workload.rows, capacity, workload.cache_dtype, placement)


def kv_bytes(config: ModelConfig, workload: Workload, placement: Placement) -> int:
    """Bytes of keys and values of all layers with attention, on one device."""
    return config.kv_arrays * bytes_per_device(described_slots(kv_info(config, workload, placement)), placement)


def states_info(config: ModelConfig, rows: int) -> list[RecurrentState]:
    """The description of the states of so many rows, for each delta net."""
    return [abstract_state(config.delta_net, rows) for _ in config.layers_with("delta_net") if config.delta_net]


def parameter_count(config: ModelConfig) -> int:
    """How many numbers a model has, a tied embedding counted once."""
    return sum(info.size for info in jax.tree.leaves(abstract_weights(config)))


def smaller_capacity(config: ModelConfig, workload: Workload) -> int:
    """Slots in a row of the cache that may have to grow into this one; 0 where this is the smallest.

    Growing copies, so the two are there together for a moment.
    """
    capacity, smaller = kv_info(config, workload).shape[2], 0
    while (larger := cache_capacity(smaller + 1, config.context_length)) < capacity:
        smaller = larger
    return smaller


def estimate_memory(config: ModelConfig, workload: Workload, placement: Placement) -> Memory:
    """What the weights, the cache and the programs of ``programs.batch`` need on each device."""
    weights = _weights_bytes(config, workload.dtype, workload.quantization, placement)
    kv = kv_bytes(config, workload, placement)
    experts, cache = _lane_copies(config, workload, placement)
    chunk = prefill_chunk(config, workload, placement)
    temporaries = {
        "prefill": _temporaries(config, workload, placement, chunk) + experts,
        "decode": _temporaries(config, workload, placement, 1) + experts + cache,
        "growth": kv * smaller_capacity(config, workload) // kv_info(config, workload).shape[2],
    }
    return Memory(weights, kv, temporaries, bytes_per_device(states_info(config, workload.rows), placement))


def prefill_chunk(config: ModelConfig, workload: Workload, placement: Placement) -> int:
    """Tokens of each prompt that a step of the prefill program takes."""
    return largest_chunk(workload.batch, select_backend(weights_info(config, workload, placement), config, placement))


@lru_cache
def _weights_bytes(config: ModelConfig, dtype: str, quantization: Quantization | None, placement: Placement) -> int:
    return bytes_per_device(_described(config, dtype, quantization, placement), placement)


def bytes_per_device(tree: Any, placement: Placement) -> int:
    """Bytes of the described arrays on one device of the mesh."""
    return sum(array_bytes(local_shape(info, placement), info.dtype) for info in jax.tree.leaves(tree))


def local_shape(info: ArrayInfo, placement: Placement) -> tuple[int, ...]:
    """The shape of the part that one device holds."""
    shape: tuple[int, ...] = placement.rules.sharding(info, placement.mesh).shard_shape(info.shape)
    return shape


def local_size(size: int, axis: str, placement: Placement) -> int:
    """How much of an axis of that logical name one device holds."""
    return local_shape(ArrayInfo((size,), jnp.int8, (axis,)), placement)[0]


def _temporaries(config: ModelConfig, workload: Workload, placement: Placement, tokens: int) -> int:
    """What a step holds besides weights and cache when it takes so many tokens of each row.

    The residual stream, its normalised copy and their sum stay; beside them are, one after another, the scores and
    probabilities of attention, the inside of the feed-forward layer, and the logits and what sampling makes of them.
    """
    size = int(jnp.dtype(workload.dtype).itemsize)
    heads = local_size(config.num_heads, "heads", placement)
    backend = select_backend(weights_info(config, workload, placement), config, placement)
    cache = kv_info(config, workload, placement)
    held = local_shape(cache, placement)
    b = held[0]
    queries = jax.ShapeDtypeStruct((cache.shape[0], tokens, config.num_heads, config.head_dim), workload.dtype)
    attention = max(
        backend.attention_bytes(queries, cache, b * tokens * heads, held, window)
        for window in {config.window(layer) for layer in range(config.num_layers)}
    )
    widths = [config.intermediate_size] + (
        [config.moe.intermediate_size * config.moe.experts_per_token + (config.moe.shared_size or 0)]
        if config.moe
        else []
    )
    feed_forward = 2 * b * tokens * local_size(max(widths), "ffw", placement) * size
    sampling = SAMPLING_ARRAYS * b * local_size(config.vocab_size, "vocab", placement) * FLOAT32
    residual = 3 * b * tokens * config.hidden_size * size
    return (
        residual
        + delta_net_code(config, tokens, placement)
        + max(attention, feed_forward, sampling, delta_net_temporaries(config, workload.rows, tokens, placement))
    )


def delta_net_temporaries(config: ModelConfig, rows: int, tokens: int, placement: Placement) -> int:
    """What a delta net holds while it takes so many tokens of each row, in float32: q, k, v, z and what becomes of
    them, and of each chunk the products of its tokens with one another."""
    if (net := config.delta_net) is None:
        return 0
    state = bytes_per_device(abstract_state(net, rows), placement)
    if tokens == 1:
        return 2 * state
    heads = local_size(net.num_value_heads, "value_heads", placement)
    of_a_token = CHUNK * CHUNK_PRODUCTS + CHUNK_VECTORS * max(net.key_head_dim, net.value_head_dim)
    return 2 * state + local_size(rows, "batch", placement) * tokens * heads * of_a_token * FLOAT32


def delta_net_code(config: ModelConfig, tokens: int, placement: Placement) -> int:
    """What of a program that takes so many tokens of each row is for delta nets."""
    if not on_tpu(placement):
        return 0
    each = STEP_CODE if tokens == 1 else SHORT_CHUNK_CODE.get(placement.device_kind or "", CHUNK_CODE)
    return len(config.layers_with("delta_net")) * each


def on_tpu(placement: Placement) -> bool:
    """Whether the devices are TPUs."""
    return (placement.device_kind or "").startswith("TPU")


def _lane_copies(config: ModelConfig, workload: Workload, placement: Placement) -> tuple[int, int]:
    """Copies, of experts and of the cache, that a TPU's programs make of arrays whose last axis is no whole number of
    lanes: at rest they lie packed, but they are worked on filled up to whole lanes."""
    if not on_tpu(placement):
        return 0, 0

    def filled(info: ArrayInfo) -> int:
        *rows, width = local_shape(info, placement)
        return 0 if width % LANES == 0 else math.prod(rows) * -(-width // LANES) * LANES * int(info.dtype.itemsize)

    layers = [
        layer.ffw for layer in weights_info(config, workload, placement).layers if isinstance(layer.ffw, MoELayer)
    ]
    experts = sum(filled(info) for ffw in layers for info in jax.tree.leaves([ffw.we_gate, ffw.we_up]))
    return experts, config.kv_arrays * filled(kv_info(config, workload, placement))
