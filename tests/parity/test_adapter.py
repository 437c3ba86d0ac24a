"""Adapters beside transformers: what PEFT computes, the changes added to the reference's weights by torch."""

import json
from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from jllm_convert import convert, save_adapter
from jllm_core import init_adapter, with_adapter
from jllm_core.adapters import Adapter, LowRank
from jllm_runtime import load_model
from safetensors.numpy import load_file, save_file
from transformers import PretrainedConfig, Qwen3_5TextConfig, Qwen3Config, Qwen3NextConfig

from .conftest import Pair
from .test_hybrids import DENSE, EXPERTS

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


LAYERS = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("config", "rslora"),
    [(Qwen3_5TextConfig(**{**DENSE, **LAYERS}), True), (Qwen3NextConfig(**{**EXPERTS, **LAYERS}), False)],
    ids=["qwen3.5", "qwen3-next"],
)
def test_an_adapter_of_a_hybrid_is_saved_as_the_reference_has_its_modules(
    config: PretrainedConfig, rslora: bool, make_pair: Callable[..., Pair]
) -> None:
    pair, tokens = make_pair(config), np.random.default_rng(0).integers(1, 199, (2, 40))
    pair.reference.config.use_cache = False
    new = init_adapter(pair.model.config, jax.random.key(0), rank=RANK, alpha=float(ALPHA), targets=None, rslora=rslora)
    keys = jax.random.split(jax.random.key(1), len(new.factors))
    factors = {
        name: LowRank(part.a, 0.05 * jax.random.normal(key, part.b.shape))
        for key, (name, part) in zip(keys, new.factors.items(), strict=True)
    }
    adapter = Adapter(factors, new.alpha, rslora)
    folder = save_adapter(adapter, pair.folder / "adapter", pair.model.config)
    fields = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    modules = dict(pair.reference.named_modules())
    before = pair.reference_logits(tokens)
    with torch.no_grad():
        for name in fields["target_modules"]:
            a, b = (torch.tensor(tensors[f"base_model.model.{name}.lora_{part}.weight"]) for part in "AB")
            alpha, rank = fields["alpha_pattern"].get(name, ALPHA), fields["rank_pattern"].get(name, fields["r"])
            assert len(a) == b.shape[1] == rank
            modules[name].weight += alpha / (rank**0.5 if rslora else rank) * b @ a
    expected = pair.reference_logits(tokens)
    ours = replace(pair.model, weights=with_adapter(pair.model.weights, adapter)).logits(tokens)
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert np.abs(expected - before).max() > 0.1
