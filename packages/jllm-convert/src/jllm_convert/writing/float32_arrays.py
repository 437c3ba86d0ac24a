"""Arrays that are float32 in a model of any type, and the types that their publisher stores them in."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
from jllm_core.array_info import named_leaves
from jllm_core.config import ModelConfig
from jllm_core.weight_specs import abstract_weights

from jllm_convert.matching.rules import Match

FLOAT32_SOURCES = "float32_arrays"
"""The key of a manifest's source: by the name behind the layer's number, the type of such an array in the source."""


def float32_arrays(config: ModelConfig) -> set[str]:
    """The names of the arrays that are float32 whatever type the others have."""
    # In any other type, what is float32 nevertheless is one of them.
    infos = named_leaves(abstract_weights(config, np.float16))
    return {name for name, info in infos.items() if info.dtype == np.float32}


def float32_sources(matches: Iterable[Match], fixed: Collection[str]) -> dict[str, str]:
    """Their types in the source, where all layers agree."""
    types: dict[str, set[str]] = {}
    for match in matches:
        if match.array in fixed:
            types.setdefault(_in_layer(match.array), set()).add(match.dtype.name)
    return {name: next(iter(each)) for name, each in types.items() if len(each) == 1}


def exported_dtype(array: str, source: Mapping[str, Any], known: Mapping[str, np.dtype]) -> np.dtype:
    """The type that such an array is exported in: that of the publisher where the manifest has it, else float32."""
    recorded = source.get(FLOAT32_SOURCES)
    name = recorded.get(_in_layer(array)) if isinstance(recorded, dict) else None
    return known.get(name, np.dtype(np.float32)) if isinstance(name, str) else np.dtype(np.float32)


def _in_layer(array: str) -> str:
    """``attn.a_log`` of ``layers.3.attn.a_log``."""
    return array.split(".", 2)[-1] if array.startswith("layers.") else array
