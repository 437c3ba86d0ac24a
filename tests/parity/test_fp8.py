"""Folders of 8-bit floats with block scales, as Qwen publishes them: the weights and logits of transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from jllm_convert import convert
from jllm_convert.sources.huggingface.folder import SafetensorsSource
from jllm_runtime import load_model
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config, PretrainedConfig, Qwen3Config, Qwen3MoeConfig
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

TOLERANCE = 1e-4
# The reference wants sizes that blocks divide, when it multiplies the scales in; several blocks each way.
SIZES = {
    "vocab_size": 199,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "qwen3": Qwen3Config(**SIZES),
    "qwen3-moe": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128),
}
# As in Qwen3-0.6B-FP8.
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "modules_to_not_convert": None,
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in blocks of 128 by 128, the last ones smaller where it does not divide, and its scales in bfloat16."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // 128), -(-columns // 128), dtype=torch.bfloat16)
    stored = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = np.s_[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            scales[i, j] = weight[block].abs().max() / 440
            stored[block] = (weight[block] / scales[i, j].float()).to(torch.float8_e4m3fn)
    return stored, scales


def write_fp8(folder: Path, config: PretrainedConfig) -> Path:
    """A random model of that config, its matrices quantised but for those that Qwen leaves as they are."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.08)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in list(tensors.items()):
        if "_proj.weight" in name:
            tensors[name], tensors[f"{name}_scale_inv"] = quantised(tensor)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "quantization_config": QUANTIZATION}))
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_and_logits_are_the_reference_s(tmp_path: Path, name: str):
    folder = write_fp8(tmp_path / "hf", CONFIGS[name])
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    ).eval()
    weights = {key: tensor.numpy() for key, tensor in reference.state_dict().items()}
    compared = 0
    for key, tensor in SafetensorsSource(folder).tensors.items():
        if key in weights:  # experts are stacked in the reference; the logits tell of them
            np.testing.assert_array_equal(tensor.read(), weights[key])
            compared += tensor.stored == "F8_E4M3"
    assert compared >= 2 * 4

    convert(folder, tmp_path / "jllm", "float32")
    tokens = np.random.default_rng(0).integers(1, SIZES["vocab_size"], (2, 40))
    with torch.no_grad():
        expected = reference(torch.as_tensor(tokens)).logits.numpy()
    assert np.abs(load_model(tmp_path / "jllm").logits(tokens) - expected).max() < TOLERANCE


def test_blocks_that_do_not_divide_are_cut_as_the_reference_s_kernels_cut_them(tmp_path: Path):
    weight = torch.randn(200, 330, generator=torch.Generator().manual_seed(0))
    stored, scales = quantised(weight)
    tmp_path.joinpath("config.json").write_text(json.dumps({"quantization_config": QUANTIZATION}))
    save_file({"w": stored, "w_scale_inv": scales}, tmp_path / "model.safetensors")
    expected = _dequantize_fp8_weight(stored, scales, [128, 128], torch.float32).numpy()
    read = SafetensorsSource(tmp_path).tensors["w"].read()
    np.testing.assert_array_equal(read, expected)
    assert np.abs(read - weight.numpy()).max() < 0.2
