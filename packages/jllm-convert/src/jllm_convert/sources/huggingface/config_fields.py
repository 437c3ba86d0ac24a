"""Fields of config.json: those that change nothing, those that a family has at one value only, and the unknown ones.

Everything that transformers' configuration classes write is in a table here or is read. What nobody knows could change
the output: it is refused by its name, unless the user says that it does not (``--ignore-field``).
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from jllm_convert.families.table import Family
from jllm_convert.sources.huggingface.field_types import is_whole

# GenerationConfig of transformers. Older versions kept its settings in config.json, where they do not touch the layers.
_GENERATION = """
    assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight assistant_lookbehind bad_words_ids
    begin_suppress_tokens cache_config cache_implementation compile_config constraints continuous_batching_config
    disable_compile diversity_penalty do_sample dola_layers early_stopping encoder_no_repeat_ngram_size
    encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty force_words_ids
    generation_config generation_kwargs guidance_scale is_assistant length_penalty low_memory max_cache_len
    max_length max_matching_ngram_size max_new_tokens max_time min_length min_new_tokens min_p no_repeat_ngram_size
    num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences output_logits
    output_scores penalty_alpha prefill_chunk_size prompt_lookup_num_tokens remove_invalid_values renormalize_logits
    repetition_penalty return_dict_in_generate sequence_bias speculation_type stop_strings suppress_tokens
    target_lookbehind temperature token_healing top_h top_k top_p typical_p use_cache use_mtp watermarking_config
"""
GENERATION_SETTINGS = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Settings of generation that count where there is no generation_config.json beside the file, as in transformers."""
# How weights are drawn, dropouts, auxiliary losses and the like: nothing of it acts when a trained model is run.
_TRAINING = """
    attention_dropout attention_dropout_prob attention_probs_dropout_prob attn_dropout attn_pdrop aux_loss_alpha
    classifier_dropout classifier_dropout_prob embd_pdrop embedding_dropout ffn_dropout gradient_checkpointing
    gradient_checkpointing_use_reentrant hidden_dropout hidden_dropout_prob initializer_factor initializer_range
    label_smoothing mlp_dropout neftune_noise_alpha output_router_logits resid_dropout resid_pdrop residual_dropout
    router_aux_loss_coef router_jitter_noise router_z_loss_coef z_loss
"""
# Which kernels compute the same maths, and how it is spread over devices.
_IMPLEMENTATION = """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _experts_implementation
    _experts_implementation_internal _flash_attn_2_enabled attention_implementation attn_impl attn_implementation
    base_model_ep_plan base_model_fsdp_plan base_model_pp_plan base_model_tp_plan chunk_size_feed_forward
    distributed_config ep_size experts_implementation flash_attn flash_attention fused_cross_entropy fused_mlp
    fused_rms_norm fused_rotary pretraining_tp tensor_parallel_size torchscript tp_size use_bfloat16
    use_cache_kernel use_flash_attention use_flash_attention_2 use_flash_attn use_flash_attn_2 use_fused_mlp
    use_fused_rms_norm use_fused_rope use_memory_efficient_attention use_sdpa use_xformers xformers
"""
# Names, versions, types of files and of tasks, and what a call of transformers returns. The types of the weights are
# those of the tensors themselves.
_BOOKKEEPING = """
    _commit_hash _from_model_config _name_or_path architectures auto_map base_model custom_pipelines dtype
    finetuned_from finetuning_task id2label is_decoder label2id language languages library_name license
    model_creator model_name model_version name_or_path num_labels output_attentions output_hidden_states prefix
    problem_type return_dict tags task_specific_params tf_legacy_loss tie_encoder_decoder tie_last_hidden_states
    tokenizer_class torch_dtype transformers.js_config transformers_version unsloth_fixed unsloth_version
    use_return_dict
"""
# Lengths that other tools read: max_position_embeddings alone says how long a text may be, as in transformers.
_LENGTHS = """
    max_model_len max_seq_len max_seq_length max_sequence_length model_max_length n_ctx seq_len seq_length
    sequence_length
"""
NO_EFFECT = frozenset(" ".join((_GENERATION, _TRAINING, _IMPLEMENTATION, _BOOKKEEPING, _LENGTHS)).split())
"""Fields that change nothing of the architecture, whatever they say."""
# Ids of tokens: the layers do not know them. (The embedding's row for padding is zero at the start of training only.)
_IDS = ("_token_id", "_token_ids")


