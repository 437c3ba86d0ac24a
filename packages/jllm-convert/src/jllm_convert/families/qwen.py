"""Qwen families with attention in every layer: Qwen2 (and 2.5), Qwen2-MoE, Qwen3, Qwen3-MoE, the text of Qwen3-VL.

They have Llama's blocks, with biases on q, k and v (Qwen2), an RMSNorm on each head of q and k (Qwen3), and mixtures of
experts, with one that all tokens go through (Qwen2-MoE) or without (Qwen3-MoE).
"""

from dataclasses import replace
from typing import Any

from jllm_convert.families.llama import ATTENTION, EMBEDDINGS, MLP, ROTATED
from jllm_convert.families.table import CACHE_SCALES, Family, LeftOut, Rule, SlidingWindows
from jllm_convert.families.tensor_layout import Identity, Linear, Row, Stacked
from jllm_convert.families.tensor_parts import Fused

# llama.cpp does not interleave the rows of Qwen's q and k.
RULES = EMBEDDINGS + ATTENTION + tuple(replace(rule, gguf_layout=None) for rule in ROTATED) + MLP
QK_NORMS = (
    Rule(
        "layers.{i}.attn.q_gamma",
        "model.layers.{i}.self_attn.q_norm.weight",
        "blk.{i}.attn_q_norm.weight",
        Identity(),
    ),
    Rule(
        "layers.{i}.attn.k_gamma",
        "model.layers.{i}.self_attn.k_norm.weight",
        "blk.{i}.attn_k_norm.weight",
        Identity(),
    ),
)
_FFW, _MLP, _BLK = "layers.{i}.ffw", "model.layers.{i}.mlp", "blk.{i}"
_GATE_UP = Fused(Stacked(), ("we_gate", "we_up"), axis=1)
# we_gate and we_up are [E, D, F], we_down is [E, F, D]; {e} is an index of the first axis.
ONE_BY_ONE_EXPERTS = (
    Rule(f"{_FFW}.w_router", f"{_MLP}.gate.weight", f"{_BLK}.ffn_gate_inp.weight", Linear()),
    # Hugging Face files have a tensor for each expert, GGUF files one for all of them.
    Rule(
        f"{_FFW}.we_gate",
        f"{_MLP}.experts.{{e}}.gate_proj.weight",
        f"{_BLK}.ffn_gate_exps.weight",
        Linear(),
        Stacked(),
    ),
    Rule(f"{_FFW}.we_up", f"{_MLP}.experts.{{e}}.up_proj.weight", f"{_BLK}.ffn_up_exps.weight", Linear(), Stacked()),
    Rule(
        f"{_FFW}.we_down",
        f"{_MLP}.experts.{{e}}.down_proj.weight",
        f"{_BLK}.ffn_down_exps.weight",
        Linear(),
        Stacked(),
    ),
    # Newer converters of llama.cpp may put gate and up in one.
    Rule(f"{_FFW}.we_gate", None, f"{_BLK}.ffn_gate_up_exps.weight", _GATE_UP),
    Rule(f"{_FFW}.we_up", None, f"{_BLK}.ffn_gate_up_exps.weight", _GATE_UP),
)
# transformers 5 in memory has all experts in one tensor, with gate and up stacked along ``out``.
FUSED_EXPERTS = (
    Rule(f"{_FFW}.we_gate", f"{_MLP}.experts.gate_up_proj", None, _GATE_UP),
    Rule(f"{_FFW}.we_up", f"{_MLP}.experts.gate_up_proj", None, _GATE_UP),
    Rule(f"{_FFW}.we_down", f"{_MLP}.experts.down_proj", None, Stacked()),
)
# In Qwen3-VL they are published as in the model: [E, D, 2*F] and [E, F, D].
_VL_GATE_UP = Fused(Identity(), ("we_gate", "we_up"), axis=2)
_VL_EXPERTS = (
    Rule(f"{_FFW}.we_gate", f"{_MLP}.experts.gate_up_proj", None, _VL_GATE_UP),
    Rule(f"{_FFW}.we_up", f"{_MLP}.experts.gate_up_proj", None, _VL_GATE_UP),
    Rule(f"{_FFW}.we_down", f"{_MLP}.experts.down_proj", None, Identity()),
)
SHARED_EXPERT = (
    Rule(f"{_FFW}.shared.w_gate", f"{_MLP}.shared_expert.gate_proj.weight", f"{_BLK}.ffn_gate_shexp.weight", Linear()),
    Rule(f"{_FFW}.shared.w_up", f"{_MLP}.shared_expert.up_proj.weight", f"{_BLK}.ffn_up_shexp.weight", Linear()),
    Rule(f"{_FFW}.shared.w_down", f"{_MLP}.shared_expert.down_proj.weight", f"{_BLK}.ffn_down_shexp.weight", Linear()),
    Rule(
        f"{_FFW}.shared_gate",
        f"{_MLP}.shared_expert_gate.weight",
        f"{_BLK}.ffn_gate_inp_shexp.weight",
        Row(),
        Identity(),
    ),
    # llama.cpp's converter has written it either way.
    Rule(f"{_FFW}.shared_gate", None, f"{_BLK}.ffn_gate_inp_shexp.weight", Row()),
)
VISION = LeftOut("tensors of the vision encoder", r"(model\.)?visual\..*")
MROPE_FIELDS = ("mrope_section", "mrope_interleaved")
"""Positions of a text are the same along each axis, so how the axes share the rotated features changes nothing."""

