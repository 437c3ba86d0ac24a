"""TPU backend: attention by Pallas kernels, JAX's own over a contiguous cache and ours over pages."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jllm_core.backends import blocked_attention
from jllm_core.backends.base import Backend
from jllm_core.backends.grouped_experts import mlp_by_blocks, mlp_by_ragged_dot
from jllm_core.backends.tpu import paged_attention, pallas_attention
from jllm_core.kv_cache import PagedSlots
from jllm_core.ops.attention import attention
from jllm_core.quantization.arrays import QuantizedArray
from jllm_core.quantization.keys_values import QuantizedSlots
from jllm_core.weights import MoELayer

RAGGED_DOT = {"TPU v4": False, "TPU v5": True, "TPU v5 lite": True, "TPU v6 lite": True}
"""Devices for which the compiler makes a kernel of ``ragged_dot``, and whether that reads experts in int8."""

READ_ALL = 4
"""A step with fewer choices than one for so many experts takes them one at a time: the compiler fetches all experts for
the kernel. By its account of a v5e and 30B-A3B over 8 devices, 184 us a layer beside 29 us for each expert that the
busiest device has a row for, of which two texts have about 4."""

PREFILL_TOKENS = {"TPU v4": 512, "TPU v5": 512, "TPU v5 lite": 512, "TPU v6 lite": 1024}
"""About twice the tokens at which a product with a matrix takes as long to compute as the matrix takes to be read, by
the published figures: 229, 166, 241 and 560. With fewer the matrix units wait; they are half idle at 256 on a v6e."""


@dataclass(frozen=True)
class TPU(Backend):
    """XLA on TPUs, with kernels for attention where they take the shapes.

    Attributes:
        interpret: what Pallas calls so, to run the kernel for pages where there is no TPU: True, or
            ``pltpu.InterpretParams``. For tests.
    """

    interpret: Any = False

    # The kernel for prompts takes all rows to see the same.
    ragged_queries = False

    # By the kind of device, so no constants of the class.
    @property
    def prefill_tokens(self) -> int:  # type: ignore[override]
        """``Backend.prefill_tokens``."""
        return PREFILL_TOKENS.get(self._kind, super().prefill_tokens)

    @property
    def min_step_tokens(self) -> int:  # type: ignore[override]
        """``Backend.min_step_tokens``."""
        return self.prefill_tokens // 2

    @property
    def one_table_width(self) -> bool:  # type: ignore[override]
        """``Backend.one_table_width``: where the kernel for pages runs, which takes no step for a page that is not
        there."""
        return bool(self.interpret) or self._kind in paged_attention.DEVICE_KINDS

    @property
    def _kind(self) -> str:
        return (self.placement and self.placement.device_kind) or ""

    def attention(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B K S H"] | QuantizedSlots | PagedSlots,
        v: Float[Array, "B K S H"] | QuantizedSlots | PagedSlots,
        q_positions: Int[Array, "B T"],
        k_positions: Int[Array, "B S"] | None = None,
        window: int | None = None,
    ) -> Float[Array, "B T N H"]:
        """``ops.attention.attention``; by a kernel where slot s stands at position s and the shapes fit, and over other
        pages in blocks."""
        attended: Array
        if k_positions is not None or self.placement is None:
            attended = attention(q, k, v, q_positions, k_positions, window)
            return attended
        if isinstance(k, PagedSlots) and isinstance(v, PagedSlots):
            if paged_attention.supports(q.shape, q.dtype, k, self.placement, self.interpret):
                return paged_attention.attention(q, k, v, q_positions, window, self.placement, self.interpret)
            if self.one_table_width:
                # What the kernel does not take must not gather the pages of a wide table either.
                return blocked_attention.attention(q, k, v, q_positions, window)
        elif (
            not isinstance(k, QuantizedSlots | PagedSlots)
            and not isinstance(v, QuantizedSlots | PagedSlots)
            and q.dtype == k.dtype
            and pallas_attention.supports(q.shape, k.shape, q.dtype, window, self.placement)
        ):
            return pallas_attention.attention(q, k, v, q_positions, window, self.placement)
        attended = attention(q, k, v, q_positions, k_positions, window)
        return attended

    def experts(self, x: Float[Array, "M D"], sizes: Int[Array, " E"], layer: MoELayer) -> Float[Array, "M D"]:
        """``Backend.experts``; by XLA's kernel where it has one for this type, and enough experts have rows."""
        kind = None if self.placement is None else self.placement.device_kind
        return (mlp_by_ragged_dot if takes_ragged_dot(kind, x, layer) else mlp_by_blocks)(x, sizes, layer)

    def attention_bytes(self, q: Any, k: Any, queries: int, held: tuple[int, ...], window: int | None) -> int:
        """``Backend.attention_bytes``: none where a kernel runs, which writes no scores to memory."""
        placement = self.placement
        if (
            placement is not None
            and q.dtype == k.dtype
            and pallas_attention.supports(q.shape, k.shape, q.dtype, window, placement)
        ):
            return 0
        return super().attention_bytes(q, k, queries, held, window)


def takes_ragged_dot(kind: str | None, x: Float[Array, "M D"], layer: MoELayer) -> bool:
    """Whether the compiler for these devices makes kernels of the products of a mixture, and they pay.

    Args:
        kind: what JAX calls the devices.
        x: the rows, one for each choice of a token.
        layer: the experts of one device, with the router of all.
    """
    if kind not in RAGGED_DOT or x.dtype not in (jnp.bfloat16, jnp.float32):
        return False
    if isinstance(layer.we_up, QuantizedArray) and not (layer.we_up.group is None and RAGGED_DOT[kind]):
        return False
    return bool(READ_ALL * x.shape[0] > layer.w_router.shape[1])
