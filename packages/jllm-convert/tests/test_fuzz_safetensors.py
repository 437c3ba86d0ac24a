"""Files that nobody would write: each is refused with a ConversionError, or every tensor of it can be read.

The examples are the same in every run. ``fuzz/fuzz_safetensors.py`` looks for others for as long as it is let.
"""

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jllm_convert.errors import ConversionError
from jllm_convert.sources.huggingface.folder import SafetensorsSource
from safetensors.numpy import save

CONFIG = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
TENSORS = {
    "a.weight": {"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 60]},
    "b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [60, 68]},
    "c.weight": {"dtype": "F8_E4M3", "shape": [2, 130], "data_offsets": [72, 332]},
    "c.weight_scale_inv": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [68, 72]},
    "d.bias": {"dtype": "F16", "shape": [], "data_offsets": [332, 334]},
    "e.empty": {"dtype": "F32", "shape": [0, 3], "data_offsets": [334, 334]},
}
HEADER: dict[str, Any] = {"__metadata__": {"format": "pt"}, **TENSORS}
DATA = bytes(range(256)) + bytes(78)
MAX_MEMORY = 64 << 20

fuzzed = settings(
    derandomize=True,
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


def file_of(header: bytes, data: bytes = DATA, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


VALID = file_of(json.dumps(HEADER).encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzzed")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def opens(folder: Path, content: bytes, index: bytes | None = None) -> bool:
    """Whether the file can be opened; where it can, every tensor is read."""
    (folder / "model.safetensors").write_bytes(content)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    if index is not None:
        (folder / "model.safetensors.index.json").write_bytes(index)
    tracemalloc.start()
    try:
        source = SafetensorsSource(folder)
        read_all(source)
    except ConversionError as error:
        refused = error
    else:
        return True
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < MAX_MEMORY
    assert refused.problems
    assert all(len(problem) < 2_000 for problem in refused.problems)
    str(refused).encode()
    return False


def read_all(source: SafetensorsSource) -> None:
    """Read every tensor, and a part of it. Once a source is open, no error is in order."""
    for tensor in source.tensors.values():
        box = tuple(slice(size // 3, size - size // 3) for size in tensor.shape)
        try:
            values, part = tensor.read(), tensor.read(box)
        except ConversionError as error:
            raise AssertionError(f"{tensor.name!r} cannot be read") from error
        assert (values.shape, values.dtype) == (tensor.shape, tensor.dtype)
        np.testing.assert_array_equal(part, values[box])


def test_the_file_that_is_changed_is_a_good_one(folder: Path) -> None:
    assert opens(folder, VALID)


@fuzzed
@given(content=st.binary(max_size=300))
def test_any_bytes(folder: Path, content: bytes) -> None:
    opens(folder, content)


@fuzzed
@given(header=st.binary(max_size=200), data=st.binary(max_size=20), length=st.none() | st.integers(0, 2**64 - 1))
def test_any_bytes_after_a_length(folder: Path, header: bytes, data: bytes, length: int | None) -> None:
    opens(folder, file_of(header, data, length))


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.integers(0, 400)
anything = st.recursive(
    scalars | st.sampled_from(["F32", "F64", "F8_E4M3", 2**63, 2**64, -1, "a.weight"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@fuzzed
@given(header=anything | st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), anything, max_size=3))
def test_any_json_as_header(folder: Path, header: Any) -> None:
    opens(folder, file_of(json.dumps(header).encode()))


@fuzzed
@given(
    name=st.sampled_from(list(TENSORS)),
    field=st.sampled_from(["dtype", "shape", "data_offsets", "other"]),
    value=anything | st.lists(st.integers(0, 400), max_size=4),
)
def test_a_field_replaced_by_anything(folder: Path, name: str, field: str, value: Any) -> None:
    opens(folder, file_of(json.dumps({**HEADER, name: {**TENSORS[name], field: value}}).encode()))


@fuzzed
@given(
    changes=st.lists(
        st.tuples(
            st.sampled_from(list(TENSORS)),
            st.sampled_from(["shape", "data_offsets"]),
            st.integers(0, 1),
            st.integers(-2, 400) | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64]),
        ),
        min_size=1,
        max_size=3,
    ),
    dtypes=st.dictionaries(st.sampled_from(list(TENSORS)), st.sampled_from(["F32", "F16", "BF16", "F8_E4M3", "I8"])),
)
def test_numbers_and_types_replaced(folder: Path, changes: list[tuple[str, str, int, int]], dtypes: Any) -> None:
    header = json.loads(json.dumps(HEADER))
    for name, field, place, number in changes:
        header[name][field][place : place + 1] = [number]
    for name, dtype in dtypes.items():
        header[name]["dtype"] = dtype
    opens(folder, file_of(json.dumps(header).encode()))


@fuzzed
@given(keep=st.integers(0, len(VALID) - 1), more=st.binary(max_size=3))
def test_a_file_cut_short_or_gone_on_with_is_refused(folder: Path, keep: int, more: bytes) -> None:
    assert not opens(folder, VALID[:keep])
    assert opens(folder, VALID + more) == (more == b"")


@fuzzed
@given(bits=st.lists(st.integers(0, 8 * len(VALID) - 1), min_size=1, max_size=4))
def test_bits_flipped(folder: Path, bits: list[int]) -> None:
    content = bytearray(VALID)
    for bit in bits:
        content[bit // 8] ^= 1 << bit % 8
    opens(folder, bytes(content))


@fuzzed
@given(at=st.integers(8, len(VALID)), cut=st.integers(0, 20), text=st.text('{}[]":,\\ 0aeu', max_size=6))
def test_a_piece_of_the_header_replaced(folder: Path, at: int, cut: int, text: str) -> None:
    header = VALID[8 : -len(DATA)]
    opens(folder, file_of(header[: at - 8] + text.encode() + header[at - 8 + cut :]))


@fuzzed
@given(
    index=st.binary(max_size=50)
    | st.dictionaries(st.just("weight_map") | st.text(max_size=3), anything).map(
        lambda value: json.dumps(value).encode()
    )
)
def test_any_index(folder: Path, index: bytes) -> None:
    opens(folder, VALID, index)


@fuzzed
@given(
    weight_map=st.dictionaries(
        st.sampled_from(list(TENSORS)) | st.text(max_size=3),
        st.sampled_from(["model.safetensors", "config.json", "..", "../fuzzed", "absent", 3]),
        max_size=7,
    )
)
def test_any_weight_map(folder: Path, weight_map: dict[str, Any]) -> None:
    whole = weight_map == dict.fromkeys(TENSORS, "model.safetensors")
    assert opens(folder, VALID, json.dumps({"weight_map": weight_map}).encode()) == whole


# ---- What the format's own library writes

arrays = st.tuples(
    st.lists(st.integers(0, 6), max_size=4), st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16])
)
names = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), max_size=8)


@fuzzed
@given(specs=st.dictionaries(names, arrays, max_size=5), data=st.data())
def test_what_safetensors_saves_is_read_box_by_box(folder: Path, specs: dict[str, Any], data: st.DataObject) -> None:
    random = np.random.default_rng(0)
    saved = {
        name: np.ascontiguousarray(random.normal(size=shape).astype(dtype)).reshape(shape)
        for name, (shape, dtype) in specs.items()
        if name != "__metadata__"
    }
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    (folder / "model.safetensors").write_bytes(save(saved, {"format": "np"}))
    tensors = SafetensorsSource(folder).tensors
    assert tensors.keys() == saved.keys()
    for name, values in saved.items():
        cuts = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in values.shape]
        box = tuple(slice(start, stop) for start, stop in cuts)
        for part, expected in ((tensors[name].read(), values), (tensors[name].read(box), values[box])):
            assert part.dtype == expected.dtype
            assert part.tobytes() == expected.tobytes()
