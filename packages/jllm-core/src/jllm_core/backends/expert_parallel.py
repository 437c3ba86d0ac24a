"""Expert parallelism: a mixture of experts shared out over the devices of a mesh."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jllm_core.backends.base import Backend
from jllm_core.config import MoEConfig
from jllm_core.ops.moe import moe, shared_expert
from jllm_core.sharding import partition
from jllm_core.weights import MLPLayer, MoELayer


def moe_over_mesh(x: Float[Array, "B T D"], layer: MoELayer, config: MoEConfig, backend: Backend) -> Array:
    """``ops.moe.moe``, shared out over the devices of ``backend.placement``.

    Every device routes the tokens of its part of the batch, and mixes the experts, and the slice of their width, that
    it holds; then comes one sum over all. Each device sees its tokens whole, so that no token has to be sent anywhere:
    what a token's experts make of it is added up by the same all-reduce that a dense layer needs. An expert that all
    tokens share is cut by its width over all devices, and joins that sum.
    """
    placement = backend.placement
    if placement is None:
        raise ValueError("without a placement there is no mesh to share experts out over")
    shared, shared_ffw = layer.shared, tuple[str, ...]()
    if shared is not None:
        width = _common_divisor_of_widths(shared.w_gate, shared.w_up, shared.w_down)
        shared_ffw = placement.axes_of("shared_ffw", width)
    experts = placement.axes_of("experts", layer.we_down.shape[0])
    ffw = placement.axes_of("ffw", _common_divisor_of_widths(layer.we_gate, layer.we_up, layer.we_down))
    summed = tuple(dict.fromkeys((*experts, *ffw, *shared_ffw)))

    def specs(matrix: Any, *axes: tuple[str, ...]) -> Any:
        """The spec of an array, or of each part of a quantised one: scales shared by all inputs are whole."""

        def spec(part: Any) -> Any:
            # Where groups have an axis of their own, it follows that of the inputs, the last but one.
            names = axes if part.ndim == len(axes) else (*axes[:-1], (), *axes[-1:])
            return partition(*(axis if size > 1 else () for axis, size in zip(names, part.shape, strict=True)))

        return jax.tree.map(spec, matrix)

    def shared_specs(expert: MLPLayer) -> MLPLayer:
        gate, up = (specs(matrix, (), shared_ffw) for matrix in (expert.w_gate, expert.w_up))
        return MLPLayer(w_gate=gate, w_up=up, w_down=specs(expert.w_down, shared_ffw, ()))

    layer_specs = MoELayer(
        w_router=specs(layer.w_router, (), ()),
        we_gate=specs(layer.we_gate, experts, (), ffw),
        we_up=specs(layer.we_up, experts, (), ffw),
        we_down=specs(layer.we_down, experts, ffw, ()),
        shared=None if shared is None else shared_specs(shared),
        shared_gate=None if layer.shared_gate is None else partition(()),
    )

    def local(x: Array, layer: MoELayer) -> Array:
        first = _index_along(experts) * layer.we_down.shape[0]
        mixed = _once(moe(x, replace(layer, shared=None), config, backend, first), summed, experts + ffw)
        if layer.shared is not None:
            mixed += _once(shared_expert(x, layer.shared, layer.shared_gate), summed, shared_ffw)
        return _sum_over(mixed, summed)

    tokens = partition(placement.axes_of("batch", x.shape[0]))
    mixed: Array = placement.shard_map(local, (tokens, layer_specs), tokens)(x, layer)
    return mixed


def _common_divisor_of_widths(gate: Any, up: Any, down: Any) -> int:
    """What the width of experts can be cut by, in the packed values and the scales of quantised arrays as well."""
    inputs = len(down.shape) - 2
    sizes = [part.shape[-1] for part in jax.tree.leaves((gate, up))]
    sizes += [part.shape[inputs] for part in jax.tree.leaves(down) if part.shape[inputs] > 1]
    return math.gcd(*sizes)


def _once(x: jax.Array, summed: tuple[str, ...], split: tuple[str, ...]) -> jax.Array:
    """``x`` so that it comes once into a sum over the axes ``summed``, where devices along others of them than
    ``split`` all have the same. For use inside ``shard_map``."""
    copies = tuple(axis for axis in summed if axis not in split)
    return jnp.where(_index_along(copies) == 0, x, 0) if copies else x


def _index_along(mesh_axes: tuple[str, ...]) -> jax.Array | int:
    """Which of the parts along these mesh axes a device has. For use inside ``shard_map``."""
    index: jax.Array | int = jax.lax.axis_index(mesh_axes) if mesh_axes else 0
    return index


def _sum_over(x: jax.Array, mesh_axes: tuple[str, ...]) -> jax.Array:
    """The sum of what the devices along these mesh axes have. For use inside ``shard_map``."""
    total: jax.Array = jax.lax.psum(x, mesh_axes) if mesh_axes else x
    return total
