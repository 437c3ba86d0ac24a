"""Exported folders, loaded by transformers: the reference's own tensors, and so its own logits, bit for bit."""

import logging
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from jllm_convert import convert
from jllm_convert.exporting.export import export
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, Qwen3MoeConfig, SmolLM3Config

TESTS = runpy.run_path(str(Path(__file__).with_name("test_families.py")))
CONFIGS: dict[str, PretrainedConfig] = {
    **TESTS["CONFIGS"],
    "smollm3-untied": SmolLM3Config(**TESTS["SIZES"], pad_token_id=0, tie_word_embeddings=False),
    "qwen3-moe-without-experts": Qwen3MoeConfig(**TESTS["SIZES"], head_dim=16, num_experts=0),
}
# Fields that may differ: none of them reaches the logits.
LABELS = {
    "_name_or_path",
    "head_dim",  # SmolLM3 and Qwen2 derive it where it is not stated
    "no_rope_layer_interval",  # the layers are listed
    "max_window_layers",  # without windows it says nothing; with them the layers are listed
    "max_position_embeddings",  # YaRN goes by the context of the first training, which has a field of its own
    "eos_token_id",
}


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def pair(request: pytest.FixtureRequest, make_pair: Callable):
    return make_pair(CONFIGS[request.param])


@pytest.fixture
def load(caplog: pytest.LogCaptureFixture):
    """``load(folder)``: the model that transformers makes of a folder, with nothing to remark on it."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)

    def load(folder: Path):
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert {name: found for name, found in info.items() if found} == {}
        assert [record.message for record in caplog.records if record.name.startswith("transformers")] == []
        return model.eval()

    yield load
    logger.removeHandler(caplog.handler)


def assert_same_state(got, expected) -> None:
    got, expected = got.state_dict(), expected.state_dict()
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def test_transformers_loads_the_same_model(pair, tmp_path, load):
    export(pair.folder / "jllm", tmp_path / "hf")
    model = load(tmp_path / "hf")
    assert_same_state(model, pair.reference)
    expected, got = pair.reference.config.to_dict(), model.config.to_dict()
    assert {name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name)} <= LABELS
    tokens = np.random.default_rng(0).integers(1, pair.model.config.vocab_size, (2, 130))
    exported = type(pair)(model, pair.model, pair.folder)
    np.testing.assert_array_equal(exported.reference_logits(tokens), pair.reference_logits(tokens))


def test_the_files_hold_what_transformers_saves(pair, tmp_path):
    """Names too: publishers store an expert a tensor, in memory transformers has them in one."""
    export(pair.folder / "jllm", tmp_path / "hf")
    got, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", pair.folder / "hf"))
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(got[name], tensor, err_msg=name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_transformers_casts_alike_and_reads_several_files(make_pair, tmp_path, load, dtype):
    pair = make_pair(CONFIGS["qwen3-moe"])
    assert len(export(pair.folder / "jllm", tmp_path / "hf", dtype=dtype, shard_bytes=20_000).files) > 3
    assert_same_state(load(tmp_path / "hf"), pair.reference.to(getattr(torch, dtype)))


def test_smollm2(smollm2_gguf, tmp_path, load):
    """Real weights, which came from a GGUF file: transformers runs the folder, with its tokenizer."""
    convert(smollm2_gguf, tmp_path / "jllm")
    export(tmp_path / "jllm", tmp_path / "hf")
    model, tokenizer = load(tmp_path / "hf"), AutoTokenizer.from_pretrained(tmp_path / "hf")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=12)[0, prompt["input_ids"].shape[1] :]
    assert answer[-1] == model.generation_config.eos_token_id
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
