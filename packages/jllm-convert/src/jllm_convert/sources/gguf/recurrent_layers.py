"""Metadata of hybrids in GGUF files: which layers have a gated delta net, and its shape."""

from jllm_core.config import DeltaNetConfig, Mixer

from jllm_convert.sources.gguf.numbers import Numbers

# llama.cpp has the names of another kind of recurrent layers (Mamba).
_SIZES = {
    "num_key_heads": "ssm.group_count",
    "num_value_heads": "ssm.time_step_rank",
    "key_head_dim": "ssm.state_size",
    "conv_size": "ssm.conv_kernel",
}
_INNER = "ssm.inner_size"
_INTERVAL, _LAYERS = "full_attention_interval", "attention.recurrent_layers"
DELTA_NET_KEYS = {*_SIZES.values(), _INNER, _INTERVAL, _LAYERS}


def read_mixers(numbers: Numbers, num_layers: int) -> tuple[Mixer, ...] | None:
    """Read for each layer whether it has attention or a delta net; None where all have attention.

    Raises:
        ConversionError: metadata of another type, or for another number of layers.
    """
    listed = numbers.known.get(_LAYERS)
    if listed is None:
        # Where the file does not say it, llama.cpp takes every fourth layer.
        interval = numbers.size(_INTERVAL, 4)
        if interval < 1:
            raise numbers.fail(_INTERVAL, "a whole number of at least 1")
        listed = [(layer + 1) % interval != 0 for layer in range(num_layers)]
    if not isinstance(listed, list) or len(listed) < num_layers or any(flag not in (0, 1) for flag in listed):
        raise numbers.fail(_LAYERS, f"true or false for each of {num_layers} layers")
    # A list that is longer has blocks behind the last layer too.
    mixers: tuple[Mixer, ...] = tuple("delta_net" if recurrent else "attention" for recurrent in listed[:num_layers])
    return mixers if "delta_net" in mixers else None


def read_delta_net(numbers: Numbers) -> DeltaNetConfig:
    """Read the shape of the delta nets.

    Raises:
        ConversionError: metadata that are missing or of another type.
        ConfigError: an impossible shape.
    """
    sizes = {ours: numbers.size(key, 0) for ours, key in _SIZES.items()}
    inner, heads = numbers.size(_INNER, 0), max(sizes["num_value_heads"], 1)
    if inner % heads:
        raise numbers.fail(_INNER, f"a multiple of the {heads} heads")
    return DeltaNetConfig(**sizes, value_head_dim=inner // heads)
