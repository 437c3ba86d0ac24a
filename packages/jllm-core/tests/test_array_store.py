"""One array on disk: cut, written by blocks, read by boxes, damaged."""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jllm_core.array_info import ArrayInfo
from jllm_core.checkpoint import ArrayStore, CheckpointError, array_store, chunk_grid, chunk_shape, whole
from jllm_core.checkpoint.saving import write_orbax_metadata


def numbers(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    bits = np.random.default_rng(0).integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8)
    return bits.view(dtype)[..., 0] if shape else bits.view(dtype).reshape(())


def same(got: np.ndarray, expected: np.ndarray) -> bool:
    return got.dtype == expected.dtype and got.shape == expected.shape and got.tobytes() == expected.tobytes()


# ---- How an array is cut


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((2048, 32, 128), ("model", "heads", "head_dim"), (2048, 4, 128)),
        ((4096, 8, 128), ("model", "kv_heads", "head_dim"), (4096, 1, 128)),
        ((4096, 3, 128), ("model", "kv_heads", "head_dim"), (4096, 1, 128)),
        ((32, 128, 2048), ("heads", "head_dim", "model"), (4, 128, 2048)),
        ((1024, 12288), ("model", "ffw"), (1024, 1536)),
        ((12288, 1024), ("ffw", "model"), (1536, 1024)),
        ((24577, 576), ("vocab", "model"), (3073, 576)),
        ((1 << 20,), ("model",), (1 << 20,)),  # nothing that devices share out
        ((64, 9, 64), ("model", "heads", "head_dim"), (64, 9, 64)),  # too small to cut
        # 1/8 of these would be 231 and 250 MiB: an even part of that, which 8 devices still share out without a rest.
        ((151936, 2560), ("vocab", "model"), (1187, 2560)),
        ((4096, 128256), ("model", "vocab"), (4096, 668)),
        ((8 * 18917, 3200), ("vocab", "model"), (655, 3200)),  # 18917 is a prime number
        # Experts are shared out too.
        ((128, 1024, 768), ("experts", "model", "ffw"), (16, 1024, 96)),
        ((128, 768, 1024), ("experts", "ffw", "model"), (16, 96, 1024)),
        ((16, 64, 512), ("experts", "model", "ffw"), (16, 64, 64)),  # too small for both
    ],
)
def test_large_arrays_are_cut_along_the_axes_that_devices_share_out(
    shape: tuple[int, ...], axes: tuple[str, ...], expected: tuple[int, ...]
) -> None:
    chunk = chunk_shape(shape, np.float32, axes)
    assert chunk == expected
    assert math.prod(chunk) * 4 <= 1.5 * chunk_grid.DEFAULT_CHUNK_BYTES


def test_arrays_are_cut_from_the_limit_on() -> None:
    assert chunk_shape((248, 1024), np.float32, ("ffw", "model")) == (248, 1024)
    assert chunk_shape((256, 1024), np.float32, ("ffw", "model")) == (32, 1024)  # 1 MiB
    assert chunk_shape((256, 1024), jnp.bfloat16, ("ffw", "model")) == (256, 1024)


# ---- Write and read

# Shapes that fall into chunks evenly, unevenly, and not at all.
STORED = [
    ((), ()),
    ((0,), (1,)),
    ((3, 0), (3, 1)),
    ((7,), (7,)),
    ((7,), (2,)),
    ((6, 8), (2, 8)),
    ((6, 8), (6, 3)),
    ((5, 4, 3), (5, 3, 3)),
    ((4, 5, 6), (2, 5, 4)),
]


