"""Converting to 8 and 4 bits: which grid, what is stored, what is kept as it was, and what is refused."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from jllm_convert import ConversionError, convert
from jllm_convert.families.tensor_layout import Identity
from jllm_convert.families.tensor_parts import Slot
from jllm_convert.matching.rules import Match, Part
from jllm_convert.quality.grid_choice import choose_grid
from jllm_convert.quality.receipt import measure, receipt_text, text_ids
from jllm_convert.sources.base import SourceTensor
from jllm_convert.writing import tensor_jobs
from jllm_core import Quantization, QuantizedArray, abstract_weights, checkpoint
from jllm_core.array_info import ArrayInfo, named_leaves
from jllm_core.checkpoint import chunk_grid, whole
from jllm_core.quantization.arrays import abstract_quantized, dequantize
from jllm_core.quantization.grids import quantize
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

Tensors = dict[str, np.ndarray]
Write = Callable[..., Path]


@pytest.fixture
def config(tiny_config: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return tiny_config(hidden_size=64, intermediate_size=96, head_dim=32, attention_bias=True)


@pytest.fixture
def tensors(config: dict[str, Any], hf_tensors: Callable[..., Tensors]) -> Tensors:
    return hf_tensors(config)


@pytest.fixture
def source(tmp_path: Path, write_hf: Write, config: dict[str, Any], tensors: Tensors) -> Path:
    return write_hf(tmp_path / "source", config, tensors)


def stored(folder: Path) -> dict[str, np.ndarray]:
    config, manifest = checkpoint.read_config(folder), checkpoint.read_manifest(folder)
    infos = named_leaves(abstract_weights(config, manifest.dtype, manifest.quantization))
    return {name: checkpoint.ArrayStore.open(folder / checkpoint.WEIGHTS_FOLDER, name).read() for name in infos}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"quantize": "int8"}, Quantization(8)),
        ({"quantize": "int8", "group": 32}, Quantization(8, 32)),
        ({"quantize": "int4"}, Quantization(4, 32)),
        ({"quantize": "int4", "offsets": True}, Quantization(4, 32, offsets=True)),
    ],
    ids=str,
)
def test_matrices_are_quantised_and_the_rest_is_kept(
    tmp_path: Path,
    source: Path,
    config: dict[str, Any],
    tensors: Tensors,
    expected_arrays: Callable[..., Tensors],
    arguments: dict[str, Any],
    expected: Quantization,
) -> None:
    result = convert(source, tmp_path / "model", **arguments)
    assert result.manifest == checkpoint.read_manifest(tmp_path / "model")
    assert result.manifest.quantization == expected
    arrays, plain = stored(tmp_path / "model"), expected_arrays(config, tensors)
    for name in ("attn.q", "attn.k", "attn.v", "attn.o", "ffw.w_gate", "ffw.w_up", "ffw.w_down"):
        name = f"layers.1.{name}"
        wanted = quantize(plain[name], expected, inputs=2 if name.endswith(".o") else 1)
        for part in ("values", "scales", *(["offsets"] if expected.offsets else [])):
            np.testing.assert_array_equal(arrays.pop(f"{name}.{part}"), getattr(wanted, part), err_msg=name)
    assert arrays["lm_head.values"].dtype == (np.int8 if expected.bits == 8 else np.uint8)
    for name in ("embedding", "gamma_final", "layers.1.attn_pre_gamma", "layers.1.attn.q_bias"):
        np.testing.assert_array_equal(arrays[name], plain[name])
    assert "there is no receipt" in result.warnings[-1]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_embedding_is_quantised_where_that_is_asked_for(
    tmp_path: Path,
    write_hf: Write,
    config: dict[str, Any],
    tensors: Tensors,
    expected_arrays: Callable[..., Tensors],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    tied: bool,
) -> None:
    monkeypatch.setattr(chunk_grid, "MIN_CHUNKED_BYTES", 512)
    config["tie_word_embeddings"] = tied
    if tied:
        del tensors["lm_head.weight"]
    source = write_hf(tmp_path / "source", config, tensors)
    result, kept = (
        convert(source, tmp_path / name, quantize=kind, embedding=name, dtype="bfloat16") for name in ("int8", "keep")
    )
    assert result.manifest.quantization == dataclasses.replace(choose_grid(kind, None, False, []), embedding=8)
    arrays, others = stored(result.path), stored(kept.path)
    wanted = quantize(expected_arrays(config, tensors)["embedding"], Quantization(8), batch=1)
    np.testing.assert_array_equal(arrays.pop("embedding.values"), wanted.values)
    np.testing.assert_array_equal(arrays.pop("embedding.scales"), wanted.scales)
    assert others.pop("embedding").dtype.name == "bfloat16"
    assert arrays.keys() == others.keys()
    for name, numbers in others.items():
        np.testing.assert_array_equal(arrays[name], numbers, err_msg=name)
    assert convert(source, tmp_path / "default", quantize=kind, dtype="bfloat16").manifest == kept.manifest


@pytest.mark.parametrize(
    ("kind", "quantize_to", "expected"),
    [
        (Kind.Q8_0, "int8", Quantization(8, 32)),
        (Kind.Q4_0, "int4", Quantization(4, 32)),
        (Kind.Q4_1, "int4", Quantization(4, 32, offsets=True)),
        (Kind.Q8_0, "int4", Quantization(4, 32)),
        (Kind.Q4_1, "int8", Quantization(8)),
    ],
)
def test_a_grid_that_the_source_has_is_kept(
    tmp_path: Path,
    config: dict[str, Any],
    tensors: Tensors,
    gguf_metadata: Callable[..., dict[str, Any]],
    gguf_tensors: Callable[..., Tensors],
    write_gguf: Write,
    kind: Kind,
    quantize_to: str,
    expected: Quantization,
) -> None:
    named = gguf_tensors(config, tensors)
    types = {name: kind for name, tensor in named.items() if tensor.ndim == 2 and name != "token_embd.weight"}
    path = write_gguf(tmp_path / "model.gguf", gguf_metadata(config), named, types=types)
    result = convert(path, tmp_path / "model", quantize=quantize_to)
    assert result.manifest.quantization == expected
    arrays = stored(tmp_path / "model")
    parts = [arrays.get(f"layers.0.ffw.w_up.{part}") for part in ("values", "scales", "offsets")]
    numbers = np.asarray(dequantize(QuantizedArray(*parts, axis=0, bits=expected.bits)))
    exact = gguf.dequantize(gguf.quantize(named["blk.0.ffn_up.weight"], kind), kind).T
    same_bits = expected.bits == (8 if kind == Kind.Q8_0 else 4)
    assert np.array_equal(numbers, exact) is same_bits


def test_the_receipt_compares_the_two_on_the_shipped_text(
    tmp_path: Path, write_hf: Write, config: dict[str, Any], tensors: Tensors
) -> None:
    words = {word: number for number, word in enumerate(["?", "the", "of", "is", "and", ",", ".", "a"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    folder = write_hf(tmp_path / "source", config, tensors, tokenizer=json.loads(tokenizer.to_str()))
    small = {name: tensor * np.float32(0.2) if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}
    write_hf(folder, config, small)
    results = {kind: convert(folder, tmp_path / kind, quantize=kind) for kind in ("int8", "int4")}
    results["rows"] = convert(folder, tmp_path / "rows", quantize="int8", embedding="int8")
    fine, coarse, rows = (results[kind].receipt for kind in ("int8", "int4", "rows"))
    assert rows is not None
    assert fine is not None
    assert coarse is not None
    assert 0 < fine.kl_nats < coarse.kl_nats
    assert fine.kl_nats < rows.kl_nats < coarse.kl_nats
    assert fine.top1_agreement >= coarse.top1_agreement
    assert fine.tokens == config["max_position_embeddings"]
    assert checkpoint.read_manifest(tmp_path / "int8").receipt == fine.as_dict()
    assert f"mean KL {fine.kl_nats:.4f} nats" in str(fine)
    # A model beside itself.
    model, manifest = checkpoint.read_config(tmp_path / "int8"), results["int8"].manifest
    infos = abstract_weights(model, manifest.dtype)
    arrays = stored_plain(folder, tmp_path / "plain")
    ids = text_ids(tmp_path / "int8" / "tokenizer.json", model)
    assert ids is not None
    same = measure(model, ids, infos, *[lambda name, box=None: arrays[name][box or ...]] * 2)
    assert (same.kl_nats, same.top1_agreement) == (0.0, 1.0)


def stored_plain(source: Path, target: Path) -> dict[str, np.ndarray]:
    convert(source, target)
    return stored(target)


def test_the_text_of_the_receipt_is_there() -> None:
    assert len(receipt_text().split()) > 250


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantize": "int2"}, "quantize must be one of int8, int4, got 'int2'"),
        ({"quantize": "int4", "group": 48}, "group must be one of 32, 64, 128, got 48"),
        ({"quantize": "int8", "offsets": True}, "offsets are for int4"),
        ({"group": 32}, "give quantize as well"),
        ({"embedding": "int8"}, "embedding is 'int8' and quantize is not given; give quantize as well"),
        ({"quantize": "int8", "embedding": "int4"}, "embedding must be one of keep, int8, got 'int4'"),
        ({"quantize": "int4", "group": 64}, r"groups of 64 do not divide axis 1 of \[4, 32, 64\]"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_for(tmp_path: Path, source: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "model", **arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_numbers_that_cannot_be_quantised_are_named(
    tmp_path: Path, write_hf: Write, config: dict[str, Any], tensors: Tensors
) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    source = write_hf(tmp_path / "source", config, tensors)
    with pytest.raises(ConversionError, match=r"NaN or infinite: 'model.layers.1.mlp.up_proj.weight' \(at \[3, 5\] in"):
        convert(source, tmp_path / "model", quantize="int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("arguments", [{"quantize": "int8"}, {"quantize": "int4"}, {"dtype": "bfloat16"}], ids=str)
def test_a_checkpoint_is_converted_like_what_it_was_made_from(
    tmp_path: Path, source: Path, arguments: dict[str, Any]
) -> None:
    if "dtype" in arguments:
        (source / "tokenizer.json").write_text("{}")
    direct = convert(source, tmp_path / "direct", **arguments)
    plain = convert(source, tmp_path / "plain")
    result = convert(plain.path, tmp_path / "model", **arguments)
    assert result.manifest.arrays == direct.manifest.arrays
    assert result.manifest.quantization == direct.manifest.quantization
    assert (result.path / "tokenizer.json").exists() is ("dtype" in arguments)
    assert checkpoint.read_eos_ids(result.path) == checkpoint.read_eos_ids(plain.path)
    with pytest.raises(ConversionError, match="say what to make of it"):
        convert(plain.path, tmp_path / "copy")
    if direct.manifest.quantization is not None:
        with pytest.raises(ConversionError, match=r"model is quantised already \(int"):
            convert(result.path, tmp_path / "again", quantize="int4")


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize(
    "grid", [Quantization(8), Quantization(8, 32), Quantization(4, 32), Quantization(4, 32, offsets=True)], ids=str
)
def test_a_matrix_in_blocks_is_quantised_as_it_is_in_one(
    experts: bool, grid: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_grid, "MIN_CHUNKED_BYTES", 512)
    monkeypatch.setattr(tensor_jobs, "_WORKSPACE", 0)
    random = np.random.default_rng(0)
    # An input axis of 6 groups is cut into 8 chunks, in the middle of groups.
    cases: list[tuple[tuple[int, ...], tuple[str, ...], int]] = [
        ((5, 64, 40), ("heads", "head_dim", "model"), 2),
        ((192, 40), ("ffw", "model"), 1),
        ((96, 200), ("model", "vocab"), 1),
    ]
    if experts:  # and, of an axis before the inputs as well, an embedding
        cases = [((8, *shape), ("experts", *axes), inputs) for shape, axes, inputs in cases[1:]]
        cases += [((200, 96), ("vocab", "model"), 1)]
    batch = int(experts)
    for shape, axes, inputs in cases:
        matrix = random.normal(size=shape).astype(np.float32)
        info = ArrayInfo(shape, np.float32, axes)
        tensor = SourceTensor("w", shape, info.dtype, Path("w"), lambda box, matrix=matrix: matrix[box])
        parts = abstract_quantized(info, grid, inputs, batch)
        made = tensor_jobs.QuantizedTensorJob(
            Match("w", info, (Part(tensor, Slot(whole(info.shape), Identity())),)), parts, grid
        )
        got = {name: np.full(each.shape, 77, each.dtype) for name, each in made.infos.items()}
        count = 0
        for name, box, values in made.pieces(1):
            got[name][box] = values
            count += name == "w.values"
        assert count > 4
        expected = quantize(matrix, grid, inputs, batch)
        for name, values in got.items():
            np.testing.assert_array_equal(values, getattr(expected, name.removeprefix("w.")), err_msg=f"{axes} {name}")
