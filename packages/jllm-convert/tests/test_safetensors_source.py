"""Hugging Face folders: whole, in shards, and damaged in every way that a download can be."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from jllm_convert.errors import ConversionError
from jllm_convert.sources.safetensors import SafetensorsSource
from safetensors.numpy import save_file

Tensors = dict[str, np.ndarray]
WriteHf = Callable[..., Path]
TinyConfig = Callable[..., dict[str, Any]]
HfTensors = Callable[..., Tensors]

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def tensors(tiny_config: TinyConfig, hf_tensors: HfTensors) -> Tensors:
    return hf_tensors(tiny_config())


@pytest.fixture
def whole(tmp_path: Path, write_hf: WriteHf, tiny_config: TinyConfig, tensors: Tensors) -> Path:
    return write_hf(tmp_path / "whole", tiny_config(), tensors)


@pytest.fixture
def sharded(tmp_path: Path, write_hf: WriteHf, tiny_config: TinyConfig, tensors: Tensors) -> Path:
    names = sorted(tensors)
    shards = {FIRST: {n: tensors[n] for n in names[:9]}, SECOND: {n: tensors[n] for n in names[9:]}}
    return write_hf(tmp_path / "sharded", tiny_config(), shards=shards)


def problems_of(folder: Path) -> tuple[str, ...]:
    with pytest.raises(ConversionError) as caught:
        SafetensorsSource(folder)
    return caught.value.problems


def rewrite_index(folder: Path, **weight_map: Any) -> None:
    path = folder / INDEX
    index = json.loads(path.read_text())
    index["weight_map"] |= {name.replace("__", "."): where for name, where in weight_map.items()}
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("layout", ["whole", "sharded"])
def test_tensors_are_those_of_the_files(request: pytest.FixtureRequest, tensors: Tensors, layout: str) -> None:
    source = SafetensorsSource(request.getfixturevalue(layout))
    assert source.naming == "hf"
    assert source.tensors.keys() == tensors.keys()
    for name, tensor in source.tensors.items():
        assert (tensor.name, tensor.shape, tensor.dtype) == (name, tensors[name].shape, np.float32)
        np.testing.assert_array_equal(tensor.read(), tensors[name])
    files = {tensor.where.name for tensor in source.tensors.values()}
    assert files == ({"model.safetensors"} if layout == "whole" else {FIRST, SECOND})


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_plain_element_types_are_read_as_they_are(whole: Path, tensors: Tensors, dtype: Any) -> None:
    stored = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    save_file(stored, whole / "model.safetensors")
    tensor = SafetensorsSource(whole).tensors["model.norm.weight"]
    assert tensor.dtype == dtype
    assert tensor.read().dtype == dtype
    np.testing.assert_array_equal(tensor.read(), stored["model.norm.weight"])


def test_the_config_is_read(whole: Path) -> None:
    config = SafetensorsSource(whole).config()
    assert (config.model_type, config.num_layers, config.rope_theta) == ("llama", 2, 500000.0)


# ---- Damage


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    assert problems_of(sharded) == (f"{SECOND}: the file is missing from {sharded}; download it again",)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_file_that_is_cut_short_is_named_with_its_size(whole: Path, keep: int) -> None:
    path = whole / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    (problem,) = problems_of(whole)
    assert problem.startswith("model.safetensors: not a whole safetensors file")
    assert f"{path.stat().st_size:,} bytes on disk" in problem


def test_every_damaged_shard_is_named(sharded: Path) -> None:
    for name in (FIRST, SECOND):
        (sharded / name).write_bytes(b"<html>404</html>")
    problems = problems_of(sharded)
    assert [problem.partition(":")[0] for problem in problems if "not a whole" in problem] == [FIRST, SECOND]


def test_a_tensor_in_two_shards_is_told(sharded: Path, tensors: Tensors) -> None:
    names = sorted(tensors)
    save_file({n: tensors[n] for n in names[8:]}, sharded / SECOND)
    assert problems_of(sharded) == (f"{SECOND}: tensor {names[8]!r} is also in {FIRST}",)


def test_a_tensor_that_the_index_puts_elsewhere_is_told(sharded: Path, tensors: Tensors) -> None:
    names = sorted(tensors)
    save_file({n: tensors[n] for n in names[:8]}, sharded / FIRST)
    assert problems_of(sharded) == (f"{FIRST}: the index puts tensor {names[8]!r} here, it is not",)


def test_a_tensor_that_the_index_leaves_out_is_seen(sharded: Path, tensors: Tensors) -> None:
    names = sorted(tensors)
    extra = {n: tensors[n] for n in names[:9]} | {"extra.weight": np.ones(2, np.float32)}
    save_file(extra, sharded / FIRST)
    assert "extra.weight" in SafetensorsSource(sharded).tensors  # for match_tensors to refuse


@pytest.mark.parametrize("where", ["../secret", "sub/x.safetensors", "/etc/passwd", 5, None])
def test_an_index_that_points_outside_of_the_folder_is_refused(sharded: Path, where: Any) -> None:
    save_file({"x": np.ones(1, np.float32)}, sharded.parent / "secret")
    rewrite_index(sharded, x=where)
    assert problems_of(sharded) == (f"{INDEX}: tensor 'x' is put in {where!r}, which is not a plain file name",)


@pytest.mark.parametrize("where", ["..", ".", ""])
def test_an_index_that_points_to_a_folder_is_refused(sharded: Path, where: str) -> None:
    rewrite_index(sharded, x=where)
    assert len(problems_of(sharded)) == 1


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_a_damaged_index_is_named(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    (problem,) = problems_of(sharded)
    assert INDEX in problem


@pytest.mark.parametrize(("content", "message"), [("{", "cannot be read as JSON"), ("[1]", "must hold a JSON object")])
def test_a_damaged_config_is_named(whole: Path, content: str, message: str) -> None:
    (whole / "config.json").write_text(content)
    (problem,) = problems_of(whole)
    assert "config.json" in problem
    assert message in problem


def test_a_folder_that_is_no_model_is_told_what_was_expected(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path)
    assert "it has no config.json" in problem
    assert "Expected a Hugging Face folder" in problem


def test_a_folder_without_weights_is_told_what_was_expected(whole: Path) -> None:
    (whole / "model.safetensors").unlink()
    (problem,) = problems_of(whole)
    assert problem.endswith("expected model.safetensors, or model.safetensors.index.json and its shards")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_not_read_and_the_way_out_is_told(whole: Path, name: str) -> None:
    (whole / "model.safetensors").rename(whole / name)
    (problem,) = problems_of(whole)
    assert name in problem
    assert "can run any code when loaded" in problem
    assert "save_pretrained" in problem


def write_raw(path: Path, **tensors: tuple[str, list[int], bytes]) -> None:
    """A safetensors file by hand, for the types that numpy does not have."""
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def test_element_types_that_are_no_weights_are_all_named(whole: Path) -> None:
    write_raw(
        whole / "model.safetensors",
        a=("F8_E4M3", [2], bytes(2)),
        b=("I64", [1], bytes(8)),
        c=("F32", [1], bytes(4)),
        d=("BOOL", [1], bytes(1)),
    )
    assert sorted(problems_of(whole)) == [
        "model.safetensors: tensor 'a' is stored as F8_E4M3; supported: F32, F16, BF16",
        "model.safetensors: tensor 'b' is stored as I64; supported: F32, F16, BF16",
        "model.safetensors: tensor 'd' is stored as BOOL; supported: F32, F16, BF16",
    ]


# ---- What is beside the weights


@pytest.mark.parametrize(
    ("in_config", "in_generation", "expected"),
    [
        (3, None, [3]),
        (0, None, [0]),
        ([3, 5], 7, [3, 5, 7]),
        (3, [7, 3], [3, 7]),
        (None, 7, [7]),
        (None, None, []),
    ],
)
def test_the_end_of_text_ids_of_both_files_count(
    tmp_path: Path,
    write_hf: WriteHf,
    tiny_config: TinyConfig,
    tensors: Tensors,
    in_config: Any,
    in_generation: Any,
    expected: list[int],
) -> None:
    settings = {"temperature": 0.6, "eos_token_id": in_generation}
    folder = write_hf(tmp_path / "m", tiny_config(eos_token_id=in_config), tensors, generation_config=settings)
    assert SafetensorsSource(folder).generation_config() == {"temperature": 0.6, "eos_token_id": expected}


def test_without_a_generation_config_the_config_counts(whole: Path) -> None:
    assert SafetensorsSource(whole).generation_config() == {"eos_token_id": [3]}


def test_the_tokenizer_files_are_copied(whole: Path, tmp_path: Path) -> None:
    files = {"tokenizer.json": '{"a": 1}', "tokenizer_config.json": "{}", "chat_template.jinja": "{{ x }}"}
    for name, text in {**files, "vocab.txt": "other"}.items():
        (whole / name).write_text(text)
    target = tmp_path / "target"
    target.mkdir()
    written = SafetensorsSource(whole).write_tokenizer(target)
    assert sorted(written) == sorted(files)
    assert {path.name: path.read_text() for path in target.iterdir()} == files


def test_without_tokenizer_json_nothing_is_copied(whole: Path, tmp_path: Path) -> None:
    (whole / "tokenizer_config.json").write_text("{}")
    target = tmp_path / "target"
    target.mkdir()
    assert SafetensorsSource(whole).write_tokenizer(target) == []
    assert list(target.iterdir()) == []
