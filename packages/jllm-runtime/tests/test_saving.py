"""Models that are saved: everything comes back, whatever became of the folder they were loaded from."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jllm_core.array_info import named_leaves
from jllm_core.checkpoint import CheckpointError, read_manifest, restore_weights
from jllm_runtime import Model, SamplingParams, generate, load_model
from jllm_runtime.__about__ import __version__

GENERATION = {"temperature": 0.6, "top_k": 20, "eos_token_id": [7, 259]}


@pytest.fixture
def loaded(write_checkpoint, tmp_path: Path) -> Model:
    """A model whose folder is gone when it is saved, as that of a temporary conversion."""
    folder = write_checkpoint.saying("Hi, you", generation_config=GENERATION)
    model = load_model(folder)
    shutil.rmtree(folder)
    return model


def texts(model: Model) -> list[str]:
    return [output.text for output in generate(model, ["H", model.encode_chat("H")], SamplingParams(max_tokens=4))]


def test_a_model_comes_back_with_all_that_it_had(loaded: Model, tmp_path: Path) -> None:
    loaded.save(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert texts(again) == texts(loaded)
    assert (again.config, again.eos_ids) == (loaded.config, loaded.eos_ids)
    assert SamplingParams.of(again) == SamplingParams.of(loaded) == SamplingParams(temperature=0.6, top_k=20)
    assert again.tokenizer is not None
    assert loaded.tokenizer is not None
    assert again.tokenizer.files() == loaded.tokenizer.files()
    for name, array in named_leaves(loaded.weights).items():
        np.testing.assert_array_equal(named_leaves(again.weights)[name], array)


def test_the_manifest_says_that_it_was_saved(loaded: Model, tmp_path: Path) -> None:
    assert loaded.path is not None
    loaded.save(str(tmp_path / "saved"))
    manifest = read_manifest(tmp_path / "saved")
    assert manifest.source == {"name": loaded.path.name, "kind": "saved"}
    assert manifest.created_by == f"jllm-runtime {__version__}"


def test_changed_weights_are_what_is_saved(loaded: Model, tmp_path: Path) -> None:
    trained = dataclasses.replace(loaded, weights=jax.tree.map(lambda array: array * 2, loaded.weights))
    trained.save(tmp_path / "trained")
    restored = restore_weights(tmp_path / "trained", loaded.config)
    np.testing.assert_array_equal(restored.embedding, 2 * np.asarray(loaded.weights.embedding))


def test_a_model_made_in_memory_is_saved_too(tiny, tmp_path: Path) -> None:
    model = tiny.random(tiny.config, jnp.bfloat16, eos_ids=(5,))
    model.save(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert (again.tokenizer, again.eos_ids, again.weights.dtype) == (None, (5,), jnp.bfloat16)
    assert read_manifest(tmp_path / "saved").source == {"name": "qwen3", "kind": "saved"}
    model.save(tmp_path / "no end of text")  # beside the other
    settings = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert settings == {"eos_token_id": [5]}


def test_a_model_is_replaced_only_when_asked(loaded: Model, tmp_path: Path) -> None:
    loaded.save(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="overwrite=True"):
        loaded.save(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    again.save(tmp_path / "saved", overwrite=True)  # over itself
    assert texts(load_model(tmp_path / "saved")) == texts(loaded)


CHILD = """
import os, jax, numpy as np
from jllm_core import ModelConfig, Quantization, ShardingRules, init_weights
from jllm_core.array_info import named_leaves
from jllm_runtime import Model, load_model, make_mesh

config = ModelConfig(model_type="qwen3", vocab_size=64, hidden_size=64, intermediate_size=256, num_layers=1,
                     num_heads=8, num_kv_heads=4, head_dim=32, context_length=64, qk_norm=True)
for name, quantization in (("float", None), ("int8", Quantization(8)), ("int4", Quantization(4, 32, embedding=8))):
    mesh, rules = make_mesh({"data": 2, "tensor": 4}), ShardingRules()
    weights = init_weights(config, jax.random.key(0), mesh=mesh, rules=rules, quantization=quantization)
    model = Model(config, weights, mesh, rules)
    folder = f"{os.environ['FOLDER']}/{name}"
    model.save(folder)
    again = load_model(folder, make_mesh({"tensor": 8}))
    for key, array in named_leaves(weights).items():
        np.testing.assert_array_equal(named_leaves(again.weights)[key], array, err_msg=key)
    assert len({shard.device for shard in again.weights.layers[0].attn.q_gamma.addressable_shards}) == 8
    print(repr(again))
"""


def test_weights_over_eight_devices_come_back(run_python: Callable[..., str], tmp_path: Path) -> None:
    printed = run_python(CHILD, devices=8, FOLDER=str(tmp_path))
    kinds = [line.partition("parameters, ")[2].partition(", XLA")[0] for line in printed.splitlines()]
    assert kinds == ["float32, 8 x cpu", "int8, float32, 8 x cpu", "int4-g32-embedding8, float32, 8 x cpu"]
