"""Expert parallelism: a mixture of experts shared out over the devices of a mesh."""

import math
from typing import Any

import jax
from jaxtyping import Array, Float

from jllm_core.backends.base import Backend
from jllm_core.config import MoEConfig
from jllm_core.ops.moe import moe
from jllm_core.sharding import partition
from jllm_core.weights import MoELayer


def moe_over_mesh(x: Float[Array, "B T D"], layer: MoELayer, config: MoEConfig, backend: Backend) -> Array:
    """``ops.moe.moe``, shared out over the devices of ``backend.placement``.

    Every device routes the tokens of its part of the batch, and mixes the experts, and the slice of their width, that
    it holds; then comes one sum over all. Each device sees its tokens whole, so that no token has to be sent anywhere:
    what a token's experts make of it is added up by the same all-reduce that a dense layer needs.
    """
    placement = backend.placement
    if placement is None:
        raise ValueError("without a placement there is no mesh to share experts out over")
    owners = {
        "experts": placement.axes_of("experts", layer.we_down.shape[0]),
        "ffw": placement.axes_of("ffw", _common_divisor_of_widths(layer)),
    }

    def specs(matrix: Any, *axes: str | None) -> Any:
        """The spec of an array, or of each part of a quantised one: scales shared by all inputs are whole."""

        def spec(part: Any) -> Any:
            # Where groups have an axis of their own, it follows that of the inputs.
            names = axes if part.ndim == len(axes) else (*axes[:2], None, *axes[2:])
            return partition(
                *(owners[axis] if axis and size > 1 else () for axis, size in zip(names, part.shape, strict=True))
            )

        return jax.tree.map(spec, matrix)

    layer_specs = MoELayer(
        w_router=specs(layer.w_router, None, None),
        we_gate=specs(layer.we_gate, "experts", None, "ffw"),
        we_up=specs(layer.we_up, "experts", None, "ffw"),
        we_down=specs(layer.we_down, "experts", "ffw", None),
    )

    def local(x: Array, layer: MoELayer) -> Array:
        first = _index_along(owners["experts"]) * layer.we_down.shape[0]
        return _sum_over(moe(x, layer, config, backend, first), owners["experts"] + owners["ffw"])

    tokens = partition(placement.axes_of("batch", x.shape[0]))
    mixed: Array = placement.shard_map(local, (tokens, layer_specs), tokens)(x, layer)
    return mixed


def _common_divisor_of_widths(layer: MoELayer) -> int:
    """What the experts' width can be cut by, in the packed values and the scales of quantised arrays as well."""
    sizes = [part.shape[-1] for part in jax.tree.leaves((layer.we_gate, layer.we_up))]
    sizes += [part.shape[1] for part in jax.tree.leaves(layer.we_down) if part.shape[1] > 1]
    return math.gcd(*sizes)


def _index_along(mesh_axes: tuple[str, ...]) -> jax.Array | int:
    """Which of the parts along these mesh axes a device has. For use inside ``shard_map``."""
    index: jax.Array | int = jax.lax.axis_index(mesh_axes) if mesh_axes else 0
    return index


def _sum_over(x: jax.Array, mesh_axes: tuple[str, ...]) -> jax.Array:
    """The sum of what the devices along these mesh axes have. For use inside ``shard_map``."""
    total: jax.Array = jax.lax.psum(x, mesh_axes) if mesh_axes else x
    return total
