"""Reader of quantization_config in config.json: FP8 with blocks of 128 by 128."""

from collections.abc import Mapping
from typing import Any

# The values that each field may have; None also stands for "left out". transformers adds the last four by itself.
_FP8: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",),
    "weight_block_size": ([128, 128],),  # of every model that Qwen published
    "activation_scheme": ("dynamic", None),
    "fmt": ("e4m3", None),
    "scale_fmt": ("float", None),
    "expert_dtype": ("fp8", None),
    "dequantize": (True, False, None),
    "modules_to_convert": ([], None),
}
# The modules that are not quantised: their tensors show it.
_NO_EFFECT = {"modules_to_not_convert", "ignored_layers"}
QUANTIZATION_FIELDS = ("quantization_config", "compression_config", "quantization")
"""Fields of config.json that say how weights are quantised: transformers', those of compressed-tensors and of MLX."""

_ADVICE = "convert the publisher's unquantised weights, or a GGUF file"


def read_quantization(fields: Mapping[str, Any], where: str) -> tuple[tuple[int, int] | None, list[str]]:
    """Read how config.json says that matrices are quantised.

    Args:
        fields: the parsed JSON object.
        where: the file's name, for messages.

    Returns:
        The rows and columns of weights that share a scale, None where nothing is quantised; and the problems.
    """
    settings = fields.get("quantization_config")
    # MLX writes the same object twice, once by a name of its own.
    for name, whose in (("quantization", "MLX"), ("compression_config", "compressed-tensors")):
        if fields.get(name):
            return None, [f"{where}: {name} says that the weights are quantised by {whose}, not supported; {_ADVICE}"]
    if settings is None:
        return None, []
    if not isinstance(settings, dict):
        return None, [f"{where}: quantization_config must be an object, got {settings!r}"]
    # For an unknown method, its other fields say nothing: one problem is enough.
    method = settings.get("quant_method")
    if method != "fp8":
        return None, [
            f"{where}: quantization_config has the quant_method {method!r}, only 'fp8' is supported; {_ADVICE}"
        ]
    problems = [
        f"{where}: quantization_config has {name} = {settings.get(name)!r}, only {allowed[0]!r} is supported; {_ADVICE}"
        for name, allowed in _FP8.items()
        if settings.get(name) not in allowed
    ]
    problems += [
        f"{where}: quantization_config has {name} = {value!r}, which this version does not know; {_ADVICE}"
        for name, value in settings.items()
        if name not in _FP8.keys() | _NO_EFFECT and value not in (None, False, [], {}, "")
    ]
    return (None, problems) if problems else ((128, 128), [])
