"""Memory layouts of weights on a device, where they differ from the order of the axes."""

from typing import Any

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding
from jllm_core.array_info import ArrayInfo
from jllm_core.mesh_axes import LANES
from jllm_core.weights import Weights

# Axis 1, the heads, varies slowest.
HEADS_OUTERMOST = Layout(major_to_minor=(1, 0, 2))

GROUPED_HEADS_OUTERMOST = Layout(major_to_minor=(2, 0, 1, 3))

HEADS = ("heads", "kv_heads", "key_heads", "value_heads")
HEAD_PROJECTIONS: dict[tuple[str | None, ...], Layout] = {
    **{("model", heads, "head_dim"): HEADS_OUTERMOST for heads in HEADS},
    # Quantised, with groups: [groups, group, N, H].
    **{("model", None, heads, "head_dim"): GROUPED_HEADS_OUTERMOST for heads in HEADS},
}
"""Logical axes of the projections to heads (q, k, v and the gates), and how they lie."""


def device_format(info: ArrayInfo, sharding: NamedSharding, platform: str) -> Format | NamedSharding:
    """Return an array's sharding and, where it is not the platform's own choice, its layout.

    The TPU compiler reads what projects to heads, ``[D, N, H]``, head by head. Left in the order of their axes it
    copies them all in every call of a program, and keeps the copies beside them until the call ends.
    """
    layout = HEAD_PROJECTIONS.get(info.logical_axes)
    if platform == "tpu" and layout is not None and info.shape[-1] % LANES == 0:
        return Format(layout, sharding)
    return sharding


def lay_out(weights: Weights, infos: Weights, platform: str) -> Weights:
    """Give weights the layouts that the platform's programs want. Arrays that are replaced are deleted."""

    def moved(info: ArrayInfo, array: Any) -> Any:
        target = device_format(info, array.sharding, platform)
        if not isinstance(target, Format):
            return array
        # One array at a time, and the old one deleted at once: the weights may fill more than half of the memory.
        laid_out = jax.device_put(array, target).block_until_ready()
        array.delete()
        return laid_out

    laid_out: Weights = jax.tree.map(moved, infos, weights)
    return laid_out
