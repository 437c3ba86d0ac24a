"""Mixture of SwiGLU experts (Shazeer et al., arXiv:1701.06538), routed as in Qwen3-MoE. No token is dropped."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jllm_core.backends.base import XLA, Backend
from jllm_core.config import MoEConfig
from jllm_core.ops.linear import linear
from jllm_core.sharding import Placement, index_along, partition, sum_over
from jllm_core.weights import MoELayer


class Routing(NamedTuple):
    """Router choices: which experts each of R tokens goes to, and with which weight.

    ``probabilities [R, E]`` in float32, of all experts; ``weights`` and ``experts [R, X]``, of the chosen ones, the
    most probable first.
    """

    probabilities: Array
    weights: Array
    experts: Array


@jax.named_scope("router")
def route(x: Float[Array, "R D"], w_router: Float[Array, "D E"], config: MoEConfig) -> Routing:
    """The X most probable experts of each token, and how much each of them counts.

    Reference: ``Qwen3MoeTopKRouter`` of transformers. As there, the product is in the type of ``x``, the softmax in
    float32, and the weights are rounded to the type of ``x`` when they are final.
    """
    probabilities = jax.nn.softmax(linear("RD,DE->RE", x, w_router).astype(jnp.float32), axis=-1)
    weights, experts = jax.lax.top_k(probabilities, config.experts_per_token)
    if config.normalize_weights:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Routing(probabilities, weights.astype(x.dtype), experts)


@jax.named_scope("moe")
def moe(
    x: Float[Array, "B T D"], layer: MoELayer, config: MoEConfig, backend: Backend | None = None
) -> Float[Array, "B T D"]:
    """Each token through its own experts, summed by their weights.

    Args:
        x: activations.
        layer: the router and all experts.
        config: how tokens are routed.
        backend: where this runs. Over a mesh of several devices the experts, and the width of each, are split by its
            rules, and every device works on its own.
    """
    backend = backend or XLA()
    if backend.placement is not None and not backend.placement.is_single:
        return _on_every_device(x, layer, config, backend, backend.placement)
    return _route_and_mix(x, layer, config, backend)


def _route_and_mix(
    x: Float[Array, "B T D"], layer: MoELayer, config: MoEConfig, backend: Backend, first: int | Int[Array, ""] = 0
) -> Float[Array, "B T D"]:
    rows = x.reshape(-1, x.shape[-1])
    routing = route(rows, layer.w_router, config)
    return mix(rows, routing, layer, backend, first).reshape(x.shape)


def mix(
    x: Float[Array, "R D"], routing: Routing, layer: MoELayer, backend: Backend, first: int | Int[Array, ""] = 0
) -> Float[Array, "R D"]:
    """The weighted sum of each token's experts, as far as ``layer`` holds them.

    A token's own experts are summed in the order of their weights, whoever its neighbours are.

    Args:
        x: activations.
        routing: the experts of each token, from ``route``.
        layer: the experts from number ``first`` on. Others count as zero.
        backend: where this runs.
        first: number of the first expert in ``layer``.
    """
    count, chosen = layer.we_down.shape[0], routing.experts.shape[1]
    own = (routing.experts - first).reshape(-1)
    own = jnp.where((own >= 0) & (own < count), own, count)  # what other devices do comes last, and is left out
    # Sorted by expert, each expert is one product with all of its tokens. Stable: equal keys keep the tokens' order, so
    # that the same tokens give the same bits.
    order = jnp.argsort(own, stable=True)
    sizes = jnp.bincount(own, length=count + 1)[:count]
    done = backend.experts(x[order // chosen], sizes, layer)
    back = jnp.argsort(order)
    mixed: Array = jnp.sum(done[back].reshape(-1, chosen, x.shape[1]) * routing.weights[..., None], axis=1)
    return mixed


def _on_every_device(x: Array, layer: MoELayer, config: MoEConfig, backend: Backend, placement: Placement) -> Array:
    """Every device routes the tokens of its part of the batch, and mixes the experts, and the slice of their width,
    that it holds; then one sum over all.

    Each device sees its tokens whole, so that no token has to be sent anywhere: what a token's experts make of it is
    added up by the same all-reduce that a dense layer needs.
    """
    owners = {
        "experts": placement.axes_of("experts", layer.we_down.shape[0]),
        "ffw": placement.axes_of("ffw", _common_divisor_of_widths(layer)),
    }

    def specs(matrix: Any, *axes: str | None) -> Any:
        """The spec of an array, or of each part of a quantised one: scales shared by all inputs are whole."""
        return jax.tree.map(
            lambda part: partition(
                *(owners[axis] if axis and size > 1 else () for axis, size in zip(axes, part.shape, strict=True))
            ),
            matrix,
        )

    layer_specs = MoELayer(
        w_router=specs(layer.w_router, None, None),
        we_gate=specs(layer.we_gate, "experts", None, "ffw"),
        we_up=specs(layer.we_up, "experts", None, "ffw"),
        we_down=specs(layer.we_down, "experts", "ffw", None),
    )

    def local(x: Array, layer: MoELayer) -> Array:
        first = index_along(owners["experts"]) * layer.we_down.shape[0]
        return sum_over(_route_and_mix(x, layer, config, backend, first), owners["experts"] + owners["ffw"])

    tokens = partition(placement.axes_of("batch", x.shape[0]))
    mixed: Array = placement.shard_map(local, (tokens, layer_specs), tokens)(x, layer)
    return mixed


def _common_divisor_of_widths(layer: MoELayer) -> int:
    """What the experts' width can be cut by, in the packed values and the scales of quantised arrays as well."""
    sizes = [part.shape[2] for part in jax.tree.leaves((layer.we_gate, layer.we_up))]
    sizes += [part.shape[1] for part in jax.tree.leaves(layer.we_down) if part.shape[1] > 1]
    return math.gcd(*sizes)
