"""Fields of config.json for hybrids: which layers have a gated delta net, and its shape."""

from collections.abc import Mapping
from typing import Any

from jllm_core.config import ConfigError, DeltaNetConfig, Mixer

from jllm_convert.families.table import Family
from jllm_convert.sources.huggingface.field_types import whole_field

_SHAPE = {
    "linear_num_key_heads": "num_key_heads",
    "linear_num_value_heads": "num_value_heads",
    "linear_key_head_dim": "key_head_dim",
    "linear_value_head_dim": "value_head_dim",
    "linear_conv_kernel_dim": "conv_size",
}
_KINDS: dict[str, Mixer] = {"linear_attention": "delta_net", "full_attention": "attention"}
DELTA_NET_FIELDS = (*_SHAPE, "layer_types", "full_attention_interval")
DELTA_NET_SPELLINGS = {ours: spelling for spelling, ours in _SHAPE.items()}


def read_mixers(fields: Mapping[str, Any], family: Family, num_layers: int) -> tuple[Mixer, ...] | None:
    """Read for each layer whether it has attention or a delta net; None where all have attention.

    Raises:
        ConfigError: a kind of layer that is not known, or another number of them.
    """
    if not family.delta_nets:
        return None
    kinds = fields.get("layer_types")
    if kinds is None:
        interval = whole_field(fields, family, "full_attention_interval")
        mixers: tuple[Mixer, ...] = tuple(
            "delta_net" if (layer + 1) % interval else "attention" for layer in range(num_layers)
        )
    else:
        # As in the reference, the interval does not count beside the list.
        if not isinstance(kinds, list) or not all(kind in _KINDS for kind in kinds):
            raise ConfigError(f"layer_types holds {kinds!r}, only {' and '.join(map(repr, _KINDS))} are supported")
        if len(kinds) != num_layers:
            raise ConfigError(f"layer_types has {len(kinds)} entries, num_hidden_layers is {num_layers}")
        mixers = tuple(_KINDS[kind] for kind in kinds)
    return mixers if "delta_net" in mixers else None


def read_delta_net(fields: Mapping[str, Any], family: Family) -> DeltaNetConfig:
    """Read the shape of the delta nets.

    Raises:
        ConfigError: an impossible one.
    """
    return DeltaNetConfig(**{ours: whole_field(fields, family, spelling) for spelling, ours in _SHAPE.items()})


def delta_net_fields(shape: DeltaNetConfig | None, mixers: tuple[Mixer, ...] | None, num_layers: int) -> dict[str, Any]:
    """The same as fields of a config.json."""
    names: dict[Mixer, str] = {ours: spelling for spelling, ours in _KINDS.items()}
    everywhere: list[Mixer] = ["attention"] * num_layers
    layers: dict[str, Any] = {"layer_types": [names[mixer] for mixer in mixers or everywhere]}
    return layers if shape is None else layers | {name: getattr(shape, ours) for name, ours in _SHAPE.items()}
