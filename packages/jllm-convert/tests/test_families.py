"""The family tables, against the names that the publishers use."""

from collections.abc import Mapping

import pytest
from jllm_convert.families import FAMILIES
from jllm_convert.families.table import Family
from jllm_convert.families.tensor_layout import Flat, Identity, Linear, RotaryPairs
from jllm_core import ModelConfig, abstract_weights
from jllm_core.array_info import named_leaves

WHOLE = {
    "embedding": ("model.embed_tokens.weight", "token_embd.weight"),
    "gamma_final": ("model.norm.weight", "output_norm.weight"),
    "lm_head": ("lm_head.weight", "output.weight"),
}
LLAMA_LAYERS = {
    "layers.0.attn_pre_gamma": ("model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight"),
    "layers.0.attn.q": ("model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight"),
    "layers.0.attn.k": ("model.layers.0.self_attn.k_proj.weight", "blk.0.attn_k.weight"),
    "layers.0.attn.v": ("model.layers.0.self_attn.v_proj.weight", "blk.0.attn_v.weight"),
    "layers.0.attn.o": ("model.layers.0.self_attn.o_proj.weight", "blk.0.attn_output.weight"),
    "layers.0.attn.q_bias": ("model.layers.0.self_attn.q_proj.bias", "blk.0.attn_q.bias"),
    "layers.0.attn.k_bias": ("model.layers.0.self_attn.k_proj.bias", "blk.0.attn_k.bias"),
    "layers.0.attn.v_bias": ("model.layers.0.self_attn.v_proj.bias", "blk.0.attn_v.bias"),
    "layers.0.attn.o_bias": ("model.layers.0.self_attn.o_proj.bias", "blk.0.attn_output.bias"),
    "layers.0.attn_post_gamma": ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
    "layers.0.ffw.w_gate": ("model.layers.0.mlp.gate_proj.weight", "blk.0.ffn_gate.weight"),
    "layers.0.ffw.w_up": ("model.layers.0.mlp.up_proj.weight", "blk.0.ffn_up.weight"),
    "layers.0.ffw.w_down": ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
    "layers.0.ffw.b_gate": ("model.layers.0.mlp.gate_proj.bias", "blk.0.ffn_gate.bias"),
    "layers.0.ffw.b_up": ("model.layers.0.mlp.up_proj.bias", "blk.0.ffn_up.bias"),
    "layers.0.ffw.b_down": ("model.layers.0.mlp.down_proj.bias", "blk.0.ffn_down.bias"),
    "layers.1.attn_pre_gamma": ("model.layers.1.input_layernorm.weight", "blk.1.attn_norm.weight"),
    "layers.1.attn.q": ("model.layers.1.self_attn.q_proj.weight", "blk.1.attn_q.weight"),
    "layers.1.attn.k": ("model.layers.1.self_attn.k_proj.weight", "blk.1.attn_k.weight"),
    "layers.1.attn.v": ("model.layers.1.self_attn.v_proj.weight", "blk.1.attn_v.weight"),
    "layers.1.attn.o": ("model.layers.1.self_attn.o_proj.weight", "blk.1.attn_output.weight"),
    "layers.1.attn.q_bias": ("model.layers.1.self_attn.q_proj.bias", "blk.1.attn_q.bias"),
    "layers.1.attn.k_bias": ("model.layers.1.self_attn.k_proj.bias", "blk.1.attn_k.bias"),
    "layers.1.attn.v_bias": ("model.layers.1.self_attn.v_proj.bias", "blk.1.attn_v.bias"),
    "layers.1.attn.o_bias": ("model.layers.1.self_attn.o_proj.bias", "blk.1.attn_output.bias"),
    "layers.1.attn_post_gamma": ("model.layers.1.post_attention_layernorm.weight", "blk.1.ffn_norm.weight"),
    "layers.1.ffw.w_gate": ("model.layers.1.mlp.gate_proj.weight", "blk.1.ffn_gate.weight"),
    "layers.1.ffw.w_up": ("model.layers.1.mlp.up_proj.weight", "blk.1.ffn_up.weight"),
    "layers.1.ffw.w_down": ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight"),
    "layers.1.ffw.b_gate": ("model.layers.1.mlp.gate_proj.bias", "blk.1.ffn_gate.bias"),
    "layers.1.ffw.b_up": ("model.layers.1.mlp.up_proj.bias", "blk.1.ffn_up.bias"),
    "layers.1.ffw.b_down": ("model.layers.1.mlp.down_proj.bias", "blk.1.ffn_down.bias"),
}
QWEN3_LAYERS = LLAMA_LAYERS | {
    "layers.0.attn.q_gamma": ("model.layers.0.self_attn.q_norm.weight", "blk.0.attn_q_norm.weight"),
    "layers.0.attn.k_gamma": ("model.layers.0.self_attn.k_norm.weight", "blk.0.attn_k_norm.weight"),
    "layers.1.attn.q_gamma": ("model.layers.1.self_attn.q_norm.weight", "blk.1.attn_q_norm.weight"),
    "layers.1.attn.k_gamma": ("model.layers.1.self_attn.k_norm.weight", "blk.1.attn_k_norm.weight"),
}


