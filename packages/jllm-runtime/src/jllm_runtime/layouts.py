"""How weights lie in a device's memory, where that is not in the order of their axes."""

from typing import Any

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding
from jllm_core.array_info import ArrayInfo
from jllm_core.weights import Weights

HEAD_PROJECTIONS = (("model", "heads", "head_dim"), ("model", "kv_heads", "head_dim"))
LANES = 128
"""What the last axis of an array in a TPU's memory is filled up to. Smaller heads are better left to the compiler."""
HEADS_OUTERMOST = Layout(major_to_minor=(1, 0, 2))


def device_format(info: ArrayInfo, sharding: NamedSharding, platform: str) -> Format | NamedSharding:
    """Where an array lives and, where its layout is not the platform's own choice, how it lies there.

    The TPU compiler reads q, k and v ``[D, N, H]`` head by head. Left in the order of their axes it copies them all in
    every call of a step, and keeps the copies beside them until the call ends.
    """
    if platform == "tpu" and info.logical_axes in HEAD_PROJECTIONS and info.shape[-1] % LANES == 0:
        return Format(HEADS_OUTERMOST, sharding)
    return sharding


def lay_out(weights: Weights, infos: Weights, platform: str) -> Weights:
    """The weights as the platform's programs want them. Those that must be moved are moved one by one and deleted."""

    def moved(info: ArrayInfo, array: Any) -> Any:
        place = device_format(info, array.sharding, platform)
        if not isinstance(place, Format):
            return array
        laid_out = jax.device_put(array, place).block_until_ready()
        array.delete()
        return laid_out

    laid_out: Weights = jax.tree.map(moved, infos, weights)
    return laid_out
