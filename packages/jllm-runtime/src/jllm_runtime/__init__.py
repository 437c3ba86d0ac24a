"""Run Qwen3 and Llama in JAX: device mesh, KV cache, sampling, generation.

The public names are loaded when they are first used, so that ``import jllm_runtime`` itself costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jllm_runtime.__about__ import __version__

if TYPE_CHECKING:
    from jllm_runtime.answers import GenerationOutput, Piece, Timings
    from jllm_runtime.errors import RequestError
    from jllm_runtime.generation import generate, stream_generate
    from jllm_runtime.loading import Model, load_model
    from jllm_runtime.mesh import make_mesh
    from jllm_runtime.sampling import SamplingParams
    from jllm_runtime.tokenizer import Tokenizer

_MODULE_OF = {
    "GenerationOutput": "answers",
    "Model": "loading",
    "Piece": "answers",
    "RequestError": "errors",
    "SamplingParams": "sampling",
    "Timings": "answers",
    "Tokenizer": "tokenizer",
    "generate": "generation",
    "load_model": "loading",
    "make_mesh": "mesh",
    "stream_generate": "generation",
}

__all__ = [
    "GenerationOutput",
    "Model",
    "Piece",
    "RequestError",
    "SamplingParams",
    "Timings",
    "Tokenizer",
    "__version__",
    "generate",
    "load_model",
    "make_mesh",
    "stream_generate",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
