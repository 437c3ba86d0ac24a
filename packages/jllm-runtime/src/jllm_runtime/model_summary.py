"""Summary of a model in one line, as a notebook shows it."""

from jllm_core.adapters import adapted_matrices
from jllm_core.quantization.arrays import quantization_of

from jllm_runtime.model import Model
from jllm_runtime.planner.memory import parameter_count


def summary(model: Model) -> str:
    """``Model(llama, 30 layers, 135M parameters, float32, 1 x cpu, CPU kernels, smollm2)``."""
    config = model.config
    parts = [
        config.model_type,
        f"{config.num_layers} layer{'s' if config.num_layers > 1 else ''}",
        f"{_rounded(parameter_count(config))} parameters",
        *_types(model),
        *(["adapted"] if adapted_matrices(model.weights) else []),
        f"{model.mesh.size} x {model.placement.device_kind}",
        model.backend.name,
        *([] if model.path is None else [str(model.path)]),
    ]
    return f"{type(model).__name__}({', '.join(parts)})"


def runs_on(model: Model) -> str:
    """``4 x tpu (TPU v5 lite), int8 and bfloat16 (XLA)``."""
    platform, kind = model.mesh.devices.flat[0].platform, model.placement.device_kind
    device = platform if kind == platform else f"{platform} ({kind})"
    return f"{model.mesh.size} x {device}, {' and '.join(_types(model))} ({model.backend.name})"


def _types(model: Model) -> list[str]:
    """The quantization of the weights, where there is one, and the type of all other numbers."""
    weights = model.weights
    quantization = quantization_of(weights.layers[0].attn.q, weights.embedding)
    return [*([] if quantization is None else [quantization.name]), weights.dtype.name]


def _rounded(count: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.{1 if count < 10 * unit else 0}f}{name}"
    return str(count)
