"""Hugging Face folders: whole, in shards, and damaged in every way that a download can be."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from jllm_convert import inspect
from jllm_convert.errors import ConversionError
from jllm_convert.matching.rules import match_tensors
from jllm_convert.sources.huggingface.folder import SafetensorsSource
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


def test_a_tensor_that_the_index_leaves_out_is_told(sharded: Path, tensors: Tensors) -> None:
    names = sorted(tensors)
    save_file({n: tensors[n] for n in names[:9]} | {"extra.weight": np.ones(2, np.float32)}, sharded / FIRST)
    assert problems_of(sharded) == (
        f"{FIRST}: tensor 'extra.weight' is here, the index does not say so; download the index and this again",
    )


@pytest.mark.parametrize(
    "where",
    [
        *("../secret", "sub/x.safetensors", "/etc/passwd", 5, None, "..", ".", "", "a\\b", "C:x", "a\x00b", "\udcff"),
        *(["x"], {}, True, "./model.safetensors"),
    ],
)
def test_an_index_that_points_outside_of_the_folder_is_refused(sharded: Path, where: Any) -> None:
    save_file({"x": np.ones(1, np.float32)}, sharded.parent / "secret")
    rewrite_index(sharded, x=where)
    assert problems_of(sharded) == (f"{INDEX}: tensor 'x' is put in {where!r}, which is not a plain file name",)


def test_an_index_with_a_name_of_any_length_is_refused(sharded: Path) -> None:
    rewrite_index(sharded, x="x" * 100_000)
    (problem,) = problems_of(sharded)
    assert "which is not a plain file name" in problem
    assert len(problem) < 300


def test_an_index_that_points_to_a_folder_is_refused(sharded: Path) -> None:
    (sharded / "sub").mkdir()
    rewrite_index(sharded, x="sub")
    assert problems_of(sharded) == ("sub: cannot be used: it is a folder, not a regular file",)


def test_an_index_with_a_name_twice_is_refused(sharded: Path) -> None:
    text = (sharded / INDEX).read_text()
    (sharded / INDEX).write_text(text.replace('"lm_head.weight":', '"lm_head.weight": "x", "lm_head.weight":'))
    (problem,) = problems_of(sharded)
    assert "the name 'lm_head.weight' stands twice in one object" in problem


def test_two_sets_of_weights_are_refused(sharded: Path, tensors: Tensors) -> None:
    save_file(tensors, sharded / "model.safetensors")
    (problem,) = problems_of(sharded)
    assert problem.endswith("which has the weights in other files; remove one or the other")


def test_an_index_may_name_the_single_file(whole: Path, tensors: Tensors) -> None:
    (whole / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model.safetensors")}))
    assert SafetensorsSource(whole).tensors.keys() == tensors.keys()


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


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt", "pytorch_model.bin.index.json"]
)
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
        a=("F8_E5M2", [2], bytes(2)),
        b=("F64", [1], bytes(8)),
        c=("F32", [1], bytes(4)),
        d=("BOOL", [1], bytes(1)),
        e=("X9", [1], bytes(1)),
    )
    assert sorted(problems_of(whole)) == [
        "3 tensors, such as 'a' in model.safetensors, are stored as BOOL, F8_E5M2, X9, as quantised weights are, and "
        "config.json has no quantization_config that says what their values stand for. To go on, convert the "
        "publisher's unquantised weights, or a GGUF file, instead",
        "model.safetensors: tensor 'b' is stored as F64; supported: F32, F16, BF16, F8_E4M3. To go on, load the model "
        "with transformers in float32 and save it again",
    ]


@pytest.mark.parametrize(
    ("parts", "kinds"),
    [
        # As GPTQ, AWQ, bitsandbytes and FP8 folders have them.
        ({"qweight": ("I32", 4), "qzeros": ("I32", 4), "g_idx": ("I32", 4), "scales": ("F16", 2)}, "I32"),
        ({"weight": ("U8", 1), "weight.absmax": ("F32", 4), "weight.quant_state.bitsandbytes__nf4": ("U8", 1)}, "U8"),
        ({"weight": ("I8", 1), "SCB": ("F32", 4)}, "I8"),
        ({"weight": ("F8_E4M3", 1), "weight_scale": ("F32", 4), "packed": ("U32", 4)}, "F8_E4M3, U32"),
    ],
)
def test_quantised_tensors_without_a_quantization_config_are_one_sentence(
    whole: Path, parts: dict[str, tuple[str, int]], kinds: str
) -> None:
    layers = {
        f"layers.{layer}.{part}": (kind, [1], bytes(size))
        for layer in range(50)
        for part, (kind, size) in parts.items()
    }
    write_raw(whole / "model.safetensors", **layers)
    [problem] = problems_of(whole)
    assert f"are stored as {kinds}, as quantised weights are, and config.json has no quantization_config" in problem


def test_types_of_another_kind_are_one_sentence_each(whole: Path) -> None:
    write_raw(whole / "model.safetensors", **{f"w{number}": ("F64", [1], bytes(8)) for number in range(50)})
    [problem] = problems_of(whole)
    assert problem.startswith("50 tensors, such as 'w0' in model.safetensors, are stored as F64")


# ---- Shards without an index


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shards_whose_names_say_that_they_are_all_need_no_index(
    tmp_path: Path, tiny_config: TinyConfig, hf_tensors: HfTensors, count: int
) -> None:
    """As vLLM, mlx-lm and llama.cpp read them."""
    tensors = hf_tensors(tiny_config())
    names = list(tensors)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    for number in range(count):
        part = {name: tensors[name] for name in names[number::count]}
        save_file(part, tmp_path / f"model-{number + 1:05}-of-{count:05}.safetensors")
    source = SafetensorsSource(tmp_path)
    assert source.tensors.keys() == tensors.keys()
    before = source.fingerprint()
    (tmp_path / f"model-{count:05}-of-{count:05}.safetensors").touch()
    os.utime(tmp_path / f"model-{count:05}-of-{count:05}.safetensors", (1, 1))
    assert SafetensorsSource(tmp_path).fingerprint() != before
    assert inspect(tmp_path).problems == ()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["model-00001-of-00003"],
            "lacks 2 of 3 shards, such as model-00002-of-00003.safetensors; download them again",
        ),
        (["model-00002-of-99999"], "lacks 99,998 of 99,999 shards, such as model-00001-of-99999.safetensors"),
        (["model-00001-of-00001", "model-00001-of-00002"], "holds no safetensors weights"),
        (["adapter_model"], "holds no safetensors weights"),
    ],
)
def test_shards_that_are_not_all_there_are_no_model(
    tmp_path: Path, tiny_config: TinyConfig, names: list[str], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    for name in names:
        save_file({"a": np.zeros(1, np.float32)}, tmp_path / f"{name}.safetensors")
    [problem] = problems_of(tmp_path)
    assert message in problem


def test_data_that_are_not_the_shape_s_are_refused(whole: Path) -> None:
    write_raw(whole / "model.safetensors", a=("F32", [2, 3], bytes(23)), b=("BF16", [], bytes(4)), c=("F16", [0], b""))
    assert problems_of(whole) == (
        "model.safetensors: tensor 'a' has 23 bytes of data; F32 [2, 3] takes 24",
        "model.safetensors: tensor 'b' has 4 bytes of data; BF16 [] takes 2",
    )


def test_scalars_and_empty_tensors_are_read(whole: Path) -> None:
    write_raw(whole / "model.safetensors", a=("F32", [], struct.pack("<f", 1.5)), b=("BF16", [0, 3], b""))
    tensors = SafetensorsSource(whole).tensors
    assert (tensors["a"].read().shape, tensors["a"].read()) == ((), 1.5)
    assert (tensors["b"].read().shape, tensors["b"].read().dtype) == ((0, 3), ml_dtypes.bfloat16)


def test_a_part_of_a_tensor_is_read(whole: Path, tensors: Tensors) -> None:
    box = (slice(3, 7), slice(2, 5))
    part = SafetensorsSource(whole).tensors["lm_head.weight"].read(box)
    np.testing.assert_array_equal(part, tensors["lm_head.weight"][box])


def test_a_file_that_changes_after_it_was_opened_is_told(whole: Path) -> None:
    tensor = SafetensorsSource(whole).tensors["lm_head.weight"]
    path = whole / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ConversionError, match=r"model\.safetensors: tensor 'lm_head\.weight' cannot be read \(the file was"
    ):
        tensor.read()


# ---- A folder from a stranger


def test_shards_may_be_links_into_the_hub_s_blobs(tmp_path: Path, sharded: Path, tensors: Tensors) -> None:
    snapshot = tmp_path / "models--x--y" / "snapshots" / "abc"
    blobs = tmp_path / "models--x--y" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(sharded.iterdir())):
        path.rename(blobs / f"{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    source = SafetensorsSource(snapshot)
    np.testing.assert_array_equal(source.tensors["lm_head.weight"].read(), tensors["lm_head.weight"])
    assert source.tensors["lm_head.weight"].where == snapshot / FIRST


def test_links_that_lead_out_of_the_folder_are_all_named(sharded: Path, tmp_path: Path) -> None:
    for name in (FIRST, "tokenizer.json", "generation_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((sharded / name).read_bytes() if (sharded / name).exists() else b"{}")
        (sharded / name).unlink(missing_ok=True)
        (sharded / name).symlink_to(tmp_path / name)
    problems = problems_of(sharded)
    assert [problem.partition(": a link that leads out of the folder")[0] for problem in problems] == [
        *(FIRST, "generation_config.json", "tokenizer.json", "chat_template.jinja"),
    ]


@pytest.mark.parametrize("name", ["config.json", INDEX, FIRST, "tokenizer.json"])
def test_a_pipe_does_not_hang(sharded: Path, name: str) -> None:
    (sharded / name).unlink(missing_ok=True)
    os.mkfifo(sharded / name)
    assert problems_of(sharded) == (f"{name}: cannot be used: it is a pipe, not a regular file",)


# ---- Fingerprints


def test_the_fingerprint_is_of_every_file_that_is_read(sharded: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"):
        (sharded / name).write_text("{}")
    first = SafetensorsSource(sharded).fingerprint()
    assert (len(first), int(first, 16) > 0) == (64, True)
    assert SafetensorsSource(sharded).fingerprint() == first
    seen = {first}
    for name in (
        "config.json",
        INDEX,
        FIRST,
        SECOND,
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ):
        status = (sharded / name).stat()
        os.utime(sharded / name, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        seen.add(SafetensorsSource(sharded).fingerprint())
    assert len(seen) == 8
    last = SafetensorsSource(sharded).fingerprint()
    (sharded / "README.md").write_text("other")
    assert SafetensorsSource(sharded).fingerprint() == last


def test_the_fingerprint_goes_by_size_and_is_up_to_date(whole: Path) -> None:
    source = SafetensorsSource(whole)
    path, before = whole / "config.json", source.fingerprint()
    status = path.stat()
    path.write_text(path.read_text() + " ")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert source.fingerprint() != before


def test_the_fingerprint_stays_when_the_folder_moves(whole: Path) -> None:
    before = SafetensorsSource(whole).fingerprint()
    assert SafetensorsSource(whole.rename(whole.with_name("moved"))).fingerprint() == before


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


SETTINGS = {"do_sample": True, "temperature": 0.6, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3}


@pytest.mark.parametrize(
    ("beside", "expected"),
    [
        (None, SETTINGS),
        # With a file of their own, those of config.json count for nothing, however little it says.
        ({}, {}),
        ({"top_k": 20}, {"top_k": 20}),
    ],
)
def test_settings_in_config_json_count_without_a_generation_config(
    tmp_path: Path, write_hf: WriteHf, tiny_config: TinyConfig, tensors: Tensors, beside: Any, expected: Any
) -> None:
    """As in transformers; tests/parity asks it."""
    fields = tiny_config(**SETTINGS, max_length=20, num_beams=3, length_penalty=None)
    json_files = {} if beside is None else {"generation_config": beside}
    folder = write_hf(tmp_path / "m", fields, tensors, **json_files)
    assert SafetensorsSource(folder).generation_config() == {**expected, "eos_token_id": [3]}


def test_settings_in_config_json_that_are_null_are_not_there(
    tmp_path: Path, write_hf: WriteHf, tiny_config: TinyConfig, tensors: Tensors
) -> None:
    folder = write_hf(tmp_path / "m", tiny_config(temperature=None, top_k=5, do_sample=None), tensors)
    assert SafetensorsSource(folder).generation_config() == {"top_k": 5, "eos_token_id": [3]}


@pytest.mark.parametrize("value", ["3", 3.0, True, [3, "x"], {"a": 1}, [[3]]])
@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_end_of_text_ids_that_are_no_ids_are_refused(
    tmp_path: Path, write_hf: WriteHf, tiny_config: TinyConfig, tensors: Tensors, where: str, value: Any
) -> None:
    in_config = {"eos_token_id": value} if where == "config.json" else {}
    settings = {"eos_token_id": 3 if in_config else value}
    folder = write_hf(tmp_path / "m", tiny_config(**in_config), tensors, generation_config=settings)
    with pytest.raises(ConversionError, match=f"{where}: eos_token_id must be a token id or a list of them"):
        SafetensorsSource(folder).generation_config()


def test_the_tokenizer_files_are_copied(whole: Path, tmp_path: Path) -> None:
    files = {"tokenizer.json": '{"a": 1}', "tokenizer_config.json": "{}", "chat_template.jinja": "{{ x }}"}
    for name, text in {**files, "vocab.txt": "other"}.items():
        (whole / name).write_text(text)
    target = tmp_path / "target"
    target.mkdir()
    written = SafetensorsSource(whole).write_tokenizer(target)
    assert sorted(written) == sorted(files)
    assert {path.name: path.read_text() for path in target.iterdir()} == files


def test_named_chat_templates_are_copied(whole: Path, tmp_path: Path) -> None:
    (whole / "tokenizer.json").write_text("{}")
    (whole / "additional_chat_templates").mkdir()
    for name in ("tool_use.jinja", "rag.jinja", "README.md"):
        (whole / "additional_chat_templates" / name).write_text(name)
    target = tmp_path / "target"
    target.mkdir()
    copied = ["tokenizer.json", "additional_chat_templates/rag.jinja", "additional_chat_templates/tool_use.jinja"]
    assert SafetensorsSource(whole).write_tokenizer(target) == copied
    assert {name: (target / name).read_text() for name in copied[1:]} == {
        copied[1]: "rag.jinja",
        copied[2]: "tool_use.jinja",
    }
    before = SafetensorsSource(whole).fingerprint()
    (whole / "additional_chat_templates" / "rag.jinja").write_text("another")
    assert SafetensorsSource(whole).fingerprint() != before


@pytest.mark.parametrize("link", ["additional_chat_templates", "additional_chat_templates/tool_use.jinja"])
def test_a_named_chat_template_outside_the_folder_is_refused(whole: Path, tmp_path: Path, link: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "tool_use.jinja").write_text("secret")
    (whole / link).parent.mkdir(exist_ok=True)
    (whole / link).symlink_to(outside if link == "additional_chat_templates" else outside / "tool_use.jinja")
    (problem,) = problems_of(whole)
    assert problem.startswith("additional_chat_templates/tool_use.jinja: a link that leads out of the folder")


def test_without_tokenizer_json_nothing_is_copied(whole: Path, tmp_path: Path) -> None:
    (whole / "tokenizer_config.json").write_text("{}")
    target = tmp_path / "target"
    target.mkdir()
    assert SafetensorsSource(whole).write_tokenizer(target) == []
    assert list(target.iterdir()) == []


# ---- Models that were saved without their head


@pytest.mark.parametrize("head", [False, True])
def test_names_without_model_are_those_of_a_model_without_its_head(
    tmp_path: Path, write_hf: WriteHf, tiny_config: TinyConfig, hf_tensors: Callable[..., Tensors], head: bool
) -> None:
    """As transformers reads it (tests/parity). A head may be there, or be the embedding."""
    config = tiny_config(tie_word_embeddings=not head)
    tensors = hf_tensors(config)
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    assert ("lm_head.weight" in bare) == head
    source = SafetensorsSource(write_hf(tmp_path / "bare", config, bare))
    expected = SafetensorsSource(write_hf(tmp_path / "whole", config, tensors))
    arrays, others = (match_tensors(each, each.config()) for each in (source, expected))
    assert [match.array for match in arrays] == [match.array for match in others]
    for ours, theirs in zip(arrays, others, strict=True):
        np.testing.assert_array_equal(ours.read(), theirs.read())


def test_a_missing_head_and_an_odd_tensor_are_a_problem_each(
    tmp_path: Path, write_hf: WriteHf, tiny_config: TinyConfig, tensors: Tensors
) -> None:
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    source = SafetensorsSource(write_hf(tmp_path / "m", tiny_config(), bare))
    with pytest.raises(ConversionError) as refused:
        match_tensors(source, source.config())
    [problem] = refused.value.problems
    assert "tensor 'lm_head.weight' is missing" in problem
    bare["layers.0.mlp.up_proj.weight"] = bare["layers.0.mlp.up_proj.weight"][1:].copy()
    bare["lm_head.weight"] = tensors["lm_head.weight"]
    source = SafetensorsSource(write_hf(tmp_path / "m", tiny_config(), bare))
    with pytest.raises(ConversionError, match=r"tensor 'layers.0.mlp.up_proj.weight' has shape \[19, 16\]"):
        match_tensors(source, source.config())
