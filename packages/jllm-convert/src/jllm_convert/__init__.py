"""Hugging Face weights (safetensors, GGUF) to a JAX checkpoint (orbax), without torch.

The public names are loaded when they are first used, so that ``import jllm_convert`` itself costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jllm_convert.__about__ import __version__

if TYPE_CHECKING:
    from jllm_convert.adapter_folder import load_adapter, save_adapter
    from jllm_convert.conversion import Conversion, convert
    from jllm_convert.errors import ConversionError
    from jllm_convert.exporting.export import Exported, export
    from jllm_convert.hub.downloading import download
    from jllm_convert.inspection import Inspection, inspect
    from jllm_convert.verification import Damage, Verification, verify
    from jllm_convert.writing.progress import Progress

_MODULE_OF = {
    "Conversion": "conversion",
    "convert": "conversion",
    "ConversionError": "errors",
    "load_adapter": "adapter_folder",
    "save_adapter": "adapter_folder",
    "Exported": "exporting.export",
    "export": "exporting.export",
    "download": "hub.downloading",
    "Inspection": "inspection",
    "inspect": "inspection",
    "Progress": "writing.progress",
    "Damage": "verification",
    "Verification": "verification",
    "verify": "verification",
}

__all__ = [
    "Conversion",
    "ConversionError",
    "Damage",
    "Exported",
    "Inspection",
    "Progress",
    "Verification",
    "__version__",
    "convert",
    "download",
    "export",
    "inspect",
    "load_adapter",
    "save_adapter",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
