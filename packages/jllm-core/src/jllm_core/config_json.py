"""Model config as JSON: the reader of what ``ModelConfig.to_json`` writes."""

import dataclasses
import json
from typing import Any

from jllm_core.config import ConfigError, DeltaNetConfig, ModelConfig, MoEConfig, RopeScaling


def read_config(text: str) -> ModelConfig:
    """``ModelConfig.from_json``.

    Raises:
        ConfigError: not JSON, an unknown or missing field, or an impossible value.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets nested a thousand deep
        raise ConfigError(f"the model config is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"the model config must be a JSON object, got {type(fields).__name__}")
    # JSON has no dataclasses and no tuples: nested objects and lists are turned back.
    kinds: tuple[tuple[str, type, tuple[str, ...]], ...] = (
        ("rope_scaling", RopeScaling, ("factors",)),
        ("moe", MoEConfig, ("layers",)),
        ("delta_net", DeltaNetConfig, ()),
    )
    for name, kind, listed in kinds:
        if fields.get(name) is not None:
            if not isinstance(fields[name], dict):
                raise ConfigError(f"{name} must be a JSON object, got {fields[name]!r}")
            fields[name] = kind(**_with_tuples(_checked(kind, fields[name]), f"{name}.", *listed))
    return ModelConfig(**_with_tuples(_checked(ModelConfig, fields), "", "windows", "rope_layers", "mixers"))


def _with_tuples(fields: dict[str, Any], prefix: str, *names: str) -> dict[str, Any]:
    """``fields`` with the lists of these names as tuples: a config is hashed, as jit's static argument."""
    for name in names:
        if fields.get(name) is not None:
            if not isinstance(fields[name], list):
                raise ConfigError(f"{prefix}{name} must be a list, got {fields[name]!r}")
            fields[name] = tuple(fields[name])
    return fields


def _checked(kind: type, fields: dict[str, Any]) -> dict[str, Any]:
    """A copy of ``fields`` if they fit the dataclass ``kind``; else a ConfigError that names what does not."""
    known = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(fields) - set(known))
    missing = sorted(n for n, f in known.items() if f.default is dataclasses.MISSING and n not in fields)
    if unknown or missing:
        raise ConfigError(
            f"{kind.__name__}: unknown fields {unknown}, missing fields {missing}; "
            "the file may come from a newer version of jllm-core"
        )
    return dict(fields)
