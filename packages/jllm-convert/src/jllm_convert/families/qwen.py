"""Qwen3, dense: Llama's blocks, with an RMSNorm on each head of q and k."""

from dataclasses import replace

from jllm_convert.families.llama import ATTENTION, EMBEDDINGS, MLP, ROTATED
from jllm_convert.families.table import Family, Rule
from jllm_convert.layout import Same

QK_NORMS = (
    Rule(
        "layers.{i}.attn.q_gamma",
        "model.layers.{i}.self_attn.q_norm.weight",
        "blk.{i}.attn_q_norm.weight",
        Same(),
    ),
    Rule(
        "layers.{i}.attn.k_gamma",
        "model.layers.{i}.self_attn.k_norm.weight",
        "blk.{i}.attn_k_norm.weight",
        Same(),
    ),
)

QWEN3 = Family(
    model_type="qwen3",
    gguf_architecture="qwen3",
    # llama.cpp leaves the rows of Qwen's q and k as they are.
    rules=EMBEDDINGS + ATTENTION + tuple(replace(rule, gguf_layout=None) for rule in ROTATED) + MLP + QK_NORMS,
    qk_norm=True,
    default_head_dim=128,
    fields=("use_sliding_window", "sliding_window", "max_window_layers"),
)
