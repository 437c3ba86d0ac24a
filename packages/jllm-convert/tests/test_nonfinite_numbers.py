"""NaN and infinity in weights: an error that names the tensors, unless they are asked for."""

import os
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from jllm_convert import convert
from jllm_convert.errors import ConversionError
from jllm_convert.sources.huggingface.safetensors_weights import StoredArray
from jllm_core import checkpoint
from jllm_core.checkpoint import first_nonfinite
from safetensors.numpy import save_file

Tensors = dict[str, np.ndarray]
Write = Callable[..., Path]
TinyConfig = Callable[..., dict[str, Any]]
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def tensors(tiny_config: TinyConfig, hf_tensors: Callable[..., Tensors]) -> Tensors:
    return hf_tensors(tiny_config())


@pytest.fixture
def write(tmp_path: Path, write_hf: Write, tiny_config: TinyConfig) -> Callable[[Tensors], Path]:
    return lambda tensors: write_hf(tmp_path / "source", tiny_config(), tensors)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- Which numbers


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("number", [np.nan, -np.nan, np.inf, -np.inf], ids=["nan", "-nan", "inf", "-inf"])
@pytest.mark.parametrize("place", [0, 1, 131_071, 131_072, 299_999])
def test_any_number_is_found_anywhere(dtype: Any, number: float, place: int) -> None:
    values = np.zeros((3, 100_000), dtype)
    assert first_nonfinite(values) is None
    values.reshape(-1)[place] = number
    assert first_nonfinite(values) == (place // 100_000, place % 100_000)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_largest_and_the_smallest_numbers_are_numbers(dtype: Any) -> None:
    limits = ml_dtypes.finfo(dtype)
    numbers = [limits.max, limits.min, limits.smallest_subnormal, -limits.smallest_subnormal, limits.tiny, 0.0, -0.0]
    assert first_nonfinite(np.array(numbers, dtype)) is None
    assert first_nonfinite(np.zeros((0, 3), dtype)) is None
    assert first_nonfinite(np.array(np.inf, dtype)) == ()


# ---- Conversions


@pytest.mark.parametrize("number", [np.nan, -np.nan, np.inf], ids=["nan", "-nan", "inf"])
@pytest.mark.parametrize("head", [np.float32, np.float16])
def test_a_tied_head_with_the_same_nan_is_the_same_head(
    tmp_path: Path,
    write_hf: Write,
    tiny_config: TinyConfig,
    hf_tensors: Callable[..., Tensors],
    number: float,
    head: Any,
) -> None:
    config = tiny_config(tie_word_embeddings=True)
    tensors = hf_tensors(config)
    embedding = tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].astype(np.float16)
    embedding[0, 0] = number
    embedding[0, 1] = 0
    tensors["lm_head.weight"] = embedding.astype(head)
    tensors["lm_head.weight"][0, 1] = -0.0
    source = write_hf(tmp_path / "source", config, tensors)
    with pytest.raises(
        ConversionError, match=r"^1 tensor holds numbers that are NaN or infinite: 'model\.embed_tokens"
    ):
        convert(source, tmp_path / "out")
    tensors["lm_head.weight"][1, 1] = np.nan
    with pytest.raises(ConversionError, match=r"'lm_head.weight' differs from"):
        convert(write_hf(tmp_path / "source", config, tensors), tmp_path / "out")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_folder_is_refused_by_the_names_of_all_its_tensors(
    tensors: Tensors, write: Callable[[Tensors], Path], tmp_path: Path, dtype: Any, number: float
) -> None:
    tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    tensors[UP][3, 5] = tensors["model.norm.weight"][7] = tensors["lm_head.weight"][10, 0] = number
    with pytest.raises(ConversionError) as refused:
        convert(write(tensors), tmp_path / "out")
    [problem] = refused.value.problems
    assert problem.startswith(
        "3 tensors hold numbers that are NaN or infinite: 'lm_head.weight' (at [10, 0] in model.safetensors), "
        f"{UP!r} (at [3, 5] in model.safetensors), 'model.norm.weight' (at [7] in model.safetensors). The files are"
    )
    assert "--allow-nonfinite" in problem
    # Nothing is left, not even what another conversion could resume from.
    assert files(tmp_path) == ["source"]


