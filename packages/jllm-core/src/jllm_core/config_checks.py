"""Config checks: what is no possible model, said field by field."""

from typing import Any, get_args

from jllm_core.config import (
    MAX_EXPERTS,
    MAX_LAYERS,
    ConfigError,
    DeltaNetConfig,
    Mixer,
    ModelConfig,
    MoEConfig,
    RopeKind,
    RopeScaling,
    is_number,
)


def check_rope_scaling(scaling: RopeScaling) -> None:
    """Raise a ConfigError where ``RopeScaling`` says that it does."""
    if scaling.kind not in get_args(RopeKind):
        raise ConfigError(
            f"rope scaling kind {scaling.kind!r} is not supported; known: {', '.join(get_args(RopeKind))}"
        )
    for name in ("factor", "beta_fast", "beta_slow", "attention_factor"):
        value = getattr(scaling, name)
        if not is_number(value) or not value > 0:
            raise ConfigError(f"rope scaling {name} must be a number above 0, got {value!r}")
    _need_bool("rope scaling truncate", scaling.truncate)
    if scaling.kind in ("dynamic", "llama3", "yarn"):
        _need_size(f"original_context_length of rope scaling {scaling.kind!r}", scaling.original_context_length)
    if scaling.kind == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        if not is_number(low) or not is_number(high):
            raise ConfigError(
                "rope scaling 'llama3' needs the numbers low_freq_factor and high_freq_factor, "
                f"got {low!r} and {high!r}"
            )
        if not 0 < low < high:
            raise ConfigError(f"rope scaling 'llama3' needs 0 < low_freq_factor < high_freq_factor, got {low}, {high}")
    if scaling.kind == "factors":
        factors = scaling.factors or ()
        if not factors or not all(is_number(factor) and factor > 0 for factor in factors):
            raise ConfigError("rope scaling 'factors' needs one divisor above 0 for each frequency")


def check_moe(moe: MoEConfig) -> None:
    """Raise a ConfigError where ``MoEConfig`` says that it does."""
    for name in ("num_experts", "experts_per_token", "intermediate_size"):
        _need_size(name, getattr(moe, name))
    _need_at_most("num_experts", moe.num_experts, MAX_EXPERTS)
    if moe.experts_per_token > moe.num_experts:
        raise ConfigError(
            f"experts_per_token must be at most num_experts, got {moe.experts_per_token} of {moe.num_experts}"
        )
    for name in ("normalize_weights", "shared_gate"):
        _need_bool(name, getattr(moe, name))
    if moe.shared_size is not None:
        _need_size("shared_size", moe.shared_size)
    elif moe.shared_gate:
        raise ConfigError("shared_gate is of a shared expert, whose width shared_size says; it is None")


def check_delta_net(net: DeltaNetConfig) -> None:
    """Raise a ConfigError where ``DeltaNetConfig`` says that it does."""
    for name in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_size"):
        _need_size(name, getattr(net, name))
    if net.num_value_heads % net.num_key_heads:
        raise ConfigError(
            f"num_value_heads must be a multiple of num_key_heads, got {net.num_value_heads} and {net.num_key_heads}"
        )


def check_model(config: ModelConfig) -> None:
    """Raise a ConfigError where ``ModelConfig`` says that it does."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
    for name in (*sizes, "head_dim", "context_length"):
        _need_size(name, getattr(config, name))
    _need_at_most("num_layers", config.num_layers, MAX_LAYERS)
    # Each within its limit, their product could still be what nobody can allocate.
    if config.moe:
        _need_at_most("num_layers times num_experts", config.num_layers * config.moe.num_experts, MAX_EXPERTS)
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(
            f"num_heads must be a multiple of num_kv_heads, got {config.num_heads} and {config.num_kv_heads}"
        )
    # Rotary embedding turns pairs of features.
    if config.head_dim % 2:
        raise ConfigError(f"head_dim must be even for the rotary embedding, got {config.head_dim}")
    if config.rotary_dim is not None:
        _need_size("rotary_dim", config.rotary_dim)
        _need_at_most("rotary_dim", config.rotary_dim, config.head_dim)
        if config.rotary_dim % 2:
            raise ConfigError(f"rotary_dim must be even, got {config.rotary_dim}")
    for name in ("rope_theta", "rms_norm_eps"):
        value = getattr(config, name)
        if not is_number(value) or not value > 0:
            raise ConfigError(f"{name} must be a number above 0, got {value!r}")
    flags = ("tie_embeddings", "qkv_bias", "o_bias", "mlp_bias", "qk_norm", "output_gate", "centered_norm")
    for name in flags:
        _need_bool(name, getattr(config, name))
    scaling, rotated = config.rope_scaling, config.rotated_features
    if scaling and scaling.factors and len(scaling.factors) != rotated // 2:
        named = "head_dim" if config.rotary_dim is None else "rotary_dim"
        raise ConfigError(f"rope scaling has {len(scaling.factors)} factors, {named} {rotated} needs {rotated // 2}")

    # What is said for each layer must be said for every layer.
    per_layers: dict[str, Any] = {"windows": config.windows, "rope_layers": config.rope_layers, "mixers": config.mixers}
    per_layers["moe.layers"] = config.moe.layers if config.moe else None
    for name, per_layer in per_layers.items():
        if per_layer is not None and len(per_layer) != config.num_layers:
            raise ConfigError(f"{name} must have an entry for each of {config.num_layers} layers, got {per_layer!r}")
    for window in config.windows or ():
        if window is not None:
            _need_size("each of windows", window)
    for name in ("moe.layers", "rope_layers"):
        for flag in per_layers[name] or ():
            _need_bool(f"each of {name}", flag)
    for mixer in config.mixers or ():
        if mixer not in get_args(Mixer):
            raise ConfigError(f"each of mixers is one of {', '.join(get_args(Mixer))}, got {mixer!r}")
    if ("delta_net" in (config.mixers or ())) != (config.delta_net is not None):
        raise ConfigError(
            "delta_net says the shape of the layers that mixers calls 'delta_net': "
            f"a model has both or neither, got mixers {config.mixers!r} and delta_net {config.delta_net!r}"
        )


def _need_size(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")


def _need_at_most(name: str, value: int, limit: int) -> None:
    if value > limit:
        raise ConfigError(f"{name} must be at most {limit:,}, got {value:,}")


def _need_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {value!r}")
