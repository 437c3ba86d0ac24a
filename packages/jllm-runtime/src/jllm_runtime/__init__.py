"""Run Qwen3 and Llama in JAX: device mesh, KV cache, sampling, generation.

The public names are loaded when they are first used, so that ``import jllm_runtime`` itself costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jllm_runtime.__about__ import __version__

if TYPE_CHECKING:
    from jllm_runtime.embedding import embed
    from jllm_runtime.engine.config import EngineConfig
    from jllm_runtime.engine.engine import Engine
    from jllm_runtime.engine.protocol import follow
    from jllm_runtime.engine.request import Request
    from jllm_runtime.engine.stats import EngineStats
    from jllm_runtime.errors import EngineError, QueueFullError, RequestError
    from jllm_runtime.evaluation.perplexity import Perplexity, perplexity
    from jllm_runtime.generation import generate, stream_generate
    from jllm_runtime.grammar import Grammar
    from jllm_runtime.loading import load_chat_model, load_model
    from jllm_runtime.mesh import make_mesh
    from jllm_runtime.model import ChatModel, Model
    from jllm_runtime.outputs import GenerationOutput, Piece, Timings, TokenLogprob
    from jllm_runtime.sampling import SamplingParams
    from jllm_runtime.tokenizer import Tokenizer

_MODULE_OF = {
    "ChatModel": "model",
    "Engine": "engine.engine",
    "EngineConfig": "engine.config",
    "EngineError": "errors",
    "EngineStats": "engine.stats",
    "GenerationOutput": "outputs",
    "Grammar": "grammar",
    "Model": "model",
    "Perplexity": "evaluation.perplexity",
    "perplexity": "evaluation.perplexity",
    "Piece": "outputs",
    "QueueFullError": "errors",
    "Request": "engine.request",
    "RequestError": "errors",
    "SamplingParams": "sampling",
    "Timings": "outputs",
    "TokenLogprob": "outputs",
    "Tokenizer": "tokenizer",
    "embed": "embedding",
    "follow": "engine.protocol",
    "generate": "generation",
    "load_chat_model": "loading",
    "load_model": "loading",
    "make_mesh": "mesh",
    "stream_generate": "generation",
}

__all__ = [
    "ChatModel",
    "Engine",
    "EngineConfig",
    "EngineError",
    "EngineStats",
    "GenerationOutput",
    "Grammar",
    "Model",
    "Perplexity",
    "Piece",
    "QueueFullError",
    "Request",
    "RequestError",
    "SamplingParams",
    "Timings",
    "TokenLogprob",
    "Tokenizer",
    "__version__",
    "embed",
    "follow",
    "generate",
    "load_chat_model",
    "load_model",
    "make_mesh",
    "perplexity",
    "stream_generate",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