def _fixed(family: Family, fields: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Fields that are supported at one value only, which this family has; any other would change the maths.

    The family's own features are among them, as some publishers state them. None always stands for "not stated".
    """
    yes, no = (True,), (False,)
    silu = ("silu", "swish", "swiglu")
    return {
        **dict.fromkeys(("hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act"), silu),
        **dict.fromkeys(("rotary_pct", "rope_ratio"), (1,)),
        **({"partial_rotary_factor": (1,)} if family.rotary_factor is None else {}),
        # Granite's factors, of which 0 would not be "off".
        **dict.fromkeys(("embedding_multiplier", "logits_scaling", "residual_multiplier"), (1,)),
        "attention_multiplier": (_attention_scale(fields, family),),
        **dict.fromkeys(("add_cross_attention", "is_encoder_decoder", "use_alibi", "alibi", "rope_interleaved"), no),
        **{
            "cross_attention_hidden_size": (None,),
            "pruned_heads": ({},),
            "position_embedding_type": ("rope", "rotary"),
        },
        **dict.fromkeys(("is_causal", "causal", "use_rope", "use_rotary", "use_rotary_embeddings"), yes),
        **dict.fromkeys(("use_rms_norm", "use_rmsnorm", "rms_norm", "use_swiglu", "use_gated_mlp", "gated_mlp"), yes),
        **dict.fromkeys(("norm_type", "normalization_type"), ("rms_norm", "rmsnorm", "RMSNorm")),
        **dict.fromkeys(("use_qk_norm", "qk_norm", "qk_layernorm", "use_qk_layernorm"), (family.qk_norm,)),
        **dict.fromkeys(("qkv_bias", "use_qkv_bias", "attention_qkv_bias"), (family.attention_bias == "qkv",)),
        **dict.fromkeys(("use_moe", "is_moe"), (family.moe,)),
        **({"norm_topk_prob": yes} if family.normalizes == "always" else {}),
        **({"decoder_sparse_step": (1,)} if family.moe and "decoder_sparse_step" not in family.defaults else {}),
        **({"use_sliding_window": no} if "sliding_window" in family.fields else {}),
        **({"attention_bias": no} if family.delta_nets else {}),
        # With an output gate, it is a sigmoid; the states of delta nets are float32.
        "attn_output_gate": (family.output_gate,),
        **({"output_gate_type": ("sigmoid",)} if family.output_gate else {}),
        **({"mamba_ssm_dtype": ("float32",)} if family.delta_nets else {}),
    }


def field_problems(
    fields: Mapping[str, Any], read: Collection[str], family: Family, ignored: Collection[str], where: str
) -> Iterator[str]:
    """A problem for each field that would change the maths in a way that is not implemented, or that nobody knows.

    Args:
        fields: the parsed config.json.
        read: the fields that are read elsewhere.
        family: the model's.
        ignored: fields that are not known here, and of which the user says that they change nothing.
        where: the file's name, for messages.
    """
    fixed = _fixed(family, fields)
    for name, value in fields.items():
        if name in fixed:
            if value is not None and value not in fixed[name]:
                yield f"{where}: {name} is {value!r}, only {fixed[name][0]!r} is supported"
        # A field that is off, empty or null asks for nothing: it names a feature that the model does not have. Those
        # that the family has, and would lack then, are among the fixed ones.
        elif not (name in ignored or is_without_effect(name, family) or name in read or value in _OFF):
            yield (
                f"{where}: {name} is {value!r}, which is not a field of {family.model_type!r} that this version knows; "
                f"if it does not change the model's output, convert with --ignore-field {name} (jllm-convert convert), "
                "or remove it from the file"
            )
    # Those with a dot are within rope_scaling or rope_parameters, which has a reader of its own.
    for name in [name for name in ignored if "." not in name]:
        if name not in fields:
            yield f"{where}: there is no field {name!r} to ignore"
        elif name in fixed or name in read:
            yield f"{where}: {name} changes the model's output and is read, so it cannot be ignored"


def _attention_scale(fields: Mapping[str, Any], family: Family) -> float | None:
    """What scores of attention are multiplied by; None where the sizes are missing or impossible."""
    head_dim = read_head_dim(fields, family)
    return head_dim**-0.5 if is_whole(head_dim) else None


def read_head_dim(fields: Mapping[str, Any], family: Family) -> Any:
    """Numbers of a head's query or key; None where the sizes that it follows from are missing or impossible.

    Where the field is missing or null, some families have a default of their own, others divide the width.
    """
    stated = fields.get("head_dim") or family.default_head_dim
    width, heads = family.field(fields, "hidden_size"), family.field(fields, "num_attention_heads")
    return stated or (width // heads if is_whole(width) and is_whole(heads) else None)


_OFF: tuple[Any, ...] = (None, False, [], {}, "")


def is_without_effect(name: str, family: Family) -> bool:
    """Whether a field changes nothing of the architecture, whatever it says."""
    return name in NO_EFFECT or name in family.fields or name.endswith(_IDS)
