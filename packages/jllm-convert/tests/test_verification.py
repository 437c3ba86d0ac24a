"""Verifying: what is damaged is found, all of it, and named in the model's order."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jllm_convert import ConversionError, Verification, convert, verify
from jllm_core import checkpoint
from jllm_core.checkpoint import CheckpointError, chunk_grid

Tensors = dict[str, np.ndarray]


@pytest.fixture
def config(tiny_config: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return tiny_config(hidden_size=64, intermediate_size=96, head_dim=32)


@pytest.fixture
def source(
    tmp_path: Path,
    write_hf: Callable[..., Path],
    config: dict[str, Any],
    hf_tensors: Callable[..., Tensors],
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    # Several chunks an array.
    monkeypatch.setattr(chunk_grid, "MIN_CHUNKED_BYTES", 1024)
    return write_hf(tmp_path / "source", config, hf_tensors(config))


@pytest.fixture(
    params=[
        {},
        {"dtype": "bfloat16"},
        {"quantize": "int8"},
        {"quantize": "int4", "offsets": True},
        {"quantize": "int4", "embedding": "int8"},
    ],
    ids=str,
)
def model(source: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return convert(source, tmp_path / "model", **request.param).path


@pytest.fixture
def plain(source: Path, tmp_path: Path) -> Path:
    return convert(source, tmp_path / "model").path


def names(result: Verification) -> list[str]:
    return [damage.array for damage in result.damages]


def chunks(model: Path, array: str) -> list[Path]:
    return checkpoint.ArrayStore.open(model / "weights", array).files()[1:]


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << place % 8
    path.write_bytes(data)


def test_a_whole_checkpoint_is_as_it_was_written(model: Path, source: Path) -> None:
    for against in (None, source):
        result = verify(model, against)
        assert result.ok
        assert result.damages == ()
        assert result.arrays == len(checkpoint.read_manifest(model).arrays)
        assert result.as_dict() == {
            "path": str(model),
            "ok": True,
            "arrays": result.arrays,
            "bytes": result.nbytes,
            "against": None if against is None else str(source),
            "left_out": {},
            "problems": [],
        }


def test_any_flipped_bit_is_found_by_verify_and_by_a_plain_load(model: Path) -> None:
    random = np.random.default_rng(0)
    files = sorted(path for path in (model / "weights").glob("*/c*"))
    for file in random.choice(np.array(files, dtype=object), 12):
        intact = file.read_bytes()
        flip(file, int(random.integers(1 << 30)))
        (damage,) = verify(model).damages
        assert damage.array == file.parent.name
        assert str(file) in damage.problem
        with pytest.raises(CheckpointError, match=file.parent.name):
            checkpoint.restore_weights(model, checkpoint.read_config(model))
        file.write_bytes(intact)
    assert verify(model).ok


def test_everything_that_is_wrong_is_told_in_the_order_of_the_model(plain: Path) -> None:
    order = list(checkpoint.read_manifest(plain).arrays)
    flip(chunks(plain, "lm_head")[2], 77)
    flip(chunks(plain, "lm_head")[1], 78)
    chunks(plain, "layers.1.attn.q")[0].unlink()
    shutil.rmtree(plain / "weights" / "layers.0.attn.k")
    (plain / "weights" / "layers.0.ffw.w_up" / "zarr.json").write_text("{}")
    (plain / "weights" / "stray").mkdir()
    (plain / "weights" / "_METADATA").unlink()
    damaged = ["layers.0.attn.k", "layers.0.ffw.w_up", "layers.1.attn.q", "lm_head", "lm_head"]
    damaged.sort(key=order.index)
    result = verify(plain)
    assert names(result) == ["", "", *damaged]
    assert "_METADATA is missing" in result.damages[0].problem
    assert "stray is left over" in result.damages[1].problem


def test_a_chunk_that_was_replaced_by_a_valid_one_is_found_by_its_hash(plain: Path) -> None:
    first, second = chunks(plain, "lm_head")[:2]
    second.write_bytes(first.read_bytes())
    (damage,) = verify(plain).damages
    assert damage.array == "lm_head"
    assert "SHA-256" in damage.problem


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [64, 12]}, r"is float32\[64, 11\], the manifest says float32\[64, 12\]"),
        ({"dtype": "float16"}, "the manifest says float16"),
    ],
)
def test_a_manifest_that_says_something_else_is_found(plain: Path, changes: dict[str, Any], message: str) -> None:
    path = plain / "manifest.json"
    fields = json.loads(path.read_text())
    fields["arrays"]["lm_head"] |= changes
    path.write_text(json.dumps(fields))
    result = verify(plain)
    assert names(result) == ["", "lm_head"]
    assert "do not agree" in result.damages[0].problem
    assert re.search(message, result.damages[1].problem)


def test_numbers_that_are_not_the_sources_are_found(
    model: Path, source: Path, config: dict[str, Any], write_hf: Callable[..., Path], hf_tensors: Callable[..., Tensors]
) -> None:
    tensors = hf_tensors(config)
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] *= -3
    tensors["model.embed_tokens.weight"][2, 3] += 1
    write_hf(source, config, tensors)
    assert verify(model).ok
    result = verify(model, source)
    assert {
        name.removesuffix(".values").removesuffix(".scales").removesuffix(".offsets") for name in names(result)
    } == {
        "embedding",
        "layers.1.ffw.w_up",
    }
    problems = {damage.array: damage.problem for damage in result.damages}
    # Where it is in 8 bits, it is the values that differ.
    problem = problems.get("embedding", problems.get("embedding.values", ""))
    assert "differs from the source: at [2, 3] it has" in problem


def test_another_model_is_no_source_of_this_one(
    plain: Path,
    tmp_path: Path,
    config: dict[str, Any],
    write_hf: Callable[..., Path],
    hf_tensors: Callable[..., Tensors],
) -> None:
    other = {**config, "num_hidden_layers": 3}
    result = verify(plain, write_hf(tmp_path / "other", other, hf_tensors(other)))
    assert "another architecture" in result.damages[0].problem
    assert sum("is in" in damage.problem for damage in result.damages) == 9


def test_what_is_no_checkpoint_is_an_error(tmp_path: Path, source: Path, plain: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a JLLM checkpoint"):
        verify(source)
    with pytest.raises(ConversionError, match="there is nothing at"):
        verify(plain, tmp_path / "nothing")
    with pytest.raises(ConversionError, match="memory must be at least"):
        verify(plain, memory=5)
