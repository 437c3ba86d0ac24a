"""The diagram of a model's weights: every array, each kind of layer once, and Mermaid that can be drawn."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from jllm_convert import convert
from jllm_convert.cli import cli
from jllm_convert.errors import ConversionError
from jllm_convert.inspection import diagram
from jllm_convert.sources.huggingface.config import read_hf_config

from .published_models import CONFIGS, LAYERS

Tensors = dict[str, np.ndarray]


def boxes(text: str) -> dict[str, list[str]]:
    """The lines of each box, by its name."""
    return {name: label.split("<br/>") for name, label in re.findall(r'^  (\w+)\["(.*)"\]$', text, flags=re.M)}


def arrows(text: str) -> list[tuple[str, str, str]]:
    return re.findall(r'^  (\w+) -->\|"(.*)"\| (\w+)$', text, flags=re.M)


def drawn(text: str) -> str:
    """The picture as SVG; an error where Mermaid does not take the text."""
    mermaidx = pytest.importorskip("mermaidx")
    return str(mermaidx.render(text).svg())


@pytest.fixture
def config_file(tmp_path: Path, tiny_config: Callable[..., Mapping[str, Any]]) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(model_type="qwen3", torch_dtype="bfloat16")))
    return tmp_path / "config.json"


def test_each_array_has_its_type_its_shape_and_what_splits_it(config_file: Path) -> None:
    text = diagram(config_file)
    weights, layer, mlp, attn = (boxes(text)[f"weights{name}"] for name in ("", "_0", "_0_ffw", "_0_attn"))
    assert weights == [
        "<b>Weights</b>",
        "embedding: bfloat16 [vocab 11 /tensor, model 16]",
        "gamma_final: bfloat16 [model 16]",
        "lm_head: bfloat16 [model 16, vocab 11 /tensor]",
    ]
    assert layer == ["<b>Layer</b>", *(f"attn_{name}_gamma: bfloat16 [model 16]" for name in ("pre", "post"))]
    assert mlp[1] == "w_gate: bfloat16 [model 16, ffw 20 /tensor]"
    assert attn[:2] == ["<b>AttentionLayer</b>", "q: bfloat16 [model 16, heads 4 /tensor, head_dim 6]"]
    assert attn[-1] == "k_gamma: bfloat16 [head_dim 6]"
    assert arrows(text) == [
        ("weights_0", "ffw", "weights_0_ffw"),
        ("weights_0", "attn", "weights_0_attn"),
        ("weights", "2 x: layers 0-1", "weights_0"),
    ]


def test_a_hybrid_has_both_kinds_of_layers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["qwen3_5_moe"]))
    text = diagram(tmp_path)  # a folder with nothing else
    assert LAYERS == ("linear_attention", "full_attention", "linear_attention")
    assert [label for _, label, _ in arrows(text) if " x: " in label] == ["2 x: layers 0, 2", "1 x: layers 1"]
    assert boxes(text)["weights_0_attn"][0] == "<b>DeltaNetLayer</b>"
    assert boxes(text)["weights_1_attn"][0] == "<b>AttentionLayer</b>"
    assert "we_gate: float32 [experts 3 /expert, model 32, ffw 24 /tensor]" in boxes(text)["weights_0_ffw"]
    assert boxes(text)["weights_0_ffw_shared"][0] == "<b>MLPLayer</b>"


def test_folders_gguf_files_and_checkpoints_are_drawn_as_they_are_stored(
    tmp_path: Path, tiny_config: Any, hf_tensors: Any, write_hf: Any, request: pytest.FixtureRequest
) -> None:
    config = tiny_config(hidden_size=32, intermediate_size=32, head_dim=8)
    folder = write_hf(tmp_path / "folder", config, hf_tensors(config))
    plain = diagram(folder)
    assert "q: float32 [model 32, heads 4 /tensor, head_dim 8]" in boxes(plain)["weights_0_attn"]
    metadata, rename, write = (request.getfixturevalue(f"{n}") for n in ("gguf_metadata", "gguf_tensors", "write_gguf"))
    assert diagram(write(tmp_path / "a.gguf", metadata(config), rename(config, hf_tensors(config)))) == plain
    assert diagram(convert(folder, tmp_path / "plain").path) == plain
    quantized = diagram(convert(folder, tmp_path / "int8", quantize="int8").path)
    scales = "int8 [model 32, heads 4 /tensor, head_dim 8] with scales float32 [1, 4, 8]"
    assert f"q: {scales}" in boxes(quantized)["weights_0_attn"]


@pytest.mark.parametrize("model_type", ["qwen3_5_moe", "qwen3_next", "qwen2_moe"])
def test_mermaid_draws_it(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[model_type]))
    text = diagram(tmp_path)
    picture = drawn(text)
    for lines in boxes(text).values():
        for line in lines:
            assert re.sub("<.*?>", "", line) in re.sub("<.*?>", "", picture)


def test_the_command_prints_it(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli(["inspect", str(config_file), "--diagram"], standalone_mode=False)
    assert capsys.readouterr().out == diagram(config_file) + "\n"
    with pytest.raises(click.UsageError, match="--diagram is a form of its own"):
        cli(["inspect", str(config_file), "--diagram", "--json"], standalone_mode=False)


def test_a_config_of_ours_is_drawn_alone_and_in_its_checkpoint(config_file: Path, tmp_path: Path) -> None:
    config = read_hf_config(json.loads(config_file.read_text()), "config.json")
    (tmp_path / "model.json").write_text(config.to_json())
    assert diagram(tmp_path / "model.json").count("[") == diagram(config_file).count("[")


def test_what_has_no_config_is_refused(tmp_path: Path, config_file: Path) -> None:
    # No name on the hub is taken, and none is asked for.
    with pytest.raises(ConversionError, match=r"there is nothing at .*; expected a Hugging Face folder, a config.json"):
        diagram(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match=r"there is no config.json in .*empty"):
        diagram(tmp_path / "empty")
    with pytest.raises(ConversionError, match=r"there is no other.json in"):
        diagram(tmp_path / "other.json")
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "model_type": "gpt2"}))
    with pytest.raises(ConversionError, match="gpt2"):
        diagram(config_file)
