"""The resolver of jllm-runtime: a model's name to a converted folder, kept in the cache."""

import os
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jllm_convert.errors import ConversionError
from jllm_convert.resolver import resolve
from jllm_core import checkpoint

Tensors = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def config(tiny_config: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return tiny_config()


@pytest.fixture
def tensors(config: dict[str, Any], hf_tensors: Callable[..., Tensors]) -> Tensors:
    return hf_tensors(config)


@pytest.fixture
def source(tmp_path: Path, write_hf: Callable[..., Path], config: dict[str, Any], tensors: Tensors) -> Path:
    return write_hf(tmp_path / "model", config, tensors)


def resolved(model: str | Path) -> Path:
    path = resolve(str(model))
    assert path is not None
    return path


def gamma(folder: Path) -> np.ndarray:
    return np.asarray(checkpoint.restore_weights(folder, checkpoint.read_config(folder)).gamma_final)


def test_a_folder_is_converted_into_the_cache(source: Path, cache: Path, tensors: Tensors) -> None:
    path = resolved(source)
    assert path.is_relative_to(cache)
    assert path.name.startswith("model-")
    np.testing.assert_array_equal(gamma(path), tensors["model.norm.weight"])


def test_the_second_call_converts_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = resolved(source)

    def convert(*arguments: Any, **options: Any) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr("jllm_convert.conversion.convert", convert)
    assert resolved(source) == path
    monkeypatch.chdir(source.parent)
    assert resolved("model") == path


def test_a_source_that_has_changed_is_converted_again(
    source: Path, write_hf: Callable[..., Path], config: dict[str, Any], tensors: Tensors
) -> None:
    before = resolved(source)
    stamp = (source / "model.safetensors").stat()
    write_hf(source, config, {name: tensor + 1 for name, tensor in tensors.items()})
    os.utime(source / "model.safetensors", ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1_000_000_000))
    after = resolved(source)
    assert after != before
    np.testing.assert_array_equal(gamma(after), tensors["model.norm.weight"] + 1)


def test_a_gguf_file_is_converted(
    tmp_path: Path,
    config: dict[str, Any],
    tensors: Tensors,
    gguf_metadata: Callable[..., dict[str, Any]],
    gguf_tensors: Callable[..., Tensors],
    write_gguf: Callable[..., Path],
) -> None:
    path = write_gguf(tmp_path / "tiny.GGUF", gguf_metadata(config), gguf_tensors(config, tensors))
    np.testing.assert_array_equal(gamma(resolved(path)), tensors["model.norm.weight"])


def test_sources_of_one_name_do_not_share_a_conversion(
    source: Path, tmp_path: Path, write_hf: Callable[..., Path], config: dict[str, Any], tensors: Tensors
) -> None:
    other = write_hf(tmp_path / "other" / "model", config, tensors)
    for path in (*source.iterdir(), *other.iterdir()):
        os.utime(path, ns=(0, 0))
    assert resolved(source) != resolved(other)


def test_another_format_version_is_converted_again(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = resolved(source)
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 2)
    assert resolved(source) != before


@pytest.mark.parametrize("name", ["nothing.gguf", "a/b/c", "x" * 300])
def test_names_of_nothing_are_left_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve(name) is None
    assert not cache.exists()


def test_a_file_of_another_kind_is_left_to_others(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("")
    assert resolve(str(tmp_path / "model.onnx")) is None


def test_a_source_that_cannot_be_converted_is_an_error_and_leaves_no_conversion(source: Path, cache: Path) -> None:
    (source / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConversionError, match="not a whole safetensors file"):
        resolve(str(source))
    assert list((cache / "converted").iterdir()) == []


def test_a_conversion_that_another_process_finished_first_is_used(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jllm_convert import conversion

    convert = conversion.convert

    def lose_the_race(src: Path, dst: Path, **options: Any) -> Any:
        convert(src, dst)
        return convert(src, dst, **options)  # the destination is there now

    monkeypatch.setattr(conversion, "convert", lose_the_race)
    assert checkpoint.is_checkpoint(resolved(source))


def test_the_entry_point_names_the_resolver() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    value = "jllm_convert.resolver:resolve"
    assert f'[project.entry-points."jllm.resolvers"]\nconvert = "{value}"' in project
    assert EntryPoint("convert", value, "jllm.resolvers").load() is resolve
