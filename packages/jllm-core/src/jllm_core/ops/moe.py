"""Mixture of SwiGLU experts (Shazeer et al., arXiv:1701.06538), routed as in Qwen3-MoE. No token is dropped."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jllm_core.backends.base import XLA, Backend
from jllm_core.config import MoEConfig
from jllm_core.ops.linear import linear
from jllm_core.ops.mlp import mlp
from jllm_core.weights import MLPLayer, MoELayer


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
    # The softmax is over all experts, before the choice (Qwen3): the chosen weights then sum to less than one.
    probabilities = jax.nn.softmax(linear("RD,DE->RE", x, w_router).astype(jnp.float32), axis=-1)
    weights, experts = jax.lax.top_k(probabilities, config.experts_per_token)
    if config.normalize_weights:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Routing(probabilities, weights.astype(x.dtype), experts)


@jax.named_scope("moe")
def moe(
    x: Float[Array, "B T D"],
    layer: MoELayer,
    config: MoEConfig,
    backend: Backend | None = None,
    first: int | Int[Array, ""] = 0,
) -> Float[Array, "B T D"]:
    """Each token through its own experts, summed by their weights, and through the one that all share, if there is one.

    Args:
        x: activations.
        layer: the router of all experts, and the experts from number ``first`` on. Others count as zero.
        config: how tokens are routed.
        backend: where this runs; XLA when None.
        first: number of the first expert in ``layer``.
    """
    # Which text a token is of does not matter to an expert: B and T become one axis of R rows.
    rows = x.reshape(-1, x.shape[-1])
    routing = route(rows, layer.w_router, config)
    mixed = mix(rows, routing, layer, backend or XLA(), first).reshape(x.shape)
    return mixed if layer.shared is None else mixed + shared_expert(x, layer.shared, layer.shared_gate)


@jax.named_scope("shared_expert")
def shared_expert(x: Float[Array, "B T D"], expert: MLPLayer, gate: Float[Array, " D"] | None) -> Float[Array, "B T D"]:
    """The expert that every token goes through (DeepSeekMoE, arXiv:2401.06066); with a gate, as much of it as that says
    (``Qwen2MoeSparseMoeBlock``)."""
    y = mlp(x, expert)
    return y if gate is None else y * jax.nn.sigmoid(linear("BTD,D->BT", x, gate))[..., None]


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
    # Row r of the sorted ones is choice order[r] of all R * X, which is of token order[r] // X.
    done = backend.experts(x[order // chosen], sizes, layer)
    back = jnp.argsort(order)
    mixed: Array = jnp.sum(done[back].reshape(-1, chosen, x.shape[1]) * routing.weights[..., None], axis=1)
    return mixed
