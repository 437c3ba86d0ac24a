"""Folders of newer Qwen models, converted and exported: the logits of transformers, before and after, within 1e-4.

Models that read images too are saved whole, and asked for text. What is exported is a text model alone.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from jllm_convert import convert, export
from jllm_runtime import load_model

TOLERANCE = 1e-4
SIZES: dict[str, Any] = {
    **{"vocab_size": 199, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 6},
    **{"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512},
}
DENSE = {**SIZES, "intermediate_size": 88}
NETS = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 8, "linear_value_head_dim": 12}
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 40}
VISION = {
    **{"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 48},
    **{"num_position_embeddings": 16, "patch_size": 4},
}
YARN = {
    **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    **{"partial_rotary_factor": 0.5},
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen2-moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**DENSE, **SHARED}),
    "qwen2-moe-every-other-layer": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**DENSE, **SHARED, "decoder_sparse_step": 2, "norm_topk_prob": True, "qkv_bias": True},
    ),
    "qwen3-vl": ("Qwen3VLForConditionalGeneration", "Qwen3VLConfig", {"text_config": DENSE}),
    "qwen3-vl-tied": (
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {"text_config": DENSE, "tie_word_embeddings": True},
    ),
    "qwen3-vl-moe": ("Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeConfig", {"text_config": {**DENSE, **EXPERTS}}),
    "qwen3-next": ("Qwen3NextForCausalLM", "Qwen3NextConfig", {**DENSE, **NETS, **SHARED}),
    "qwen3-next-but-one-layer": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {**DENSE, **NETS, **SHARED, "mlp_only_layers": [1], "norm_topk_prob": False},
    ),
    "qwen3.5": ("Qwen3_5ForConditionalGeneration", "Qwen3_5Config", {"text_config": {**DENSE, **NETS}}),
    "qwen3.5-yarn": (
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Config",
        {"text_config": {**DENSE, **NETS, "max_position_embeddings": 64, "rope_parameters": YARN}},
    ),
    "qwen3.5-text-tied": (
        "Qwen3_5ForCausalLM",
        "Qwen3_5TextConfig",
        {**DENSE, **NETS, "linear_num_key_heads": 6, "tie_word_embeddings": True},
    ),
    "qwen3.5-moe": (
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3_5MoeConfig",
        {"text_config": {**SIZES, **NETS, **SHARED}},
    ),
    "qwen3.5-moe-text": ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", {**SIZES, **NETS, **SHARED}),
}


def reference_of(name: str) -> Any:
    """A random model of transformers."""
    model_class, config_class, fields = MODELS[name]
    if "text_config" in fields:
        deep = {"deepstack_visual_indexes": [0]} if "vl" in name else {}
        fields = {**fields, "vision_config": {**VISION, **deep}}
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**fields)).eval()
    with torch.no_grad():
        for each, parameter in model.named_parameters():
            if each.endswith("A_log"):
                parameter.copy_(torch.linspace(-6, 2, len(parameter)))
            elif "visual" not in each:
                parameter.copy_((1.0 if parameter.mean() == 1 else 0.0) + 0.1 * torch.randn(parameter.shape))
    model.tie_weights()
    return model


@pytest.fixture(scope="module", params=MODELS, ids=str)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model, and the folder that holds it (``hf``) and its conversion (``jllm``)."""
    folder, reference = tmp_path_factory.mktemp(request.param), reference_of(request.param)
    reference.save_pretrained(folder / "hf")
    convert(folder / "hf", folder / "jllm")
    return reference, folder


def logits_of(reference: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return reference(torch.as_tensor(tokens)).logits.float().numpy()


def random_tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, SIZES["vocab_size"], shape)


def test_logits_of_a_converted_folder(saved: tuple[Any, Path]) -> None:
    reference, folder = saved
    tokens = random_tokens(2, 70)
    ours = np.asarray(load_model(folder / "jllm", dtype="float32").logits(tokens))
    assert np.abs(ours - logits_of(reference, tokens)).max() < TOLERANCE


def test_transformers_loads_what_is_exported(saved: tuple[Any, Path]) -> None:
    reference, folder = saved
    export(folder / "jllm", folder / "back")
    back, told = transformers.AutoModelForCausalLM.from_pretrained(folder / "back", output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    tokens = random_tokens(2, 70)
    np.testing.assert_array_equal(logits_of(back.eval(), tokens), logits_of(reference, tokens))
