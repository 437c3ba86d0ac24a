"""Weight tree: the arrays of a model, layer by layer.

The letters of the shapes are those of docs/notation.md. Which of the arrays a config asks for, and random values for
them, are in ``weight_specs.py``.
"""

from dataclasses import dataclass
from typing import Any

import jax

Leaf = Any
"""An array or a QuantizedArray; in the trees of ``abstract_weights`` and of shardings, an ArrayInfo or a NamedSharding
in place of each array."""


class ShortRepr:
    """Dataclass whose repr fits a screen: types and shapes of arrays, and not their numbers."""

    def __repr__(self) -> str:
        from jllm_core.short_repr import short_repr  # no part of the maths, for those who read what it needs

        return short_repr(self)


# Registered as pytrees: jit, grad, shardings and the checkpoint go through one tree, by the names of the fields.
# Frozen, for weights are passed to programs and must not change between two calls.
@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class AttentionLayer(ShortRepr):
    """Projections of one attention layer; None where the family has no such array.

    ``q [D, N, H]``, ``k`` and ``v [D, K, H]``, ``o [N, H, D]``, ``q_gamma`` and ``k_gamma [H]``,
    ``q_bias [N, H]``, ``k_bias`` and ``v_bias [K, H]``, ``o_bias [D]``, ``gate [D, N, H]``.
    """

    # Heads have axes of their own: sharding splits whole heads, and no code has to know how they were packed.
    q: Leaf
    k: Leaf
    v: Leaf
    o: Leaf
    q_gamma: Leaf | None = None
    k_gamma: Leaf | None = None
    q_bias: Leaf | None = None
    k_bias: Leaf | None = None
    v_bias: Leaf | None = None
    o_bias: Leaf | None = None
    gate: Leaf | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class DeltaNetLayer(ShortRepr):
    """Projections, convolutions and decay of one gated delta net.

    ``q`` and ``k [D, Hk, dk]``, ``v`` and ``z [D, Hv, dv]``, ``a`` and ``b [D, Hv]``, ``conv_q`` and ``conv_k
    [W, Hk, dk]`` and ``conv_v [W, Hv, dv]``, the oldest token first, ``a_log`` and ``dt_bias [Hv]``, ``gamma [dv]``,
    ``o [Hv, dv, D]``. The query and key of key head h serve value heads ``h * Hv/Hk .. (h + 1) * Hv/Hk - 1``.
    """

    q: Leaf
    k: Leaf
    v: Leaf
    # The gate of the output, the decay of the state, and how much of it is written anew.
    z: Leaf
    a: Leaf
    b: Leaf
    conv_q: Leaf
    conv_k: Leaf
    conv_v: Leaf
    # These three are float32 in a model of any type: a decay is multiplied up over thousands of tokens.
    a_log: Leaf
    dt_bias: Leaf
    gamma: Leaf
    o: Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class MLPLayer(ShortRepr):
    """Projections of one SwiGLU feed-forward layer.

    ``w_gate`` and ``w_up [D, F]``, ``w_down [F, D]``, ``b_gate`` and ``b_up [F]``, ``b_down [D]``.
    """

    w_gate: Leaf
    w_up: Leaf
    w_down: Leaf
    b_gate: Leaf | None = None
    b_up: Leaf | None = None
    b_down: Leaf | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class MoELayer(ShortRepr):
    """A mixture of SwiGLU experts: ``w_router [D, E]``, ``we_gate`` and ``we_up [E, D, F]``, ``we_down [E, F, D]``.

    ``shared`` is an expert that every token goes through, and ``shared_gate [D]`` its gate; None where there is none.
    """

    w_router: Leaf
    we_gate: Leaf
    we_up: Leaf
    we_down: Leaf
    shared: MLPLayer | None = None
    shared_gate: Leaf | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Layer(ShortRepr):
    """One block: attention or a delta net, and feed-forward, each behind an RMSNorm with weights ``[D]``."""

    # Which of the two a layer has is a matter of its type: models mix dense layers and mixtures.
    ffw: MLPLayer | MoELayer
    attn: AttentionLayer | DeltaNetLayer
    attn_pre_gamma: Leaf
    attn_post_gamma: Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Weights(ShortRepr):
    """All weights: ``embedding [V, D]``, ``gamma_final [D]``, ``lm_head [D, V]`` or None when the embedding is tied."""

    layers: list[Layer]
    embedding: Leaf
    gamma_final: Leaf
    # None, and not the same array twice: a donated or sharded tree must not hold one array under two names.
    lm_head: Leaf | None = None

    @property
    def dtype(self) -> Any:
        """The element type of what is not quantised, and of what is computed with it."""
        return self.gamma_final.dtype