def test_they_are_taken_as_they_are_where_they_are_asked_for(
    tensors: Tensors, write: Callable[[Tensors], Path], tmp_path: Path
) -> None:
    tensors[UP][3, 5] = np.nan
    made = convert(write(tensors), tmp_path / "out", allow_nonfinite=True)
    [*_, warning] = made.warnings
    assert f"1 tensor holds numbers that are NaN or infinite: {UP!r}" in warning
    stored = checkpoint.ArrayStore.open(tmp_path / "out" / "weights", "layers.1.ffw.w_up").read()
    np.testing.assert_array_equal(stored, tensors[UP].T)


# The largest numbers of bfloat16 and float32 are 3.3895e38 and 3.4028e38.
@pytest.mark.parametrize("number", [3.4e38, -3.4e38, np.finfo(np.float32).max])
def test_numbers_that_the_new_type_cannot_hold_are_refused_too(
    tensors: Tensors, write: Callable[[Tensors], Path], tmp_path: Path, number: float
) -> None:
    tensors[UP][3, 5] = tensors["model.norm.weight"][7] = number
    tensors["lm_head.weight"][0, 0] = 3.3895e38  # rounds to the largest
    source = write(tensors)
    with pytest.raises(ConversionError) as refused:
        convert(source, tmp_path / "out", dtype="bfloat16")
    shown = f"{np.float32(number):.4g}"
    [problem] = refused.value.problems
    assert problem.startswith(
        f"2 tensors hold numbers that bfloat16 cannot hold: {UP!r} ({shown} in model.safetensors, layers.1.ffw.w_up at "
        f"[5, 3]), 'model.norm.weight' ({shown} in model.safetensors, gamma_final at [7]). Store them in a wider type "
        "(--dtype float32), or take the numbers as they are with --allow-nonfinite"
    )
    assert files(tmp_path) == ["source"]
    assert not convert(source, tmp_path / "wide").warnings[1:]
    [*_, warning] = convert(source, tmp_path / "out", dtype="bfloat16", allow_nonfinite=True).warnings
    assert "2 tensors hold numbers that bfloat16 cannot hold" in warning
    stored = checkpoint.ArrayStore.open(tmp_path / "out" / "weights", "layers.1.ffw.w_up").read()
    assert stored[5, 3] == np.sign(number) * np.inf


def test_numbers_beyond_65504_are_refused_in_float16(
    tensors: Tensors, write: Callable[[Tensors], Path], tmp_path: Path
) -> None:
    tensors[UP][3, 5], tensors["lm_head.weight"][0, 0] = 7e4, 65519  # rounds to 65504
    source = write(tensors)
    with pytest.raises(ConversionError, match=r"^1 tensor holds numbers that float16 cannot hold: ") as refused:
        convert(source, tmp_path / "out", dtype="float16")
    assert f"{UP!r} (7e+04 in model.safetensors, layers.1.ffw.w_up at [5, 3])" in str(refused.value)
    assert files(tmp_path) == ["source"]


def test_one_large_number_among_bfloat16_is_refused_without_asking_for_a_type(
    tensors: Tensors, write: Callable[[Tensors], Path], tmp_path: Path
) -> None:
    stored = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    stored["model.norm.weight"] = tensors["model.norm.weight"]
    stored["model.norm.weight"][7] = 3.4e38
    stored[UP][3, 5] = np.nan
    with pytest.raises(ConversionError) as refused:
        convert(write(stored), tmp_path / "out")
    assert "1 tensor holds numbers that are NaN or infinite: " in str(refused.value)
    assert "; 1 tensor holds numbers that bfloat16 cannot hold: 'model.norm.weight'" in str(refused.value)
    assert "download them again. Store them in a wider type" in str(refused.value)


def test_a_quantised_model_s_norms_may_not_become_infinite(
    tmp_path: Path, write_hf: Write, tiny_config: TinyConfig, hf_tensors: Callable[..., Tensors]
) -> None:
    config = tiny_config(hidden_size=64, intermediate_size=64, head_dim=32)
    tensors = hf_tensors(config)
    tensors["model.norm.weight"][7] = 3.4e38
    source = write_hf(tmp_path / "source", config, tensors)
    with pytest.raises(ConversionError, match="1 tensor holds numbers that bfloat16 cannot hold: "):
        convert(source, tmp_path / "out", dtype="bfloat16", quantize="int8")


