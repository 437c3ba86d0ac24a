"""Choice of a backend: once, when a model is loaded."""

from typing import Any

from jax.sharding import Mesh

from jllm_core.backends.base import XLA, Backend
from jllm_core.config import ModelConfig
from jllm_core.sharding import Placement
from jllm_core.weights import MoELayer, Weights

CPU_REDUCTION = 4096
"""XLA's CPU compiler sums smaller arrays in another order, and multiplies a single row by another routine: numbers of
rows give a row the same bits when each of them keeps every reduction at least this large."""


def select_backend(weights: Weights, config: ModelConfig, placement: Placement) -> Backend:
    """The fastest backend that takes this model on these devices.

    Args:
        weights: the model's arrays, or their descriptions (``abstract_weights``).
        config: the architecture.
        placement: the devices. Without ``placement.kernels`` it is XLA everywhere. A mesh that is only planned
            (``AbstractMesh``) gets no kernels that are compiled for the processor at hand.
    """
    kind = placement.device_kind or ""
    if kind == "cpu":
        return _on_cpu(weights, config, placement)
    if kind.startswith("TPU") and placement.kernels:
        from jllm_core.backends.tpu.backend import TPU

        return TPU(placement, name="XLA, with kernels for attention")
    if kind and placement.kernels:
        from jllm_core.backends.gpu.backend import gpu_backend

        return gpu_backend(placement) or XLA(placement)
    return XLA(placement)


def _on_cpu(weights: Weights, config: ModelConfig, placement: Placement) -> Backend:
    narrowest = min(config.hidden_size, config.num_heads * config.head_dim)
    exact = max(2, _power_of_two(-(-CPU_REDUCTION // narrowest)))
    if not placement.kernels:
        return XLA(placement, min_exact_batch=exact)
    if not placement.is_single:
        return XLA(placement, min_exact_batch=exact, name="XLA (the CPU kernels take one device)")
    # Imported here: they come with the code of the kernels.
    from jllm_core.backends.cpu import backend as cpu
    from jllm_core.backends.cpu import ffi
    from jllm_core.backends.cpu import layer_calls as layer

    reason: str | None = "the devices are only planned"
    if isinstance(placement.mesh, Mesh):
        known = cpu.supports_type(weights.dtype)
        reason = ffi.obstacle() if known else f"the CPU kernels take no norms in {weights.dtype.name}"
    if reason is not None:
        return cpu.XLAOnCPU(placement, min_exact_batch=exact, name=f"XLA ({reason})")
    from jllm_core.backends.cpu.llvm_builder import instruction_set

    name = f"CPU kernels ({instruction_set()})"
    if not cpu.supports_layers(weights, config):
        return cpu.CPUKernels(placement, min_exact_batch=exact, name=f"XLA for the layers, {name} for the rest")
    # Kernels sum in an order that does not go by the number of rows; XLA computes mixtures of experts, and of a small
    # vocabulary the log-probabilities.
    if not _has_mixtures(weights) and config.vocab_size >= CPU_REDUCTION:
        exact = 1
    return cpu.CPULayerKernels(placement, min_exact_batch=exact, reads_filled_only=layer.prompts_fit(config), name=name)


def _has_mixtures(weights: Any) -> bool:
    return any(isinstance(layer.ffw, MoELayer) for layer in weights.layers)


def _power_of_two(count: int) -> int:
    """The smallest power of two that is at least ``count``."""
    return 1 << (count - 1).bit_length()
