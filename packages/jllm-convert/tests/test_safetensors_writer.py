"""Safetensors written in parts, against the safetensors package."""

import itertools
import json
import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jllm_convert.exporting import safetensors_writer
from jllm_convert.exporting.safetensors_writer import SafetensorsWriter, TensorInfo, split_into_shards
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

Tensors = dict[str, np.ndarray]
DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


def infos(tensors: Mapping[str, np.ndarray]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def writer(folder: Path, tensors: Tensors, shard_bytes: int = 1 << 30) -> SafetensorsWriter:
    return SafetensorsWriter(folder, infos(tensors), split_into_shards(infos(tensors), shard_bytes))


def all_of(tensor: np.ndarray) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in tensor.shape)


def save(folder: Path, tensors: Tensors, shard_bytes: int = 1 << 30) -> None:
    files = writer(folder, tensors, shard_bytes)
    for name, tensor in tensors.items():
        files.write(name, all_of(tensor), tensor)
    files.finish()


def numbers(*shape: int, dtype: np.dtype = DTYPES[0], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def assert_same(got: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert got[name].tobytes() == tensor.tobytes(), name


@pytest.fixture
def tensors() -> Tensors:
    return {"b": numbers(4, 3, seed=1), "a.10": numbers(5, seed=2), "a.9": numbers(2, 2, seed=3)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_file_has_the_bytes_that_safetensors_writes(tmp_path: Path, tensors: Tensors, dtype: np.dtype) -> None:
    tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    save(tmp_path, tensors)
    save_file(tensors, tmp_path / "oracle.safetensors", {"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "oracle.safetensors").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "oracle.safetensors"]


@pytest.mark.parametrize("length", range(1, 17))
def test_data_begin_at_a_multiple_of_eight(tmp_path: Path, length: int) -> None:
    """And each tensor at a multiple of its own element, though 2-byte ones of odd sizes are among them."""
    tensors = {"x" * length: numbers(3, dtype=DTYPES[1]), "é": numbers(3), "c": numbers(1, dtype=DTYPES[2])}
    save(tmp_path, tensors)
    data = (tmp_path / "model.safetensors").read_bytes()
    header = int.from_bytes(data[:8], "little")
    assert header % 8 == 0
    places = json.loads(data[8 : 8 + header])
    assert places["é"]["data_offsets"][0] % 4 == 0
    assert_same(load_file(tmp_path / "model.safetensors"), tensors)
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


@st.composite
def cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[list[int]], list[int]]:
    """A shape, for each axis where it is cut, and an order for the boxes."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    inner = [sorted(draw(st.sets(st.integers(0, size)) if size > 1 else st.just(set()))) for size in shape]
    edges = [sorted({0, size, *cut}) for size, cut in zip(shape, inner, strict=True)]
    count = int(np.prod([len(edge) - 1 for edge in edges]))
    return shape, edges, draw(st.permutations(range(count)))


@given(cut=cuts(), dtype=st.sampled_from(DTYPES), transposed=st.booleans())
def test_parts_in_any_order_make_the_tensor(
    cut: tuple[tuple[int, ...], list[list[int]], list[int]], dtype: np.dtype, transposed: bool
) -> None:
    shape, edges, order = cut
    tensor = numbers(*shape[::-1], dtype=dtype).T if transposed else numbers(*shape, dtype=dtype)
    tensors = {"before": numbers(3, dtype=dtype), "cut": tensor, "past": numbers(3, dtype=dtype)}
    boxes = list(itertools.product(*([slice(*pair) for pair in itertools.pairwise(edge)] for edge in edges)))
    with tempfile.TemporaryDirectory() as name:
        files = writer(Path(name), tensors)
        for number in order:
            files.write("cut", boxes[number], tensor[boxes[number]])
        for name_of_rest in ("before", "past"):
            files.write(name_of_rest, all_of(tensors[name_of_rest]), tensors[name_of_rest])
        files.finish()
        assert_same(load_file(Path(name) / "model.safetensors"), tensors)


def test_several_threads_write_one_tensor(tmp_path: Path) -> None:
    tensor = numbers(64, 48)
    files = writer(tmp_path, {"x": tensor})
    boxes = [(slice(0, 64), slice(start, start + 3)) for start in range(0, 48, 3)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda box: files.write("x", box, tensor[box]), boxes))
    files.finish()
    assert_same(load_file(tmp_path / "model.safetensors"), {"x": tensor})


def test_a_system_that_takes_little_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensors: Tensors
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:5], offset))
    save(tmp_path, tensors)
    assert_same(load_file(tmp_path / "model.safetensors"), tensors)


# ---- Several files


def files_of(sizes: Mapping[str, int], shard_bytes: int) -> list[tuple[str, list[str]]]:
    tensors = {name: TensorInfo((size,), DTYPES[1]) for name, size in sizes.items()}
    return [(shard.name, list(shard.starts)) for shard in split_into_shards(tensors, shard_bytes)]


def test_files_are_filled_in_order() -> None:
    sizes = {"d": 3, "a": 2, "c": 9, "b": 1}
    assert files_of(sizes, 30) == [("model.safetensors", ["a", "b", "c", "d"])]
    assert files_of(sizes, 10) == [
        ("model-00001-of-00003.safetensors", ["a", "d"]),
        ("model-00002-of-00003.safetensors", ["c"]),
        ("model-00003-of-00003.safetensors", ["b"]),
    ]
    assert [names for _, names in files_of(sizes, 1)] == [["d"], ["a"], ["c"], ["b"]]


def test_the_index_says_which_tensor_is_where(tmp_path: Path, tensors: Tensors) -> None:
    save(tmp_path, tensors, shard_bytes=4 * 12)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(os.listdir(tmp_path)) == [*names, "model.safetensors.index.json"]
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": 4 * (12 + 5 + 4)},
        "weight_map": {"b": names[0], "a.10": names[1], "a.9": names[1]},
    }
    assert_same(load_file(tmp_path / names[0]), {"b": tensors["b"]})
    assert_same(load_file(tmp_path / names[1]), {name: tensors[name] for name in ("a.10", "a.9")})


def test_the_plan_knows_the_size_of_the_files(tmp_path: Path, tensors: Tensors) -> None:
    shards = split_into_shards(infos(tensors), 4 * 12)
    save(tmp_path, tensors, 4 * 12)
    assert {shard.name: shard.nbytes for shard in shards} == {
        path.name: path.stat().st_size for path in tmp_path.glob("*.safetensors")
    }


# ---- What is refused


@pytest.mark.parametrize(
    ("values", "got"),
    [(numbers(2, 3, dtype=DTYPES[1]), r"float16\[2, 3\]"), (numbers(3, 2), r"float32\[3, 2\]")],
    ids=["type", "shape"],
)
def test_parts_that_do_not_fit_are_refused(tmp_path: Path, tensors: Tensors, values: np.ndarray, got: str) -> None:
    files = writer(tmp_path, tensors)
    with pytest.raises(ValueError, match=rf"b: {got} was to be written, expected float32\[2, 3\]"):
        files.write("b", (slice(0, 2), slice(0, 3)), values)


@pytest.mark.parametrize(("rows", "written"), [([0, 1], 24), ([0, 1, 2, 3, 3], 60)])
def test_a_file_with_gaps_or_overlaps_is_not_finished(
    tmp_path: Path, tensors: Tensors, rows: list[int], written: int
) -> None:
    files = writer(tmp_path, {"b": tensors["b"]})
    for row in rows:
        files.write("b", (slice(row, row + 1), slice(0, 3)), tensors["b"][row : row + 1])
    with pytest.raises(ValueError, match=f"b: {written} bytes were written, it has 48"):
        files.finish()


def test_what_is_written_is_on_the_disk(tmp_path: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(safetensors_writer, "sync", synced.append)
    save(tmp_path, tensors, shard_bytes=4 * 12)
    assert synced == [tmp_path]
