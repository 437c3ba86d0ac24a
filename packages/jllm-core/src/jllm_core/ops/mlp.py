"""SwiGLU feed-forward layer."""

import jax
from jaxtyping import Array, Float

from jllm_core.ops.linear import linear
from jllm_core.weights import MLPLayer


@jax.named_scope("mlp")
def mlp(x: Float[Array, "B T D"], layer: MLPLayer) -> Float[Array, "B T D"]:
    """``(silu(x w_gate) * (x w_up)) w_down``, each with its bias if it has one (Shazeer, arXiv:2002.05202)."""
    # Two matrices, not one of twice the width: sharded along F, each device has the same columns of both.
    gate = linear("BTD,DF->BTF", x, layer.w_gate, layer.b_gate)
    up = linear("BTD,DF->BTF", x, layer.w_up, layer.b_up)
    return linear("BTF,FD->BTD", jax.nn.silu(gate) * up, layer.w_down, layer.b_down)
