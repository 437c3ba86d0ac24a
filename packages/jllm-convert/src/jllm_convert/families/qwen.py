"""Qwen families: Qwen2 (and 2.5), Qwen3, Qwen3-MoE.

They have Llama's blocks, with biases on q, k and v (Qwen2), an RMSNorm on each head of q and k (Qwen3), and mixtures of
experts (Qwen3-MoE).
"""

from dataclasses import replace

from jllm_convert.families.llama import ATTENTION, EMBEDDINGS, MLP, ROTATED
from jllm_convert.families.table import Family, Rule, SlidingWindows
from jllm_convert.families.tensor_layout import Identity, Linear, Stacked
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
EXPERTS = (
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
    # transformers 5 in memory has all experts in one tensor, with gate and up stacked along ``out``.
    Rule(f"{_FFW}.we_gate", f"{_MLP}.experts.gate_up_proj", None, _GATE_UP),
    Rule(f"{_FFW}.we_up", f"{_MLP}.experts.gate_up_proj", None, _GATE_UP),
    Rule(f"{_FFW}.we_down", f"{_MLP}.experts.down_proj", None, Stacked()),
)

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
    rules=RULES + QK_NORMS + EXPERTS,
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
