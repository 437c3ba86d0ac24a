"""Parts of GGUF tensors: any box of any type is what gguf's own reader gives, in bounded memory, or an error."""

import os
import threading
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from jllm_convert.errors import ConversionError
from jllm_convert.sources.gguf import dequantization
from jllm_convert.sources.gguf.source import GGUFSource
from jllm_core.checkpoint import Box


def can_dequantise(kind: Kind) -> bool:
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


KINDS = [kind for kind in Kind if can_dequantise(kind)]
PLAIN: dict[Kind, Any] = {Kind.F32: np.float32, Kind.F16: np.float16, Kind.BF16: ml_dtypes.bfloat16}


def write(path: Path, raw: dict[str, np.ndarray], kinds: dict[str, Kind], **metadata: Any) -> Path:
    """A file of tensors whose bytes are given, and lists of strings and numbers as metadata."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in metadata.items():
        writer.add_array(name, value)
    for name, tensor in raw.items():
        writer.add_tensor(name, tensor, raw_dtype=kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_bytes(kind: Kind, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Any bytes for a tensor whose rows have ``shape[-1]`` blocks."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    return np.random.default_rng(seed).integers(0, 256, (*shape[:-1], shape[-1] * size), np.uint8)


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tensors of every kind that is supported, with one to four axes. Their random bytes make some values NaN."""
    shapes = [(6,), (5, 4), (2, 3, 5), (2, 2, 3, 2)]
    named = {f"{kind.name}.{len(shape)}": (kind, shape) for kind in KINDS for shape in shapes}
    raw = {name: random_bytes(kind, shape) for name, (kind, shape) in named.items()}
    path = tmp_path_factory.mktemp("gguf") / "every.gguf"
    return write(path, raw, {name: kind for name, (kind, _) in named.items()})


def expected_values(path: Path) -> dict[str, np.ndarray]:
    """What gguf's own reader makes of a file's tensors."""
    values = {}
    with np.errstate(all="ignore"):
        for tensor in gguf.GGUFReader(path).tensors:
            shape = tuple(reversed(tensor.shape.tolist()))
            values[tensor.name] = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    return values


@pytest.fixture(scope="module")
def expected(every_kind: Path) -> dict[str, np.ndarray]:
    return expected_values(every_kind)


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    """Boxes whose axes are whole, cut or empty."""
    box = []
    for length in shape:
        start = draw(st.just(0) | st.integers(0, length))
        box.append(slice(start, draw(st.just(length) | st.integers(start, length))))
    return tuple(box)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@settings(max_examples=40, derandomize=True, deadline=None)
@given(data=st.data())
def test_a_part_is_that_part_of_what_gguf_reads(
    every_kind: Path, expected: dict[str, np.ndarray], kind: Kind, data: st.DataObject
) -> None:
    name = f"{kind.name}.{data.draw(st.integers(1, 4))}"
    tensor, whole = GGUFSource(every_kind).tensors[name], expected[name]
    box = data.draw(boxes(whole.shape))
    with pytest.MonkeyPatch.context() as patch:  # so small that every box takes several slabs, or none does
        patch.setattr(dequantization, "_MAX_SLAB_VALUES", data.draw(st.sampled_from([256, 512, 1 << 17])))
        patch.setattr(dequantization, "_MAX_SLAB_BYTES", data.draw(st.sampled_from([100, 1 << 20])))
        patch.setattr(dequantization, "_MAX_GAP_BYTES", data.draw(st.sampled_from([0, 1 << 13])))
        values = tensor.read(box)
    assert (tensor.shape, tensor.stored) == (whole.shape, kind.name)
    assert (values.shape, values.dtype) == (whole[box].shape, PLAIN.get(kind, np.float32))
    with np.errstate(invalid="ignore"):  # the bytes hold signalling NaNs
        np.testing.assert_array_equal(values.astype(np.float32), whole[box])


def test_the_types_that_are_refused_are_those_that_gguf_cannot_dequantise(tmp_path: Path) -> None:
    assert {Kind.I8, Kind.I16, Kind.I32, Kind.I64, Kind.F64, Kind.Q8_1, Kind.Q8_K} <= set(Kind) - set(KINDS)
    for kind in set(Kind) - set(KINDS):
        path = write(tmp_path / "m.gguf", {"a": random_bytes(kind, (1, 1))}, {"a": kind})
        with pytest.raises(ConversionError, match=f"tensor 'a' is of type {kind.name}, which holds no weights or"):
            GGUFSource(path)


def test_metadata_has_the_values_that_gguf_reads(tmp_path: Path) -> None:
    lists = {"words": ["", "é", "漢字 x"], "whole": [1, -2], "real": [0.1, 2.0], "flags": [True, False]}
    path = write(tmp_path / "m.gguf", {"a": random_bytes(Kind.F32, (4,))}, {"a": Kind.F32}, **lists)
    fields = gguf.GGUFReader(path).fields.items()
    read = {name: field.contents() for name, field in fields if not name.startswith("GGUF.")}
    ours = GGUFSource(path).metadata
    assert ours == read
    assert ours["words"] == lists["words"]
    assert [type(item) for name in lists for item in ours[name]] == [
        type(item) for name in lists for item in read[name]
    ]


