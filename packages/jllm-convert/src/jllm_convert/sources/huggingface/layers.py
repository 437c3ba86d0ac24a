"""Per-layer fields of config.json: sliding windows, layers without rotary embedding, mixtures of experts."""

from collections.abc import Mapping
from typing import Any

from jllm_core.config import ConfigError, MoEConfig

from jllm_convert.families.table import Family
from jllm_convert.sources.huggingface.field_types import is_whole, whole_field
from jllm_convert.sources.huggingface.layer_types import DELTA_NET_FIELDS

WINDOW_FIELDS = ("use_sliding_window", "sliding_window", "max_window_layers")
ROPE_FIELDS = ("no_rope_layers", "no_rope_layer_interval")
MOE_FIELDS = ("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size")
# Of families whose layers are not all mixtures.
SPARSE_FIELDS = ("decoder_sparse_step", "mlp_only_layers")
SHARED_FIELDS = ("shared_expert_intermediate_size",)


def layer_fields(family: Family) -> tuple[str, ...]:
    """The fields of a config.json that this family has and this module reads."""
    windows: tuple[str, ...] = ()
    if family.windows is not None:
        windows = WINDOW_FIELDS if family.windows.switch else ("sliding_window",)
    experts: tuple[str, ...] = MOE_FIELDS if family.moe else ()
    experts += ("norm_topk_prob",) if family.moe and family.normalizes == "config" else ()
    experts += SPARSE_FIELDS if "decoder_sparse_step" in family.defaults else ()
    experts += SHARED_FIELDS if family.shared_expert else ()
    rope: tuple[str, ...] = ROPE_FIELDS if family.skips_rope else ()
    rope += ("partial_rotary_factor",) if family.rotary_factor is not None else ()
    return windows + rope + experts + (DELTA_NET_FIELDS if family.delta_nets else ())


def read_rope_layers(fields: Mapping[str, Any], family: Family, num_layers: int) -> tuple[bool, ...] | None:
    """Read for each layer whether it has a rotary embedding; None where all have.

    Raises:
        ConfigError: the list is too short, or holds anything but 0 and 1.
    """
    if not family.skips_rope:
        return None
    listed = fields.get("no_rope_layers")
    if listed is None:
        # In spite of the name, the reference takes 1 for "rotated".
        interval = whole_field(fields, family, "no_rope_layer_interval")
        listed = [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    if not isinstance(listed, list) or len(listed) < num_layers or any(flag not in (0, 1) for flag in listed):
        raise ConfigError(f"no_rope_layers must be a 0 or a 1 for each of {num_layers} layers, got {listed!r}")
    # A longer list is accepted, as by the reference, which reads only the entries of its layers.
    rotated = tuple(bool(flag) for flag in listed[:num_layers])
    return None if all(rotated) else rotated


def read_windows(
    fields: Mapping[str, Any], family: Family, num_layers: int, rope_layers: tuple[bool, ...] | None
) -> tuple[int | None, ...] | None:
    """Read each layer's sliding window: positions that a query sees, None for all. None where no layer has one.

    Raises:
        ConfigError: windows that this family does not have, or layer_types that contradicts the other fields.
    """
    window, windows = None, family.windows
    if windows is not None:
        on = not windows.switch or fields.get("use_sliding_window") is True
        window = family.field(fields, "sliding_window") if on else None
    if window is not None and not is_whole(window):
        raise ConfigError(f"sliding_window must be a whole number of at least 1, got {window!r}")
    if family.delta_nets:
        return None  # layer_types says other things there
    # First by the family's own fields, then by layer_types.
    if windows is None or window is None:
        sliding = [False] * num_layers
    elif windows.layers == "all":
        sliding = [True] * num_layers
    elif windows.layers == "last":
        first = whole_field(fields, family, "max_window_layers", smallest=0)
        sliding = [layer >= first for layer in range(num_layers)]
    else:
        sliding = [not rotated for rotated in rope_layers or [True] * num_layers]
    sliding = _by_layer_types(fields, sliding, window, windows is not None and windows.layers != "all")
    return tuple(window if slides else None for slides in sliding) if any(sliding) else None


def _by_layer_types(fields: Mapping[str, Any], derived: list[bool], window: int | None, decide: bool) -> list[bool]:
    """``layer_types`` where it is given, checked against the other fields (``derived``)."""
    # Newer versions of transformers write layer_types beside the older fields. It wins where the family allows it.
    types = fields.get("layer_types")
    if not types:
        return derived
    if not isinstance(types, list) or set(types) - {"full_attention", "attention", "sliding_attention"}:
        raise ConfigError(f"layer_types holds {types!r}, only 'full_attention' and 'sliding_attention' are supported")
    if len(types) != len(derived):
        raise ConfigError(f"layer_types has {len(types)} entries, num_hidden_layers is {len(derived)}")
    listed = [kind == "sliding_attention" for kind in types]
    if (any(listed) and window is None) or (listed != derived and not decide):
        raise ConfigError(
            f"layer_types holds {sorted(set(types))}, but the other fields say that "
            f"{'no' if not any(derived) else 'every'} layer has a sliding window"
        )
    return listed


def read_moe(fields: Mapping[str, Any], family: Family, num_layers: int) -> MoEConfig | None:
    """Read the mixture of experts; None where the family or the config has none.

    Raises:
        ConfigError: a field is missing or impossible.
    """
    if not family.moe:
        return None
    counts = [fields[name] for name in ("num_experts", "num_local_experts") if fields.get(name) is not None]
    if counts and counts[0] != counts[-1]:
        raise ConfigError(f"num_experts and num_local_experts differ: {counts}; leave one of them")
    experts = counts[0] if counts else family.defaults["num_experts"]
    if experts == 0:
        return None
    layers = _mixtures(fields, family, num_layers)
    if not any(layers):
        return None
    return MoEConfig(
        num_experts=experts,
        experts_per_token=whole_field(fields, family, "num_experts_per_tok"),
        intermediate_size=whole_field(fields, family, "moe_intermediate_size"),
        normalize_weights=_normalizes(fields, family),
        layers=None if all(layers) else layers,
        shared_size=whole_field(fields, family, SHARED_FIELDS[0]) if family.shared_expert else None,
        shared_gate=family.shared_expert,
    )


def _normalizes(fields: Mapping[str, Any], family: Family) -> Any:
    """Whether the weights of a token's experts are scaled to sum to one."""
    stated = fields.get("norm_topk_prob")
    # The default of most references is False.
    default = family.normalizes == "always" or bool(family.defaults.get("norm_topk_prob"))
    return default if stated is None else stated


def _mixtures(fields: Mapping[str, Any], family: Family, num_layers: int) -> tuple[bool, ...]:
    """For each layer, whether it is a mixture of experts."""
    if "decoder_sparse_step" not in family.defaults:
        return (True,) * num_layers
    step = whole_field(fields, family, "decoder_sparse_step")
    plain = fields.get("mlp_only_layers") or []
    if not isinstance(plain, list) or not all(is_whole(layer, 0) for layer in plain):
        raise ConfigError(f"mlp_only_layers must be a list of layer numbers, got {plain!r}")
    left_out = set(plain)
    # As in the reference: layer numbers from 1 on count for the step, from 0 on for mlp_only_layers.
    return tuple((layer + 1) % step == 0 and layer not in left_out for layer in range(num_layers))