def two_layers(family: Family) -> dict[str, tuple[str, str]]:
    names = {}
    for rule in family.rules:
        for i in range(2 if "{i}" in rule.array else 1):
            names[rule.array.format(i=i)] = (rule.name_in("hf").format(i=i), rule.name_in("gguf").format(i=i))
    return names


@pytest.mark.parametrize(("model_type", "layers"), [("llama", LLAMA_LAYERS), ("qwen3", QWEN3_LAYERS)])
def test_every_array_has_the_name_that_the_publishers_use(
    model_type: str, layers: Mapping[str, tuple[str, str]]
) -> None:
    assert two_layers(FAMILIES[model_type]) == WHOLE | layers


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_no_array_has_two_rules(model_type: str) -> None:
    rules = FAMILIES[model_type].rules
    assert len({rule.array for rule in rules}) == len(rules)
    assert len({rule.hf for rule in rules}) == len({rule.gguf for rule in rules}) == len(rules)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_the_table_covers_every_array_that_a_model_may_have(model_type: str) -> None:
    family = FAMILIES[model_type]
    config = ModelConfig(
        **{"model_type": model_type, "vocab_size": 5, "hidden_size": 4, "intermediate_size": 6, "num_layers": 2},
        **{"num_heads": 4, "num_kv_heads": 2, "head_dim": 2, "context_length": 8, "qk_norm": family.qk_norm},
        **{"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    )
    assert two_layers(family).keys() == named_leaves(abstract_weights(config)).keys()


@pytest.mark.parametrize(
    ("array", "layout"),
    [
        ("embedding", Identity()),
        ("lm_head", Linear()),
        ("layers.{i}.attn.q", Linear()),
        ("layers.{i}.attn.o", Linear(inputs=2)),
        ("layers.{i}.attn.k_bias", Flat()),
        ("layers.{i}.attn.o_bias", Identity()),
        ("layers.{i}.ffw.w_down", Linear()),
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_hugging_face_layouts(model_type: str, array: str, layout: object) -> None:
    (rule,) = (rule for rule in FAMILIES[model_type].rules if rule.array == array)
    assert rule.layout_in("hf") == layout


def test_gguf_keeps_rotary_pairs_in_q_and_k_of_llama_and_its_kin() -> None:
    paired = {
        (name, rule.array.rpartition(".")[2])
        for name, family in FAMILIES.items()
        for rule in family.rules
        if isinstance(rule.layout_in("gguf"), RotaryPairs)
    }
    llamas = ("llama", "mistral", "smollm3")
    assert paired == {(name, array) for name in llamas for array in ("q", "k", "q_bias", "k_bias")}
    assert {name: family.gguf_architecture for name, family in FAMILIES.items()} == {
        **{"llama": "llama", "mistral": None, "smollm3": "smollm3"},
        **{"qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"},
        **{"qwen2_moe": "qwen2moe", "qwen3_vl": "qwen3vl", "qwen3_vl_moe": "qwen3vlmoe"},
        **{"qwen3_next": "qwen3next", "qwen3_5": "qwen35", "qwen3_5_moe": "qwen35moe"},
    }
