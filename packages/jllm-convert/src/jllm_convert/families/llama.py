"""Llama family: Llama 1 to 3.x, and models with its blocks (SmolLM2, TinyLlama, Mistral, SmolLM3)."""

from jllm_convert.families.table import Family, Rule, SlidingWindows
from jllm_convert.families.tensor_layout import Flat, Identity, Linear, RotaryPairs

_LAYER, _BLK = "model.layers.{i}", "blk.{i}"

EMBEDDINGS = (
    Rule("embedding", "model.embed_tokens.weight", "token_embd.weight", Identity()),
    Rule("gamma_final", "model.norm.weight", "output_norm.weight", Identity()),
    Rule("lm_head", "lm_head.weight", "output.weight", Linear()),
)
# The model has q [D, N, H], k and v [D, K, H], o [N, H, D] (docs/notation.md). So o has two input axes.
ATTENTION = (
    Rule("layers.{i}.attn_pre_gamma", f"{_LAYER}.input_layernorm.weight", f"{_BLK}.attn_norm.weight", Identity()),
    Rule("layers.{i}.attn.v", f"{_LAYER}.self_attn.v_proj.weight", f"{_BLK}.attn_v.weight", Linear()),
    Rule("layers.{i}.attn.o", f"{_LAYER}.self_attn.o_proj.weight", f"{_BLK}.attn_output.weight", Linear(inputs=2)),
    Rule("layers.{i}.attn.v_bias", f"{_LAYER}.self_attn.v_proj.bias", f"{_BLK}.attn_v.bias", Flat()),
    Rule("layers.{i}.attn.o_bias", f"{_LAYER}.self_attn.o_proj.bias", f"{_BLK}.attn_output.bias", Identity()),
)
MLP = (
    Rule(
        "layers.{i}.attn_post_gamma", f"{_LAYER}.post_attention_layernorm.weight", f"{_BLK}.ffn_norm.weight", Identity()
    ),
    Rule("layers.{i}.ffw.w_gate", f"{_LAYER}.mlp.gate_proj.weight", f"{_BLK}.ffn_gate.weight", Linear()),
    Rule("layers.{i}.ffw.w_up", f"{_LAYER}.mlp.up_proj.weight", f"{_BLK}.ffn_up.weight", Linear()),
    Rule("layers.{i}.ffw.w_down", f"{_LAYER}.mlp.down_proj.weight", f"{_BLK}.ffn_down.weight", Linear()),
    Rule("layers.{i}.ffw.b_gate", f"{_LAYER}.mlp.gate_proj.bias", f"{_BLK}.ffn_gate.bias", Identity()),
    Rule("layers.{i}.ffw.b_up", f"{_LAYER}.mlp.up_proj.bias", f"{_BLK}.ffn_up.bias", Identity()),
    Rule("layers.{i}.ffw.b_down", f"{_LAYER}.mlp.down_proj.bias", f"{_BLK}.ffn_down.bias", Identity()),
)
# GGUF stores q and k of this family interleaved for RoPE.
ROTATED = (
    Rule(
        "layers.{i}.attn.q",
        f"{_LAYER}.self_attn.q_proj.weight",
        f"{_BLK}.attn_q.weight",
        Linear(),
        RotaryPairs(Linear()),
    ),
    Rule(
        "layers.{i}.attn.k",
        f"{_LAYER}.self_attn.k_proj.weight",
        f"{_BLK}.attn_k.weight",
        Linear(),
        RotaryPairs(Linear()),
    ),
    Rule(
        "layers.{i}.attn.q_bias", f"{_LAYER}.self_attn.q_proj.bias", f"{_BLK}.attn_q.bias", Flat(), RotaryPairs(Flat())
    ),
    Rule(
        "layers.{i}.attn.k_bias", f"{_LAYER}.self_attn.k_proj.bias", f"{_BLK}.attn_k.bias", Flat(), RotaryPairs(Flat())
    ),
)

RULES = EMBEDDINGS + ATTENTION + ROTATED + MLP

LLAMA = Family(
    model_type="llama",
    gguf_architecture="llama",
    rules=RULES,
    # Those of Llama 1 in 7B, whose files say little.
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    mlp_bias=True,
    fields=("is_llama_config", "max_window_layers"),
)
# No GGUF architecture of its own: llama.cpp calls it llama, and ignores its sliding window.
MISTRAL = Family(
    model_type="mistral",
    gguf_architecture=None,
    rules=RULES,
    defaults={
        **LLAMA.defaults,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    attention_bias="none",
    windows=SlidingWindows("all", switch=False),
    # The reference's class reads neither: sliding_window alone counts.
    fields=("use_sliding_window", "max_window_layers"),
)
SMOLLM3 = Family(
    model_type="smollm3",
    gguf_architecture="smollm3",
    rules=RULES,
    defaults={
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "no_rope_layer_interval": 4,
    },
    mlp_bias=True,
    windows=SlidingWindows("unrotated"),
    skips_rope=True,
    default_rope_theta=2_000_000.0,
)