_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

QWEN2 = Family(
    model_type="qwen2",
    gguf_architecture="qwen2",
    rules=RULES,
    defaults=_DEFAULTS,
    attention_bias="qkv",
    windows=SlidingWindows("last"),
)
QWEN3 = Family(
    model_type="qwen3",
    gguf_architecture="qwen3",
    rules=RULES + QK_NORMS,
    defaults=_DEFAULTS,
    qk_norm=True,
    windows=SlidingWindows("last"),
    default_head_dim=128,
)
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    gguf_architecture="qwen3moe",
    rules=RULES + QK_NORMS + ONE_BY_ONE_EXPERTS + FUSED_EXPERTS,
    defaults={
        **_DEFAULTS,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
    },
    qk_norm=True,
    moe=True,
    windows=SlidingWindows("all"),
)
QWEN2_MOE = Family(
    model_type="qwen2_moe",
    gguf_architecture="qwen2moe",
    rules=RULES + ONE_BY_ONE_EXPERTS + FUSED_EXPERTS + SHARED_EXPERT,
    defaults={
        **_DEFAULTS,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "decoder_sparse_step": 1,
    },
    attention_bias="qkv",
    moe=True,
    gguf_normalizes=False,
    shared_expert=True,
    # Windows in every other layer, which no published model has, are not supported.
    fields=("sliding_window", "max_window_layers"),
)
_VL: dict[str, Any] = {
    "qk_norm": True,
    "left_out": (CACHE_SCALES, VISION),
    # That of text_config is the default of a class that does not tie.
    "outer_fields": ("tie_word_embeddings",),
    "default_rope_theta": 500000.0,
    "rope_fields": MROPE_FIELDS,
}
QWEN3_VL = Family(
    model_type="qwen3_vl",
    text_model_type="qwen3_vl_text",
    exported_as="qwen3",
    gguf_architecture="qwen3vl",
    rules=QWEN3.rules,
    defaults={**_DEFAULTS, "max_position_embeddings": 128000},
    default_head_dim=128,
    **_VL,
)
QWEN3_VL_MOE = Family(
    model_type="qwen3_vl_moe",
    text_model_type="qwen3_vl_moe_text",
    exported_as="qwen3_moe",
    gguf_architecture="qwen3vlmoe",
    # transformers 5 may save them like those of Qwen3-MoE; it tells the two apart by the shape, in this order.
    rules=RULES + QK_NORMS + ONE_BY_ONE_EXPERTS + FUSED_EXPERTS + _VL_EXPERTS,
    defaults={
        **_DEFAULTS,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 128000,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "decoder_sparse_step": 1,
    },
    moe=True,
    normalizes="always",
    # The reference sets it to null, whatever the file says.
    fields=("sliding_window",),
    **_VL,
)
