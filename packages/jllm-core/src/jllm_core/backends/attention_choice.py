"""Which attention runs where."""

from jaxtyping import Array, Float, Int

from jllm_core.backends import blocked_attention
from jllm_core.backends.tpu import pallas_attention
from jllm_core.ops.attention import attention
from jllm_core.quantization.keys_values import QuantizedSlots
from jllm_core.sharding import Placement


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"] | QuantizedSlots,
    v: Float[Array, "B K S H"] | QuantizedSlots,
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"] | None,
    window: int | None = None,
    placement: Placement | None = None,
) -> Float[Array, "B T N H"]:
    """``ops.attention.attention``, or a kernel that gives the same where there is one for these devices and shapes.

    Args:
        q, k, v, q_positions, k_positions, window: as ``attention`` takes them.
        placement: the mesh on which this runs; None is any device.
    """
    if (
        k_positions is None
        and placement is not None
        and not isinstance(k, QuantizedSlots)
        and not isinstance(v, QuantizedSlots)
        and q.dtype == k.dtype
        and pallas_attention.supports(q.shape, k.shape, q.dtype, window, placement)
    ):
        return pallas_attention.attention(q, k, v, q_positions, window, placement)
    if k_positions is None and blocked_attention.supports(q.shape[1], k.shape[2], placement):
        return blocked_attention.attention(q, k, v, q_positions, window)
    return attention(q, k, v, q_positions, k_positions, window)
