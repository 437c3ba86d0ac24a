"""GPU backend: attention by a Pallas kernel on NVIDIA's GPUs from Ampere on, and in blocks on all others."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jllm_core.backends import blocked_attention
from jllm_core.backends.base import Backend
from jllm_core.backends.gpu import flash_attention
from jllm_core.kv_cache import PagedSlots
from jllm_core.ops.attention import attention
from jllm_core.quantization.keys_values import QuantizedSlots, Slots
from jllm_core.sharding import Placement

KINDS = ("NVIDIA", "Tesla", "Quadro", "AMD")
"""Beginnings of JAX's names of GPUs."""
BEFORE_AMPERE = ("Tesla", "Quadro", "NVIDIA GeForce GTX", "NVIDIA GeForce RTX 20", "NVIDIA TITAN", "AMD")
"""The same of those that the kernel is not compiled for, where nothing but the name is known."""
MIN_CAPABILITY = (8, 0)
"""Compute capability of Ampere. Triton, in which the kernel is written, knows no older GPU."""

QUERY_AXES = ("batch", None, "heads", None)
CACHE_AXES = ("batch", "kv_heads", "sequence", None)
# Any row may use any page, so that the pool is whole along the batch.
POOL_AXES = (None, "kv_heads", None, None)


@dataclass(frozen=True)
class GPU(Backend):
    """XLA on GPUs, with attention that reads only the slots that are filled, and writes no scores to memory.

    Attributes:
        triton: whether the devices take kernels written in Triton.
        interpret: run them by Pallas' interpreter, on any device; for tests.
    """

    triton: bool = True
    interpret: bool = False

    one_table_width = True
    # From 150 (A100) to 400 (L4) operations a byte; whole rows of blocks for the multiprocessors besides.
    prefill_tokens = 512

    def attention(
        self,
        q: Float[Array, "B T N H"],
        k: Slots | PagedSlots,
        v: Slots | PagedSlots,
        q_positions: Int[Array, "B T"],
        k_positions: Int[Array, "B S"] | None = None,
        window: int | None = None,
    ) -> Float[Array, "B T N H"]:
        """``ops.attention.attention``; by the kernel, or in blocks, where slot s stands at position s."""
        if k_positions is not None:
            plain: Array = attention(q, k, v, q_positions, k_positions, window)
            return plain
        attend: Callable[..., Any] = partial(self._attend, window=window)
        placement = self.placement
        if placement is not None and not placement.is_single and _splits_by_heads(q, k, placement):
            attend = _on_each_device(attend, placement)
        elif placement is not None and not placement.is_single:
            # XLA splits what it has compiled itself.
            attend = partial(blocked_attention.attention, window=window)
        attended: Array = attend(q, k, v, q_positions)
        return attended

    def attention_bytes(self, q: Any, k: Any, queries: int, held: tuple[int, ...], window: int | None) -> int:
        """``Backend.attention_bytes``: none where the kernel runs, which writes no scores to memory."""
        if self.triton and flash_attention.supports(q.dtype, k.dtype, k.shape):
            return 0
        b, heads, slots, width = held
        block = (b, heads, min(slots, blocked_attention.BLOCK), width)
        return super().attention_bytes(q, k, queries, block, window)

    def _attend(
        self, q: Array, k: Slots | PagedSlots, v: Slots | PagedSlots, positions: Array, window: int | None
    ) -> Array:
        pages = k.pages if isinstance(k, PagedSlots) else k
        kept = (pages.values if isinstance(pages, QuantizedSlots) else pages).dtype
        if (self.triton or self.interpret) and flash_attention.supports(q.dtype, kept, pages.shape):
            return flash_attention.attention(q, k, v, positions, window, self.interpret)
        return blocked_attention.attention(q, k, v, positions, window, by_sums=q.shape[1] == 1)


def gpu_backend(placement: Placement) -> GPU | None:
    """The backend of these devices; None where they are no GPUs."""
    kind = placement.device_kind or ""
    if not kind.startswith(KINDS):
        return None
    triton = not kind.startswith(BEFORE_AMPERE)
    if isinstance(placement.mesh, Mesh):
        triton = _capability(placement.mesh.devices.flat[0]) >= MIN_CAPABILITY
    words = "a Pallas kernel for attention" if triton else "attention in blocks"
    return GPU(placement, triton=triton, name=f"XLA, with {words}")


def _capability(device: Any) -> tuple[int, ...]:
    """A GPU's compute capability. AMD's are no numbers, and come before all."""
    numbers = str(getattr(device, "compute_capability", "")).split(".")
    return tuple(map(int, numbers)) if all(number.isdigit() for number in numbers) else ()


def _axes(slots: Slots | PagedSlots) -> tuple[str | None, ...]:
    return POOL_AXES if isinstance(slots, PagedSlots) else CACHE_AXES


def _splits_by_heads(q: Array, k: Slots | PagedSlots, placement: Placement) -> bool:
    """Whether each device has the kv heads of its query heads, and all slots of them."""
    _, _, heads, _ = placement.spec(q.shape, *QUERY_AXES)
    pages = k.pages if isinstance(k, PagedSlots) else k
    _, kv_heads, slots, _ = placement.spec(pages.shape, *_axes(k))
    return heads == kv_heads and slots is None


def _on_each_device(attend: Callable[..., Any], placement: Placement) -> Callable[..., Any]:
    """``attend`` for each device's own rows and heads: XLA cannot split a kernel over the mesh by itself."""

    def split(q: Array, k: Slots | PagedSlots, v: Slots | PagedSlots, positions: Array) -> Array:
        leaves, tree = jax.tree.flatten((k, v))

        def spec(array: Array) -> Any:
            axes = ("batch", None) if array.ndim == 2 else _axes(k)[: array.ndim]
            return placement.spec(array.shape, *axes)

        def local(q: Array, positions: Array, *leaves: Array) -> Any:
            return attend(q, *jax.tree.unflatten(tree, leaves), positions)

        queries = placement.spec(q.shape, *QUERY_AXES)
        rows = placement.spec(positions.shape, "batch", None)
        mapped = placement.shard_map(local, (queries, rows, *map(spec, leaves)), queries)
        attended: Array = mapped(q, positions, *leaves)
        return attended

    return split
