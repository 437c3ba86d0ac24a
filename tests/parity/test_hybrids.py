"""Hybrids of delta nets and attention, random weights: the logits of transformers, within 1e-4, and its tokens."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from transformers import PretrainedConfig, Qwen3_5MoeTextConfig, Qwen3_5TextConfig, Qwen3NextConfig

TOLERANCE = 1e-4
SIZES: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "tie_word_embeddings": False,
}
DENSE = {**SIZES, "intermediate_size": 88}
EXPERTS = {
    **SIZES,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.5,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "qwen3.5": Qwen3_5TextConfig(**DENSE),
    "qwen3.5-tied": Qwen3_5TextConfig(**{**DENSE, "tie_word_embeddings": True}),
    "qwen3.5-a-key-head-each": Qwen3_5TextConfig(**{**DENSE, "linear_num_key_heads": 4}),
    "qwen3.5-attention-first": Qwen3_5TextConfig(
        **DENSE, layer_types=["full_attention", "linear_attention", "linear_attention", "full_attention"]
    ),
    "qwen3.5-attention-alone": Qwen3_5TextConfig(**DENSE, layer_types=["full_attention"] * 4),
    "qwen3.5-delta-nets-alone": Qwen3_5TextConfig(**DENSE, layer_types=["linear_attention"] * 4),
    "qwen3.5-yarn": Qwen3_5TextConfig(**{**DENSE, "max_position_embeddings": 64}, rope_parameters=YARN),
    "qwen3.5-conv-2": Qwen3_5TextConfig(**DENSE, linear_conv_kernel_dim=2),
    "qwen3.5-moe": Qwen3_5MoeTextConfig(**EXPERTS),
    "qwen3-next": Qwen3NextConfig(**EXPERTS),
    "qwen3-next-not-normalised": Qwen3NextConfig(**EXPERTS, norm_topk_prob=False),
}


def random_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, SIZES["vocab_size"], shape)


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def pair(request: pytest.FixtureRequest, make_hybrid: Callable):
    return make_hybrid(CONFIGS[request.param])


@pytest.mark.parametrize("length", [1, 3, 63, 64, 65, 130, 200])
def test_logits(pair, length: int):
    tokens = random_tokens(2, length)
    assert np.abs(np.asarray(pair.model.logits(tokens)) - pair.reference_logits(tokens)).max() < TOLERANCE
