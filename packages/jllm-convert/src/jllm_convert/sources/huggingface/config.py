"""Reader of config.json (transformers 4 and 5) into a ModelConfig: the only place that knows those spellings.

A field that would change the maths is either honoured or an error; ``config_fields`` has the tables of the others.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from jllm_core.config import MAX_LAYERS, ConfigError, ModelConfig

from jllm_convert.errors import ConversionError
from jllm_convert.families import FAMILIES, family_of
from jllm_convert.families.table import Family
from jllm_convert.sources.huggingface.config_fields import field_problems, read_head_dim
from jllm_convert.sources.huggingface.field_types import is_whole, type_problems
from jllm_convert.sources.huggingface.layer_types import DELTA_NET_SPELLINGS, read_delta_net, read_mixers
from jllm_convert.sources.huggingface.layers import layer_fields, read_moe, read_rope_layers, read_windows
from jllm_convert.sources.huggingface.rope import read_rope, read_rotary_dim, stretched_context
from jllm_convert.sources.huggingface.text_config import text_fields
from jllm_convert.sources.quantized.quantization_config import QUANTIZATION_FIELDS, read_quantization

_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "context_length",
}
_SPELLINGS = {
    **{ours: spelling for spelling, ours in _SIZES.items()},
    **{"num_kv_heads": "num_key_value_heads", "experts_per_token": "num_experts_per_tok"},
    **{"original_context_length": "original_max_position_embeddings", "shared_size": "shared_expert_intermediate_size"},
    **DELTA_NET_SPELLINGS,
    "rotary_dim": "head_dim times partial_rotary_factor",
}
_READ = {
    *_SIZES,
    *QUANTIZATION_FIELDS,
    "model_type",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "original_max_position_embeddings",
    "tie_word_embeddings",
    "layer_types",
    "eos_token_id",
}


def read_hf_config(fields: Mapping[str, Any], where: str, ignored: Collection[str] = ()) -> ModelConfig:
    """Read the ModelConfig that a config.json describes. What it leaves out is the family's default.

    Args:
        fields: the parsed JSON object.
        where: the file's name, for messages.
        ignored: fields that this version does not know, and of which the user says that they change nothing.

    Raises:
        ConversionError: every field that is missing, impossible or cannot be honoured.
    """
    model_type = fields.get("model_type")
    family = family_of(model_type)
    if family is None:
        raise ConversionError(
            f"{where}: model_type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}"
        )
    fields, problems = text_fields(fields, where)
    problems += _unsupported(fields, family, ignored, where)
    # The source multiplies the scales in, so the model sees no quantisation.
    problems += read_quantization(fields, where)[1]
    values: dict[str, Any] = {}
    for spelling, name in _SIZES.items():
        values[name] = family.field(fields, spelling)
        if values[name] is None and spelling == "intermediate_size" and family.moe:
            values[name] = family.field(fields, "moe_intermediate_size")  # no layer is without experts
        if values[name] is None:
            problems.append(f"{where}: {spelling} must be a whole number of at least 1, got None")
    # Checked before anything is made for each layer: an absurd number would take all memory.
    if is_whole(values["num_layers"]) and values["num_layers"] > MAX_LAYERS:
        problems.append(f"{where}: num_hidden_layers must be at most {MAX_LAYERS:,}, got {values['num_layers']:,}")
    context = values["context_length"] if is_whole(values["context_length"]) else 0
    theta, scaling, rope_problems = read_rope(
        fields, family.default_rope_theta, context, where, ignored, _harmless_in_rope(family)
    )
    if problems + rope_problems:
        raise ConversionError(problems + rope_problems)

    biased = family.attention_bias == "config" and fields.get("attention_bias") is True
    values["context_length"] = stretched_context(scaling, context)
    kv_heads = family.field(fields, "num_key_value_heads")
    tied = family.field(fields, "tie_word_embeddings")
    eps = fields.get("rms_norm_eps")
    try:
        rope_layers = read_rope_layers(fields, family, values["num_layers"])
        mixers, head_dim = read_mixers(fields, family, values["num_layers"]), read_head_dim(fields, family)
        return ModelConfig(
            model_type=family.model_type,
            **values,
            # Null, unlike a field that is left out, is no grouped-query attention.
            num_kv_heads=values["num_heads"] if kv_heads is None else kv_heads,
            head_dim=head_dim,
            rms_norm_eps=1e-6 if eps is None else float(eps),
            rope_theta=float(theta),
            rope_scaling=scaling,
            tie_embeddings=family.defaults["tie_word_embeddings"] if tied is None else tied,
            qkv_bias=biased or family.attention_bias == "qkv",
            o_bias=biased,
            mlp_bias=family.mlp_bias and fields.get("mlp_bias") is True,
            qk_norm=family.qk_norm,
            moe=read_moe(fields, family, values["num_layers"]),
            windows=read_windows(fields, family, values["num_layers"], rope_layers),
            rope_layers=rope_layers,
            rotary_dim=read_rotary_dim(fields, family, head_dim),
            output_gate=family.output_gate,
            centered_norm=family.centered_norm,
            mixers=mixers,
            delta_net=None if mixers is None else read_delta_net(fields, family),
        )
    except (ConfigError, TypeError, ValueError) as error:
        raise ConversionError(f"{where}: {_as_spelled(str(error))}") from error


def _as_spelled(message: str) -> str:
    """A message about a ModelConfig with the names that config.json has for its fields."""
    return re.sub(r"\w+", lambda word: _SPELLINGS.get(word[0], word[0]), message)


def _harmless_in_rope(family: Family) -> tuple[str, ...]:
    return (*family.rope_fields, *(() if family.rotary_factor is None else ("partial_rotary_factor",)))


def _unsupported(fields: Mapping[str, Any], family: Family, ignored: Collection[str], where: str) -> list[str]:
    """A problem for each field that would change the maths in a way that is not implemented."""
    read = _READ | set(layer_fields(family))
    # Qwen2's biases are there whatever it says, and the reference does not read it.
    read |= set() if family.attention_bias == "none" else {"attention_bias"}
    read |= {"mlp_bias"} if family.mlp_bias else set()
    # That of the rotary embedding has two places, and is checked by its reader.
    typed = type_problems(fields, read - {"rope_theta"}, where)
    return [*field_problems(fields, read, family, ignored, where), *typed]
