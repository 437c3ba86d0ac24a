"""config.json, in the spellings of transformers 4 and 5, and every way in which it is refused."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from jllm_convert.errors import ConversionError
from jllm_convert.sources.huggingface.config import read_hf_config
from jllm_convert.sources.quantized.quantization_config import read_quantization
from jllm_core import ModelConfig, MoEConfig, RopeScaling

TinyConfig = Callable[..., dict[str, Any]]

LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA3_ROPE = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm", "model.layers.0.mlp.gate"],
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def read(fields: dict[str, Any]) -> ModelConfig:
    return read_hf_config(fields, "config.json")


def problems_of(fields: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(ConversionError) as caught:
        read(fields)
    return caught.value.problems


def test_llama_3_2_as_transformers_4_and_5_spell_it() -> None:
    v4 = {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE, "torch_dtype": "bfloat16"}
    v5 = {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500000.0}, "dtype": "bfloat16"}
    expected = ModelConfig(
        model_type="llama",
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        context_length=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(
            kind="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=8192
        ),
        tie_embeddings=True,
    )
    assert read({**LLAMA_3_2_1B, **v4, "transformers_version": "4.45.0.dev0"}) == expected
    assert read({**LLAMA_3_2_1B, **v5, "transformers_version": "5.0.0"}) == expected


def test_qwen3_as_transformers_4_and_5_spell_it() -> None:
    v4 = {"rope_theta": 1000000, "rope_scaling": None, "torch_dtype": "bfloat16"}
    v5 = {
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
        "layer_types": ["full_attention"] * 28,
        "dtype": "bfloat16",
        "pad_token_id": None,
    }
    expected = ModelConfig(
        model_type="qwen3",
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        context_length=40960,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        tie_embeddings=True,
        qk_norm=True,
    )
    assert read({**QWEN3_06B, **v4, "transformers_version": "4.51.0"}) == expected
    assert read({**QWEN3_06B, **v5, "transformers_version": "5.0.0"}) == expected


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"type": "linear", "factor": 4.0}, RopeScaling(kind="linear", factor=4.0)),
        ({"rope_type": "linear", "factor": 4}, RopeScaling(kind="linear", factor=4.0)),
        ({"type": "linear", "rope_type": "linear", "factor": 4.0}, RopeScaling(kind="linear", factor=4.0)),
        ({"rope_type": "default"}, None),
        ({"rope_type": "default", "partial_rotary_factor": 1.0}, None),
        ({}, None),
        (None, None),
    ],
    ids=str,
)
def test_rope_scalings_that_are_honoured(
    tiny_config: TinyConfig, scaling: dict[str, Any] | None, expected: RopeScaling | None
) -> None:
    config = read(tiny_config(rope_scaling=scaling))
    assert config.rope_scaling == expected
    assert config.rope_theta == 500000.0


@pytest.mark.parametrize("absent", ["left out", None])
def test_head_dim_is_derived_for_llama_and_known_for_qwen3(tiny_config: TinyConfig, absent: str | None) -> None:
    llama, qwen3 = tiny_config(), tiny_config(model_type="qwen3")
    for fields in (llama, qwen3):
        del fields["head_dim"]
        if absent is None:
            fields["head_dim"] = None
    assert read(llama).head_dim == 16 // 4
    assert read(qwen3).head_dim == 128


@pytest.mark.parametrize("absent", ["left out", None])
def test_without_kv_heads_every_head_has_its_own(tiny_config: TinyConfig, absent: str | None) -> None:
    fields = tiny_config(num_key_value_heads=None)
    if absent is not None:
        del fields["num_key_value_heads"]
    assert read(fields).num_kv_heads == 4


def test_defaults_are_those_of_transformers(tiny_config: TinyConfig) -> None:
    fields = tiny_config()
    for name in ("rms_norm_eps", "rope_theta", "hidden_act", "tie_word_embeddings"):
        del fields[name]
    config = read(fields)
    assert (config.rms_norm_eps, config.rope_theta, config.tie_embeddings) == (1e-6, 10000.0, False)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == (False, False, False, False)


def test_biases_are_read(tiny_config: TinyConfig) -> None:
    config = read(tiny_config(attention_bias=True))
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, False)
    config = read(tiny_config(mlp_bias=True))
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (False, False, True)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gemma"},
            "model_type 'gemma' is not supported; supported: llama, mistral, qwen2, qwen2_moe, qwen3, qwen3_5, "
            "qwen3_5_moe, qwen3_moe, qwen3_next, qwen3_vl, qwen3_vl_moe, smollm3$",
        ),
        ({"model_type": None}, "model_type None is not supported"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', only 'silu' is supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "gamma": 1}}, "rope type 'yarn' has no field 'gamma'"),
        (
            {"rope_scaling": {"rope_type": "yarn", "beta_fast": "32"}},
            "'beta_fast' of rope type 'yarn' must be a number",
        ),
        ({"rope_scaling": {"type": "dynamic"}}, "rope type 'dynamic' needs the number 'factor', got None"),
        ({"rope_scaling": {"rope_type": "su"}}, "rope type 'su' is not supported; supported: default, linear, dynamic"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope type 'longrope' is not supported"),
        ({"rope_scaling": "linear"}, "must be an object, got 'linear'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope type 'linear' needs the number 'factor', got None"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor must be a number above 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, "'linear' has no field 'beta'"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, r"rope type \['linear'\] is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "attn_factor": 2}}, "'yarn' has no field 'attn_factor'"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "'default' has no field 'factor'"),
        ({"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": None}}, "'llama3' needs the number 'low_freq_factor'"),
        ({"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": 8}}, "0 < low_freq_factor < high_freq_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25"),
        ({"rope_interleaved": True}, "rope_interleaved is True"),
        ({"rope_theta": "10000"}, "rope_theta must be a number above 0, got '10000'"),
        ({"rope_theta": [10000]}, r"rope_theta must be a number above 0, got \[10000\]"),
        ({"rope_theta": -1}, "rope_theta must be a number above 0"),
        ({"use_sliding_window": True}, "use_sliding_window is True, which is not a field of 'llama'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types holds .*sliding_attention"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types holds .*only 'full_attention' and"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries, num_hidden_layers is 2"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 2}, "every layer has a sliding window"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be a whole number of at least 1, got 0"),
        (
            {"model_type": "mistral", "attention_bias": True},
            "attention_bias is True, which is not a field of 'mistral'",
        ),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers must be a 0 or a 1 for each of 2 layers"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 2]}, "no_rope_layers must be a 0 or a 1"),
        # Eight are the family's default.
        ({"model_type": "qwen3_moe", "num_experts": 4}, "num_experts_per_tok must be at most num_experts"),
        (
            {"model_type": "qwen3_moe", "num_experts": 4, "num_local_experts": 8},
            r"num_experts and num_local_experts differ: \[4, 8\]",
        ),
        (
            {"model_type": "qwen3_moe", "num_experts": 4, "decoder_sparse_step": 0},
            "decoder_sparse_step must be a whole number of at least 1, got 0",
        ),
        (
            {"model_type": "qwen3_moe", "num_experts": 4, "mlp_only_layers": 3},
            "mlp_only_layers must be a list of layer numbers, got 3",
        ),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "the quant_method 'gptq', only 'fp8' is supported; convert the",
        ),
        ({"quantization_config": {"bits": 4}}, "the quant_method None, only 'fp8' is supported"),
        ({"quantization_config": {}}, "the quant_method None, only 'fp8' is supported"),
        ({"quantization_config": {**FP8, "quant_method": ["fp8"]}}, r"the quant_method \['fp8'\]"),
        ({"quantization_config": "fp8"}, "quantization_config must be an object, got 'fp8'"),
        ({"quantization_config": [FP8]}, "quantization_config must be an object"),
        ({"quantization_config": {**FP8, "fmt": "e5m2"}}, "has fmt = 'e5m2', only 'e4m3' is supported"),
        (
            {"quantization_config": {**FP8, "activation_scheme": "static"}},
            "activation_scheme = 'static', only 'dynamic'",
        ),
        ({"quantization_config": {**FP8, "weight_block_size": None}}, r"weight_block_size = None, only \[128, 128\]"),
        ({"quantization_config": {**FP8, "weight_block_size": [64, 128]}}, r"weight_block_size = \[64, 128\], only"),
        ({"quantization_config": {**FP8, "weight_block_size": 128}}, "weight_block_size = 128, only"),
        ({"quantization_config": {**FP8, "scale_fmt": "ue8m0"}}, "scale_fmt = 'ue8m0', only 'float' is supported"),
        ({"quantization_config": {**FP8, "expert_dtype": "fp4"}}, "expert_dtype = 'fp4', only 'fp8' is supported"),
        (
            {"quantization_config": {**FP8, "modules_to_convert": ["embed_tokens"]}},
            r"modules_to_convert = \['embed_tokens'\]",
        ),
        (
            {"quantization_config": {**FP8, "rotation": "hadamard"}},
            "rotation = 'hadamard', which this version does not",
        ),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0, which is not a field of 'llama'"),
        ({"model_type": "qwen3", "mlp_bias": True}, "mlp_bias is True, which is not a field of 'qwen3'"),
        ({"num_experts": 8}, "num_experts is 8.*remove it from the file"),
        ({"vocab_size": None}, "vocab_size must be a whole number of at least 1, got None"),
        ({"hidden_size": "16"}, "hidden_size must be a whole number of at least 1, got '16'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number of at least 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 10,000, got 1,000,000,000"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number of at least 1, got 0"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads must be a whole number of at least 1"),
        ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads, got 4 and 3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be a whole number of at least 1, got 0"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"head_dim": 6.0}, "head_dim must be a whole number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a number above 0"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number above 0, got '1e-6'"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused(tiny_config: TinyConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message) as caught:
        read(tiny_config(**changes))
    assert all(problem.startswith("config.json: ") for problem in caught.value.problems)


INFINITIES = [json.loads(text) for text in ("1e400", "-Infinity", "NaN", "1" + 400 * "0")]
NO_NUMBERS = [*INFINITIES, True, "1.0", [1.0]]
NO_SIZES = [*INFINITIES[:3], True, "2", 2.0, 0, False, -1]
NO_FLAGS = ["false", "no", 0, 1, [], [False]]
WRONG_TYPES = [
    *[("llama", name, value) for name in ("rms_norm_eps", "rope_theta") for value in NO_NUMBERS],
    *[("llama", name, value) for name in ("head_dim", "num_key_value_heads", "hidden_size") for value in NO_SIZES],
    *[("llama", name, value) for name in ("attention_bias", "mlp_bias", "tie_word_embeddings") for value in NO_FLAGS],
    *[(kind, "use_sliding_window", value) for kind in ("qwen2", "qwen3", "smollm3") for value in NO_FLAGS],
    *[("qwen2", "attention_bias", value) for value in NO_FLAGS],
    *[("qwen3_moe", "norm_topk_prob", value) for value in NO_FLAGS],
    *[("qwen3_moe", "num_experts", value) for value in ("4", 4.0, False, -1)],
]


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(("model_type", "field", "value"), WRONG_TYPES, ids=lambda value: str(value)[:20])
def test_values_of_the_wrong_type_are_one_problem_by_the_file_s_own_name(
    tiny_config: TinyConfig, model_type: str, field: str, value: Any
) -> None:
    mixture = {"num_experts": 4, "num_experts_per_tok": 2} if model_type == "qwen3_moe" else {}
    [problem] = problems_of({**tiny_config(model_type=model_type, **mixture), field: value})
    assert problem.startswith(f"config.json: {field} must be ")
    assert problem.endswith(f", got {value!r}")


ROPE_NUMBERS = [
    *[({"rope_type": kind}, "factor") for kind in ("linear", "dynamic")],
    *[(LLAMA3_ROPE, name) for name in ("factor", "low_freq_factor", "high_freq_factor")],
    *[({"rope_type": "yarn", "factor": 4.0}, name) for name in ("factor", "attention_factor", "beta_fast", "mscale")],
]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize(("scaling", "name"), ROPE_NUMBERS)
def test_numbers_of_a_rope_scaling_are_finite(
    tiny_config: TinyConfig, scaling: dict[str, Any], name: str, value: Any
) -> None:
    for parent in ("rope_scaling", "rope_parameters"):
        [problem] = problems_of(tiny_config(**{parent: {**scaling, name: value}}))
        assert f"number {name!r}" in problem or f"{name!r} of rope type 'yarn' must be a number" in problem
        assert problem.endswith(f", got {value!r}")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("truncate", "false", "true or false"),
        ("truncate", 0, "true or false"),
        ("original_max_position_embeddings", 32.0, "a whole number"),
        ("original_max_position_embeddings", True, "a whole number"),
    ],
)
def test_what_else_yarn_cannot_be(tiny_config: TinyConfig, name: str, value: Any, expected: str) -> None:
    [problem] = problems_of(tiny_config(rope_scaling={"rope_type": "yarn", "factor": 4.0, name: value}))
    assert problem == f"config.json: {name!r} of rope type 'yarn' must be {expected}, got {value!r}"


def test_two_rope_entries_that_disagree_are_refused(tiny_config: TinyConfig) -> None:
    with pytest.raises(ConversionError):
        read(tiny_config(rope_scaling=LLAMA3_ROPE, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}))
    with pytest.raises(ConversionError):
        read(tiny_config(rope_theta=10000.0, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}))


@pytest.mark.parametrize("value", [None, False, 0, [], {}, ""])
def test_an_unknown_field_that_is_off_is_fine(tiny_config: TinyConfig, value: Any) -> None:
    assert read(tiny_config(attn_logit_softcapping=value)) == read(tiny_config())


# Two values each: what changes nothing changes nothing whatever it says.
HARMLESS = {
    # Settings of generation that transformers before 5 wrote into config.json, and 5 drops on loading.
    **{"max_length": (20, 4096), "num_beams": (1, 4), "temperature": (1.0, 0.6), "top_k": (50, 20)},
    **{"do_sample": (True, False), "repetition_penalty": (1.0, 1.1), "bad_words_ids": (None, [[5]])},
    **{"no_repeat_ngram_size": (0, 3), "forced_eos_token_id": (None, 7), "suppress_tokens": (None, [3])},
    # Training.
    **{"attention_dropout": (0.0, 0.1), "initializer_range": (0.02, 1.0), "resid_pdrop": (0.0, 0.5)},
    **{
        "router_aux_loss_coef": (0.001, 1.0),
        "output_router_logits": (False, True),
        "gradient_checkpointing": (0, True),
    },
    # Which kernels compute it.
    **{"_attn_implementation": ("eager", "sdpa"), "attn_implementation": ("eager", "flash_attention_2")},
    **{"_flash_attn_2_enabled": (True, False), "use_flash_attn": (True, False), "pretraining_tp": (1, 2)},
    # Lengths: max_position_embeddings alone counts.
    **{"max_sequence_length": (2048, 7), "model_max_length": (4096, 7), "max_seq_len": (512, 7)},
    # Bookkeeping, and ids.
    **{"_name_or_path": ("x", "y"), "use_cache": (True, False), "unsloth_version": ("2024.9", "2025.1")},
    **{
        "transformers_version": ("4.28.0", "5.0.0"),
        "auto_map": ({}, {"AutoModel": "m.M"}),
        "id2label": ({}, {"0": "A"}),
    },
    **{"bos_token_id": (1, 2), "pad_token_id": (-1, 0), "image_token_id": (5, 6), "tokenizer_class": ("A", "B")},
}


@pytest.mark.parametrize("model_type", ["llama", "mistral", "smollm3", "qwen2", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_nothing_is_accepted_at_any_value(tiny_config: TinyConfig, name: str, model_type: str) -> None:
    fields = tiny_config(model_type=model_type)
    without = read(fields)
    assert [read({**fields, name: value}) for value in HARMLESS[name]] == [without, without]


@pytest.mark.parametrize(
    ("model_type", "field", "stated", "other"),
    [
        ("qwen3", "use_qk_norm", True, False),
        ("qwen3", "qk_layernorm", True, False),
        ("llama", "use_qk_norm", False, True),
        ("qwen2", "qkv_bias", True, False),
        ("qwen3_moe", "use_moe", True, False),
        ("mistral", "is_causal", True, False),
        ("llama", "use_rms_norm", True, False),
        ("llama", "norm_type", "rms_norm", "layer_norm"),
        ("llama", "position_embedding_type", "rope", "alibi"),
        ("llama", "hidden_act", "swish", "gelu"),
        ("llama", "is_encoder_decoder", False, True),
        ("llama", "pruned_heads", {}, {"0": [1]}),
        ("llama", "embedding_multiplier", 1, 0),
        ("mistral", "logits_scaling", 1, 8.0),
        ("qwen2", "residual_multiplier", 1, 0.22),
        ("llama", "attention_multiplier", 6**-0.5, 0),
        ("qwen3", "attention_multiplier", 6**-0.5, 1.0),
    ],
)
def test_a_family_s_own_features_may_be_stated_as_they_are(
    tiny_config: TinyConfig, model_type: str, field: str, stated: Any, other: Any
) -> None:
    fields = tiny_config(model_type=model_type)
    assert read({**fields, field: stated}) == read({**fields, field: None}) == read(fields)
    [problem] = problems_of({**fields, field: other})
    assert f"{field} is {other!r}, only {stated!r} is supported" in problem.replace("'silu'", "'swish'")


@pytest.mark.parametrize("model_type", ["llama", "mistral", "smollm3", "qwen2", "qwen3", "qwen3_moe"])
def test_multipliers_at_one_are_nothing_and_at_zero_are_refused(tiny_config: TinyConfig, model_type: str) -> None:
    fields = tiny_config(model_type=model_type)
    for name in ("embedding_multiplier", "logits_scaling", "residual_multiplier"):
        assert read({**fields, name: 1.0}) == read(fields)
        [problem] = problems_of({**fields, name: 0.0})
        assert f"{name} is 0.0, only 1 is supported" in problem
    # Without a head_dim, and with sizes that are none.
    del fields["head_dim"]
    width = 128 if model_type == "qwen3" else 4
    assert read({**fields, "attention_multiplier": width**-0.5}) == read(fields)
    assert len(problems_of({**fields, "attention_multiplier": 0, "num_attention_heads": 0, "head_dim": None})) == 2


@pytest.mark.parametrize(
    ("model_type", "field"),
    [
        *((model_type, "max_window_layers") for model_type in ("llama", "mistral", "smollm3", "qwen3_moe")),
        ("mistral", "use_sliding_window"),
    ],
)
@pytest.mark.parametrize("value", [0, 1, 28, True, False, None])
def test_fields_of_windows_that_a_family_s_class_does_not_read_are_nothing(
    tiny_config: TinyConfig, model_type: str, field: str, value: Any
) -> None:
    """Mistral's window is there without a switch, as in transformers; tests/parity asks it."""
    fields = tiny_config(model_type=model_type, sliding_window=8 if model_type != "llama" else None)
    assert read({**fields, field: value}) == read(fields)