@pytest.mark.parametrize("arguments", [{"quantize": "int8"}, {"quantize": "int8", "group": 32}, {"quantize": "int4"}])
def test_a_quantised_conversion_names_the_tensors_too(
    tmp_path: Path, write_hf: Write, tiny_config: TinyConfig, hf_tensors: Callable[..., Tensors], arguments: Any
) -> None:
    config = tiny_config(hidden_size=64, intermediate_size=64, head_dim=32)
    tensors = hf_tensors(config)
    other = "model.layers.0.self_attn.o_proj.weight"
    tensors[UP][3, 5] = tensors[other][0, 0] = np.nan
    source = write_hf(tmp_path / "source", config, tensors)
    with pytest.raises(ConversionError) as refused:
        convert(source, tmp_path / "out", **arguments)
    assert f"2 tensors hold numbers that are NaN or infinite: {other!r}" in str(refused.value)
    # No grid has a place for them, asked for or not.
    with pytest.raises(ConversionError, match="cannot be quantised: the matrix holds numbers that are not finite"):
        convert(source, tmp_path / "out", **arguments, allow_nonfinite=True)
    assert files(tmp_path) == ["source"]


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_a_gguf_file_is_refused_by_the_names_of_its_tensors(
    tmp_path: Path,
    tiny_config: TinyConfig,
    hf_tensors: Callable[..., Tensors],
    gguf_metadata: Callable[..., dict[str, Any]],
    gguf_tensors: Callable[..., Tensors],
    write_gguf: Write,
    kind: str,
) -> None:
    config = tiny_config(hidden_size=32, intermediate_size=64, head_dim=8)
    tensors = gguf_tensors(config, hf_tensors(config))
    name = "blk.1.ffn_up.weight"
    from gguf import GGMLQuantizationType, GGUFReader

    path = write_gguf(tmp_path / "model.gguf", gguf_metadata(config), tensors, types={name: GGMLQuantizationType[kind]})
    tensor = next(each for each in GGUFReader(path).tensors if each.name == name)
    with path.open("r+b") as file:
        file.seek(int(tensor.data_offset))
        file.write(struct.pack("<e", np.inf))  # a number, or the scale of a block
    with pytest.raises(ConversionError) as refused:
        convert(path, tmp_path / "out")
    assert f"1 tensor holds numbers that are NaN or infinite: {name!r} (at [0, 0] in model.gguf)" in str(refused.value)
    assert convert(path, tmp_path / "out", allow_nonfinite=True).warnings


