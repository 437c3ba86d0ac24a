"""Embeddings beside transformers: its last hidden states, pooled by numpy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from jllm_runtime import embed
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

SIZES = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "qwen3-moe": Qwen3MoeConfig(
        **SIZES, head_dim=16, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True
    ),
}
SENTENCES = [
    "A cat sleeps on the warm windowsill.",
    "The kitten is napping by the window.",
    "Interest rates rose by a quarter of a per cent.",
    "The lighthouse keeper climbed the stairs every evening and lit the lamp. " * 12,
]


def reference(model: Any, prompts: list[list[int]], pooling: str) -> np.ndarray:
    with torch.no_grad():
        states = [model.model(torch.tensor([ids])).last_hidden_state[0].numpy() for ids in prompts]
    pooled = np.stack([state.mean(0) if pooling == "mean" else state[-1] for state in states])
    return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_random_weights(make_pair: Callable, name: str):
    pair = make_pair(CONFIGS[name])
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 199, length).tolist() for length in (3, 64, 150)]
    for pooling in ("mean", "last"):
        np.testing.assert_allclose(
            embed(pair.model, prompts, pooling), reference(pair.reference, prompts, pooling), atol=1e-5
        )


def test_real_weights(smollm2):
    prompts = [smollm2.model.tokenizer.encode(text) for text in SENTENCES]
    assert len(prompts[-1]) > 128
    for pooling in ("mean", "last"):
        found = embed(smollm2.model, SENTENCES, pooling)
        np.testing.assert_allclose(found, reference(smollm2.reference, prompts, pooling), atol=1e-5)
    alike = embed(smollm2.model, SENTENCES[:3])
    assert alike[0] @ alike[1] > alike[0] @ alike[2]


def test_real_weights_have_the_same_bits_in_batches_and_alone(smollm2):
    if not smollm2.model.backend.name.startswith("CPU kernels"):
        pytest.skip(smollm2.model.backend.name)
    rng = np.random.default_rng(0)
    prompts = [
        rng.integers(0, 49152, length).tolist() for length in [*rng.integers(1, 17, 72), *rng.integers(17, 65, 18)]
    ]
    for pooling in ("mean", "last"):
        together = embed(smollm2.model, prompts, pooling)
        for number in [*range(0, 72, 8), *range(72, 90, 4)]:
            np.testing.assert_array_equal(embed(smollm2.model, [prompts[number]], pooling)[0], together[number])
