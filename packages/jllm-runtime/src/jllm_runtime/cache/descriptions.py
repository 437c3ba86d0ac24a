"""Descriptions of caches that are not there: to lower programs with, and to count their bytes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jllm_core.array_info import ArrayInfo
from jllm_core.quantization.keys_values import QuantizedSlots

from jllm_runtime.cache.contiguous import ContiguousCache


def described_slots(info: ArrayInfo) -> ArrayInfo | QuantizedSlots:
    """The descriptions of the arrays that keys (or values) of this description consist of: those of int8 have scales
    besides."""
    if info.dtype != jnp.int8:
        return info
    return QuantizedSlots(info, ArrayInfo(info.shape[:-1], jnp.dtype(jnp.float32), info.logical_axes[:-1]))


def resized(cache: ContiguousCache, capacity: int) -> ContiguousCache:
    """The description of a cache like this one with so many slots in a row, to lower programs with."""

    def describe(slots: Array) -> jax.ShapeDtypeStruct:
        shape = (*slots.shape[:2], capacity, *slots.shape[3:])
        return jax.ShapeDtypeStruct(shape, slots.dtype, sharding=slots.sharding)

    keys, values = jax.tree.map(describe, (cache.keys, cache.values))
    return replace(cache, keys=keys, values=values)