@pytest.mark.parametrize("allow", [False, True])
def test_a_resumed_conversion_does_not_forget_them(
    tensors: Tensors, write: Callable[[Tensors], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allow: bool
) -> None:
    """The array with the bad number is complete when the conversion is interrupted; it must not be taken for done."""
    tensors["model.embed_tokens.weight"][0, 0] = np.nan
    source = write(tensors)
    read = StoredArray.read

    def interrupted(array: StoredArray, box: Any) -> np.ndarray:
        if array.name == "model.norm.weight":
            os.kill(os.getpid(), signal.SIGINT)
        return read(array, box)

    # One thread, largest arrays first: the embedding is done before the norm.
    monkeypatch.setattr("jllm_convert.writing.memory_budget.processors", lambda: 0.5)
    monkeypatch.setattr(StoredArray, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", allow_nonfinite=allow)
    monkeypatch.setattr(StoredArray, "read", read)
    if allow:
        made = convert(source, tmp_path / "out", allow_nonfinite=True)
        assert "'model.embed_tokens.weight'" in made.warnings[-1]
        assert "'model.embed_tokens.weight'" in made.manifest.source["nonfinite_numbers"]
        return
    with pytest.raises(ConversionError, match=r"'model\.embed_tokens\.weight'"):
        convert(source, tmp_path / "out")
    assert files(tmp_path) == ["source"]


@pytest.mark.parametrize(("number", "dtype"), [(np.nan, None), (-np.inf, None), (3.4e38, "bfloat16")])
def test_a_conversion_that_is_there_with_them_is_refused_as_a_new_one_would_be(
    tensors: Tensors, write: Callable[[Tensors], Path], tmp_path: Path, number: float, dtype: Any
) -> None:
    tensors[UP][3, 5] = number
    source = write(tensors)
    made = convert(source, tmp_path / "out", dtype, allow_nonfinite=True)
    assert UP in made.manifest.source["nonfinite_numbers"]
    assert not convert(source, tmp_path / "out", dtype, exist_ok=True, allow_nonfinite=True).is_new
    for more in ({}, {"overwrite": True}):
        with pytest.raises(
            ConversionError, match="out is this conversion, made with --allow-nonfinite: 1 tensor holds"
        ):
            convert(source, tmp_path / "out", dtype, exist_ok=True, **more)
    assert checkpoint.read_manifest(tmp_path / "out") == made.manifest


def test_numbers_that_are_finite_leave_no_trace_of_what_was_allowed(
    tensors: Tensors, write: Callable[[Tensors], Path], tmp_path: Path
) -> None:
    source = write(tensors)
    made = convert(source, tmp_path / "out", allow_nonfinite=True)
    assert "nonfinite_numbers" not in made.manifest.source
    assert not convert(source, tmp_path / "out", exist_ok=True).is_new


def test_many_tensors_are_one_sentence(tmp_path: Path, write_hf: Write, tiny_config: TinyConfig) -> None:
    config = tiny_config(num_hidden_layers=30)
    from jllm_convert.sources.huggingface.folder import SafetensorsSource

    shapes = {"model.embed_tokens.weight": (11, 16), "model.norm.weight": (16,), "lm_head.weight": (11, 16)}
    for i in range(30):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{each}_layernorm.weight": (16,) for each in ("input", "post_attention")}
        shapes |= {f"{layer}.self_attn.{n}_proj.weight": (24 if n == "q" else 12, 16) for n in "qkv"}
        shapes |= {f"{layer}.self_attn.o_proj.weight": (16, 24), f"{layer}.mlp.down_proj.weight": (16, 20)}
        shapes |= {f"{layer}.mlp.{n}_proj.weight": (20, 16) for n in ("gate", "up")}
    source = write_hf(tmp_path / "source", config, {name: np.full(s, np.nan, np.float32) for name, s in shapes.items()})
    assert len(SafetensorsSource(source).tensors) == 273
    with pytest.raises(ConversionError) as refused:
        convert(source, tmp_path / "out")
    assert "273 tensors hold numbers" in str(refused.value)
    assert "and 253 more" in str(refused.value)
    assert len(str(refused.value)) < 3000


def test_an_expert_is_named_by_its_own_tensor(tmp_path: Path, tiny_config: TinyConfig, write_hf: Write) -> None:
    config = tiny_config(
        model_type="qwen3_moe", num_hidden_layers=1, num_experts=3, num_experts_per_tok=1, moe_intermediate_size=4
    )
    d, h = 16, 6
    layer = "model.layers.0"
    shapes = {
        **{"model.embed_tokens.weight": (11, d), "model.norm.weight": (d,), "lm_head.weight": (11, d)},
        **{f"{layer}.input_layernorm.weight": (d,), f"{layer}.post_attention_layernorm.weight": (d,)},
        **{f"{layer}.self_attn.q_proj.weight": (4 * h, d), f"{layer}.self_attn.o_proj.weight": (d, 4 * h)},
        **{f"{layer}.self_attn.{n}_proj.weight": (2 * h, d) for n in "kv"},
        **{f"{layer}.self_attn.{n}_norm.weight": (h,) for n in "qk"},
        f"{layer}.mlp.gate.weight": (3, d),
        **{f"{layer}.mlp.experts.{e}.{n}_proj.weight": (4, d) for e in range(3) for n in ("gate", "up")},
        **{f"{layer}.mlp.experts.{e}.down_proj.weight": (d, 4) for e in range(3)},
    }
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    bad = f"{layer}.mlp.experts.1.up_proj.weight"
    tensors[bad][2, 9] = np.inf
    source = write_hf(tmp_path / "source", config)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ConversionError) as refused:
        convert(source, tmp_path / "out")
    assert f"1 tensor holds numbers that are NaN or infinite: {bad!r} (at [2, 9] in" in str(refused.value)
    tensors[bad][2, 9] = 3.4e38
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ConversionError) as refused:
        convert(source, tmp_path / "out", dtype="bfloat16")
    assert f"{bad!r} (3.4e+38 in model.safetensors, layers.0.ffw.we_up at [1, 9, 2])" in str(refused.value)
