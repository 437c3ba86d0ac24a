"""Writer of config.json from a ModelConfig, in a spelling that transformers 4 and 5 both read.

Fields are written even where they have transformers' default: its defaults differ between families, and a model must
not depend on the version that reads it.
"""

import math
from collections.abc import Sequence
from dataclasses import fields as fields_of
from dataclasses import replace
from typing import Any

from jllm_core.config import ModelConfig, MoEConfig

from jllm_convert.errors import ConversionError
from jllm_convert.exporting.huggingface_rope import expressible_scaling, to_hf_rope
from jllm_convert.families import FAMILIES, exported_family
from jllm_convert.families.table import Family
from jllm_convert.sources.huggingface.config import read_hf_config
from jllm_convert.sources.huggingface.layer_types import delta_net_fields
from jllm_convert.sources.huggingface.rope import stretched_context

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_5": "Qwen3_5ForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForCausalLM",
}


def to_hf_config(
    config: ModelConfig,
    dtype: str,
    eos_ids: Sequence[int] = (),
    *,
    bos_id: int | None = None,
    pad_id: int | None = None,
) -> dict[str, Any]:
    """Make the fields of config.json for a model.

    The fields are read back and must give the same architecture. Allowed differences compute the same: a list that says
    the default of every layer; divisors of single frequencies in place of the ``llama3`` parameters they come from;
    numbers that a kind of rotary scaling does not use; and the context length with YaRN, which readers take to be at
    least ``factor`` times that of the first training.

    Args:
        config: the architecture.
        dtype: the element type of the weights, such as ``"bfloat16"``.
        eos_ids: the end-of-text ids.
        bos_id: the beginning-of-text id, where it is known.
        pad_id: the padding id, where it is known.

    Raises:
        ConversionError: every field of the architecture that this family's config.json cannot express.
    """
    if config.model_type not in FAMILIES or (family := exported_family(config)).model_type not in _ARCHITECTURES:
        raise ConversionError(
            f"model_type {config.model_type!r} cannot be exported; supported: {', '.join(sorted(FAMILIES))}"
        )
    expressible = _expressible(replace(config, model_type=family.model_type))
    scaling = expressible.rope_scaling
    dynamic = scaling is not None and scaling.kind == "dynamic"
    fields = {
        "architectures": [_ARCHITECTURES[family.model_type]],
        "model_type": family.text_model_type or family.model_type,
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        # With dynamic scaling this field is the context length of the first training.
        "max_position_embeddings": (
            scaling.original_context_length if scaling and dynamic else expressible.context_length
        ),
        "rms_norm_eps": float(config.rms_norm_eps),
        **to_hf_rope(expressible),
        **_rotary_factor(expressible, family),
        "tie_word_embeddings": config.tie_embeddings,
        **_biases(expressible, family),
        **_rope_layers(expressible, family),
        **_windows(expressible, family),
        **_experts(expressible, family),
        **(delta_net_fields(config.delta_net, config.mixers, config.num_layers) if family.delta_nets else {}),
        "bos_token_id": bos_id,
        # Publishers write one id as a number, and several as a list. An empty list would break transformers.
        "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else list(eos_ids) or None,
        "pad_token_id": pad_id,
    }
    _check(fields, expressible)
    return fields


def _expressible(config: ModelConfig) -> ModelConfig:
    """The same architecture in the form in which config.json is read back."""
    # Lists that hold the default of every layer become None, as the reader gives them.
    scaling, context = expressible_scaling(config), config.context_length
    moe = config.moe
    if moe is not None and moe.layers is not None:
        moe = None if not any(moe.layers) else replace(moe, layers=None) if all(moe.layers) else moe
    return replace(
        config,
        context_length=stretched_context(scaling, context) if scaling and scaling.kind == "yarn" else context,
        rope_scaling=scaling,
        rope_layers=None if all(config.rope_layers or ()) else config.rope_layers,
        windows=config.windows if any(config.windows or ()) else None,
        moe=moe,
    )


def _rotary_factor(config: ModelConfig, family: Family) -> dict[str, Any]:
    if family.rotary_factor is None:
        return {}
    rotated, size = config.rotated_features, config.head_dim
    factor = rotated / size
    # Whoever reads it rounds the product down, which may be a hair below the number that it stands for.
    return {"partial_rotary_factor": factor if int(size * factor) == rotated else math.nextafter(factor, 1)}


def _biases(config: ModelConfig, family: Family) -> dict[str, Any]:
    attention = {"attention_bias": config.qkv_bias} if family.attention_bias == "config" else {}
    return attention | ({"mlp_bias": config.mlp_bias} if family.mlp_bias else {})


def _rope_layers(config: ModelConfig, family: Family) -> dict[str, Any]:
    rotated = [int(config.rotates(layer)) for layer in range(config.num_layers)]
    return {"no_rope_layers": rotated} if family.skips_rope else {}


def _windows(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The fields of the sliding windows. ``_check`` finds windows that they cannot express."""
    if family.windows is None:
        return {}
    windows = [config.window(layer) for layer in range(config.num_layers)]
    # All windows of a model have one size; ``_check`` refuses others.
    largest = max((window for window in windows if window is not None), default=None)
    fields: dict[str, Any] = {"sliding_window": largest}
    if family.windows.switch:
        fields["use_sliding_window"] = largest is not None
    # Without any window, max_window_layers past the end says the same once more.
    if family.windows.switch and family.windows.layers != "unrotated":
        first = next((layer for layer, window in enumerate(windows) if window is not None), config.num_layers)
        fields["max_window_layers"] = first
    if largest is not None and family.windows.layers != "all":
        fields["layer_types"] = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return fields


def _experts(config: ModelConfig, family: Family) -> dict[str, Any]:
    moe = config.moe
    if not family.moe:
        return {}
    if moe is None:
        return {"num_experts": 0}
    fields: dict[str, Any] = {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.intermediate_size,
    }
    if family.normalizes == "config":
        fields["norm_topk_prob"] = moe.normalize_weights
    if family.shared_expert:
        fields["shared_expert_intermediate_size"] = moe.shared_size
    if "decoder_sparse_step" not in family.defaults:
        return fields
    step, plain = _sparse_layers(moe, config.num_layers)
    return fields | {"decoder_sparse_step": step, "mlp_only_layers": plain}


def _sparse_layers(moe: MoEConfig, num_layers: int) -> tuple[int, list[int]]:
    """``decoder_sparse_step`` and ``mlp_only_layers``: a step alone where one fits, else all plain layers by number."""
    # A step of 1 is a mixture in every layer.
    layers = [True] * num_layers if moe.layers is None else list(moe.layers)
    for step in range(1, num_layers + 1):
        if layers == [(layer + 1) % step == 0 for layer in range(num_layers)]:
            return step, []
    return 1, [layer for layer, is_moe in enumerate(layers) if not is_moe]


def _check(fields: dict[str, Any], config: ModelConfig) -> None:
    """Read the fields back and compare.

    Raises:
        ConversionError: they are refused, or give another architecture.
    """
    try:
        read = read_hf_config(fields, "config.json")
    except ConversionError as error:
        raise ConversionError([f"no config.json can say this: {problem}" for problem in error.problems]) from error
    # All fields, so that one that this module forgets is found too.
    problems = [
        f"{field.name} is {wanted!r}, which the config.json of a {config.model_type!r} model cannot express; "
        f"it would be read as {got!r}"
        for field in fields_of(ModelConfig)
        if (got := getattr(read, field.name)) != (wanted := getattr(config, field.name))
    ]
    if problems:
        raise ConversionError(problems)
