"""Whole conversions of small models, and conversions that fail half way."""

import hashlib
import json
import logging
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from jllm_convert import Progress, convert, export
from jllm_convert.errors import ConversionError
from jllm_convert.matching.rules import Match
from jllm_convert.sources.gguf.source import GGUFSource
from jllm_convert.sources.huggingface.folder import SafetensorsSource
from jllm_convert.writing import memory_budget, plan
from jllm_core import checkpoint
from jllm_core.array_info import named_leaves
from jllm_core.checkpoint import atomic_rename

Tensors = dict[str, np.ndarray]
Write = Callable[..., Path]
TinyConfig = Callable[..., dict[str, Any]]
TOKENIZER = {"tokenizer": {"version": "1.0"}, "tokenizer_config": {"eos_token": "x"}}


@pytest.fixture
def config(tiny_config: TinyConfig) -> dict[str, Any]:
    return tiny_config(attention_bias=True)


@pytest.fixture
def tensors(config: dict[str, Any], hf_tensors: Callable[..., Tensors]) -> Tensors:
    return hf_tensors(config)


@pytest.fixture
def source(tmp_path: Path, write_hf: Write, config: dict[str, Any], tensors: Tensors) -> Path:
    return write_hf(tmp_path / "source", config, tensors, **TOKENIZER)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out" / "model"


def restored(folder: Path) -> Tensors:
    weights = checkpoint.restore_weights(folder, checkpoint.read_config(folder))
    return {name: np.asarray(array) for name, array in named_leaves(weights).items()}


def assert_same(got: Tensors, expected: Tensors) -> None:
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype, name
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def cast(arrays: Tensors, dtype: Any) -> Tensors:
    return {name: array.astype(dtype) for name, array in arrays.items()}


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- Values


def test_a_hugging_face_folder_becomes_a_checkpoint(
    source: Path, target: Path, config: dict[str, Any], tensors: Tensors, expected_arrays: Callable[..., Tensors]
) -> None:
    result = convert(source, target)
    assert (result.path, result.warnings) == (target, ())
    assert result.config == checkpoint.read_config(target)
    assert result.manifest == checkpoint.read_manifest(target)
    assert_same(restored(target), expected_arrays(config, tensors))
    assert files_in(target) == [
        *("generation_config.json", "manifest.json", "model.json"),
        *("tokenizer.json", "tokenizer_config.json", "weights"),
    ]
    assert files_in(target.parent) == ["model"]
    assert checkpoint.read_eos_ids(target) == (3,)


def test_a_gguf_file_becomes_a_checkpoint(
    tmp_path: Path,
    target: Path,
    tiny_config: TinyConfig,
    hf_tensors: Callable[..., Tensors],
    gguf_metadata: Callable[..., dict[str, Any]],
    gguf_tensors: Callable[..., Tensors],
    write_gguf: Write,
    expected_arrays: Callable[..., Tensors],
) -> None:
    config = tiny_config(hidden_size=32, intermediate_size=64, head_dim=8, tie_word_embeddings=True)
    tensors = hf_tensors(config)
    # The values of a block of 32 that Q8_0 keeps exactly: whole numbers up to 127.
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = np.random.default_rng(0).integers(-127, 128, (64, 32)).astype(np.float32)
    tensors[name][:, 0] = 127
    vocabulary = {
        "tokenizer__ggml__model": "gpt2",
        "tokenizer__ggml__pre": "gpt-2",
        "tokenizer__ggml__tokens": ["a", "b", "ab", "<end>"],
        "tokenizer__ggml__token_type": [1, 1, 1, 3],
        "tokenizer__ggml__merges": ["a b"],
        "tokenizer__ggml__eos_token_id": 3,
    }
    path = write_gguf(
        tmp_path / "tiny.gguf",
        gguf_metadata(config),
        gguf_tensors(config, tensors),
        types={"blk.1.ffn_up.weight": Kind.Q8_0},
        **vocabulary,
    )
    result = convert(path, target)
    assert (result.warnings, result.manifest.dtype) == ((), "float32")
    fingerprint = GGUFSource(path).fingerprint()
    assert result.manifest.source == {"name": "tiny.gguf", "kind": "gguf", "fingerprint": fingerprint}
    assert_same(restored(target), expected_arrays(config, tensors))
    assert checkpoint.read_eos_ids(target) == (3,)
    assert checkpoint.read_generation_config(target) == {"eos_token_id": [3]}
    assert json.loads((target / "tokenizer.json").read_text())["model"]["vocab"]["ab"] == 2


