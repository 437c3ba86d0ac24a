"""The real model changed, saved, verified, exported and run again, by the library and the commands."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from jllm_convert import convert
from jllm_runtime import SamplingParams, load_chat_model, load_model

QUESTION = "What is the capital of France?"


def test_a_changed_model_goes_through_the_commands(run, smollm2_folder: Path, tmp_path: Path) -> None:
    model = load_chat_model(smollm2_folder)
    # As after a step of training: every number a little larger. RMSNorm takes most of it away, so the answer stays.
    changed = dataclasses.replace(model, weights=jax.tree.map(lambda array: array * 1.001, model.weights))
    changed.save(tmp_path / "changed")
    verified = run("jllm-convert", "verify", tmp_path / "changed", "--json")
    assert verified.returncode == 0, verified.stderr
    assert (json.loads(verified.stdout)["ok"], json.loads(verified.stdout)["arrays"]) == (True, 272)
    assert run("jllm-convert", "verify", tmp_path / "changed", "--against", smollm2_folder).returncode != 0
    assert run("jllm-convert", "export", tmp_path / "changed", tmp_path / "hf").returncode == 0
    assert run("jllm-convert", "convert", tmp_path / "hf", tmp_path / "again").returncode == 0
    answer = run("jllm", "generate", tmp_path / "again", "--prompt", QUESTION, "--temperature", 0)
    assert answer.stdout == "The capital of France is Paris.\n", answer.stderr
    again = load_model(tmp_path / "again")
    for saved, loaded in zip(jax.tree.leaves(changed.weights), jax.tree.leaves(again.weights), strict=True):
        np.testing.assert_array_equal(saved, loaded)


def test_a_quantised_model_is_saved_as_it_is(run, smollm2_gguf: Path, tmp_path: Path) -> None:
    convert(smollm2_gguf, tmp_path / "first", quantize="int4")
    model = load_chat_model(tmp_path / "first")
    model.save(tmp_path / "second")
    first, second = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("first", "second"))
    assert second["arrays"] == first["arrays"]  # hashes and all
    assert second["quantization"] == first["quantization"]
    assert run("jllm-convert", "verify", tmp_path / "second").returncode == 0
    assert run("jllm-convert", "export", tmp_path / "second", tmp_path / "hf").returncode == 0
    assert (
        load_chat_model(tmp_path / "second").chat(QUESTION, SamplingParams()).text == "The capital of France is Paris."
    )
