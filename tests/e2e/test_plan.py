"""`jllm plan` of the real model: it says of a GGUF file what `jllm generate` then loads, and makes nothing."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import jax
from jllm_convert import convert
from jllm_convert.quality.storage_choice import storage_of
from jllm_convert.sources.opening import open_source
from jllm_runtime import load_model, make_mesh

Run = Callable[..., CompletedProcess]


def planned(run: Run, model: Path, *options: str) -> dict:
    result = run("jllm", "plan", model, "--topology", "2xT4", "--mesh", "data=2", "--json", *options)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_gguf_file_is_planned_as_it_will_be_loaded(run: Run, smollm2_gguf: Path, tmp_path: Path) -> None:
    plan = planned(run, smollm2_gguf)
    storage = storage_of(open_source(smollm2_gguf))
    made = convert(smollm2_gguf, tmp_path / "made", storage.dtype, storage.quantize, embedding=storage.embedding).path
    loaded = load_model(made, make_mesh({}, jax.devices()[:1]))
    assert plan["per_device"]["weights_bytes"] == sum(array.nbytes for array in jax.tree.leaves(loaded.weights))
    assert plan["quantize"].startswith("int4-g32-offsets")
    assert "weights in Q4_1" in plan["assumed"]["types"]
    # And so is the checkpoint that came of it.
    assert planned(run, made)["per_device"] == plan["per_device"]


def test_nothing_is_converted_to_plan_it(run: Run, smollm2_gguf: Path, cache_folder: Path) -> None:
    before = sorted(os.listdir(cache_folder / "converted")) if (cache_folder / "converted").exists() else []
    planned(run, smollm2_gguf)
    after = sorted(os.listdir(cache_folder / "converted")) if (cache_folder / "converted").exists() else []
    assert after == before


def test_the_real_model_runs_on_devices_of_the_cpu(run: Run, smollm2_folder: Path) -> None:
    """`--devices` in place of XLA_FLAGS, which the runs of these tests set to one device."""
    prompt = ("--prompt", "What is the capital of France?", "--max-tokens", "8", "--json")
    refused = run("jllm", "generate", smollm2_folder, *prompt, "--mesh", "data=2,tensor=2")
    assert refused.returncode == 2
    assert "needs 4 devices, there are 1 (cpu)" in refused.stderr
    assert "--devices 4" in refused.stderr
    answered = run("jllm", "generate", smollm2_folder, *prompt, "--mesh", "data=2,tensor=2", "--devices", 4)
    assert answered.returncode == 0, answered.stderr
    assert "Paris" in json.loads(answered.stdout)["text"]
