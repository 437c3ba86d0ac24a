"""Configuration classes of transformers: their defaults, and the fields that they write, are those that we know."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from jllm_convert.errors import ConversionError
from jllm_convert.families import FAMILIES
from jllm_convert.matching.rules import match_tensors
from jllm_convert.sources.huggingface.config import read_hf_config
from jllm_convert.sources.huggingface.config_fields import GENERATION_SETTINGS
from jllm_convert.sources.huggingface.folder import SafetensorsSource
from jllm_core import ModelConfig

# Of models that read images too, the class of the text model.
CLASSES = {name: transformers.CONFIG_MAPPING[family.text_model_type or name] for name, family in FAMILIES.items()}
# No value is anybody's default, and they fit each other and each of the defaults.
STATED: dict[str, Any] = {
    **{"vocab_size": 999, "hidden_size": 2560, "intermediate_size": 1000, "num_hidden_layers": 12},
    **{"num_attention_heads": 64, "num_key_value_heads": 16, "head_dim": 48, "max_position_embeddings": 600},
    **{"rms_norm_eps": 1e-3, "rope_theta": 777.0, "hidden_act": "silu"},
    **{"attention_bias": True, "mlp_bias": True, "use_sliding_window": True, "sliding_window": 55},
    **{"max_window_layers": 5, "no_rope_layer_interval": 3},
    **{"num_experts": 16, "num_experts_per_tok": 3, "moe_intermediate_size": 64, "decoder_sparse_step": 2},
    **{"norm_topk_prob": True, "mlp_only_layers": [1], "shared_expert_intermediate_size": 40},
    **{"linear_num_key_heads": 8, "linear_num_value_heads": 48, "linear_key_head_dim": 20, "linear_value_head_dim": 24},
    **{"linear_conv_kernel_dim": 3, "partial_rotary_factor": 0.5},
}
SMALL = {
    **{"vocab_size": 50, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}
OTHER_TIE = {"smollm3": False}


def stated(model_type: str) -> dict[str, Any]:
    """A config.json that says everything that the family has, and nothing that is a default."""
    fields = {"model_type": model_type, "tie_word_embeddings": OTHER_TIE.get(model_type, True)}
    family = FAMILIES[model_type]
    known = set(CLASSES[model_type]().to_dict()) | {"rope_theta", "head_dim"}
    known |= {"num_experts"} if family.moe else set()
    known |= {"partial_rotary_factor"} if family.rotary_factor else set()
    # What these families do not have, in spite of their classes.
    known -= {"attention_bias"} if family.delta_nets else set()
    known -= {"use_sliding_window", "sliding_window", "max_window_layers"} if family.windows is None else set()
    return {**fields, **{name: value for name, value in STATED.items() if name in known}}


def as_transformers_reads(fields: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of everything that the class has after reading these fields: nothing is left to a default."""
    model_type = fields["model_type"]
    read = CLASSES[model_type].from_dict(dict(fields)).to_dict()
    # What counts around text_config only.
    around = transformers.CONFIG_MAPPING[model_type]().to_dict()
    read |= {name: fields.get(name, around[name]) for name in FAMILIES[model_type].outer_fields}
    return read_hf_config(read, "config.json")


REMOVALS = [(model_type, name) for model_type in FAMILIES for name in stated(model_type) if name != "model_type"]


@pytest.mark.parametrize(("model_type", "name"), REMOVALS)
def test_a_field_that_is_left_out_has_the_family_s_default(model_type: str, name: str) -> None:
    fields = stated(model_type)
    whole = read_hf_config(fields, "config.json")
    assert whole == as_transformers_reads(fields)
    del fields[name]
    assert read_hf_config(fields, "config.json") == as_transformers_reads(fields)


NULLABLE = [
    *[(model_type, "num_key_value_heads") for model_type in ("llama", "smollm3", "qwen2", "qwen3")],
    *[("llama", "head_dim"), ("mistral", "head_dim"), ("mistral", "sliding_window"), ("qwen3_moe", "mlp_only_layers")],
    *[(model_type, "sliding_window") for model_type in ("smollm3", "qwen2", "qwen3", "qwen3_moe")],
]


