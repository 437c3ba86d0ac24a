"""Matrices of 8-bit floats with a scale a block: any box of them, against the arithmetic written out in numpy."""

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jllm_convert.errors import ConversionError
from jllm_convert.files.regular_file import RegularFile
from jllm_convert.sources.huggingface.folder import SafetensorsSource
from jllm_convert.sources.quantized.fp8 import ScaledMatrix, scales_shape
from jllm_convert.sources.stored_array import StoredArray

TinyConfig = Callable[..., dict[str, Any]]

FP8_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "modules_to_not_convert": None,
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
NAMES = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(ml_dtypes.bfloat16): "BF16"}


def dequantised(values: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Every value times the scale of the block that it is in."""
    rows, columns = np.indices(values.shape)
    by_value = scales.astype(np.float32)[rows // block[0], columns // block[1]]
    return values.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * by_value


def stored(folder: Path, name: str, values: np.ndarray) -> StoredArray:
    path = folder / name
    path.write_bytes(values.tobytes())
    return StoredArray(name, RegularFile.at(path, name), 0, values.shape, values.dtype)


def random_matrix(shape: tuple[int, int], block: tuple[int, int], dtype: Any = np.float32) -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    values = random.integers(0, 256, shape, dtype=np.uint8)
    return values, random.uniform(1e-4, 2.0, scales_shape(shape, block)).astype(dtype)


@st.composite
def cases(draw: st.DrawFn) -> Any:
    shape = draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    block = draw(st.tuples(st.integers(1, 8), st.integers(1, 8)))
    box = []
    for size in shape:
        start, stop = sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size))))
        box.append(slice(start, stop))
    return shape, block, tuple(box)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(case=cases(), dtype=st.sampled_from([np.float32, ml_dtypes.bfloat16]))
def test_any_box_is_the_stored_values_times_their_scales(
    tmp_path_factory: pytest.TempPathFactory, case: Any, dtype: Any
) -> None:
    shape, block, box = case
    folder = tmp_path_factory.getbasetemp()
    values, scales = random_matrix(shape, block, dtype)
    matrix = ScaledMatrix(stored(folder, "w", values), stored(folder, "s", scales), block)
    part = matrix.read(box)
    assert part.dtype == matrix.dtype == np.float32
    np.testing.assert_array_equal(part, dequantised(values, scales, block)[box])


def test_every_value_is_what_ml_dtypes_takes_it_for(tmp_path: Path) -> None:
    values = np.arange(256, dtype=np.uint8).reshape(2, 128)
    matrix = ScaledMatrix(stored(tmp_path, "w", values), stored(tmp_path, "s", np.ones((1, 1), np.float32)), (128, 128))
    read = matrix.read((slice(0, 2), slice(0, 128)))
    np.testing.assert_array_equal(read, values.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert (read[0, 126], np.isnan(read[0, 127]), np.isnan(read).sum()) == (448.0, True, 2)


def test_a_large_box_takes_little_more_than_its_result(tmp_path: Path) -> None:
    values, scales = random_matrix((2048, 1024), (128, 128))
    matrix = ScaledMatrix(stored(tmp_path, "w", values), stored(tmp_path, "s", scales), (128, 128))
    tracemalloc.start()
    matrix.read((slice(0, 2048), slice(0, 1024)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    row_of_blocks = 128 * 1024
    assert peak < values.size * (4 + 1) + row_of_blocks * (4 + 8) + 2**20


# ---- In a folder


def write_folder(folder: Path, config: dict[str, Any], *shards: dict[str, np.ndarray]) -> Path:
    """A Hugging Face folder; uint8 stands for F8_E4M3."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for number, tensors in enumerate(shards):
        header, data = {}, b""
        for name, values in tensors.items():
            end = len(data) + values.nbytes
            dtype = NAMES.get(values.dtype, "F8_E4M3")
            header[name] = {"dtype": dtype, "shape": values.shape, "data_offsets": [len(data), end]}
            data += values.tobytes()
            weight_map[name] = f"{number}.safetensors"
        text = json.dumps(header).encode()
        (folder / f"{number}.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def problems_of(folder: Path) -> tuple[str, ...]:
    with pytest.raises(ConversionError) as caught:
        SafetensorsSource(folder)
    return caught.value.problems


@pytest.fixture
def fp8_config(tiny_config: TinyConfig) -> dict[str, Any]:
    return tiny_config(quantization_config=FP8_CONFIG)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_source_multiplies_the_scales_in_and_hides_them(
    tmp_path: Path, fp8_config: dict[str, Any], dtype: Any
) -> None:
    """The scales may be in another shard than the weight, and before or after it."""
    (w, w_scales), (v, v_scales) = (
        random_matrix((130, 256), (128, 128), dtype),
        random_matrix((7, 300), (128, 128), dtype),
    )
    norm = np.ones(3, ml_dtypes.bfloat16)
    first = {"w": w, "n": norm, "v_scale_inv": v_scales}
    source = SafetensorsSource(write_folder(tmp_path / "m", fp8_config, first, {"w_scale_inv": w_scales, "v": v}))
    assert source.tensors.keys() == {"w", "v", "n"}
    for name, values, scales in (("w", w, w_scales), ("v", v, v_scales)):
        tensor = source.tensors[name]
        assert (tensor.dtype, tensor.shape, tensor.stored) == (np.float32, values.shape, "F8_E4M3")
        np.testing.assert_array_equal(tensor.read(), dequantised(values, scales, (128, 128)))
    box = (slice(127, 129), slice(100, 200))
    np.testing.assert_array_equal(source.tensors["w"].read(box), dequantised(w, w_scales, (128, 128))[box])
    assert source.tensors["n"].stored == "BF16"
    assert source.config().num_layers == 2


W, S = np.zeros((130, 256), np.uint8), np.ones((2, 2), np.float32)
NEED = "the config's blocks of 128 by 128 need [2, 2] in F32 or BF16"
STORED = "0.safetensors: tensor 'w' is stored as F8_E4M3, and "


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"w": W}, f"{STORED}its scales 'w_scale_inv' are missing; download the folder again"),
        ({"w": W, "w_scale_inv": S[:1]}, f"{STORED}its scales 'w_scale_inv' are F32 [1, 2]; {NEED}"),
        ({"w": W, "w_scale_inv": S[0]}, f"{STORED}its scales 'w_scale_inv' are F32 [2]; {NEED}"),
        (
            {"w": W, "w_scale_inv": np.ones((3, 4), np.float32)},
            f"{STORED}its scales 'w_scale_inv' are F32 [3, 4]; {NEED}",
        ),
        ({"w": W, "w_scale_inv": np.float32(1)}, f"{STORED}its scales 'w_scale_inv' are F32 []; {NEED}"),
        ({"w": W, "w_scale_inv": S.astype(np.float16)}, f"{STORED}its scales 'w_scale_inv' are F16 [2, 2]; {NEED}"),
        ({"w": W, "w_scale_inv": S.astype(np.uint8)}, f"{STORED}its scales 'w_scale_inv' are F8_E4M3 [2, 2]; {NEED}"),
        ({"w": W[0], "w_scale_inv": S}, f"{STORED}has shape [256]; only matrices can be"),
        ({"w_scale_inv": S}, "0.safetensors: tensor 'w_scale_inv' holds scales of 'w', which is missing"),
        (
            {"w": np.ones((130, 256), np.float32), "w_scale_inv": S},
            "0.safetensors: tensor 'w_scale_inv' holds scales of 'w', which is F32 and takes none",
        ),
    ],
    ids=range(10),
)
def test_weights_and_scales_that_do_not_fit_are_refused(
    tmp_path: Path, fp8_config: dict[str, Any], tensors: dict[str, Any], problem: str
) -> None:
    arrays = {name: np.asarray(values) for name, values in tensors.items()}
    assert problems_of(write_folder(tmp_path / "m", fp8_config, arrays)) == (problem,)


def test_without_a_quantization_config_they_are_refused(tmp_path: Path, tiny_config: TinyConfig) -> None:
    assert problems_of(write_folder(tmp_path / "m", tiny_config(), {"w": W, "w_scale_inv": S})) == (
        "0.safetensors: tensor 'w' is stored as F8_E4M3, as quantised weights are, and config.json has no "
        "quantization_config that says what their values stand for. To go on, convert the publisher's unquantised "
        "weights, or a GGUF file, instead",
    )


def test_another_kind_of_quantising_is_told_once(tmp_path: Path, tiny_config: TinyConfig) -> None:
    """And not for each tensor that it made something else of."""
    config = tiny_config(quantization_config={"quant_method": "gptq", "bits": 4})
    (problem,) = problems_of(write_folder(tmp_path / "m", config, {"w": W, "v": W}))
    assert problem == (
        "config.json: quantization_config has the quant_method 'gptq', only 'fp8' is supported; "
        "convert the publisher's unquantised weights, or a GGUF file"
    )
