"""Reader of config.json (transformers 4 and 5) into a ModelConfig: the only place that knows those spellings.

A field that would change the maths is either honoured or an error; the lists below say which fields change nothing.
"""

from collections.abc import Mapping
from typing import Any

from jllm_core.config import MAX_LAYERS, ConfigError, ModelConfig

from jllm_convert.errors import ConversionError
from jllm_convert.families import FAMILIES
from jllm_convert.families.table import Family
from jllm_convert.sources.huggingface.layers import layer_fields, read_moe, read_rope_layers, read_windows
from jllm_convert.sources.huggingface.rope import read_rope, stretched_context
from jllm_convert.sources.quantized.quantization_config import read_quantization

_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "context_length",
}
_READ = {
    *_SIZES,
    "model_type",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "tie_word_embeddings",
    "hidden_act",
    "layer_types",
    "eos_token_id",
    "quantization_config",
}
# Training, storage, bookkeeping and outputs of transformers: nothing that reaches the logits.
_NO_EFFECT = {
    *("architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "name_or_path", "use_cache"),
    *("attention_dropout", "initializer_range", "bos_token_id", "pad_token_id", "sep_token_id", "cls_token_id"),
    *(
        "decoder_start_token_id",
        "auto_map",
        "_commit_hash",
        "unsloth_version",
        "unsloth_fixed",
        "transformers.js_config",
    ),
    *(
        "pretraining_tp",
        "_attn_implementation_autoset",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "torchscript",
    ),
    *("use_bfloat16", "pruned_heads", "is_decoder", "is_encoder_decoder", "id2label", "label2id", "problem_type"),
    *(
        "chunk_size_feed_forward",
        "tokenizer_class",
        "prefix",
        "task_specific_params",
        "finetuning_task",
        "tf_legacy_loss",
    ),
}
# Fields that are supported at one value only; any other would change the maths.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1, 1.0, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
}


def read_hf_config(fields: Mapping[str, Any], where: str) -> ModelConfig:
    """Read the ModelConfig that a config.json describes.

    Args:
        fields: the parsed JSON object.
        where: the file's name, for messages.

    Raises:
        ConversionError: every field that is missing, impossible or cannot be honoured.
    """
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConversionError(
            f"{where}: model_type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[model_type]
    problems = _unsupported(fields, family, where)
    # The source multiplies the scales in, so the model sees no quantisation.
    problems += read_quantization(fields, where)[1]
    values: dict[str, Any] = {}
    for spelling, name in _SIZES.items():
        if not isinstance(fields.get(spelling), int):
            problems.append(f"{where}: {spelling} must be a whole number, got {fields.get(spelling)!r}")
        values[name] = fields.get(spelling)
    # Checked before anything is made for each layer: an absurd number would take all memory.
    if isinstance(values["num_layers"], int) and values["num_layers"] > MAX_LAYERS:
        problems.append(f"{where}: num_layers must be at most {MAX_LAYERS:,}, got {values['num_layers']:,}")
    if not isinstance(fields.get("rms_norm_eps"), int | float | None):
        problems.append(f"{where}: rms_norm_eps must be a number, got {fields['rms_norm_eps']!r}")
    context = values["context_length"] if isinstance(values["context_length"], int) else 0
    theta, scaling, rope_problems = read_rope(fields, family.default_rope_theta, context, where)
    if problems + rope_problems:
        raise ConversionError(problems + rope_problems)

    biased = family.attention_bias == "config" and bool(fields.get("attention_bias", False))
    values["context_length"] = stretched_context(scaling, context)
    # Where head_dim is missing or null, some families have a default of their own, others derive it.
    derived_head_dim = values["hidden_size"] // max(values["num_heads"], 1)
    head_dim = fields.get("head_dim") or family.default_head_dim or derived_head_dim
    kv_heads = fields.get("num_key_value_heads")
    eps = fields.get("rms_norm_eps")
    try:
        rope_layers = read_rope_layers(fields, family, values["num_layers"])
        return ModelConfig(
            model_type=model_type,
            **values,
            # Without grouped-query attention, older configs leave it out.
            num_kv_heads=values["num_heads"] if kv_heads is None else kv_heads,
            head_dim=head_dim,
            rms_norm_eps=1e-6 if eps is None else float(eps),
            rope_theta=float(theta),
            rope_scaling=scaling,
            tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
            qkv_bias=biased or family.attention_bias == "qkv",
            o_bias=biased,
            mlp_bias=family.mlp_bias and bool(fields.get("mlp_bias", False)),
            qk_norm=family.qk_norm,
            moe=read_moe(fields, family, values["num_layers"]),
            windows=read_windows(fields, family, values["num_layers"], rope_layers),
            rope_layers=rope_layers,
        )
    except (ConfigError, TypeError, ValueError) as error:
        raise ConversionError(f"{where}: {error}") from error


def _unsupported(fields: Mapping[str, Any], family: Family, where: str) -> list[str]:
    """A problem for each field that would change the maths in a way that is not implemented."""
    problems = [
        f"{where}: {name} is {fields[name]!r}, only {allowed[0]!r} is supported"
        for name, allowed in _ONLY.items()
        if name in fields and fields[name] not in allowed
    ]
    problems += [
        f"{where}: {name} must be true or false, got {fields[name]!r}"
        for name in ("attention_bias", "mlp_bias", "tie_word_embeddings")
        if not isinstance(fields.get(name), bool | None)
    ]
    # Everything else is an error: a field that is ignored by oversight would change the result silently.
    known = _READ | _NO_EFFECT | set(_ONLY) | set(family.fields) | set(layer_fields(family))
    known |= {"attention_bias"} if family.attention_bias == "config" else set()
    known |= {"mlp_bias"} if family.mlp_bias else set()
    # A field that is off, empty or null asks for nothing.
    problems += [
        f"{where}: {name} is {value!r}, which is not a field of {family.model_type!r} that this version knows; "
        "if it does not change the model's output, remove it from the file"
        for name, value in fields.items()
        if name not in known and value not in (None, False, [], {}, "")
    ]
    return problems
