"""``--ignore-field``: a field that nobody knows is ignored because the user says so, and that is kept in mind."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jllm_convert import cli, convert, inspect, verify
from jllm_convert.errors import ConversionError
from jllm_core import checkpoint

TinyConfig = Callable[..., dict[str, Any]]
Tensors = dict[str, np.ndarray]
Write = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path, write_hf: Write, tiny_config: TinyConfig, hf_tensors: Callable[..., Tensors]) -> Path:
    return write_hf(tmp_path / "source", tiny_config(soft_cap=30.0, other="x"), hf_tensors(tiny_config()), tokenizer={})


@pytest.fixture
def gguf_file(
    tmp_path: Path,
    write_gguf: Write,
    tiny_config: TinyConfig,
    hf_tensors: Callable[..., Tensors],
    gguf_metadata: Callable[..., dict[str, Any]],
    gguf_tensors: Callable[..., Tensors],
) -> Path:
    config = tiny_config()
    metadata = {**gguf_metadata(config), "soft_cap": 30.0, "parallel_residual": False, "attention.causal": True}
    return write_gguf(tmp_path / "model.gguf", metadata, gguf_tensors(config, hf_tensors(config)))


def test_it_is_refused_without_and_recorded_with(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError) as refused:
        convert(folder, tmp_path / "out")
    assert [problem.split()[1] for problem in refused.value.problems] == ["soft_cap", "other"]
    made = convert(folder, tmp_path / "out", ignore_fields=["soft_cap", "other"])
    assert made.manifest.source["ignored_fields"] == ["soft_cap", "other"]
    assert [warning.split()[0] for warning in made.warnings] == ["soft_cap", "other"]
    # verify reads the same source again, and needs no option: the manifest says what was ignored.
    assert verify(tmp_path / "out", folder).ok
    assert convert(folder, tmp_path / "out", exist_ok=True, ignore_fields=["soft_cap", "other"]).is_new is False


def test_the_commands_take_it_several_times(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--ignore-field", "soft_cap", "--ignore-field", "other"]
    for arguments in (["convert", str(folder), str(tmp_path / "out")], ["inspect", str(folder)]):
        monkeypatch.setattr(sys, "argv", ["jllm-convert", *arguments, *options])
        cli.main()
    out, err = capsys.readouterr()
    assert err.count("was ignored, as asked") == 2
    assert "--ignore-field" not in out
    assert len(inspect(folder).problems) == len(inspect(folder, ["soft_cap", "other"]).problems) + 2


def test_metadata_of_a_gguf_file_is_ignored_by_its_key(gguf_file: Path, tmp_path: Path) -> None:
    """What is off there, or says what the architecture is anyway, needs no word."""
    with pytest.raises(ConversionError) as refused:
        convert(gguf_file, tmp_path / "out")
    [problem] = refused.value.problems
    assert "convert with --ignore-field llama.soft_cap" in problem
    made = convert(gguf_file, tmp_path / "out", ignore_fields=["llama.soft_cap"])
    assert made.manifest.source["ignored_fields"] == ["llama.soft_cap"]
    assert verify(tmp_path / "out", gguf_file).ok


@pytest.mark.parametrize("name", ["llama.rope.freq_base", "soft", "llama.hard_cap"])
def test_metadata_that_is_read_or_not_there_cannot_be_ignored(gguf_file: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConversionError, match=f"there is no metadata {name} that could be ignored"):
        convert(gguf_file, tmp_path / "out", ignore_fields=["llama.soft_cap", name])


def test_a_checkpoint_has_nothing_to_ignore(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "out", ignore_fields=["soft_cap", "other"])
    with pytest.raises(ConversionError, match="a checkpoint: it has no fields that could be ignored"):
        convert(tmp_path / "out", tmp_path / "two", "bfloat16", ignore_fields=["soft_cap"])
    # What was ignored once is known of a checkpoint that is made of it, by its source.
    assert checkpoint.read_manifest(tmp_path / "out").source["ignored_fields"] == ["soft_cap", "other"]
