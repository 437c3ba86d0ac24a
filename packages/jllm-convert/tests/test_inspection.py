"""Inspections of folders, GGUF files and checkpoints: whole, broken, of families that are not known."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from jllm_convert import convert
from jllm_convert.errors import ConversionError
from jllm_convert.inspection import Inspection, inspect
from jllm_core import checkpoint
from safetensors.numpy import save_file

Tensors = dict[str, np.ndarray]
Write = Callable[..., Path]
TinyConfig = Callable[..., dict[str, Any]]
HfTensors = Callable[..., Tensors]

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
TOKENIZER = {
    "tokenizer": {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
        "added_tokens": [{"id": 2, "content": "ab"}, {"id": 3, "content": "<end>"}],
    },
    "tokenizer_config": {"chat_template": "{{ messages }}"},
}
# Parameters of TINY_LLAMA: q and o 24 x 16 each, k and v 12 x 16 each, the MLP 3 x 20 x 16, two norms of 16.
LAYER_PARAMETERS = 2 * 24 * 16 + 2 * 12 * 16 + 3 * 20 * 16 + 2 * 16
OUTSIDE_PARAMETERS = 2 * 11 * 16 + 16


@pytest.fixture
def tensors(tiny_config: TinyConfig, hf_tensors: HfTensors) -> Tensors:
    return hf_tensors(tiny_config())


@pytest.fixture
def whole(tmp_path: Path, write_hf: Write, tiny_config: TinyConfig, tensors: Tensors) -> Path:
    return write_hf(tmp_path / "whole", tiny_config(), tensors, **TOKENIZER)


@pytest.fixture
def sharded(tmp_path: Path, write_hf: Write, tiny_config: TinyConfig, tensors: Tensors) -> Path:
    names = sorted(tensors)
    shards = {FIRST: {n: tensors[n] for n in names[:9]}, SECOND: {n: tensors[n] for n in names[9:]}}
    return write_hf(tmp_path / "sharded", tiny_config(), shards=shards)


@pytest.fixture
def write_tiny_gguf(
    tmp_path: Path,
    tiny_config: TinyConfig,
    hf_tensors: HfTensors,
    gguf_metadata: Callable[..., dict[str, Any]],
    gguf_tensors: Callable[..., Tensors],
    write_gguf: Write,
) -> Write:
    """Writes a GGUF file whose rows are of 32 and 64, since it quantises blocks of 32."""
    config = tiny_config(hidden_size=32, intermediate_size=64, head_dim=8, tie_word_embeddings=True)

    def write(**how: Any) -> Path:
        tensors = gguf_tensors(config, hf_tensors(config))
        return write_gguf(tmp_path / "tiny.gguf", gguf_metadata(config), tensors, **how)

    return write


def write_mixture(
    folder: Path, write_hf: Write, tiny_config: TinyConfig, hf_tensors: HfTensors, **changes: Any
) -> Path:
    """A qwen3_moe with a plain layer, then two of three experts of width 4."""
    config = tiny_config(model_type="qwen3", num_hidden_layers=3)
    tensors = hf_tensors(config)
    for i in (1, 2):
        for n, shape in (("gate", (4, 16)), ("up", (4, 16)), ("down", (16, 4))):
            del tensors[f"model.layers.{i}.mlp.{n}_proj.weight"]
            for e in range(3):
                tensors[f"model.layers.{i}.mlp.experts.{e}.{n}_proj.weight"] = np.ones(shape, np.float32)
        tensors[f"model.layers.{i}.mlp.gate.weight"] = np.ones((3, 16), np.float32)
    config |= {"model_type": "qwen3_moe", "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 4}
    return write_hf(folder, config | {"norm_topk_prob": True, "mlp_only_layers": [0]} | changes, tensors)


def json_of(inspection: Inspection) -> dict[str, Any]:
    """The dictionary, which must be what JSON gives back."""
    fields = inspection.as_dict()
    assert json.loads(json.dumps(fields)) == fields
    return fields


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what the header of a safetensors file says, and leave the data as they are."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    changed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + data[8 + length :])


# ---- Hugging Face folders


def test_a_folder_is_told_in_numbers(whole: Path, tensors: Tensors) -> None:
    found = inspect(whole)
    assert (found.kind, found.family, found.supported, found.ok, found.problems) == ("hf", "llama", True, True, ())
    assert found.config is not None
    assert found.config.num_layers == 2
    assert {tensor.name: tensor.shape for tensor in found.tensors} == {n: t.shape for n, t in tensors.items()}
    assert {tensor.dtype for tensor in found.tensors} == {"F32"}
    assert found.parameters == sum(tensor.size for tensor in tensors.values())
    assert found.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    size = (whole / "model.safetensors").stat().st_size
    assert found.bytes_on_disk == size > found.nbytes
    assert [(shard.name, shard.nbytes, shard.tensors) for shard in found.shards] == [("model.safetensors", size, 21)]
    assert (found.quantization, found.receipt) == (None, None)


def test_layers_are_summed_up_each(whole: Path) -> None:
    found = inspect(whole)
    assert [(layer.stack, layer.layer, layer.tensors) for layer in found.layers] == [
        ("model.layers", 0, 9),
        ("model.layers", 1, 9),
    ]
    assert {(layer.parameters, layer.nbytes) for layer in found.layers} == {(LAYER_PARAMETERS, 4 * LAYER_PARAMETERS)}
    outside = found.outside_layers
    assert (outside.tensors, outside.parameters, outside.nbytes) == (3, OUTSIDE_PARAMETERS, 4 * OUTSIDE_PARAMETERS)


def test_shards_are_listed_each(sharded: Path, tensors: Tensors) -> None:
    found = inspect(sharded)
    assert found.problems == ()
    assert [(shard.name, shard.tensors) for shard in found.shards] == [(FIRST, 9), (SECOND, 12)]
    assert {tensor.file for tensor in found.tensors} == {FIRST, SECOND}
    assert len(found.tensors) == len(tensors)


def test_element_types_are_counted_most_bytes_first(whole: Path, tensors: Tensors) -> None:
    stored = {
        name: tensor.astype(np.float32 if tensor.ndim == 1 else ml_dtypes.bfloat16) for name, tensor in tensors.items()
    }
    save_file(stored, whole / "model.safetensors")
    norms = 5 * 16
    matrices = 2 * LAYER_PARAMETERS + OUTSIDE_PARAMETERS - norms
    assert [(each.dtype, each.tensors, each.parameters, each.nbytes) for each in inspect(whole).dtypes] == [
        ("BF16", 16, matrices, 2 * matrices),
        ("F32", 5, norms, 4 * norms),
    ]


def test_a_mixture_is_told_layer_by_layer(
    tmp_path: Path, write_hf: Write, tiny_config: TinyConfig, hf_tensors: HfTensors
) -> None:
    found = inspect(write_mixture(tmp_path / "moe", write_hf, tiny_config, hf_tensors))
    assert found.problems == ()
    layers = json_of(found)["layers"]
    mixture = {"kind": "moe", "width": 4, "experts": 3, "experts_per_token": 2, "shared": None}
    assert [layer["ffw"] for layer in layers] == [
        {"kind": "mlp", "width": 20, "experts": None, "experts_per_token": None, "shared": None},
        mixture,
        mixture,
    ]
    assert [layer["tensors"] for layer in layers] == [11, 18, 18]
    assert [layer["layer"] for layer in layers] == [0, 1, 2]
    rows = [line for line in str(found).splitlines() if "heads" in line]
    assert [line.split()[0] for line in rows] == ["0", "1-2"]
    assert rows[1].endswith("moe 3 experts of 4, 2 a token")


def test_windows_and_rotation_are_told_layer_by_layer(
    tmp_path: Path, write_hf: Write, tiny_config: TinyConfig, hf_tensors: HfTensors
) -> None:
    tensors = hf_tensors(tiny_config(num_hidden_layers=4))
    config = tiny_config(model_type="smollm3", num_hidden_layers=4, no_rope_layers=[1, 1, 0, 1])
    found = inspect(write_hf(tmp_path / "s", config | {"use_sliding_window": True, "sliding_window": 5}, tensors))
    assert found.problems == ()
    attention = [layer["attention"] for layer in json_of(found)["layers"]]
    assert [(each["window"], each["rope"]) for each in attention] == [
        (None, True),
        (None, True),
        (5, False),
        (None, True),
    ]
    assert attention[0] == {"heads": 4, "kv_heads": 2, "head_dim": 6, "window": None, "rope": True}
    rows = [line for line in str(found).splitlines() if "kv heads" in line]
    assert [line.split()[0] for line in rows] == ["0-1", "2", "3"]
    assert "4 heads, 2 kv heads of 6, window 5, no rope" in rows[1]


def test_only_neighbours_share_a_row(whole: Path, tensors: Tensors) -> None:
    far = {n.replace("layers.1.", "layers.3."): t for n, t in tensors.items() if "layers.1." in n}
    save_file(tensors | far, whole / "model.safetensors")
    (whole / "config.json").write_text("{}")
    rows = [line.split()[0] for line in str(inspect(whole)).splitlines() if f"{LAYER_PARAMETERS:,}" in line]
    assert rows == ["0-1", "3"]


def test_the_config_describes_its_own_layers_only(whole: Path, tensors: Tensors) -> None:
    others = {"model.layers.2.x": np.ones(1, np.float32), "vision.layers.0.x": np.ones(1, np.float32)}
    save_file(tensors | others, whole / "model.safetensors")
    found = inspect(whole)
    assert [
        (layer.stack, layer.layer, layer.attention is not None, layer.ffw is not None) for layer in found.layers
    ] == [
        ("model.layers", 0, True, True),
        ("model.layers", 1, True, True),
        ("model.layers", 2, False, False),
        ("vision.layers", 0, False, False),
    ]
    assert len(found.problems) == 2


# ---- Tokenizers and origins


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (TOKENIZER, {"present": True, "vocabulary": 4, "chat_template": True}),
        ({"tokenizer": TOKENIZER["tokenizer"]}, {"present": True, "vocabulary": 4, "chat_template": False}),
        (
            {"tokenizer": {"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}}},
            {"present": True, "vocabulary": 2, "chat_template": False},
        ),
        ({"tokenizer_config": {"chat_template": ""}}, {"present": False, "vocabulary": None, "chat_template": False}),
        ({}, {"present": False, "vocabulary": None, "chat_template": False}),
    ],
)
def test_the_tokenizer_is_told(
    tmp_path: Path, write_hf: Write, tiny_config: TinyConfig, tensors: Tensors, files: Any, expected: Any
) -> None:
    found = inspect(write_hf(tmp_path / "m", tiny_config(), tensors, **files))
    assert found.problems == ()
    assert json_of(found)["tokenizer"] == expected


def test_a_chat_template_may_be_a_file_of_its_own(whole: Path) -> None:
    (whole / "tokenizer_config.json").write_text("{}")
    assert not inspect(whole).tokenizer.chat_template
    (whole / "chat_template.jinja").write_text("{{ messages }}")
    assert inspect(whole).tokenizer.chat_template


def test_a_named_chat_template_may_be_the_only_one(whole: Path, write_tiny_gguf: Write) -> None:
    (whole / "tokenizer_config.json").write_text("{}")
    (whole / "additional_chat_templates").mkdir()
    (whole / "additional_chat_templates" / "README.md").touch()
    assert not inspect(whole).tokenizer.chat_template
    (whole / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    assert inspect(whole).tokenizer.chat_template
    named = write_tiny_gguf(**{"tokenizer__chat_template.tool_use": "{{ messages }}"})
    assert inspect(named).tokenizer.chat_template


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model": {"vocab": 5}}', '{"model": {"vocab": [1]}}'])
def test_a_damaged_tokenizer_is_a_problem(whole: Path, content: str) -> None:
    (whole / "tokenizer.json").write_text(content)
    found = inspect(whole)
    (problem,) = found.problems
    assert "tokenizer.json" in problem
    assert (found.tokenizer.present, found.tokenizer.vocabulary) == (True, None)
    assert "? tokens" in str(found)


def test_a_tokenizer_too_large_to_look_at_is_no_problem(whole: Path) -> None:
    with (whole / "tokenizer.json").open("ab") as file:
        file.truncate(40 << 20)
    found = inspect(whole)
    assert (found.problems, found.tokenizer.present, found.tokenizer.vocabulary) == ((), True, None)


def test_what_a_download_records_is_told(whole: Path, tmp_path: Path) -> None:
    assert inspect(whole).source == {"name": None, "revision": None}
    commit = "0123456789abcdef0123456789abcdef01234567"
    record = {"repo": "Qwen/Qwen3-0.6B", "revision": commit}
    files = {"config.json": {"size": (whole / "config.json").stat().st_size}}
    (whole / "jllm-download.json").write_text(json.dumps(record | {"files": files}))
    assert inspect(whole).source == {"name": "Qwen/Qwen3-0.6B", "revision": commit}
    (whole / "jllm-download.json").unlink()
    cached = tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / commit
    cached.parent.mkdir(parents=True)
    whole.rename(cached)
    assert inspect(cached).source == {"name": "Qwen/Qwen3-0.6B", "revision": commit}


# ---- Folders that cannot be converted


def test_every_problem_of_the_tensors_is_told(whole: Path, tensors: Tensors) -> None:
    changed = tensors | {"extra.weight": np.ones(2, np.float32), "model.norm.weight": np.ones(5, np.float32)}
    del changed["lm_head.weight"]
    save_file(changed, whole / "model.safetensors")
    found = inspect(whole)
    assert found.config is not None
    assert not found.ok
    assert len(found.problems) == 3
    for name in ("extra.weight", "model.norm.weight", "lm_head.weight"):
        assert any(name in problem for problem in found.problems)


def test_an_unsupported_config_still_has_its_tensors_listed(whole: Path, tiny_config: TinyConfig) -> None:
    (whole / "config.json").write_text(json.dumps(tiny_config(hidden_act="gelu", logit_softcap=30)))
    found = inspect(whole)
    assert (found.family, found.supported, found.config) == ("llama", True, None)
    assert len(found.problems) == 2
    assert len(found.tensors) == 21
    assert [(layer.tensors, layer.attention, layer.ffw) for layer in found.layers] == [(9, None, None)] * 2
    assert "?" in str(found)


def test_an_unknown_family_still_has_its_tensors_listed(
    tmp_path: Path, write_hf: Write, tensors: Tensors, tiny_config: TinyConfig
) -> None:
    stacks = {
        "vision.encoder.layers.0.w": np.ones(3, np.float32),
        "text.h.0.w": np.ones(2, np.float32),
        "text.h.1.w": np.ones(2, np.float32),
        "text.ln_f.weight": np.ones(2, np.float32),
    }
    found = inspect(write_hf(tmp_path / "m", {"model_type": "two-towers", "hidden_size": "?"}, stacks))
    assert (found.family, found.supported, found.config) == ("two-towers", False, None)
    (problem,) = found.problems
    assert "model_type 'two-towers' is not supported" in problem
    assert [(layer.stack, layer.layer, layer.parameters) for layer in found.layers] == [
        ("text.h", 0, 2),
        ("text.h", 1, 2),
        ("vision.encoder.layers", 0, 3),
    ]
    assert found.outside_layers.parameters == 2
    text = str(found)
    assert "two-towers (not supported)" in text
    assert "text.h.0-1" in text


@pytest.mark.parametrize("content", ["{", "[1]", "5", ""])
def test_a_damaged_config_still_has_its_tensors_listed(whole: Path, content: str) -> None:
    (whole / "config.json").write_text(content)
    found = inspect(whole)
    assert (found.family, found.supported, found.config, len(found.tensors)) == (None, False, None, 21)
    (problem,) = found.problems
    assert "config.json" in problem
    assert "family      unknown" in str(found)


def test_a_missing_config_still_has_its_tensors_listed(whole: Path) -> None:
    (whole / "config.json").unlink()
    found = inspect(whole)
    assert len(found.tensors) == 21
    assert any("config.json" in problem for problem in found.problems)


def test_a_missing_shard_is_told_and_the_others_are_listed(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    found = inspect(sharded)
    assert found.config is not None
    assert [(shard.name, shard.nbytes is None, shard.tensors) for shard in found.shards] == [
        (FIRST, False, 9),
        (SECOND, True, None),
    ]
    assert len(found.tensors) == 9
    assert all(SECOND in problem for problem in found.problems)
    assert len(found.problems) == 1
    assert f"{SECOND}           missing" in str(found)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 10**15)])
def test_a_shard_that_is_no_safetensors_file_is_told_and_the_others_are_listed(sharded: Path, content: bytes) -> None:
    (sharded / SECOND).write_bytes(content)
    found = inspect(sharded)
    assert [(shard.name, shard.tensors) for shard in found.shards] == [(FIRST, 9), (SECOND, None)]
    assert found.shards[1].nbytes == len(content)
    assert any(problem.startswith(f"{SECOND}: ") for problem in found.problems)
    assert "unreadable" in str(found)


def test_a_shard_that_is_cut_short_still_has_its_tensors_listed(sharded: Path) -> None:
    data = (sharded / SECOND).read_bytes()
    (sharded / SECOND).write_bytes(data[:-1])
    found = inspect(sharded)
    assert len(found.tensors) == 21
    assert any(problem.startswith(f"{SECOND}: ") for problem in found.problems)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        5,
        {},
        {"dtype": "F32", "shape": [16], "data_offsets": [0]},
        {"dtype": "F32", "shape": [16], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [16], "data_offsets": [0, "x"]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 64]},
        {"dtype": "F32", "shape": 16, "data_offsets": [0, 64]},
        {"dtype": ["F32"], "shape": [16], "data_offsets": [0, 64]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 64]},
    ],
)
def test_a_header_that_makes_no_sense_is_told(whole: Path, entry: Any) -> None:
    rewrite_header(whole / "model.safetensors", lambda header: header.update({"model.norm.weight": entry}))
    found = inspect(whole)
    assert found.problems != ()
    assert all(problem.startswith("model.safetensors: ") for problem in found.problems)
    json_of(found)


def test_types_that_cannot_be_weights_are_listed_all_the_same(whole: Path, tensors: Tensors) -> None:
    save_file(tensors | {"model.norm.weight": np.ones(16, np.int64)}, whole / "model.safetensors")
    found = inspect(whole)
    (problem,) = found.problems
    assert "I64" in problem
    assert ("I64", 1, 16, 128) in [(each.dtype, each.tensors, each.parameters, each.nbytes) for each in found.dtypes]


def test_a_folder_of_pickled_weights_is_told(whole: Path) -> None:
    (whole / "model.safetensors").rename(whole / "pytorch_model.bin")
    found = inspect(whole)
    (problem,) = found.problems
    assert "pytorch_model.bin" in problem
    assert (found.tensors, found.shards, found.layers, found.parameters) == ((), (), (), 0)
    assert found.config is not None
    assert "size        0 bytes" in str(found)


def test_an_index_that_points_outside_of_the_folder_is_not_followed(sharded: Path, tensors: Tensors) -> None:
    save_file({"secret": np.ones(1, np.float32)}, sharded.parent / "secret.safetensors")
    index = sharded / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"]["secret"] = "../secret.safetensors"
    index.write_text(json.dumps(fields))
    found = inspect(sharded)
    assert not any(tensor.name == "secret" for tensor in found.tensors)
    assert any("'../secret.safetensors'" in problem for problem in found.problems)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 5}', '{"weight_map": {"x": 5}}'])
def test_a_damaged_index_still_has_the_files_listed(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    found = inspect(sharded)
    assert [shard.tensors for shard in found.shards] == [9, 12]
    assert any("index" in problem for problem in found.problems)


def test_a_tied_model_with_another_head_is_a_problem(whole: Path, tiny_config: TinyConfig) -> None:
    (whole / "config.json").write_text(json.dumps(tiny_config(tie_word_embeddings=True)))
    (problem,) = inspect(whole).problems
    assert "lm_head.weight" in problem


# ---- GGUF files


def test_a_gguf_file_is_told_in_numbers(write_tiny_gguf: Write) -> None:
    path = write_tiny_gguf(
        types={"blk.1.ffn_up.weight": Kind.Q8_0, "blk.0.ffn_up.weight": Kind.Q4_1},
        general__name="Tiny",
        tokenizer__chat_template="{{ messages }}",
    )
    found = inspect(path)
    assert (found.kind, found.family, found.supported, found.problems) == ("gguf", "llama", True, ())
    assert found.config is not None
    assert found.config.hidden_size == 32
    sizes = {tensor.name: (tensor.dtype, tensor.shape, tensor.nbytes) for tensor in found.tensors}
    # 64 blocks of 32: 32 numbers and a scale of 2 bytes; 32 halves of a byte, a scale and an offset.
    assert sizes["blk.1.ffn_up.weight"] == ("Q8_0", (64, 32), 64 * 34)
    assert sizes["blk.0.ffn_up.weight"] == ("Q4_1", (64, 32), 64 * 20)
    assert sizes["blk.0.attn_k.weight"] == ("F32", (16, 32), 4 * 16 * 32)
    assert [(shard.name, shard.nbytes, shard.tensors) for shard in found.shards] == [
        ("tiny.gguf", path.stat().st_size, 20)
    ]
    assert [(layer.stack, layer.layer, layer.tensors) for layer in found.layers] == [("blk", 0, 9), ("blk", 1, 9)]
    assert found.layers[0].nbytes < found.layers[1].nbytes
    assert found.layers[0].parameters == found.layers[1].parameters
    assert (found.tokenizer.present, found.tokenizer.chat_template) == (False, True)
    assert found.source == {"name": "Tiny", "revision": None}
    assert "rows" not in str(found)
    assert [line.split()[0] for line in str(found).splitlines() if "kv heads" in line] == ["0", "1"]


def test_the_tokenizer_of_a_gguf_file_is_told(write_tiny_gguf: Write) -> None:
    vocabulary = {
        "tokenizer__ggml__model": "gpt2",
        "tokenizer__ggml__pre": "gpt-2",
        "tokenizer__ggml__tokens": ["a", "b", "ab", "<end>"],
        "tokenizer__ggml__token_type": [1, 1, 1, 3],
        "tokenizer__ggml__merges": ["a b"],
        "tokenizer__ggml__eos_token_id": 3,
    }
    found = inspect(write_tiny_gguf(**vocabulary))
    assert found.problems == ()
    assert (found.tokenizer.present, found.tokenizer.vocabulary) == (True, 4)


def test_a_tokenizer_that_cannot_be_rebuilt_is_a_problem(write_tiny_gguf: Write) -> None:
    found = inspect(write_tiny_gguf(tokenizer__ggml__model="unheard-of"))
    (problem,) = found.problems
    assert "unheard-of" in problem
    assert found.config is not None


def test_an_unknown_architecture_still_has_its_tensors_listed(write_tiny_gguf: Write) -> None:
    found = inspect(write_tiny_gguf(architecture="mamba"))
    assert (found.family, found.supported, found.config, len(found.tensors)) == ("mamba", False, None, 20)
    (problem,) = found.problems
    assert "architecture 'mamba' is not supported" in problem
    assert [layer.attention for layer in found.layers] == [None, None]


def test_a_gguf_file_of_another_config_still_has_its_tensors_listed(write_tiny_gguf: Write) -> None:
    found = inspect(write_tiny_gguf(llama__expert_count=8))
    assert (found.config, len(found.tensors)) == (None, 20)
    assert any("expert_count" in problem for problem in found.problems)


def test_one_part_of_several_is_a_problem(write_tiny_gguf: Write) -> None:
    found = inspect(write_tiny_gguf(split__count=3))
    assert len(found.tensors) == 20
    (problem,) = found.problems
    assert "one of 3 parts" in problem


def test_a_gguf_file_that_is_cut_short_cannot_be_read(write_tiny_gguf: Write) -> None:
    path = write_tiny_gguf()
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ConversionError, match=r"tiny\.gguf: tensor .* download it again"):
        inspect(path)


@pytest.mark.parametrize("keep", [0, 3, 8, 30, 200, 1000])
def test_a_gguf_file_whose_header_is_cut_short_cannot_be_read(write_tiny_gguf: Write, keep: int) -> None:
    path = write_tiny_gguf()
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConversionError, match=r"tiny\.gguf cannot be read as a GGUF file"):
        inspect(path)


@pytest.mark.parametrize(
    "content",
    [
        b"PK\x03\x04" * 100,
        b"GGUF" + struct.pack("<I", 1) + bytes(100),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63) + bytes(100),
        b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0) + bytes(8),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62) + bytes(100),
        b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 99) + bytes(100),
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 4, 2**62) + bytes(100),
        b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"a", 1, 4, 999, 0) + bytes(100),
    ],
)
def test_a_header_of_nonsense_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ConversionError, match=r"x\.gguf(: tensor 'a' is of type| cannot be read as a GGUF file)"):
        inspect(path)


# ---- Checkpoints


def test_a_checkpoint_is_told_in_numbers(whole: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    convert(whole, target, "bfloat16")
    found = inspect(target)
    assert (found.kind, found.family, found.supported, found.problems) == ("checkpoint", "llama", True, ())
    assert found.config == checkpoint.read_config(target)
    assert found.parameters == 2 * LAYER_PARAMETERS + OUTSIDE_PARAMETERS
    assert found.nbytes == 2 * found.parameters
    assert found.bytes_on_disk > found.nbytes
    assert [(shard.name, shard.tensors) for shard in found.shards] == [("weights", 21)]
    assert [(layer.layer, layer.parameters) for layer in found.layers] == [(0, LAYER_PARAMETERS), (1, LAYER_PARAMETERS)]
    assert found.layers[0].attention is not None
    assert found.source["name"] == "whole"
    assert (found.tokenizer.vocabulary, found.tokenizer.chat_template) == (4, True)


@pytest.mark.parametrize("embedding", [None, 8])
@pytest.mark.parametrize(("quantize", "group"), [("int8", None), ("int8", 32), ("int4", 32)])
def test_a_quantised_checkpoint_has_the_parameters_of_its_matrices(
    tmp_path: Path,
    write_hf: Write,
    tiny_config: TinyConfig,
    hf_tensors: HfTensors,
    quantize: str,
    group: int | None,
    embedding: int | None,
) -> None:
    config = tiny_config(hidden_size=32, intermediate_size=64, head_dim=32)
    tensors, target = hf_tensors(config), tmp_path / "out"
    rows = "int8" if embedding else "keep"
    convert(write_hf(tmp_path / "m", config, tensors), target, quantize=quantize, group=group, embedding=rows)
    found = inspect(target)
    assert found.problems == ()
    assert found.parameters == sum(tensor.size for tensor in tensors.values())
    assert found.quantization == checkpoint.read_manifest(target).quantization
    told = {"bits": int(quantize[3:]), "group": group, "offsets": False, "embedding": embedding}
    assert json_of(found)["quantization"] == told
    assert "quantized" in str(found)


def test_a_receipt_is_told(whole: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    convert(whole, target)
    manifest = json.loads((target / "manifest.json").read_text())
    manifest["receipt"] = {"kl_nats": 0.0123456, "top1_agreement": 0.75, "tokens": 500, "by_text": [1, 2]}
    (target / "manifest.json").write_text(json.dumps(manifest))
    found = inspect(target)
    assert json_of(found)["receipt"] == manifest["receipt"]
    assert "kl_nats 0.01235, top1_agreement 0.75, tokens 500" in str(found)


def changed_manifest(target: Path, change: Callable[[dict[str, Any]], None]) -> Inspection:
    manifest = json.loads((target / "manifest.json").read_text())
    change(manifest)
    (target / "manifest.json").write_text(json.dumps(manifest))
    return inspect(target)


def test_a_manifest_that_disagrees_with_the_config_is_told(whole: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    convert(whole, target)

    def change(manifest: dict[str, Any]) -> None:
        arrays = manifest["arrays"]
        arrays["layers.7.attn.q"] = {"shape": [2, 2], "dtype": "float32"}
        arrays["gamma_final"]["dtype"] = "bfloat16"
        del arrays["embedding"]

    found = changed_manifest(target, change)
    assert [problem.partition(":")[0] for problem in found.problems] == [
        "layers.7.attn.q",  # has no folder
        "embedding",
        "gamma_final",
        "layers.7.attn.q",
    ]


@pytest.mark.parametrize("entry", [{"shape": ["x"], "dtype": "float32"}, {"shape": [2], "dtype": "object"}])
def test_a_manifest_of_nonsense_is_told(whole: Path, tmp_path: Path, entry: Any) -> None:
    target = tmp_path / "out"
    convert(whole, target)
    found = changed_manifest(target, lambda manifest: manifest["arrays"].update(gamma_final=entry))
    assert any("gamma_final" in problem for problem in found.problems)
    json_of(found)


def test_a_damaged_checkpoint_is_told(whole: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    convert(whole, target)
    (target / "weights" / "embedding").rename(target / "elsewhere")
    found = inspect(target)
    assert found.problems == ("embedding: its folder weights/embedding is missing",)
    assert [shard.tensors for shard in found.shards] == [20]
    (target / "weights").rename(target / "elsewhere" / "weights")
    found = inspect(target)
    assert [(shard.nbytes, shard.tensors) for shard in found.shards] == [(None, None)]
    assert len(found.problems) == 1
    (target / "model.json").write_bytes(b"\xff")
    (target / "manifest.json").write_text("{")
    found = inspect(target)
    assert (found.config, found.family, found.tensors) == (None, None, ())
    assert len(found.problems) == 2
    json_of(found)
    assert "2 problems:" in str(found)


# ---- Files from anybody


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """A pipe that nobody writes to: whoever opens it the plain way waits for ever."""
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


NAMES = ("config.json", FIRST, "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("name", NAMES)
def test_pipes_are_not_waited_for(sharded: Path, pipe: Path, name: str) -> None:
    (sharded / name).unlink(missing_ok=True)
    pipe.rename(sharded / name)
    found = inspect(sharded)
    assert any(name in problem and "a pipe" in problem for problem in found.problems)
    json_of(found)


def test_a_record_of_a_download_that_is_a_pipe_is_not_waited_for(whole: Path, pipe: Path) -> None:
    pipe.rename(whole / "jllm-download.json")
    assert inspect(whole).source == {"name": None, "revision": None}


def test_a_gguf_file_that_is_a_pipe_is_refused(pipe: Path) -> None:
    path = pipe.rename(pipe.with_suffix(".gguf"))
    with pytest.raises(ConversionError, match="not a regular file"):
        inspect(path)


@pytest.mark.parametrize("name", NAMES)
def test_links_that_lead_out_of_the_folder_are_not_followed(sharded: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    if (sharded / name).exists():
        (sharded / name).rename(outside)
    else:
        outside.write_text(json.dumps(TOKENIZER["tokenizer"]))
    (sharded / name).symlink_to(outside)
    found = inspect(sharded)
    assert any(name in problem and "a link that leads out" in problem for problem in found.problems)
    assert (found.tokenizer.vocabulary, found.tokenizer.chat_template) == (None, False)
    if name == FIRST:
        assert (found.shards[0].nbytes, found.shards[0].tensors) == (None, None)


@pytest.mark.parametrize("name", NAMES)
def test_deep_json_is_a_problem(sharded: Path, name: str) -> None:
    (sharded / name).write_text("[" * 90_000)
    found = inspect(sharded)
    assert any(name in problem for problem in found.problems)


@pytest.mark.parametrize("name", ["manifest.json", "model.json"])
@pytest.mark.parametrize("content", [b"\xff", b"[" * 200_000, b" " * (17 << 20)])
def test_a_checkpoint_of_nonsense_is_a_problem(whole: Path, tmp_path: Path, name: str, content: bytes) -> None:
    target = tmp_path / "out"
    convert(whole, target)
    (target / name).write_bytes(content)
    found = inspect(target)
    assert len(found.problems) == 1
    assert len(str(found)) < 5_000


@pytest.mark.parametrize("model_type", ["llama", "smollm3", "qwen2"])
def test_a_billion_layers_are_refused_at_once(whole: Path, tiny_config: TinyConfig, model_type: str) -> None:
    (whole / "config.json").write_text(json.dumps(tiny_config(model_type=model_type, num_hidden_layers=10**9)))
    problems = inspect(whole).problems
    assert any("num_hidden_layers must be at most 10,000, got 1,000,000,000" in problem for problem in problems)


def test_what_a_file_says_at_length_is_cut_in_the_text(whole: Path, tiny_config: TinyConfig) -> None:
    (whole / "config.json").write_text(json.dumps(tiny_config(model_type="x" * 100_000)))
    assert len(str(inspect(whole))) < 5_000


def test_an_index_of_many_missing_files_is_cut_in_the_text(sharded: Path) -> None:
    missing = {f"t{number}": f"{number}.safetensors" for number in range(1000)}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": missing}))
    found = inspect(sharded)
    assert len(found.shards) == 1000
    assert "and 980 more" in str(found)
    assert len(str(found).splitlines()) < 80


# ---- What is none of the three


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"there is nothing at .*nowhere"):
        inspect(tmp_path / "nowhere")
    with pytest.raises(ConversionError, match=r"holds no model: expected config\.json"):
        inspect(tmp_path)
    (tmp_path / "model.onnx").write_text("")
    with pytest.raises(ConversionError, match=r"neither a folder nor a \.gguf file"):
        inspect(tmp_path / "model.onnx")


# ---- JSON and text


def keys_of(value: Any, name: str = "") -> set[str]:
    """The dotted names of every key, ``[]`` for the entries of a list."""
    if isinstance(value, list):
        return set().union(*(keys_of(each, f"{name}[]") for each in value))
    if not isinstance(value, dict):
        return set()
    keys = {f"{name}.{key}".lstrip("."): each for key, each in value.items()}
    # The fields of these two belong to others.
    return set(keys).union(*(keys_of(each, key) for key, each in keys.items() if key not in ("config", "receipt")))


def test_the_keys_of_the_json_stay_as_they_are(
    tmp_path: Path, write_hf: Write, tiny_config: TinyConfig, hf_tensors: HfTensors
) -> None:
    config = tiny_config(hidden_size=32, intermediate_size=64)
    folder = write_hf(tmp_path / "m", config, hf_tensors(config), **TOKENIZER)
    of_source = {
        *("path", "kind", "family", "supported", "ok", "problems", "config", "parameters", "bytes", "bytes_on_disk"),
        *("source", "source.name", "source.revision"),
        *("dtypes", "dtypes[].dtype", "dtypes[].tensors", "dtypes[].parameters", "dtypes[].bytes"),
        *("shards", "shards[].name", "shards[].bytes", "shards[].tensors"),
        *("layers", *(f"layers[].{key}" for key in ("stack", "layer", "tensors", "parameters", "bytes"))),
        *("layers[].attention", *(f"layers[].attention.{key}" for key in ("heads", "kv_heads", "head_dim"))),
        *("layers[].attention.window", "layers[].attention.rope"),
        *(
            "layers[].ffw",
            *(f"layers[].ffw.{key}" for key in ("kind", "width", "experts", "experts_per_token", "shared")),
        ),
        *("outside_layers", *(f"outside_layers.{key}" for key in ("stack", "layer", "tensors", "parameters"))),
        *("outside_layers.bytes", "outside_layers.attention", "outside_layers.ffw"),
        *("tensors", *(f"tensors[].{key}" for key in ("name", "shape", "dtype", "parameters", "bytes", "file"))),
        *("tokenizer", "tokenizer.present", "tokenizer.vocabulary", "tokenizer.chat_template"),
        *("quantization", "receipt", "left_out"),
    }
    assert keys_of(json_of(inspect(folder))) == of_source
    (folder / "tokenizer.json").unlink()  # a receipt needs a whole one
    convert(folder, tmp_path / "out", quantize="int8")
    of_checkpoint = of_source - {"source.revision"}
    of_checkpoint |= {"quantization.bits", "quantization.group", "quantization.offsets", "quantization.embedding"}
    of_checkpoint |= {"source.kind", "source.dtype", "source.fingerprint"}
    assert keys_of(json_of(inspect(tmp_path / "out"))) == of_checkpoint


def test_the_text_is_a_few_tables(whole: Path) -> None:
    text = inspect(whole).text()
    size = (whole / "model.safetensors").stat().st_size
    assert text == str(inspect(whole))
    assert text == "\n".join(
        (
            "whole (Hugging Face folder)",
            "family      llama (supported)",
            "model       2 layers, 16 wide, 11 tokens, context 64",
            "parameters  4,656",
            f"size        {size / 1000:.1f} kB",
            "tokenizer   4 tokens, chat template",
            "",
            "stored as  tensors  parameters     size",
            "F32             21       4,656  18.6 kB",
            "",
            "file               tensors     size",
            f"model.safetensors       21  {size / 1000:.1f} kB",
            "",
            "layers   tensors each  parameters each  size each  attention                 feed-forward",
            "0-1                 9            2,144     8.6 kB  4 heads, 2 kv heads of 6  mlp 20",
            "outside             3              368     1.5 kB",
            "",
            "No problems: it can be converted.",
        )
    )


def test_the_text_can_list_every_tensor(whole: Path) -> None:
    lines = inspect(whole).text(tensors=True).splitlines()
    (row,) = (line for line in lines if line.startswith("model.layers.0.mlp.down_proj.weight"))
    assert row.split() == ["model.layers.0.mlp.down_proj.weight", "16x20", "F32", "1.3", "kB"]


def test_many_shards_share_a_row_and_many_problems_are_cut(tmp_path: Path, write_hf: Write, tensors: Tensors) -> None:
    shards = {f"part-{number:02}.safetensors": {name: tensors[name]} for number, name in enumerate(sorted(tensors))}
    folder = write_hf(
        tmp_path / "m", {"model_type": "llama", **{f"field_{n}": n + 1 for n in range(30)}}, shards=shards
    )
    (folder / "part-07.safetensors").unlink()
    found = inspect(folder)
    text = str(found)
    assert "part-07.safetensors           missing" in text
    assert "part-08" not in text.partition("problems:")[0]
    assert "20 files" in text
    assert f"{len(found.problems)} problems:" in text
    assert f" and {len(found.problems) - 20} more" in text
    assert len(json_of(found)["shards"]) == 21


def test_names_from_files_move_no_cursor(whole: Path, tensors: Tensors, tiny_config: TinyConfig) -> None:
    bad = "\x1b[2Jgone\r\n"
    save_file(tensors | {bad: np.ones(1, np.float32)}, whole / "model.safetensors")
    (whole / "config.json").write_text(json.dumps(tiny_config(model_type=bad)))
    text = inspect(whole).text(tensors=True)
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert "\N{REPLACEMENT CHARACTER}[2Jgone" in text