def test_biases_of_qwen2_are_there_whatever_attention_bias_says(tiny_config: TinyConfig) -> None:
    fields = tiny_config(model_type="qwen2")
    assert read({**fields, "attention_bias": True}) == read({**fields, "attention_bias": False}) == read(fields)


@pytest.mark.parametrize("value", [50.0, "yes", {"a": 1}], ids=str)
def test_an_unknown_field_is_refused_with_the_offer_to_ignore_it(tiny_config: TinyConfig, value: Any) -> None:
    fields = tiny_config(attn_logit_softcapping=value)
    [problem] = problems_of(fields)
    assert f"attn_logit_softcapping is {value!r}" in problem
    assert "convert with --ignore-field attn_logit_softcapping (jllm-convert convert)" in problem
    assert read_hf_config(fields, "config.json", ["attn_logit_softcapping"]) == read(tiny_config())


def test_an_unknown_field_of_the_rotary_embedding_is_ignored_by_its_path(tiny_config: TinyConfig) -> None:
    scaling = {"type": "linear", "factor": 4.0}
    fields = tiny_config(rope_scaling={**scaling, "gamma": 2})
    [problem] = problems_of(fields)
    assert "--ignore-field rope_scaling.gamma" in problem
    expected = read(tiny_config(rope_scaling=scaling))
    assert read_hf_config(fields, "config.json", ["rope_scaling.gamma"]) == expected


