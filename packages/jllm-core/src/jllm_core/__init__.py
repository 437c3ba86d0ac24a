"""Qwen3 and Llama in pure JAX: the weights' description, the sharding rules and the layer math.

The public names are loaded when they are first used, so that ``import jllm_core`` itself costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jllm_core.__about__ import __version__

if TYPE_CHECKING:
    from jllm_core.adapters import Adapter, init_adapter, merge_adapter, with_adapter
    from jllm_core.array_info import ArrayInfo
    from jllm_core.config import DeltaNetConfig, ModelConfig, MoEConfig, RopeScaling
    from jllm_core.errors import JLLMError
    from jllm_core.expert_statistics import ExpertLoad, expert_load
    from jllm_core.kv_cache import NoCache
    from jllm_core.model import Capture, Captured, forward, hidden_states, unembed
    from jllm_core.quantization.arrays import Quantization, QuantizedArray
    from jllm_core.sharding import Placement, ShardingRules
    from jllm_core.weight_specs import abstract_weights, init_weights
    from jllm_core.weights import AttentionLayer, DeltaNetLayer, Layer, MLPLayer, MoELayer, Weights

_MODULE_OF = {
    "Adapter": "adapters",
    "init_adapter": "adapters",
    "merge_adapter": "adapters",
    "with_adapter": "adapters",
    "ArrayInfo": "array_info",
    "DeltaNetConfig": "config",
    "ModelConfig": "config",
    "MoEConfig": "config",
    "RopeScaling": "config",
    "JLLMError": "errors",
    "ExpertLoad": "expert_statistics",
    "expert_load": "expert_statistics",
    "NoCache": "kv_cache",
    "Capture": "model",
    "Captured": "model",
    "forward": "model",
    "hidden_states": "model",
    "unembed": "model",
    "Placement": "sharding",
    "Quantization": "quantization.arrays",
    "QuantizedArray": "quantization.arrays",
    "ShardingRules": "sharding",
    "AttentionLayer": "weights",
    "DeltaNetLayer": "weights",
    "Layer": "weights",
    "MLPLayer": "weights",
    "MoELayer": "weights",
    "Weights": "weights",
    "abstract_weights": "weight_specs",
    "init_weights": "weight_specs",
}

__all__ = [
    "Adapter",
    "ArrayInfo",
    "AttentionLayer",
    "Capture",
    "Captured",
    "DeltaNetConfig",
    "DeltaNetLayer",
    "ExpertLoad",
    "JLLMError",
    "Layer",
    "MLPLayer",
    "MoEConfig",
    "MoELayer",
    "ModelConfig",
    "NoCache",
    "Placement",
    "Quantization",
    "QuantizedArray",
    "RopeScaling",
    "ShardingRules",
    "Weights",
    "__version__",
    "abstract_weights",
    "expert_load",
    "forward",
    "hidden_states",
    "init_adapter",
    "init_weights",
    "merge_adapter",
    "unembed",
    "with_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
