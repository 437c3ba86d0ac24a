"""Whatever is wrong, a command says so in a sentence, leaves with 2 and leaves nothing behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    """A tiny Llama in two shards, as transformers saves it; the tests break it one way or another."""
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes = {"model.embed_tokens.weight": (64, 16), "model.norm.weight": (16,)}
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{name}.weight": (16,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (16, 16) for name in "qo"}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (8, 16) for name in "kv"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (24, 16) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (16, 24)
    random = np.random.default_rng(0)
    tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def cut_short(folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def lose_a_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def change_tensors(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = {}
        for shard in folder.glob("*.safetensors"):
            tensors |= load_file(shard)
            shard.unlink()
        (folder / "model.safetensors.index.json").unlink()
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def change_config(**fields: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps({**CONFIG, **fields}))

    return apply


def add_a_tensor(tensors: dict) -> None:
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(4, np.float32)


def change_a_shape(tensors: dict) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = np.ones((23, 16), np.float32)


BROKEN = {
    "truncated file": (cut_short, ["model-00002-of-00002.safetensors", "cut short"]),
    "missing shard": (lose_a_shard, ["model-00002-of-00002.safetensors", "is missing"]),
    "extra tensor": (change_tensors(add_a_tensor), ["model.layers.0.self_attn.q_norm.weight", "not part of"]),
    "wrong shape": (change_tensors(change_a_shape), ["mlp.up_proj.weight", "[23, 16]", "[24, 16]"]),
    "unsupported model_type": (
        change_config(model_type="mamba"),
        ["'mamba'", "llama, mistral, qwen2, qwen2_moe, qwen3, qwen3_5"],
    ),
    "unsupported rope type": (
        change_config(rope_scaling={"rope_type": "longrope", "factor": 2.0}),
        ["'longrope'", "llama3"],
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_convert_refuses(run, hf_folder, tmp_path, what):
    break_it, expected = BROKEN[what]
    break_it(hf_folder)
    result = run("jllm-convert", "convert", hf_folder, tmp_path / "out")
    check(result, *expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_convert_takes_what_the_tests_above_break(run, hf_folder, tmp_path):
    result = run("jllm-convert", "convert", hf_folder, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "token ids only" in result.stderr
    again = run("jllm-convert", "convert", hf_folder, tmp_path / "out")
    check(again, "exists", "--overwrite")
    assert run("jllm-convert", "convert", hf_folder, tmp_path / "out", "--overwrite").returncode == 0


def test_convert_reports_all_problems_at_once(run, hf_folder, tmp_path):
    def break_both(tensors: dict) -> None:
        add_a_tensor(tensors)
        change_a_shape(tensors)

    change_tensors(break_both)(hf_folder)
    check(run("jllm-convert", "convert", hf_folder, tmp_path / "out"), "2 problems", "q_norm", "[23, 16]")


def test_no_such_source(run, tmp_path):
    check(run("jllm-convert", "convert", tmp_path / "nothing", tmp_path / "out"), "there is nothing at", "nothing")


def test_not_a_model_folder(run, tmp_path):
    (tmp_path / "empty").mkdir()
    check(run("jllm-convert", "convert", tmp_path / "empty", tmp_path / "out"), "no config.json")
    check(run("jllm", "generate", tmp_path / "empty", "--prompt", "Hi"), "no config.json")


def test_no_such_model(run, tmp_path):
    check(run("jllm", "generate", tmp_path / "nothing", "--prompt", "Hi"), "there is no model at", "nothing")


def test_a_prompt_longer_than_the_context(run, smollm2_folder):
    result = run("jllm", "generate", smollm2_folder, "--raw", "--prompt", "word " * 9000)
    check(result, "the context of the model is 8192")


def test_a_negative_temperature(run, smollm2_folder):
    result = run("jllm", "generate", smollm2_folder, "--prompt", "Hi", "--temperature", "-0.5")
    check(result, "temperature must be 0 or above, got -0.5")


def test_an_empty_prompt_file(run, smollm2_folder, tmp_path):
    (tmp_path / "empty.txt").touch()
    result = run("jllm", "generate", smollm2_folder, "--prompt-file", tmp_path / "empty.txt")
    check(result, "empty.txt", "is empty")


def test_no_prompt_at_all(run, smollm2_folder):
    check(run("jllm", "generate", smollm2_folder), "the prompt from standard input is empty")


def test_a_damaged_checkpoint(run, smollm2_folder, tmp_path):
    """One flipped bit among 540 MB."""
    copy = tmp_path / "copy"
    shutil.copytree(smollm2_folder, copy)
    chunk = next((copy / "weights" / "layers.3.ffw.w_up").glob("c.*"))
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 4
    chunk.write_bytes(data)
    check(run("jllm", "generate", copy, "--prompt", "Hi"), "layers.3.ffw.w_up")


def check(result, *parts: str) -> None:
    """A clear message on standard error and exit code 2, no traceback, nothing on standard output."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    for part in parts:
        assert part in result.stderr