@pytest.mark.parametrize(("shape", "chunk"), STORED)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8, np.float16])
def test_what_is_written_by_blocks_is_read_hashed_and_restored_by_orbax(
    tmp_path: Path, shape: tuple[int, ...], chunk: tuple[int, ...], dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(array_store, "chunk_shape", lambda *_: chunk)
    monkeypatch.setattr(array_store, "_HASH_BLOCK_BYTES", 64)
    array = numbers(shape, dtype)
    weights = write_orbax_metadata(tmp_path, ["layers.0.q", "b"])
    for name in ("layers.0.q", "b"):
        store = ArrayStore.create(weights, name, ArrayInfo(shape, dtype, (None,) * len(shape)))
        for box in store.blocks(32):
            store.write(box, np.asarray(array[box]))
    store = ArrayStore.open(weights, "layers.0.q")
    assert (store.shape, store.dtype, store.chunk_shape) == (shape, array.dtype, chunk)
    assert same(store.read(), array)
    assert store.digest() == hashlib.sha256(array.tobytes()).hexdigest()
    assert list(store.damage()) == []
    assert sorted(store.files()) == sorted(path for path in store.path.rglob("*") if path.is_file())
    with ocp.PyTreeCheckpointer() as stock:
        restored = stock.restore(weights)
    assert same(np.asarray(restored["layers"]["0"]["q"]), array)
    assert same(np.asarray(restored["b"]), array)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(data=st.data())
def test_any_box_is_read_as_it_is(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    chunk = tuple(data.draw(st.integers(1, size)) for size in shape)
    array = numbers(shape)
    store = ArrayStore(tmp_path_factory.mktemp("array"), shape, array.dtype, chunk)
    store.write(whole(shape), array)
    ends = [sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in shape]
    box = tuple(slice(start, stop) for start, stop in ends)
    assert same(store.read(box), array[box])


@settings(max_examples=100, derandomize=True, deadline=None)
@given(data=st.data())
def test_blocks_are_whole_chunks_within_the_limit_and_hold_everything_once(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    chunk = tuple(data.draw(st.integers(1, size)) for size in shape)
    limit = data.draw(st.integers(1, 4 * math.prod(shape) + 10))
    store = ArrayStore(Path("x"), shape, np.dtype(np.float32), chunk)
    seen = np.zeros(shape, int)
    for box in store.blocks(limit):
        seen[box] += 1
        assert all(part.start % size == 0 for part, size in zip(box, chunk, strict=True))
        chunks = math.prod(-(-(p.stop - p.start) // size) for p, size in zip(box, chunk, strict=True))
        assert chunks == 1 or chunks * store.chunk_nbytes <= limit
    assert (seen == 1).all()


def test_an_array_whose_chunks_lie_in_folders_is_read_too(tmp_path: Path) -> None:
    array = numbers((6, 8))
    store = ArrayStore(tmp_path / "q", (6, 8), array.dtype, (6, 3), "/")
    for column in range(3):
        (store.path / "c" / "0").mkdir(parents=True, exist_ok=True)
        box = (slice(0, 6), slice(3 * column, min(3 * column + 3, 8)))
        store.write(box, array[box])
    for encoding in ({"name": "default"}, {"name": "default", "configuration": {"separator": "/"}}):
        metadata = {**store._metadata(), "chunk_key_encoding": encoding}
        (store.path / array_store.METADATA_FILE).write_text(json.dumps(metadata))
        assert same(ArrayStore.open(tmp_path, "q").read(), array)


def test_a_write_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    store = ArrayStore(tmp_path, (4, 4), np.dtype(np.float32), (2, 4))
    with pytest.raises(ValueError, match=r"float64\[4, 4\] was to be written, expected float32\[4, 4\]"):
        store.write(whole((4, 4)), np.zeros((4, 4)))
    with pytest.raises(ValueError, match="cuts the chunk"):
        store.write((slice(1, 3), slice(0, 4)), np.zeros((2, 4), np.float32))


def test_stock_orbax_restores_straight_into_a_sharding(tmp_path: Path) -> None:
    array = numbers((512, 9, 64)).view(np.uint32).astype(np.float32)
    weights = write_orbax_metadata(tmp_path, ["q"])
    ArrayStore.create(weights, "q", ArrayInfo(array.shape, array.dtype, ("model", "heads", "head_dim"))).write(
        whole(array.shape), array
    )
    mesh = jax.make_mesh((1,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    target = {"q": jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)}
    with ocp.StandardCheckpointer() as stock:
        restored = stock.restore(weights, target)["q"]
    assert restored.sharding == sharding
    np.testing.assert_array_equal(restored, array)


# ---- Damage


@pytest.fixture
def store(tmp_path: Path) -> ArrayStore:
    store = ArrayStore.create(tmp_path, "layers.0.q", ArrayInfo((256, 1024), np.float32, ("ffw", "model")))
    store.write(whole(store.shape), numbers(store.shape))
    return store


def test_every_flipped_bit_is_found_and_told(store: ArrayStore) -> None:
    random = np.random.default_rng(0)
    for file in store.files()[1:]:
        intact = file.read_bytes()
        damaged = bytearray(intact)
        damaged[random.integers(len(damaged))] ^= 1 << random.integers(8)
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"the array layers.0.q is damaged: the checksum of .*c\."):
            store.read()
        assert [str(file) in each for each in store.damage()] == [True]
        file.write_bytes(intact)
    assert list(store.damage()) == []


def test_what_is_not_all_there_is_found_and_told(store: ArrayStore) -> None:
    first, second, third = store.files()[1:4]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-5])
    os.truncate(third, 1 << 40)  # a file that would fill the memory
    problems = list(store.damage())
    assert len(problems) == 3
    assert f"{first}: No such file" in problems[0]
    assert "131,071 bytes, expected 131,076" in problems[1]
    assert "1,099,511,627,776 bytes" in problems[2]
    second.write_bytes(b"")
    first.write_bytes(b"")
    with pytest.raises(CheckpointError, match="cut short"):
        store.digest()


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [256, 1023, 1]},
        {"shape": "all"},
        {"shape": [256, -1]},
        {"shape": [256, True]},
        {"data_type": "float33"},
        {"data_type": None},
        {"codecs": []},
        {"chunk_grid": {}},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0, 1024]}}},
        {"chunk_key_encoding": {"name": "v2"}},
    ],
    ids=str,
)
def test_metadata_of_another_kind_are_refused(store: ArrayStore, changes: dict[str, Any]) -> None:
    path = store.path / array_store.METADATA_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=r"the array layers.0.q in .* cannot be read"):
        ArrayStore.open(store.path.parent, store.name)


@pytest.mark.parametrize("text", ["", "[]", "{", "5"])
def test_metadata_that_are_no_metadata_are_refused(store: ArrayStore, text: str) -> None:
    (store.path / array_store.METADATA_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=r"zarr.json is missing or damaged"):
        ArrayStore.open(store.path.parent, store.name)
    with pytest.raises(CheckpointError, match=r"the array k in .*missing"):
        ArrayStore.open(store.path.parent, "k")
