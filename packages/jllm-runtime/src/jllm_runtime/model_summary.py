"""Summary of a model in one line, as a notebook shows it."""

from jllm_core.quantization.arrays import quantization_of

from jllm_runtime.model import Model
from jllm_runtime.planner.memory import parameter_count


def summary(model: Model) -> str:
    """``Model(llama, 30 layers, 135M parameters, float32, 1 x cpu, CPU kernels, smollm2)``."""
    config, weights = model.config, model.weights
    quantization = quantization_of(weights.layers[0].attn.q, weights.embedding)
    parts = [
        config.model_type,
        f"{config.num_layers} layer{'s' if config.num_layers > 1 else ''}",
        f"{_rounded(parameter_count(config))} parameters",
        *([] if quantization is None else [quantization.name]),
        weights.dtype.name,
        f"{model.mesh.size} x {model.placement.device_kind}",
        model.backend.name,
        *([] if model.path is None else [str(model.path)]),
    ]
    return f"{type(model).__name__}({', '.join(parts)})"


def _rounded(count: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.{1 if count < 10 * unit else 0}f}{name}"
    return str(count)
