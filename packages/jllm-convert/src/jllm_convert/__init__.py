"""Hugging Face weights (safetensors, GGUF) to a JAX checkpoint (orbax), without torch.

The public names are loaded when they are first used, so that ``import jllm_convert`` itself costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jllm_convert.__about__ import __version__

if TYPE_CHECKING:
    from jllm_convert.conversion import Conversion, Progress, convert
    from jllm_convert.errors import ConversionError

_MODULE_OF = {
    "Conversion": "conversion",
    "Progress": "conversion",
    "convert": "conversion",
    "ConversionError": "errors",
}

__all__ = ["Conversion", "ConversionError", "Progress", "__version__", "convert"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