def test_the_sampling_parameters_of_a_gguf_file_are_kept(
    tmp_path: Path,
    target: Path,
    tiny_config: TinyConfig,
    hf_tensors: Callable[..., Tensors],
    gguf_metadata: Callable[..., dict[str, Any]],
    gguf_tensors: Callable[..., Tensors],
    write_gguf: Write,
) -> None:
    config = tiny_config(hidden_size=32, intermediate_size=64, head_dim=8, tie_word_embeddings=True)

    def file(name: str, **metadata: Any) -> Path:
        tensors = gguf_tensors(config, hf_tensors(config))
        return write_gguf(tmp_path / name, gguf_metadata(config), tensors, **metadata)

    keys = {"temp": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "penalty_repeat": 1.05}
    convert(file("all.gguf", **{f"general__sampling__{name}": value for name, value in keys.items()}), target)
    # The file has them in float32: 0.95 is 0.949999988 there.
    assert checkpoint.read_generation_config(target) == {
        "eos_token_id": [],
        **{"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.05},
    }
    with pytest.raises(ConversionError, match=r"metadata general.sampling.temp must be a number, got 'warm'"):
        convert(file("bad.gguf", general__sampling__temp="warm"), tmp_path / "other")


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (np.float32, None, "float32"),
        (np.float16, "keep", "float32"),
        (ml_dtypes.bfloat16, None, "bfloat16"),
        (ml_dtypes.bfloat16, "keep", "bfloat16"),
        (ml_dtypes.bfloat16, "float32", "float32"),
        (np.float16, "bfloat16", "bfloat16"),
        (np.float32, "bfloat16", "bfloat16"),
        (ml_dtypes.bfloat16, "float16", "float16"),
        (np.float32, "float16", "float16"),
        (np.float16, "float16", "float16"),
    ],
)
def test_the_element_type_is_kept_or_the_one_asked_for(
    tmp_path: Path,
    target: Path,
    write_hf: Write,
    config: dict[str, Any],
    tensors: Tensors,
    expected_arrays: Callable[..., Tensors],
    stored: Any,
    asked: str | None,
    expected: str,
) -> None:
    tensors = cast(tensors, stored)
    result = convert(write_hf(tmp_path / "source", config, tensors), target, asked)
    assert result.manifest.dtype == expected
    assert {entry["dtype"] for entry in result.manifest.arrays.values()} == {expected}
    assert_same(restored(target), cast(expected_arrays(config, tensors), np.dtype(expected)))


def test_a_checkpoint_s_own_float16_is_kept(source: Path, target: Path, tmp_path: Path) -> None:
    convert(source, target, "float16", receipt=False)
    again = convert(target, tmp_path / "quantised", "keep", "int8", receipt=False)
    assert again.manifest.dtype == "float16"
    assert again.stored_as == "int8 and float16"


def test_keep_goes_by_what_most_weights_are(
    tmp_path: Path, target: Path, write_hf: Write, config: dict[str, Any], tensors: Tensors
) -> None:
    mixed = {name: t.astype(np.float32 if t.ndim == 1 else ml_dtypes.bfloat16) for name, t in tensors.items()}
    assert convert(write_hf(tmp_path / "source", config, mixed), target).manifest.dtype == "bfloat16"


def test_the_manifest_has_the_hash_of_every_array(
    source: Path, target: Path, config: dict[str, Any], tensors: Tensors, expected_arrays: Callable[..., Tensors]
) -> None:
    manifest = convert(source, target, "bfloat16").manifest
    expected = {
        name: {
            "shape": list(array.shape),
            "dtype": "bfloat16",
            "sha256": hashlib.sha256(array.astype(ml_dtypes.bfloat16).tobytes("C")).hexdigest(),
        }
        for name, array in expected_arrays(config, tensors).items()
    }
    assert manifest.arrays == expected
    fingerprint = SafetensorsSource(source).fingerprint()
    assert manifest.source == {"name": "source", "kind": "hf", "dtype": "float32", "fingerprint": fingerprint}
    assert manifest.created_by.startswith("jllm-convert ")


