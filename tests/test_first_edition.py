"""Checkpoints that jllm-convert 0.1 wrote, before the rebuild of the packages: they load, and say what they said then.

``data/first_edition.zip`` holds a tiny Qwen3 of random weights, in float32 and in int4 with an int8 embedding, and
what the code of that day gave for a prompt.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jllm_convert import inspect, verify
from jllm_runtime import SamplingParams, generate, load_model, make_mesh

STORED = Path(__file__).parent / "data" / "first_edition.zip"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first_edition")
    with zipfile.ZipFile(STORED) as stored:
        stored.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> Any:
    return json.loads((folder / "expected.json").read_text())


@pytest.mark.parametrize("name", ["float32", "int4"])
def test_it_says_what_it_said(name: str, folder: Path, expected: Any) -> None:
    model = load_model(folder / name, mesh=make_mesh(devices=jax.devices()[:1]))
    logits = np.asarray(model.logits([expected["prompt"]]))[0, -1]
    np.testing.assert_allclose(logits, expected[name]["logits"], atol=1e-5)
    (output,) = generate(model, expected["prompt"], SamplingParams(max_tokens=8, ignore_eos=True))
    assert output.token_ids == expected[name]["tokens"]


@pytest.mark.parametrize("name", ["float32", "int4"])
def test_it_is_whole(name: str, folder: Path) -> None:
    assert verify(folder / name).ok
    assert inspect(folder / name).kind == "checkpoint"
