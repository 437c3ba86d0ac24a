"""Qwen families with gated delta nets in most layers: Qwen3-Next; Qwen3.5, 3.6 and 3.8, dense and as mixtures.

Every fourth layer has attention, with an output gate whose rows lie between those of q, head by head. What a delta net
takes from a token is in fewer tensors than there are arrays: one after another in Qwen3.5, key head by key head in
Qwen3-Next. GGUF files have both one after another, and Qwen3.5's value heads in another order.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jllm_convert.families.llama import ATTENTION, EMBEDDINGS, MLP
from jllm_convert.families.qwen import FUSED_EXPERTS, MROPE_FIELDS, ONE_BY_ONE_EXPERTS, QK_NORMS, SHARED_EXPERT, VISION
from jllm_convert.families.table import CACHE_SCALES, Family, LeftOut, Rule
from jllm_convert.families.tensor_layout import Depthwise, Identity, Layout, Linear
from jllm_convert.families.tensor_parts import Arrangement, Decay, Fused, OneAdded, Tiled

_ATTN, _SELF, _NET, _BLK = "layers.{i}.attn", "model.layers.{i}.self_attn", "model.layers.{i}.linear_attn", "blk.{i}"
_Q_GATE = Fused(Linear(), ("q", "gate"), groups="q")


def _attention(array: str, hf: str, gguf: str, layout: Layout | Arrangement) -> Rule:
    return Rule(f"{_ATTN}.{array}", f"{_SELF}.{hf}.weight", f"{_BLK}.{gguf}.weight", layout, mixer="attention")


def _net(
    array: str, hf: str, gguf: str, layout: Layout | Arrangement, gguf_layout: Layout | Arrangement | None = None
) -> Rule:
    return Rule(f"{_ATTN}.{array}", f"{_NET}.{hf}", f"{_BLK}.{gguf}", layout, gguf_layout, mixer="delta_net")


def _centered(rule: Rule) -> Rule:
    """A rule of a norm that multiplies by ``1 + gamma``, which GGUF files store as the sum."""
    return replace(rule, gguf_layout=OneAdded(Identity()))


_BLOCKS = (
    *(_centered(rule) if rule.array == "gamma_final" else rule for rule in EMBEDDINGS),
    *(_centered(rule) for rule in ATTENTION if rule.array == "layers.{i}.attn_pre_gamma"),
    *(
        _centered(replace(rule, gguf=f"{_BLK}.post_attention_norm.weight"))
        for rule in MLP
        if rule.array == "layers.{i}.attn_post_gamma"
    ),
    _attention("q", "q_proj", "attn_q", _Q_GATE),
    _attention("gate", "q_proj", "attn_q", _Q_GATE),
    _attention("k", "k_proj", "attn_k", Linear()),
    _attention("v", "v_proj", "attn_v", Linear()),
    _attention("o", "o_proj", "attn_output", Linear(inputs=2)),
    *(_centered(replace(rule, mixer="attention")) for rule in QK_NORMS),
)
_DENSE = tuple(rule for rule in MLP if ".ffw.w_" in rule.array)
_CONV = ("conv_q", "conv_k", "conv_v")


def _delta_net(order: Callable[..., Layout | Arrangement]) -> tuple[Rule, ...]:
    """What delta nets of all families have in common; ``order`` is how GGUF files arrange value heads."""
    conv, squeezed = Fused(Depthwise(), _CONV), Depthwise(middle=0)
    return (
        _net("conv_q", "conv1d.weight", "ssm_conv1d.weight", conv, Fused(squeezed, _CONV)),
        _net("conv_k", "conv1d.weight", "ssm_conv1d.weight", conv, Fused(squeezed, _CONV)),
        _net("conv_v", "conv1d.weight", "ssm_conv1d.weight", conv, Fused(order(squeezed), _CONV)),
        _net("a_log", "A_log", "ssm_a", Identity(), order(Decay(Identity()), heads=0)),
        _net("dt_bias", "dt_bias", "ssm_dt.bias", Identity(), order(Identity(), heads=0)),
        _net("gamma", "norm.weight", "ssm_norm.weight", Identity()),
        _net("o", "out_proj.weight", "ssm_out.weight", Linear(inputs=2), order(Linear(inputs=2), heads=0, axis=1)),
    )


_QKV = ("q", "k", "v")
_IN_A_ROW = (
    _net("q", "in_proj_qkv.weight", "attn_qkv.weight", Fused(Linear(), _QKV)),
    _net("k", "in_proj_qkv.weight", "attn_qkv.weight", Fused(Linear(), _QKV)),
    _net("v", "in_proj_qkv.weight", "attn_qkv.weight", Fused(Linear(), _QKV), Fused(Tiled(Linear()), _QKV)),
    _net("z", "in_proj_z.weight", "attn_gate.weight", Linear(), Tiled(Linear())),
    _net("a", "in_proj_a.weight", "ssm_alpha.weight", Linear(), Tiled(Linear())),
    _net("b", "in_proj_b.weight", "ssm_beta.weight", Linear(), Tiled(Linear())),
    *_delta_net(Tiled),
)
_QKVZ = Fused(Linear(), ("q", "k", "v", "z"), groups="q")
_BA = Fused(Linear(), ("b", "a"), groups="q")
_BY_KEY_HEAD = (
    *(_net(array, "in_proj_qkvz.weight", "attn_qkv.weight", _QKVZ, Fused(Linear(), _QKV)) for array in _QKV),
    _net("z", "in_proj_qkvz.weight", "attn_gate.weight", _QKVZ, Linear()),
    # llama.cpp's first converter left it as it is.
    *(Rule(f"{_ATTN}.{array}", None, f"{_BLK}.ssm_in.weight", _QKVZ, mixer="delta_net") for array in (*_QKV, "z")),
    _net("b", "in_proj_ba.weight", "ssm_ba.weight", _BA),
    _net("a", "in_proj_ba.weight", "ssm_ba.weight", _BA),
    *_delta_net(lambda layout, **axes: layout),
)

_DEFAULTS = {
    "vocab_size": 248320,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "full_attention_interval": 4,
}
_MIXTURE = {
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
# A block that guesses the token after the next one. It only makes answers come faster.
_PREDICTION = LeftOut("tensors of multi-token prediction", r"(model\.)?mtp\..*")
_FEATURES: dict[str, Any] = {
    "qk_norm": True,
    "attention_bias": "none",
    "delta_nets": True,
    "output_gate": True,
    "centered_norm": True,
    "default_head_dim": 256,
    "rotary_factor": 0.25,
    "fields": ("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"),
}
_BESIDE: dict[str, Any] = {"left_out": (CACHE_SCALES, _PREDICTION, VISION), "rope_fields": MROPE_FIELDS}

QWEN3_5 = Family(
    model_type="qwen3_5",
    text_model_type="qwen3_5_text",
    gguf_architecture="qwen35",
    rules=_BLOCKS + _IN_A_ROW + _DENSE,
    defaults=_DEFAULTS,
    **_FEATURES,
    **_BESIDE,
)
QWEN3_5_MOE = Family(
    model_type="qwen3_5_moe",
    text_model_type="qwen3_5_moe_text",
    gguf_architecture="qwen35moe",
    # Published with all experts in one tensor; in 8 bits, and by transformers 5, one by one.
    rules=_BLOCKS + _IN_A_ROW + FUSED_EXPERTS + ONE_BY_ONE_EXPERTS + SHARED_EXPERT,
    defaults={name: value for name, value in (_DEFAULTS | _MIXTURE).items() if name != "intermediate_size"},
    moe=True,
    normalizes="always",
    shared_expert=True,
    **_FEATURES,
    **_BESIDE,
)
QWEN3_NEXT = Family(
    model_type="qwen3_next",
    gguf_architecture="qwen3next",
    rules=_BLOCKS + _BY_KEY_HEAD + ONE_BY_ONE_EXPERTS + FUSED_EXPERTS + SHARED_EXPERT + _DENSE,
    defaults={
        **_DEFAULTS,
        **_MIXTURE,
        "vocab_size": 151936,
        "intermediate_size": 5632,
        "num_hidden_layers": 48,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    },
    moe=True,
    shared_expert=True,
    left_out=(CACHE_SCALES, _PREDICTION),
    **_FEATURES,
)