# ---- Progress and warnings


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_progress_adds_up_to_the_whole(source: Path, target: Path, tensors: Tensors, dtype: str, itemsize: int) -> None:
    seen: list[Progress] = []
    convert(source, target, dtype, on_progress=seen.append)
    total = sum(tensor.size for tensor in tensors.values()) * itemsize
    assert {(each.total_arrays, each.total_nbytes) for each in seen} == {(len(tensors), total)}
    assert [each.arrays for each in seen] == sorted(each.arrays for each in seen)
    assert [each.nbytes for each in seen] == sorted(each.nbytes for each in seen)
    assert (seen[-1].arrays, seen[-1].nbytes) == (len(tensors), total)


def test_a_source_without_tokenizer_gives_a_warning(
    tmp_path: Path, target: Path, write_hf: Write, config: dict[str, Any], tensors: Tensors
) -> None:
    result = convert(write_hf(tmp_path / "bare", config, tensors), target)
    assert result.warnings == ("bare has no tokenizer.json: the model will take token ids only",)
    assert not (target / "tokenizer.json").exists()


def test_a_chat_template_for_processors_is_left_unread_with_a_warning(source: Path, target: Path) -> None:
    (source / "chat_template.json").write_text('{"chat_template": "{{ messages }}"}')
    (warning,) = convert(source, target).warnings
    assert warning.startswith(f"{source.name}/chat_template.json is not read")
    assert "chat_template.json" not in files_in(target)


def test_named_chat_templates_pass_through_checkpoints(source: Path, target: Path, tmp_path: Path) -> None:
    folder, name = "additional_chat_templates", "additional_chat_templates/tool_use.jinja"
    (source / folder).mkdir()
    (source / name).write_text("{{ tools }}")
    convert(source, target)
    convert(target, tmp_path / "quantised", quantize="int8", receipt=False)
    export(target, tmp_path / "exported")
    copies = [target / name, tmp_path / "quantised" / name, tmp_path / "exported" / name]
    assert [copy.read_text() for copy in copies] == ["{{ tools }}"] * 3


# ---- The destination


