"""Adapters beside transformers: what PEFT computes, the changes added to the reference's weights by torch."""

import json
from collections.abc import Callable

import numpy as np
import torch
from jllm_convert import convert
from jllm_runtime import load_model
from safetensors.numpy import save_file
from transformers import Qwen3Config

from .conftest import Pair

CONFIG = Qwen3Config(
    vocab_size=199,
    hidden_size=48,
    intermediate_size=88,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 4, 6


def test_a_merged_adapter_gives_the_logits_of_the_changed_reference(make_pair: Callable[..., Pair]) -> None:
    pair, random = make_pair(CONFIG), np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for name, module in pair.reference.named_modules():
            if not name.endswith(TARGETS):
                continue
            out, ins = module.weight.shape
            a, b = (random.normal(0, 0.2, shape).astype(np.float32) for shape in ((RANK, ins), (out, RANK)))
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
            module.weight += ALPHA / RANK * torch.tensor(b) @ torch.tensor(a)
    folder = pair.folder / "adapter"
    folder.mkdir()
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGETS)}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / "adapter_model.safetensors")
    convert(pair.folder / "hf", pair.folder / "merged", adapter=folder)
    tokens = random.integers(1, 199, (2, 40))
    expected = pair.reference_logits(tokens)
    np.testing.assert_allclose(load_model(pair.folder / "merged").logits(tokens), expected, atol=1e-4)
    assert np.abs(np.asarray(pair.model.logits(tokens)) - expected).max() > 0.1