# ---- Memory and threads


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """60 MiB in four tensors: many rows, one long row, experts, and plain numbers."""
    shapes = {"rows": (4096, 128), "row": (1, 1 << 19), "experts": (8, 512, 128), "plain": (4096, 1024)}
    kinds = {"rows": Kind.Q8_0, "row": Kind.Q8_0, "experts": Kind.Q8_0, "plain": Kind.F32}
    return write(tmp_path / "large.gguf", {name: random_bytes(kinds[name], shapes[name]) for name in shapes}, kinds)


@pytest.mark.parametrize(
    ("name", "box"),
    [
        ("rows", (slice(0, 64), slice(0, 4096))),
        ("rows", (slice(0, 4096), slice(7, 70))),
        ("rows", (slice(0, 4096), slice(0, 64))),
        ("rows", (slice(10, 200), slice(1, 4096))),
        ("row", (slice(0, 1), slice(12_345_678, 14_345_678))),
        ("row", (slice(0, 1), slice(1 << 24, 1 << 24))),
        ("experts", (slice(0, 8), slice(3, 11), slice(0, 4096))),
        ("experts", (slice(2, 3), slice(0, 512), slice(33, 99))),
        ("plain", (slice(0, 4096), slice(0, 64))),
    ],
)
def test_a_part_takes_little_more_memory_than_its_own(large: Path, name: str, box: Box) -> None:
    tensor = GGUFSource(large).tensors[name]
    tensor.read(tuple(slice(0, min(length, 32)) for length in tensor.shape))  # imports
    tracemalloc.start()
    values = tensor.read(box)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < values.nbytes + (6 << 20)


def test_several_threads_read_at_once(every_kind: Path, expected: dict[str, np.ndarray]) -> None:
    source, barrier = GGUFSource(every_kind), threading.Barrier(4)

    def read(first: int) -> dict[str, np.ndarray]:
        barrier.wait()
        names = list(source.tensors)
        return {name: source.tensors[name].read() for name in names[first:] + names[:first]}

    with ThreadPoolExecutor(4) as pool:
        for values in pool.map(read, (0, 0, 5, 9)):
            for name, whole in expected.items():
                with np.errstate(invalid="ignore"):
                    np.testing.assert_array_equal(values[name].astype(np.float32), whole, err_msg=name)


# ---- What a disk can do


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write(tmp_path / "model.gguf", {"a": random_bytes(Kind.Q8_0, (3, 2))}, {"a": Kind.Q8_0})


def test_reads_that_give_less_than_was_asked_for_are_gone_on_with(
    every_kind: Path, expected: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: preadv(file, [buffers[0][:1001]], offset))
    np.testing.assert_array_equal(GGUFSource(every_kind).tensors["Q6_K.3"].read(), expected["Q6_K.3"])


def test_an_error_of_the_disk_names_the_file_and_the_tensor(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = GGUFSource(small).tensors["a"]

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(ConversionError, match=r"model\.gguf: tensor 'a' cannot be read \(Input/output error\)"):
        tensor.read()
    with pytest.raises(ConversionError, match=r"model\.gguf: its header cannot be read \(Input/output error\)"):
        GGUFSource(small)


def test_a_file_that_ends_while_it_is_read_is_named(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = GGUFSource(small).tensors["a"]
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(ConversionError, match=r"model\.gguf: tensor 'a' cannot .*ends at byte .*, 204 bytes too early"):
        tensor.read()


@pytest.mark.parametrize(
    "change", [lambda path: os.truncate(path, 64), lambda path: os.utime(path, ns=(5, 5))], ids=["size", "time"]
)
def test_a_file_that_changes_after_it_was_opened_is_refused(small: Path, change: Callable[[Path], None]) -> None:
    tensor = GGUFSource(small).tensors["a"]
    tensor.read()
    change(small)
    message = r"model\.gguf: tensor 'a' cannot be read \(the file was changed while it was in use: it had "
    with pytest.raises(ConversionError, match=message):
        tensor.read()


def test_a_file_that_is_gone_is_named(small: Path) -> None:
    tensor = GGUFSource(small).tensors["a"]
    small.unlink()
    with pytest.raises(ConversionError, match=r"model\.gguf: tensor 'a' cannot be read \(No such file"):
        tensor.read()
    with pytest.raises(ConversionError, match=r"model\.gguf: its header cannot be read \(No such file"):
        GGUFSource(small)


def test_a_link_is_followed(small: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(small)
    np.testing.assert_array_equal(GGUFSource(link).tensors["a"].read(), expected_values(small)["a"])


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "model.gguf"
    make(path)
    with pytest.raises(
        ConversionError, match=r"model\.gguf: its header cannot be read \(it is a (pipe|folder), not a regular file\)"
    ):
        GGUFSource(path)


# ---- The fingerprint


def test_the_fingerprint_is_that_of_the_name_the_size_the_time_and_the_header(small: Path, tmp_path: Path) -> None:
    def fingerprint(path: Path) -> str:
        return GGUFSource(path).fingerprint()

    os.utime(small, ns=(7, 7))
    original, content = fingerprint(small), small.read_bytes()
    assert len(original) == 64
    assert fingerprint(small) == original
    os.utime(small, ns=(9, 7))  # when it was last read changes nothing
    assert fingerprint(small) == original

    changed = {
        "name": (tmp_path / "other.gguf", content),
        "size": (small, content + b"x"),
        "header": (small, content.replace(b"llama", b"qwen3")),
    }
    for what, (path, other) in changed.items():
        path.write_bytes(other)
        os.utime(path, ns=(7, 7))
        assert fingerprint(path) != original, what
    small.write_bytes(content)
    os.utime(small, ns=(7, 8))
    assert fingerprint(small) != original
