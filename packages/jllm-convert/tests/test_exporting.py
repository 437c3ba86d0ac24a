"""Whole exports: what comes out of a checkpoint is what went in, and nothing is left of an export that fails."""

import dataclasses
import json
import os
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from jllm_convert import Progress, convert
from jllm_convert.errors import ConversionError
from jllm_convert.exporting.export import export
from jllm_convert.exporting.quantized_store import QuantizedStore
from jllm_convert.exporting.safetensors_writer import SafetensorsWriter
from jllm_convert.families import FAMILIES
from jllm_convert.quality.grid_choice import matrices_of
from jllm_convert.sources.huggingface.config import read_hf_config
from jllm_convert.writing import memory_budget
from jllm_core import Quantization, QuantizedArray, abstract_weights, checkpoint
from jllm_core.array_info import named_leaves
from jllm_core.checkpoint import ArrayStore, CheckpointError, atomic_rename, chunk_grid
from jllm_core.quantization.arrays import dequantize
from safetensors import safe_open
from safetensors.numpy import load_file

Tensors = dict[str, np.ndarray]
Write = Callable[..., Path]
TinyConfig = Callable[..., dict[str, Any]]
MakeTensors = Callable[[dict[str, Any]], Tensors]
MakeCheckpoint = Callable[..., Path]

TOKENIZER = {"tokenizer": {"version": "1.0"}, "tokenizer_config": {"eos_token": "x"}}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "eleven layers": {"num_hidden_layers": 11},
    "mistral": {"model_type": "mistral"},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 4},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "experts": {"model_type": "qwen3_moe", **EXPERTS},
    "experts in one layer": {"model_type": "qwen3_moe", **EXPERTS, "mlp_only_layers": [0]},
}


@pytest.fixture
def make_tensors(hf_tensors: Callable[..., Tensors]) -> MakeTensors:
    """Random tensors for a config.json of any family."""

    def make(config: dict[str, Any]) -> Tensors:
        family, tensors = FAMILIES[config["model_type"]], hf_tensors(config)
        random = np.random.default_rng(1)

        def add(name: str, *shape: int) -> None:
            tensors[name] = random.normal(size=shape).astype(np.float32)

        for i in range(config["num_hidden_layers"]):
            attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
            if family.qk_norm:
                add(f"{attention}.q_norm.weight", config["head_dim"])
                add(f"{attention}.k_norm.weight", config["head_dim"])
            if family.attention_bias == "qkv":
                for name in ("q_proj", "k_proj", "v_proj"):
                    add(f"{attention}.{name}.bias", len(tensors[f"{attention}.{name}.weight"]))
            if family.moe and i not in config.get("mlp_only_layers", ()):
                d, f = config["hidden_size"], config["moe_intermediate_size"]
                for name in ("gate", "up", "down"):
                    del tensors[f"{mlp}.{name}_proj.weight"]
                add(f"{mlp}.gate.weight", config["num_experts"], d)
                for e in range(config["num_experts"]):
                    add(f"{mlp}.experts.{e}.gate_proj.weight", f, d)
                    add(f"{mlp}.experts.{e}.up_proj.weight", f, d)
                    add(f"{mlp}.experts.{e}.down_proj.weight", d, f)
        return tensors

    return make