@pytest.mark.parametrize(("model_type", "name"), NULLABLE)
def test_null_means_what_it_means_to_transformers(model_type: str, name: str) -> None:
    fields = {**stated(model_type), name: None}
    assert read_hf_config(fields, "config.json") == as_transformers_reads(fields)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_file_that_says_nothing_is_the_family_s_default_model(model_type: str) -> None:
    fields = {"model_type": model_type}
    assert read_hf_config(fields, "config.json") == as_transformers_reads(fields)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_field_of_transformers_own_is_known(model_type: str) -> None:
    """Those of the class, of its base, and of the generation settings that older versions wrote beside them."""
    names = set(CLASSES[model_type]().to_dict()) | set(transformers.GenerationConfig().to_dict())
    unknown = []
    for name in names - {"model_type"}:
        try:
            read_hf_config({**stated(model_type), name: "surprise"}, "config.json")
        except ConversionError as error:
            unknown += [problem for problem in error.problems if "that this version knows" in problem]
    assert not unknown


def test_what_we_say_changes_nothing_changes_nothing_in_transformers() -> None:
    torch.manual_seed(0)
    sizes = {"model_type": "llama", **SMALL}
    odd = {
        **{"max_length": 7, "num_beams": 3, "temperature": 0.1, "top_k": 2, "do_sample": True, "min_length": 3},
        **{"repetition_penalty": 3.0, "bad_words_ids": [[3]], "suppress_tokens": [1, 2, 3], "no_repeat_ngram_size": 1},
        **{"attention_dropout": 0.9, "initializer_range": 0.9, "resid_pdrop": 0.9, "hidden_dropout": 0.9},
        **{"max_sequence_length": 2, "model_max_length": 2, "seq_length": 2, "n_ctx": 2, "pretraining_tp": 2},
        **{"use_flash_attn": True, "_flash_attn_2_enabled": True, "attn_implementation": "eager", "use_cache": False},
        **{"pad_token_id": 3, "bos_token_id": 4, "image_token_id": 5, "is_decoder": True, "num_labels": 5},
        **{"router_aux_loss_coef": 9.0, "output_router_logits": True, "gradient_checkpointing": True},
    }
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(sizes)).eval()
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict({**sizes, **odd})).eval()
    other.load_state_dict(plain.state_dict())
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(plain(tokens).logits, other(tokens).logits, atol=1e-6)
    assert read_hf_config({**sizes, **odd}, "config.json") == read_hf_config(sizes, "config.json")


@pytest.mark.parametrize("beside", [None, {}, {"top_k": 20, "do_sample": True}], ids=str)
def test_settings_of_generation_in_config_json_count_as_in_transformers(
    tmp_path: Path, beside: dict[str, Any] | None
) -> None:
    """Only where the folder has no generation_config.json, however little that says."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    settings = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.3,
    }
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    if beside is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(beside))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    ours = SafetensorsSource(tmp_path).generation_config()
    default = transformers.GenerationConfig()
    for name in settings:
        assert ours.get(name, getattr(default, name)) == getattr(theirs, name)
    assert set(GENERATION_SETTINGS) == set(settings)


def logits(fields: dict[str, Any]) -> torch.Tensor:
    """Those of a small model of transformers with these fields, for 40 tokens."""
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[fields["model_type"]].from_dict(dict(fields))
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_config(config).eval()(torch.arange(40)[None]).logits


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic"])
def test_the_first_training_s_length_is_nothing_to_these_scalings(kind: str) -> None:
    scaling = {"rope_type": kind, **({} if kind == "default" else {"factor": 2.0})}
    fields = {"model_type": "llama", **SMALL, "max_position_embeddings": 16, "rope_scaling": scaling}
    for length in (8, 32):
        other = {**fields, "rope_scaling": {**scaling, "original_max_position_embeddings": length}}
        assert torch.equal(logits(fields), logits(other))
        assert read_hf_config(fields, "config.json") == read_hf_config(other, "config.json")


@pytest.mark.parametrize(
    ("model_type", "field", "values"),
    [
        ("mistral", "use_sliding_window", (False, True)),
        ("mistral", "max_window_layers", (0, 28)),
        ("llama", "max_window_layers", (0, 28)),
        ("qwen2", "attention_bias", (False, True)),
    ],
)
def test_fields_that_a_class_does_not_read_change_nothing_in_transformers(
    model_type: str, field: str, values: tuple[Any, ...]
) -> None:
    window = {"sliding_window": 4} if model_type == "mistral" else {}
    fields = {"model_type": model_type, **SMALL, **window}
    for value in values:
        other = {**fields, field: value}
        assert torch.equal(logits(fields), logits(other))
        assert read_hf_config(fields, "config.json") == read_hf_config(other, "config.json")


def test_a_model_saved_without_its_head_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)
    transformers.LlamaModel(config).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    source = SafetensorsSource(tmp_path)
    assert set(source.tensors) == set(theirs) - {"lm_head.weight"}
    for name, tensor in source.tensors.items():
        assert np.array_equal(tensor.read(), theirs[name].numpy())
    match_tensors(source, source.config())