def test_an_existing_checkpoint_is_kept_unless_told_otherwise(
    source: Path, target: Path, write_hf: Write, config: dict[str, Any], tensors: Tensors
) -> None:
    convert(source, target)
    before = restored(target)
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    write_hf(source, config, other)
    with pytest.raises(ConversionError, match=r"exists; choose another name, or replace it with overwrite"):
        convert(source, target)
    assert_same(restored(target), before)
    convert(source, target, overwrite=True)
    assert_same(restored(target), {name: array + 1 for name, array in before.items()})
    assert files_in(target.parent) == ["model"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_but_a_checkpoint_is_ever_replaced(source: Path, target: Path, overwrite: bool) -> None:
    target.mkdir(parents=True)
    (target / "thesis.txt").write_text("years of work")
    (target / "manifest.json").write_text("{}")
    with pytest.raises(ConversionError, match="is not a JLLM checkpoint, so it is not replaced"):
        convert(source, target, overwrite=overwrite)
    assert files_in(target) == ["manifest.json", "thesis.txt"]
    file = target / "thesis.txt"
    with pytest.raises(ConversionError, match="is not a JLLM checkpoint"):
        convert(source, file, overwrite=overwrite)
    assert file.read_text() == "years of work"


def test_an_empty_folder_is_filled(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    convert(source, target)
    assert checkpoint.is_checkpoint(target)
    assert files_in(target.parent) == ["model"]


def test_a_link_to_a_checkpoint_is_replaced_without_a_trace(source: Path, target: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    convert(source, elsewhere)
    target.parent.mkdir()
    target.symlink_to(elsewhere)
    convert(source, target, overwrite=True)
    assert checkpoint.is_checkpoint(target)
    assert files_in(target.parent) == ["model"]
    assert checkpoint.is_checkpoint(elsewhere), "what the link pointed to is not ours to remove"


def test_a_link_to_nothing_is_not_replaced(source: Path, target: Path, tmp_path: Path) -> None:
    target.parent.mkdir()
    target.symlink_to(tmp_path / "nothing")
    with pytest.raises(ConversionError, match="exists and is not a JLLM checkpoint"):
        convert(source, target, overwrite=True)


def test_a_destination_that_cannot_be_written_is_told(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match="cannot write beside"):
        convert(source, tmp_path / "file" / "model")


def test_relative_paths_are_relative_to_the_working_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    convert("source", "converted")
    assert checkpoint.is_checkpoint(tmp_path / "converted")


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_modes_follow_the_umask(source: Path, target: Path, umask: int) -> None:
    (source / "tokenizer.json").chmod(0o600)
    before = os.umask(umask)
    try:
        convert(source, target)
    finally:
        os.umask(before)
    wrong = {
        str(path.relative_to(target)): oct(stat.S_IMODE(path.stat().st_mode))
        for path in (target, *target.rglob("*"))
        if stat.S_IMODE(path.stat().st_mode) != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert wrong == {}


# ---- Memory


# A process of its own: what is traced is that of every thread, and tests leave some.
MEASURED = """
import sys, tracemalloc
from jllm_convert import convert
from jllm_convert.writing import memory_budget, tensor_jobs
from jllm_core.checkpoint import array_store, chunk_grid
chunk_grid.DEFAULT_CHUNK_BYTES, array_store._HASH_BLOCK_BYTES = 1 << 17, 1 << 20
memory_budget.MIN_MEMORY, tensor_jobs._WORKSPACE = 1, 1 << 19
small, first, source, target, memory, *arguments = sys.argv[1:]
convert(small, first)  # imports orbax
tracemalloc.start()
convert(source, target, memory=int(memory), **dict(argument.split("=") for argument in arguments))
print(tracemalloc.get_traced_memory()[1])
"""


@pytest.mark.parametrize("arguments", [[], ["dtype=bfloat16"], ["quantize=int8"], ["quantize=int4"]], ids=str)
def test_memory_is_a_budget_and_not_the_model(
    tmp_path: Path,
    target: Path,
    tiny_config: TinyConfig,
    hf_tensors: Callable[..., Tensors],
    write_hf: Write,
    arguments: list[str],
) -> None:
    config = tiny_config(vocab_size=8192, hidden_size=512, intermediate_size=2048, head_dim=32)
    source = write_hf(tmp_path / "source", config, hf_tensors(config))
    small = write_hf(tmp_path / "small", tiny_config(), hf_tensors(tiny_config()))
    size, memory = (source / "model.safetensors").stat().st_size, 8 << 20
    assert size > 7 * memory
    command = [sys.executable, "-c", MEASURED, small, tmp_path / "first", source, target, str(memory), *arguments]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert int(child.stdout.splitlines()[-1]) < 1.5 * memory


def test_what_takes_longest_starts_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it holds at a time: an embedding that is written piece by piece would else be alone at the end."""
    monkeypatch.setattr(memory_budget, "processors", lambda: 0.5)  # one thread
    started: list[str] = []
    tasks = [
        memory_budget.Task(nbytes, lambda _, name=name: started.append(name), work)
        for name, nbytes, work in (("small", 1, 5), ("matrix", 30, 60), ("embedding", 20, 900), ("whole", 70, 0))
    ]
    memory_budget.run_tasks(tasks, 100)
    assert started == ["embedding", "whole", "matrix", "small"]


# ---- Failures


def read_instead(monkeypatch: pytest.MonkeyPatch, array: str, read: Callable[[Match], np.ndarray]) -> None:
    """Let something else happen when the tensor of that array is read."""

    def changed(match: Match) -> Match:
        if match.array != array:
            return match
        (part,) = match.parts
        return replace(match, parts=(replace(part, tensor=replace(part.tensor, read_box=lambda box: read(match))),))

    before = plan.match_tensors
    monkeypatch.setattr(plan, "match_tensors", lambda *args: [changed(match) for match in before(*args)])


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("array", ["embedding", "layers.1.attn.k", "lm_head"])
@pytest.mark.parametrize("error", [OSError("disk gone"), RuntimeError("bug")], ids=repr)
def test_a_failure_in_the_middle_leaves_the_old_checkpoint(
    source: Path,
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    array: str,
    error: Exception,
) -> None:
    convert(source, target)
    before = contents(target)

    def read(match: Match) -> np.ndarray:
        raise error

    read_instead(monkeypatch, array, read)
    with pytest.raises(ConversionError if isinstance(error, OSError) else RuntimeError, match=str(error)):
        convert(source, target, overwrite=True)
    assert contents(target) == before
    # What a read error leaves is worth keeping, what a bug leaves is not.
    kept = [".model.partial"] if isinstance(error, OSError) else []
    assert files_in(target.parent) == [*kept, "model"]
    # The command would show these, tracebacks and all.
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_a_failure_before_any_array_is_written_leaves_nothing(
    source: Path,
    target: Path,
    config: dict[str, Any],
    tensors: Tensors,
    expected_arrays: Callable[..., Tensors],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(match: Match) -> np.ndarray:
        raise OSError("disk gone")

    for array in expected_arrays(config, tensors):
        read_instead(monkeypatch, array, read)
    with pytest.raises(ConversionError, match="disk gone"):
        convert(source, target)
    assert files_in(target.parent) == []


def test_ctrl_c_leaves_the_old_checkpoint_and_what_is_done_of_the_new(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, target)
    before = contents(target)

    def read(match: Match) -> np.ndarray:
        os.kill(os.getpid(), signal.SIGINT)  # Python gives it to the main thread
        time.sleep(0.1)
        return match.read()

    read_instead(monkeypatch, "gamma_final", read)
    with pytest.raises(KeyboardInterrupt) as caught:
        convert(source, target, overwrite=True)
    assert contents(target) == before
    assert files_in(target.parent) == [".model.partial", "model"]
    assert "the same conversion resumes from it" in caught.value.__notes__[0]


def test_a_failing_rename_puts_the_old_checkpoint_back(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_rename, "_exchange", lambda *_: False)
    convert(source, target)
    before, rename = restored(target), os.rename

    def fail(old: Path, new: Path) -> None:
        if str(old).endswith(".partial"):
            raise OSError("no space left")
        rename(old, new)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(ConversionError, match="no space left"):
        convert(source, target, overwrite=True)
    assert_same(restored(target), before)
    assert files_in(target.parent) == ["model"]


def test_an_error_in_the_callback_stops_the_conversion(source: Path, target: Path) -> None:
    def stop(progress: Progress) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        convert(source, target, on_progress=stop)
    assert files_in(target.parent) == []


def test_bad_tensors_are_told_before_anything_is_written(
    tmp_path: Path, target: Path, write_hf: Write, config: dict[str, Any], tensors: Tensors
) -> None:
    del tensors["lm_head.weight"]
    tensors["extra"] = np.ones(2, np.float32)
    with pytest.raises(ConversionError) as caught:
        convert(write_hf(tmp_path / "source", config, tensors), target)
    assert len(caught.value.problems) == 2
    assert not target.parent.exists()


def test_a_bad_tokenizer_is_told_before_weights_are_written(
    tmp_path: Path,
    target: Path,
    tiny_config: TinyConfig,
    hf_tensors: Callable[..., Tensors],
    gguf_metadata: Callable[..., dict[str, Any]],
    gguf_tensors: Callable[..., Tensors],
    write_gguf: Write,
) -> None:
    config = tiny_config()
    path = write_gguf(
        tmp_path / "tiny.gguf",
        gguf_metadata(config),
        gguf_tensors(config, hf_tensors(config)),
        tokenizer__ggml__model="unheard-of",
    )
    written: list[Progress] = []
    with pytest.raises(ConversionError, match="unheard-of"):
        convert(path, target, on_progress=written.append)
    assert written == []


@pytest.mark.parametrize("dtype", ["float8", "int8", ""])
def test_other_element_types_are_refused(source: Path, target: Path, dtype: str) -> None:
    with pytest.raises(ConversionError, match="dtype must be one of float32, bfloat16, float16 or keep, got"):
        convert(source, target, dtype)


def test_what_is_no_source_is_refused(tmp_path: Path, source: Path, target: Path) -> None:
    with pytest.raises(
        ConversionError, match=r"there is nothing at .*expected a Hugging Face folder, a \.gguf file or"
    ):
        convert(tmp_path / "nothing", target)
    (tmp_path / "model.onnx").write_text("")
    with pytest.raises(ConversionError, match=r"model\.onnx is neither a folder nor a \.gguf file"):
        convert(tmp_path / "model.onnx", target)
    convert(source, target)
    with pytest.raises(ConversionError, match="is a JLLM checkpoint already"):
        convert(target, tmp_path / "again")


def test_the_weights_are_restored_on_the_default_device(source: Path, target: Path) -> None:
    convert(source, target)
    weights = checkpoint.restore_weights(target, checkpoint.read_config(target))
    assert {device for leaf in jax.tree.leaves(weights) for device in leaf.devices()} == {jax.devices()[0]}