@pytest.mark.parametrize(
    ("ignored", "message"),
    [
        ("softcapping", "there is no field 'softcapping' to ignore"),
        ("rope_theta", "rope_theta changes the model's output and is read, so it cannot be ignored"),
        ("hidden_act", "hidden_act changes the model's output"),
        ("rope_scaling.gamma", "there is no field 'rope_scaling.gamma' that could be ignored"),
        ("rope_scaling.factor", "there is no field 'rope_scaling.factor' that could be ignored"),
    ],
)
def test_only_what_is_not_known_can_be_ignored(tiny_config: TinyConfig, ignored: str, message: str) -> None:
    fields = tiny_config(rope_scaling={"type": "linear", "factor": 4.0})
    with pytest.raises(ConversionError, match=message):
        read_hf_config(fields, "config.json", [ignored])
    # What changes nothing anyway may be named: a newer version knows more such fields.
    assert read_hf_config({**fields, "num_beams": 4}, "config.json", ["num_beams"]) == read(fields)


def test_a_llama_1_as_its_first_conversions_describe_it() -> None:
    """Without max_position_embeddings, which is 2,048 in transformers, whatever the length that nobody reads says."""
    fields = {
        **{"architectures": ["LlamaForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu"},
        **{"hidden_size": 4096, "intermediate_size": 11008, "initializer_range": 0.02, "max_sequence_length": 8192},
        **{"model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": -1},
        **{"rms_norm_eps": 1e-06, "torch_dtype": "float16", "transformers_version": "4.27.0.dev0", "use_cache": True},
        **{"vocab_size": 32000},
    }
    config = read(fields)
    assert (config.context_length, config.num_kv_heads, config.head_dim) == (2048, 32, 128)


@pytest.mark.parametrize(
    ("field", "words"),
    [("quantization", "quantised by MLX"), ("compression_config", "quantised by compressed-tensors")],
)
def test_other_spellings_of_a_quantisation_are_one_problem(tiny_config: TinyConfig, field: str, words: str) -> None:
    [problem] = problems_of(tiny_config(**{field: {"bits": 4, "group_size": 64}, "quantization_config": {"bits": 4}}))
    assert words in problem


def test_all_problems_are_told_at_once(tiny_config: TinyConfig) -> None:
    fields = tiny_config(
        hidden_act="gelu", quantization_config={"bits": 4}, num_experts=8, rope_scaling={"rope_type": "longrope"}
    )
    fields["hidden_size"] = "16"
    problems = problems_of(fields)
    assert len(problems) == 5
    for word in ("hidden_act", "quantization_config", "num_experts", "longrope", "hidden_size"):
        assert sum(word in problem for problem in problems) == 1, word


@pytest.mark.parametrize(
    "quantization",
    [
        None,
        FP8,
        {**FP8, "modules_to_not_convert": None, "rotation": None},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        # As transformers 5 writes it.
        {
            **{name: value for name, value in FP8.items() if name != "fmt"},
            **{"dequantize": False, "expert_dtype": "fp8", "modules_to_convert": None, "scale_fmt": "float"},
        },
    ],
)
def test_weights_of_8_bits_in_blocks_of_128_are_the_same_model(quantization: dict[str, Any] | None) -> None:
    fields = {**QWEN3_06B, "rope_theta": 1000000}
    assert read({**fields, "quantization_config": quantization}) == read(fields)
    assert read_quantization({"quantization_config": quantization}, "config.json") == (
        (128, 128) if quantization else None,
        [],
    )


def test_all_that_is_wrong_with_a_quantization_config_is_told(tiny_config: TinyConfig) -> None:
    settings = {**FP8, "fmt": "e5m2", "activation_scheme": "static", "rotation": 1}
    problems = problems_of(tiny_config(quantization_config=settings))
    assert [problem.partition(" has ")[2].partition(" =")[0] for problem in problems] == [
        *("activation_scheme", "fmt", "rotation"),
    ]


# ---- What differs from layer to layer


def test_mistral_has_a_window_in_every_layer_unless_it_is_null(tiny_config: TinyConfig) -> None:
    assert read(tiny_config(model_type="mistral")).windows == (4096, 4096)
    assert read(tiny_config(model_type="mistral", sliding_window=8)).windows == (8, 8)
    assert read(tiny_config(model_type="mistral", sliding_window=None)).windows is None
    assert read(tiny_config(model_type="mistral", layer_types=["sliding_attention"] * 2)).windows == (4096, 4096)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_qwen_has_windows_in_its_last_layers_when_they_are_switched_on(
    tiny_config: TinyConfig, model_type: str
) -> None:
    off = tiny_config(model_type=model_type, sliding_window=8, max_window_layers=1)
    assert read(off).windows is None
    assert read({**off, "use_sliding_window": True}).windows == (None, 8)
    types = ["sliding_attention", "full_attention"]
    assert read({**off, "use_sliding_window": True, "layer_types": types}).windows == (8, None)
    with pytest.raises(ConversionError, match="no layer has a sliding window"):
        read({**off, "layer_types": types})


def test_qwen2_has_biases_on_q_k_and_v_alone(tiny_config: TinyConfig) -> None:
    config = read(tiny_config(model_type="qwen2"))
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == (True, False, False, False)


def test_smollm3_leaves_rotation_out_of_every_fourth_layer(tiny_config: TinyConfig) -> None:
    fields = tiny_config(model_type="smollm3", num_hidden_layers=8)
    del fields["rope_theta"]
    config = read(fields)
    assert config.rope_layers == (True, True, True, False) * 2
    assert config.rope_theta == 2e6
    assert read({**fields, "no_rope_layer_interval": 2}).rope_layers == (True, False) * 4
    assert read({**fields, "no_rope_layers": [1] * 8}).rope_layers is None
    assert read({**fields, "no_rope_layers": [0, 1] * 5}).rope_layers == (False, True) * 4
    # Windows are in the layers without rotation, where they are switched on.
    assert config.windows is None
    switched = {**fields, "use_sliding_window": True, "sliding_window": 16}
    assert read(switched).windows == (None, None, None, 16) * 2


QWEN3_30B_A3B = {
    **QWEN3_06B,
    **{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "decoder_sparse_step": 1, "head_dim": 128},
    **{"hidden_size": 2048, "intermediate_size": 6144, "max_window_layers": 48, "mlp_only_layers": []},
    **{"moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128},
    **{"num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False},
    **{"router_aux_loss_coef": 0.001, "tie_word_embeddings": False, "rope_theta": 1000000.0, "rope_scaling": None},
}


def test_qwen3_30b_a3b_as_it_was_published() -> None:
    config = read(QWEN3_30B_A3B)
    assert config.moe == MoEConfig(num_experts=128, experts_per_token=8, intermediate_size=768)
    assert (config.head_dim, config.num_kv_heads, config.qk_norm, config.tie_embeddings) == (128, 4, True, False)
    assert read({**QWEN3_30B_A3B, "norm_topk_prob": False}).moe == replace(config.moe, normalize_weights=False)


def test_which_layers_are_mixtures() -> None:
    fields = {**QWEN3_30B_A3B, "num_hidden_layers": 4}

    def layers(**changes: Any) -> list[bool]:
        config = read({**fields, **changes})
        return [config.is_moe(layer) for layer in range(4)]

    assert layers() == [True] * 4
    assert layers(decoder_sparse_step=2) == [False, True, False, True]
    assert layers(mlp_only_layers=[0, 3]) == [False, True, True, False]
    assert layers(decoder_sparse_step=2, mlp_only_layers=[1]) == [False, False, False, True]
    assert layers(num_experts=0) == [False] * 4


# ---- Rotary embeddings for long contexts


def test_yarn_as_qwen3_s_publishers_ask_for_it() -> None:
    """Their model cards add three fields and leave max_position_embeddings as it is."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = read({**QWEN3_06B, "rope_theta": 1000000, "rope_scaling": scaling})
    assert config.context_length == 131072
    assert config.rope_scaling == RopeScaling(
        kind="yarn", factor=4.0, original_context_length=32768, attention_factor=0.1 * math.log(4) + 1
    )
    stated = read({**QWEN3_06B, "rope_scaling": {**scaling, "attention_factor": 1.5, "truncate": False}})
    assert stated.rope_scaling == replace(config.rope_scaling, attention_factor=1.5, truncate=False)
    weighed = read({**QWEN3_06B, "rope_scaling": {**scaling, "mscale": 1.0, "mscale_all_dim": 0.5}})
    assert weighed.rope_scaling.attention_factor == (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)


def test_dynamic_scaling_goes_by_the_stated_context_and_stretches_it(tiny_config: TinyConfig) -> None:
    config = read(tiny_config(rope_scaling={"type": "dynamic", "factor": 2.0}))
    assert config.rope_scaling == RopeScaling(kind="dynamic", factor=2.0, original_context_length=64)
    assert config.context_length == 128


def test_the_length_of_the_first_training_may_stand_outside_of_the_scaling_and_wins(tiny_config: TinyConfig) -> None:
    """As in transformers, for the kinds that depend on it."""
    yarn = {"rope_type": "yarn", "factor": 4.0}
    inside = tiny_config(rope_scaling={**yarn, "original_max_position_embeddings": 32})
    outside = tiny_config(rope_scaling=yarn, original_max_position_embeddings=32)
    assert read(outside) == read(inside) != read(tiny_config(rope_scaling=yarn))
    assert read({**inside, "original_max_position_embeddings": 16}).rope_scaling.original_context_length == 16
    linear = {"type": "linear", "factor": 4.0}
    assert read(tiny_config(rope_scaling=linear, original_max_position_embeddings=32)) == read(
        tiny_config(rope_scaling=linear)
    )
    # llama3 without it takes max_position_embeddings.
    llama3 = {name: value for name, value in LLAMA3_ROPE.items() if name != "original_max_position_embeddings"}
    assert read(tiny_config(rope_scaling=llama3)).rope_scaling.original_context_length == 64
    # A dynamic one goes by max_position_embeddings (tests/parity asks the reference).
    dynamic = {**linear, "type": "dynamic"}
    expected = read(tiny_config(rope_scaling=dynamic))
    assert read(tiny_config(rope_scaling=dynamic, original_max_position_embeddings=32)) == expected
    assert read(tiny_config(rope_scaling={**dynamic, "original_max_position_embeddings": 16})) == expected


def test_factors_of_other_tools_that_do_nothing_are_fine(tiny_config: TinyConfig) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0}
    notes = {"finetuned": True, "attn_factor": 1.0, "extrapolation_factor": 1}
    assert read(tiny_config(rope_scaling={**yarn, **notes})) == read(tiny_config(rope_scaling=yarn))