@pytest.fixture
def make_checkpoint(
    tmp_path: Path, tiny_config: TinyConfig, make_tensors: MakeTensors, write_hf: Write
) -> MakeCheckpoint:
    """A converted model; its source stays at ``tmp_path / "source"``."""

    def make(
        dtype: Any = np.float32,
        quantize: Quantization | None = None,
        stored: str | None = None,
        json_files: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Path:
        config = tiny_config(**changes)
        tensors = {name: tensor.astype(dtype) for name, tensor in make_tensors(config).items()}
        # Quantising would read a text with the tokenizer.
        files = (TOKENIZER if quantize is None else {}) if json_files is None else json_files
        write_hf(tmp_path / "source", config, tensors, **files)
        grid: dict[str, Any] = {} if quantize is None else {"group": quantize.group, "offsets": quantize.offsets}
        if quantize is not None and quantize.embedding is not None:
            grid["embedding"] = f"int{quantize.embedding}"
        bits = None if quantize is None else f"int{quantize.bits}"
        convert(tmp_path / "source", tmp_path / "model", stored, bits, **grid)
        return tmp_path / "model"

    return make


@pytest.fixture
def small_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any memory budget may be asked for."""
    monkeypatch.setattr(memory_budget, "MIN_MEMORY", 1)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays of a few bytes are cut as those of real models are."""
    monkeypatch.setattr(chunk_grid, "MIN_CHUNKED_BYTES", 16)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out" / "hf"


def loaded(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def assert_same(got: Tensors, expected: Tensors) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert got[name].tobytes() == tensor.tobytes(), name


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def as_hf(array: str, values: np.ndarray) -> np.ndarray:
    """A matrix of the model as torch has it: outputs, then inputs."""
    inputs = 2 if array.endswith(".o") else 1
    return values.reshape(int(np.prod(values.shape[:inputs])), -1).T


# ---- What comes out


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("small_chunks", "small_budget")
def test_names_and_bits_are_those_of_the_source(
    tmp_path: Path, target: Path, make_checkpoint: MakeCheckpoint, variant: str
) -> None:
    dtype = np.dtype(ml_dtypes.bfloat16 if variant in ("qwen3", "experts") else np.float32)
    model = make_checkpoint(dtype, **VARIANTS[variant])
    result = export(model, target)
    expected = load_file(tmp_path / "source" / "model.safetensors")
    assert_same(load_file(target / "model.safetensors"), expected)
    with safe_open(target / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
    config = json.loads((target / "config.json").read_text())
    assert read_hf_config(config, "config.json") == checkpoint.read_config(model)
    assert (config["torch_dtype"], config["eos_token_id"]) == (dtype.name, 3)
    assert (result.path, result.dtype, result.warnings) == (target, dtype.name, ())
    assert (result.tensors, result.files) == (len(expected), ("model.safetensors",))
    assert result.nbytes == (target / "model.safetensors").stat().st_size
    assert ("lm_head.weight" in expected) == (variant != "tied")
    export(model, target, memory=1, overwrite=True)  # chunk by chunk
    assert_same(load_file(target / "model.safetensors"), expected)


@pytest.mark.usefixtures("small_chunks")
def test_chunks_are_cut_in_these_tests(make_checkpoint: MakeCheckpoint) -> None:
    weights = make_checkpoint(**VARIANTS["experts"]) / "weights"
    for name in ("layers.0.attn.q", "layers.0.attn.o", "layers.0.ffw.we_up", "layers.0.ffw.we_down", "embedding"):
        assert len(ArrayStore.open(weights, name).blocks(1)) > 1, name
    assert len({box[0].start for box in ArrayStore.open(weights, "layers.0.ffw.we_up").blocks(1)}) > 1


def test_converting_again_gives_the_same_checkpoint(
    tmp_path: Path, target: Path, make_checkpoint: MakeCheckpoint
) -> None:
    model = make_checkpoint(**VARIANTS["qwen3"])
    export(model, target)
    again = convert(target, tmp_path / "again")
    assert again.manifest.arrays == checkpoint.read_manifest(model).arrays
    assert again.config == checkpoint.read_config(model)


def test_the_other_files(target: Path, make_checkpoint: MakeCheckpoint) -> None:
    generation = {"eos_token_id": [4, 3], "bos_token_id": 1, "pad_token_id": 2, "temperature": 0.5}
    model = make_checkpoint(json_files={**TOKENIZER, "generation_config": generation})
    export(model, target)
    assert files_in(target) == [
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ]
    assert files_in(target.parent) == ["hf"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (target / name).read_bytes() == (model / name).read_bytes()
    assert json.loads((target / "generation_config.json").read_text()) == {**generation, "eos_token_id": [3, 4]}
    config = json.loads((target / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, [3, 4], 2)


def test_a_model_without_a_tokenizer_or_an_end(target: Path, make_checkpoint: MakeCheckpoint) -> None:
    model = make_checkpoint(json_files={}, eos_token_id=None)
    result = export(model, target)
    assert result.warnings == ("model has no tokenizer.json: the exported folder takes token ids only",)
    assert files_in(target) == ["config.json", "model.safetensors"]
    assert json.loads((target / "config.json").read_text())["eos_token_id"] is None


def test_several_files(tmp_path: Path, target: Path, make_checkpoint: MakeCheckpoint) -> None:
    result = export(make_checkpoint(), target, shard_bytes=3000)
    assert len(result.files) > 2
    assert {*result.files, "model.safetensors.index.json"} < set(files_in(target))
    assert_same(loaded(target), load_file(tmp_path / "source" / "model.safetensors"))
    convert(target, tmp_path / "again")  # reads and checks the index


def test_progress_ends_at_the_total(target: Path, make_checkpoint: MakeCheckpoint) -> None:
    seen: list[Progress] = []
    export(make_checkpoint(), target, on_progress=seen.append)
    nbytes = sum(tensor.nbytes for tensor in loaded(target).values())
    count = len(loaded(target))
    assert seen[-1] == Progress(count, count, nbytes, nbytes, "exporting")
    assert [each.nbytes for each in seen] == sorted(each.nbytes for each in seen)


@pytest.mark.usefixtures("small_budget")
def test_memory_is_bounded(target: Path, make_checkpoint: MakeCheckpoint) -> None:
    sizes = {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 2048}
    model, memory = make_checkpoint(**sizes), 4 << 20
    tracemalloc.start()
    result = export(model, target, memory=memory)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result.nbytes > 28 << 20
    assert peak < 1.5 * memory


# ---- Element types


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.usefixtures("small_chunks")
def test_a_dtype_casts(tmp_path: Path, target: Path, make_checkpoint: MakeCheckpoint, dtype: str) -> None:
    result = export(make_checkpoint(), target, dtype=dtype)
    source = load_file(tmp_path / "source" / "model.safetensors")
    assert_same(loaded(target), {name: tensor.astype(dtype) for name, tensor in source.items()})
    assert result.dtype == json.loads((target / "config.json").read_text())["torch_dtype"] == dtype


def state_source_dtype(model: Path, dtype: Any) -> None:
    manifest = checkpoint.read_manifest(model)
    dataclasses.replace(manifest, source={**manifest.source, "dtype": dtype}).write(model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_type_of_the_source_comes_back(
    tmp_path: Path, target: Path, make_checkpoint: MakeCheckpoint, dtype: str
) -> None:
    model = make_checkpoint(dtype, stored="float32")
    state_source_dtype(model, dtype)
    assert export(model, target).dtype == dtype
    assert_same(loaded(target), load_file(tmp_path / "source" / "model.safetensors"))


@pytest.mark.parametrize("dtype", ["float64", "Q4_0", ["float16"], None])
def test_another_type_of_the_source_is_no_hint(target: Path, make_checkpoint: MakeCheckpoint, dtype: Any) -> None:
    model = make_checkpoint()
    state_source_dtype(model, dtype)
    assert export(model, target).dtype == "float32"


def test_a_checkpoint_in_bfloat16_stays_so_whatever_its_source_was(
    target: Path, make_checkpoint: MakeCheckpoint
) -> None:
    model = make_checkpoint(stored="bfloat16")
    state_source_dtype(model, "float32")
    assert export(model, target).dtype == "bfloat16"


def test_no_bit_is_lost_unasked(target: Path, make_checkpoint: MakeCheckpoint) -> None:
    model = make_checkpoint()
    state_source_dtype(model, "float16")
    with pytest.raises(ConversionError, match=r"numbers such as .* float16 does not hold exactly.*--dtype float32"):
        export(model, target)
    assert files_in(target.parent) == []


def change(model: Path, array: str, number: float) -> None:
    store = ArrayStore.open(model / "weights", array)
    values = store.read()
    values.flat[5] = number
    store.write(checkpoint.whole(store.shape), values)


def test_an_overflow_is_an_error(target: Path, make_checkpoint: MakeCheckpoint) -> None:
    model = make_checkpoint()
    change(model, "layers.1.attn.v", -1e5)
    with pytest.raises(ConversionError, match=r"layers\.1\.attn\.v has numbers such as -100000\.0, .*float16 cannot"):
        export(model, target, dtype="float16")
    assert files_in(target.parent) == []
    export(model, target, dtype="bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_no_number_passes(target: Path, make_checkpoint: MakeCheckpoint, dtype: str) -> None:
    model = make_checkpoint(np.float16, stored="float32")
    state_source_dtype(model, dtype)
    change(model, "gamma_final", np.nan)
    change(model, "layers.0.attn_pre_gamma", -np.inf)
    export(model, target)
    tensors = loaded(target)
    assert np.isnan(tensors["model.norm.weight"]).sum() == 1
    assert np.isneginf(tensors["model.layers.0.input_layernorm.weight"]).sum() == 1


# ---- Quantised checkpoints

QUANTIZED = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_hidden_layers": 1}
GRIDS = [
    Quantization(8),
    Quantization(8, 32),
    Quantization(4, 32),
    Quantization(4, 32, offsets=True),
    Quantization(4, 32, embedding=8),
]


def dequantized(model: Path) -> Tensors:
    """Every array of a quantised checkpoint, as jllm-core dequantises it."""
    config, manifest = checkpoint.read_config(model), checkpoint.read_manifest(model)
    matrices = matrices_of(abstract_weights(config, manifest.dtype, manifest.quantization))
    arrays = {}
    for name in named_leaves(abstract_weights(config)):
        if name not in matrices:
            arrays[name] = ArrayStore.open(model / "weights", name).read()
            continue
        infos = matrices[name]
        values, scales, offsets = (
            None if getattr(infos, part) is None else ArrayStore.open(model / "weights", f"{name}.{part}").read()
            for part in ("values", "scales", "offsets")
        )
        array = QuantizedArray(values, scales, offsets, axis=infos.axis, bits=infos.bits)
        arrays[name] = np.asarray(dequantize(array))
    return arrays


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
@pytest.mark.parametrize("variant", ["llama", "experts"])
@pytest.mark.usefixtures("small_chunks", "small_budget")
def test_a_quantised_checkpoint_becomes_the_floats_that_it_stands_for(
    tmp_path: Path, target: Path, make_checkpoint: MakeCheckpoint, variant: str, grid: Quantization
) -> None:
    width = {"moe_intermediate_size": 64} if variant == "experts" else {}
    model = make_checkpoint(quantize=grid, **{**VARIANTS[variant], **QUANTIZED, **width})
    result = export(model, target)
    tensors, arrays = loaded(target), dequantized(model)
    layer, ours = "model.layers.0", "layers.0"
    expected = {
        "model.embed_tokens.weight": arrays["embedding"],
        "lm_head.weight": arrays["lm_head"].T,
        f"{layer}.self_attn.k_proj.weight": as_hf(".k", arrays[f"{ours}.attn.k"]),
        f"{layer}.self_attn.o_proj.weight": as_hf(".o", arrays[f"{ours}.attn.o"]),
    }
    if variant == "llama":
        expected[f"{layer}.mlp.up_proj.weight"] = arrays[f"{ours}.ffw.w_up"].T
        expected[f"{layer}.mlp.down_proj.weight"] = arrays[f"{ours}.ffw.w_down"].T
    else:
        expected[f"{layer}.mlp.experts.4.up_proj.weight"] = arrays[f"{ours}.ffw.we_up"][4].T
        expected[f"{layer}.mlp.experts.3.down_proj.weight"] = arrays[f"{ours}.ffw.we_down"][3].T
    assert_same({name: tensors[name] for name in expected}, expected)
    assert tensors.keys() == load_file(tmp_path / "source" / "model.safetensors").keys()
    assert f"model is quantised ({grid.name}): its matrices are exported as" in result.warnings[0]
    export(model, target, memory=1, overwrite=True)  # chunk by chunk
    assert_same(loaded(target), tensors)


def test_a_quantised_checkpoint_has_the_type_of_what_is_not_quantised(
    target: Path, make_checkpoint: MakeCheckpoint
) -> None:
    model = make_checkpoint(ml_dtypes.bfloat16, Quantization(8))
    state_source_dtype(model, "float16")
    assert export(model, target).dtype == "bfloat16"
    numbers = dequantized(model)["layers.1.ffw.w_up"].T.astype(ml_dtypes.bfloat16)
    assert_same({"": loaded(target)["model.layers.1.mlp.up_proj.weight"]}, {"": numbers})


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
@pytest.mark.usefixtures("small_chunks")
def test_blocks_of_a_quantised_matrix_cut_no_group_and_miss_nothing(
    make_checkpoint: MakeCheckpoint, grid: Quantization
) -> None:
    # 96 inputs in 8 chunks of values: they do not end where groups of 32 do.
    model = make_checkpoint(quantize=grid, **QUANTIZED)
    matrices, expected = (
        matrices_of(abstract_weights(checkpoint.read_config(model), "float32", grid)),
        dequantized(model),
    )
    for name in ("layers.0.attn.o", "layers.0.ffw.w_down", *(["embedding"] if grid.embedding else [])):
        store = QuantizedStore.open(model / "weights", name, matrices[name])
        for limit in (1, 3000, 1 << 20):
            values = np.full(store.shape, np.nan, np.float32)
            for box in store.blocks(limit):
                assert np.isnan(values[box]).all()
                values[box] = store.read(box)
            np.testing.assert_array_equal(values, expected[name])
        assert len(store.blocks(1)) > 1


# ---- Damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [flip, Path.unlink, lambda path: os.truncate(path, 3)], ids=["bit", "file", "end"])
@pytest.mark.parametrize("array", ["layers.1.ffw.w_down", "gamma_final"])
def test_damage_is_told_with_the_array_and_nothing_is_left(
    target: Path, make_checkpoint: MakeCheckpoint, harm: Callable[[Path], None], array: str
) -> None:
    model = make_checkpoint()
    harm(ArrayStore.open(model / "weights", array).files()[-1])
    with pytest.raises(CheckpointError, match=f"the array {array} "):
        export(model, target)
    assert files_in(target.parent) == []


def test_arrays_that_are_not_as_the_manifest_says_are_refused_first(
    target: Path, make_checkpoint: MakeCheckpoint
) -> None:
    model = make_checkpoint()
    shutil.rmtree(model / "weights" / "layers.0.attn.q")
    with pytest.raises(CheckpointError, match=r"the array layers\.0\.attn\.q"):
        export(model, target)
    shutil.copytree(model / "weights" / "layers.0.attn.k", model / "weights" / "layers.0.attn.q")
    with pytest.raises(CheckpointError, match=r"layers\.0\.attn\.q .* holds float32\[16, 2, 6\], the manifest says"):
        export(model, target)
    assert not target.parent.exists()


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, target: Path, make_checkpoint: MakeCheckpoint) -> None:
    make_checkpoint()
    with pytest.raises(CheckpointError, match="is not a JLLM checkpoint"):
        export(tmp_path / "source", target)
    with pytest.raises(CheckpointError, match="there is nothing at"):
        export(tmp_path / "nothing", target)


def test_an_architecture_that_config_json_cannot_express_is_refused_first(
    target: Path, make_checkpoint: MakeCheckpoint
) -> None:
    model = make_checkpoint()
    config = dataclasses.replace(checkpoint.read_config(model), windows=(3, 3))
    (model / "model.json").write_text(config.to_json())
    with pytest.raises(ConversionError, match=r"windows is \(3, 3\)"):
        export(model, target)
    assert not target.parent.exists()


# ---- The destination


def test_a_folder_of_anything_else_is_never_replaced(target: Path, make_checkpoint: MakeCheckpoint) -> None:
    model = make_checkpoint()
    target.mkdir(parents=True)
    (target / "config.json").write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(ConversionError, match="is not a Hugging Face folder"):
            export(model, target, overwrite=overwrite)
    shutil.rmtree(target)
    target.write_text("precious")
    with pytest.raises(ConversionError, match="is not a Hugging Face folder"):
        export(model, target, overwrite=True)
    assert target.read_text() == "precious"


def test_a_model_is_replaced_when_asked(target: Path, make_checkpoint: MakeCheckpoint) -> None:
    model = make_checkpoint()
    target.mkdir(parents=True)  # an empty folder is in nobody's way
    export(model, target)
    with pytest.raises(ConversionError, match=r"exists; choose another name, or replace it with overwrite"):
        export(model, target, dtype="bfloat16")
    assert loaded(target)["model.norm.weight"].dtype == np.float32
    export(model, target, dtype="bfloat16", overwrite=True)
    assert loaded(target)["model.norm.weight"].dtype == ml_dtypes.bfloat16
    assert files_in(target.parent) == ["hf"]


@pytest.mark.parametrize("place", [".", "..", "hf", "weights", "../../link"])
def test_the_checkpoint_itself_is_in_no_danger(tmp_path: Path, make_checkpoint: MakeCheckpoint, place: str) -> None:
    shutil.copytree(make_checkpoint(), tmp_path / "own" / "model")
    model = tmp_path / "own" / "model"
    (tmp_path / "link").symlink_to(model)
    with pytest.raises(ConversionError, match="is, holds or lies in the checkpoint"):
        export(model, model / place, overwrite=True)


def test_a_disk_that_is_too_full_is_told_before_anything_is_written(
    target: Path, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_checkpoint()
    asked: list[Path] = []

    def disk_usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=12_345)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with pytest.raises(ConversionError, match=r"needs 1,0\d\d,\d\d\d bytes, .* has 12,345 free; make room for 1,0"):
        export(model, target)
    assert asked == [target.parent.parent]
    assert not target.parent.exists()


# ---- Failures half way


def test_a_failing_disk_leaves_the_old_folder_and_nothing_else(
    target: Path, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_checkpoint()
    export(model, target)
    before = loaded(target)
    pwrite, left = os.pwrite, [9]

    def fail(file: int, data: memoryview, offset: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError("disk gone")
        return pwrite(file, data, offset)

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(ConversionError, match="disk gone"):
        export(model, target, dtype="bfloat16", overwrite=True)
    assert_same(loaded(target), before)
    assert files_in(target.parent) == ["hf"]


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()], ids=repr)
def test_a_stop_leaves_nothing(target: Path, make_checkpoint: MakeCheckpoint, error: BaseException) -> None:
    def stop(progress: Progress) -> None:
        if progress.arrays == 3:
            raise error

    with pytest.raises(type(error)):
        export(make_checkpoint(), target, on_progress=stop)
    assert files_in(target.parent) == []


def test_no_write_goes_on_after_a_failure(
    target: Path, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, write, begun, ended = make_checkpoint(), SafetensorsWriter.write, [], []

    def fail(*arguments: Any) -> None:
        begun.append(1)
        try:
            time.sleep(0.02 * len(begun))
            write(*arguments)
            raise OSError("disk gone")
        finally:
            ended.append(1)

    monkeypatch.setattr(SafetensorsWriter, "write", fail)
    with pytest.raises(ConversionError, match="disk gone"):
        export(model, target)
    assert len(ended) == len(begun)


def test_a_failing_rename_puts_the_old_folder_back(
    target: Path, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_checkpoint()
    export(model, target)
    rename = os.rename
    monkeypatch.setattr(atomic_rename, "_exchange", lambda *_: False)

    def fail(old: Path, new: Path) -> None:
        if str(old).endswith(".partial"):
            raise OSError("no space left")
        rename(old, new)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(ConversionError, match="no space left"):
        export(model, target, dtype="bfloat16", overwrite=True)
    assert loaded(target)["model.norm.weight"].dtype == np.float32
    assert files_in(target.parent) == ["hf"]


def test_impossible_arguments_are_told_at_once(target: Path, make_checkpoint: MakeCheckpoint) -> None:
    model = make_checkpoint()
    with pytest.raises(ConversionError) as caught:
        export(model, target, dtype="int8", shard_bytes=0)
    assert caught.value.problems == (
        "dtype must be one of float32, bfloat16, float16 or None, got 'int8'",
        "shard_bytes must be at least 1, got 0",
    )
    with pytest.raises(ConversionError, match="memory must be at least 67,108,864 bytes"):
        export(model, target, memory=1 << 20)
