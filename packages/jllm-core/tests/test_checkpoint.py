"""The checkpoint on disk: whole, damaged, and half written."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jllm_core import JLLMError, ModelConfig, Quantization, Weights, abstract_weights, init_weights
from jllm_core.array_info import ArrayInfo, named_leaves
from jllm_core.checkpoint import (
    GENERATION_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    WEIGHTS_FOLDER,
    ArrayStore,
    CheckpointError,
    Manifest,
    is_checkpoint,
    read_config,
    read_eos_ids,
    read_manifest,
    restore_weights,
    save_checkpoint,
    save_weights,
    saving,
)
from jllm_core.checkpoint.chunk_grid import MIN_CHUNKED_BYTES
from jllm_core.config import ConfigError

MakeConfig = Callable[..., ModelConfig]
MakeWeights = Callable[..., Weights]
SaveModel = Callable[..., Path]


@pytest.fixture(scope="session")
def config(make_config: MakeConfig) -> ModelConfig:
    # Eleven layers: their numbers sort differently as texts.
    return make_config(num_layers=11, qk_norm=True, qkv_bias=True)


@pytest.fixture
def checkpoint(tmp_path: Path, config: ModelConfig, make_weights: MakeWeights, save_model: SaveModel) -> Path:
    return save_model(tmp_path / "model", config, make_weights(config))


def save(folder: Path, **arrays: np.ndarray) -> None:
    save_weights(folder, arrays, {name: described(array) for name, array in arrays.items()})


def described(array: np.ndarray, *axes: str) -> ArrayInfo:
    return ArrayInfo(array.shape, array.dtype, axes or (None,) * array.ndim)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_same_arrays(got: Any, expected: Any) -> None:
    got, expected = named_leaves(got), named_leaves(expected)
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(np.asarray(got[name]), np.asarray(array), err_msg=name)


# ---- There and back


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_weights_come_back_as_they_were_saved(
    tmp_path: Path, config: ModelConfig, make_weights: MakeWeights, save_model: SaveModel, dtype: Any
) -> None:
    weights = make_weights(config, dtype)
    folder = save_model(tmp_path / "model", config, weights)
    restored = restore_weights(folder, read_config(folder))
    assert isinstance(restored, Weights)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))
    assert_same_arrays(restored, weights)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_may_be_loaded_in_another_type(checkpoint: Path, config: ModelConfig, dtype: str) -> None:
    exact, rounded = restore_weights(checkpoint, config), restore_weights(checkpoint, config, dtype)
    assert_same_arrays(rounded, jax.tree.map(lambda array: np.asarray(array).astype(jnp.dtype(dtype)), exact))


# The largest numbers of float16 and bfloat16 are 65504 and 3.3895e38; what is nearer to them than to the next is
# rounded.
@pytest.mark.parametrize(
    ("stored", "dtype", "fits", "too_large", "shown"),
    [
        (jnp.float32, "float16", 65519.0, -65521.0, "-6.552e+04"),
        (jnp.bfloat16, "float16", 65280.0, 65536.0, "6.554e+04"),
        (jnp.float32, "bfloat16", 3.39e38, 3.4e38, "3.4e+38"),
    ],
)
def test_a_number_that_another_type_cannot_hold_is_named(
    tmp_path: Path,
    config: ModelConfig,
    make_weights: MakeWeights,
    save_model: SaveModel,
    stored: Any,
    dtype: str,
    fits: float,
    too_large: float,
    shown: str,
) -> None:
    weights = make_weights(config, stored)

    def with_up(up: Any) -> Weights:
        layer = weights.layers[1]
        changed = dataclasses.replace(layer, ffw=dataclasses.replace(layer.ffw, w_up=up))
        return dataclasses.replace(weights, layers=[weights.layers[0], changed, *weights.layers[2:]])

    # What was infinite before is no fault of the type.
    up = jnp.asarray(weights.layers[1].ffw.w_up).at[3, 5].set(fits).at[0, 0].set(jnp.inf).at[0, 1].set(jnp.nan)
    folder = save_model(tmp_path / "fits", config, with_up(up))
    got = np.asarray(restore_weights(folder, config, dtype).layers[1].ffw.w_up, np.float32)
    assert np.isfinite(got[3, 5])
    assert np.isinf(got[0, 0])
    folder = save_model(tmp_path / "too large", config, with_up(up.at[3, 5].set(too_large)))
    with pytest.raises(CheckpointError) as refused:
        restore_weights(folder, config, dtype)
    stated = jnp.dtype(stored).name
    assert str(refused.value) == (
        f"{folder} holds numbers that {dtype} cannot hold: layers.1.ffw.w_up ({shown} at [3, 5]). "
        f"Load it in a wider type, such as its own ({stated})"
    )
    restore_weights(folder, config)


def test_a_checkpoint_may_be_named_by_a_relative_path(
    checkpoint: Path, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = restore_weights(checkpoint, config)
    monkeypatch.chdir(checkpoint.parent)
    assert_same_arrays(restore_weights(Path(checkpoint.name), config), expected)


def test_special_values_keep_their_bits(tmp_path: Path) -> None:
    array = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45], np.float32)
    save(tmp_path, a=array, zeros=np.zeros((2, 3), np.float32))
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / WEIGHTS_FOLDER)
    np.testing.assert_array_equal(restored["a"].view(np.uint32), array.view(np.uint32))
    np.testing.assert_array_equal(restored["zeros"], np.zeros((2, 3)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("checkpointer", [ocp.PyTreeCheckpointer, ocp.StandardCheckpointer])
def test_stock_orbax_restores_the_weights_without_jllm(
    tmp_path: Path,
    make_config: MakeConfig,
    make_weights: MakeWeights,
    save_model: SaveModel,
    checkpointer: Any,
    dtype: Any,
) -> None:
    config = make_config()
    weights = make_weights(config, dtype)
    folder = save_model(tmp_path / "model", config, weights)
    with checkpointer() as stock:
        tree = stock.restore((folder / WEIGHTS_FOLDER).absolute())
    assert set(tree) == {"embedding", "gamma_final", "layers", "lm_head"}
    assert_same_arrays(
        tree,
        {name: getattr(weights, name) for name in tree if name != "layers"}
        | {"layers": dict(enumerate(weights.layers))},
    )


@pytest.mark.parametrize(
    "quantization",
    [Quantization(8), Quantization(4, 32), Quantization(4, 32, offsets=True), Quantization(4, 32, embedding=8)],
    ids=lambda q: q.name,
)
def test_quantised_weights_come_back_as_they_are(
    tmp_path: Path, make_config: MakeConfig, save_model: SaveModel, quantization: Quantization
) -> None:
    config = make_config(hidden_size=64, intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=32, num_layers=1)
    weights = init_weights(config, jax.random.key(0), quantization=quantization)
    folder = save_model(tmp_path / "model", config, weights, quantization)
    assert_same_arrays(restore_weights(folder, config), weights)
    # Another type is for what is not quantised; the values and scales stay as they are.
    loaded = restore_weights(folder, config, "bfloat16")
    assert loaded.dtype == jnp.bfloat16
    assert_same_arrays(loaded.layers[0].attn.q, weights.layers[0].attn.q)
    if quantization.embedding is None:
        assert loaded.embedding.dtype == jnp.bfloat16
    else:
        assert_same_arrays(loaded.embedding, weights.embedding)
        edit(folder / MANIFEST_FILE, quantization={"bits": 4, "group": 32})
        with pytest.raises(CheckpointError, match=r"embedding is missing.*embedding.scales is left over"):
            restore_weights(folder, config)
    edit(folder / MANIFEST_FILE, quantization=None)
    with pytest.raises(CheckpointError, match=r"layers.0.attn.q is missing"):
        restore_weights(folder, config)


def test_arrays_larger_than_a_chunk_come_back_whole(tmp_path: Path) -> None:
    # 9 heads do not fall into 8 equal chunks.
    array = np.random.default_rng(0).normal(size=(512, 9, 64)).astype(np.float32)
    assert array.nbytes > MIN_CHUNKED_BYTES
    save_weights(tmp_path, {"q": array}, {"q": described(array, "model", "heads", "head_dim")})
    assert len(list((tmp_path / WEIGHTS_FOLDER / "q").glob("c*"))) == 5
    with ocp.PyTreeCheckpointer() as checkpointer:
        np.testing.assert_array_equal(checkpointer.restore(tmp_path / WEIGHTS_FOLDER)["q"], array)


# ---- Damage


def data_files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in (checkpoint / WEIGHTS_FOLDER).glob("*/c*") if path.is_file())


def test_every_flipped_bit_is_found_and_its_array_named(
    tmp_path: Path, make_config: MakeConfig, make_weights: MakeWeights, save_model: SaveModel
) -> None:
    config = make_config(num_layers=1)
    checkpoint = save_model(tmp_path / "model", config, make_weights(config))
    random = np.random.default_rng(0)
    files = data_files(checkpoint)
    assert len(files) == len(named_leaves(abstract_weights(config)))
    for file in random.choice(np.array(files, dtype=object), 40):
        intact = file.read_bytes()
        damaged = bytearray(intact)
        damaged[random.integers(len(damaged))] ^= 1 << random.integers(8)
        file.write_bytes(damaged)
        name = file.relative_to(checkpoint / WEIGHTS_FOLDER).parts[0]
        with pytest.raises(CheckpointError) as caught:
            restore_weights(checkpoint, config)
        assert name in str(caught.value)
        file.write_bytes(intact)
    restore_weights(checkpoint, config)


@pytest.mark.parametrize("damage", ["emptied", "cut", "removed"])
def test_data_that_are_not_all_there_are_found(checkpoint: Path, config: ModelConfig, damage: str) -> None:
    file = data_files(checkpoint)[7]
    if damage == "removed":
        file.unlink()  # zarr would read a chunk that is not there as zeros
    else:
        file.write_bytes(file.read_bytes()[: -3 if damage == "cut" else 0])
    with pytest.raises(CheckpointError):
        restore_weights(checkpoint, config)


@pytest.mark.parametrize("part", [WEIGHTS_FOLDER, f"{WEIGHTS_FOLDER}/layers.10.attn.q"])
def test_a_missing_folder_is_a_checkpoint_error(checkpoint: Path, config: ModelConfig, part: str) -> None:
    (checkpoint / part).rename(checkpoint / "elsewhere")
    with pytest.raises(CheckpointError):
        restore_weights(checkpoint, config)


def test_damaged_array_metadata_are_a_checkpoint_error(checkpoint: Path, config: ModelConfig) -> None:
    path = checkpoint / WEIGHTS_FOLDER / "layers.3.attn.q" / "zarr.json"
    intact = path.read_text()
    for damaged in ("", "{", intact.replace("[12,6,4]", "[12,6,5]").replace("[12, 6, 4]", "[12, 6, 5]")):
        assert damaged != intact
        path.write_text(damaged)
        with pytest.raises(CheckpointError):
            restore_weights(checkpoint, config)


def test_an_array_that_is_not_as_described_is_not_written(tmp_path: Path) -> None:
    array = np.ones(3, np.float32)
    for other in (np.ones(4, np.float32), np.ones(3, np.float64)):
        with pytest.raises(ValueError, match=r"q: .* was to be written, expected float32\[3\]"):
            save_weights(tmp_path / str(other.dtype.name) / str(other.size), {"q": other}, {"q": described(array)})


# ---- The manifest and the other files


def test_a_checkpoint_is_known_by_its_files(checkpoint: Path, tmp_path: Path) -> None:
    assert is_checkpoint(checkpoint)
    assert not is_checkpoint(tmp_path)
    assert not is_checkpoint(tmp_path / "nothing")
    (checkpoint / MODEL_FILE).unlink()
    assert not is_checkpoint(checkpoint)


def test_the_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    arrays = {"a": {"shape": [2], "dtype": "bfloat16"}}
    quantization = Quantization(4, 32, offsets=True, embedding=8)
    manifest = Manifest("bfloat16", arrays, {"name": "x"}, quantization, {"kl": 0.25}, "jllm-convert 1")
    manifest.write(tmp_path)
    assert read_manifest(tmp_path) == manifest
    edit(tmp_path / MANIFEST_FILE, quantization={"bits": 8, "group": None, "offsets": False})  # as of before
    assert read_manifest(tmp_path).quantization == Quantization(8)


def test_a_folder_without_manifest_is_told_how_to_convert(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a JLLM checkpoint.*jllm-convert convert SRC DST"):
        read_manifest(tmp_path)
    with pytest.raises(CheckpointError, match=r"there is nothing at .*nowhere; expected a JLLM checkpoint"):
        read_manifest(tmp_path / "nowhere")
    assert issubclass(CheckpointError, JLLMError)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "expected format 'jllm-checkpoint'"),
        ({"format_version": 2}, "format version 2, this jllm-core reads 1; convert the model again"),
        ({"format_version": None}, "format version None"),
        ({"colour": "blue"}, "does not have the fields of a manifest"),
    ],
)
def test_manifests_of_another_kind_are_refused(checkpoint: Path, changes: dict[str, Any], message: str) -> None:
    edit(checkpoint / MANIFEST_FILE, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_manifest(checkpoint)


@pytest.mark.parametrize("text", ["", "{", "[]", '"text"', "\xff"])
def test_a_manifest_that_cannot_be_read_is_a_checkpoint_error(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=MANIFEST_FILE):
        read_manifest(tmp_path)


def test_a_manifest_without_its_fields_is_a_checkpoint_error(checkpoint: Path) -> None:
    fields = json.loads((checkpoint / MANIFEST_FILE).read_text())
    del fields["arrays"]
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="arrays"):
        read_manifest(checkpoint)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "changes",
    [
        {"arrays": []},
        {"arrays": {"embedding": 5}},
        {"dtype": "float33"},
        {"quantization": "int8"},
        {"quantization": {"bits": 3}},
        {"quantization": {"bits": 8}},
        {"arrays": {"embedding": {"shape": [13, "12"], "dtype": "float32"}}},
        {"arrays": {"embedding": {"shape": [13, -12], "dtype": "float32"}}},
        {"arrays": {"embedding": {"shape": [1] * 9, "dtype": "float32"}}},
        {"arrays": {"embedding": {"shape": [13, 12], "dtype": ["float32"]}}},
    ],
    ids=str,
)
def test_a_manifest_with_impossible_values_is_a_checkpoint_error(
    checkpoint: Path, config: ModelConfig, changes: dict[str, Any]
) -> None:
    edit(checkpoint / MANIFEST_FILE, **changes)
    with pytest.raises(CheckpointError):
        restore_weights(checkpoint, config)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": None}, "source must be an object, got None"),
        ({"source": ["x" * 1000]}, "source must be an object, got .{1,60}$"),
        ({"receipt": "good"}, "receipt must be an object or null, got 'good'"),
        ({"receipt": []}, "receipt must be an object or null"),
    ],
)
def test_what_a_manifest_says_of_its_origin_is_an_object(
    checkpoint: Path, changes: dict[str, Any], message: str
) -> None:
    edit(checkpoint / MANIFEST_FILE, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_manifest(checkpoint)


@pytest.mark.parametrize("content", [b"[" * 200_000, b" " * (17 << 20)], ids=["deep", "large"])
def test_files_without_bounds_are_refused(checkpoint: Path, content: bytes) -> None:
    for name in (MANIFEST_FILE, MODEL_FILE):
        (checkpoint / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest.json cannot be read: "):
        read_manifest(checkpoint)
    with pytest.raises((CheckpointError, ConfigError), match=r"not valid JSON|model.json cannot be read"):
        read_config(checkpoint)


def test_a_manifest_that_does_not_fit_the_config_is_told_in_full(checkpoint: Path, config: ModelConfig) -> None:
    arrays = json.loads((checkpoint / MANIFEST_FILE).read_text())["arrays"]
    arrays["embedding"]["shape"] = [12, 13]
    arrays["layers.11.attn.q"] = arrays.pop("layers.10.attn.q")
    edit(checkpoint / MANIFEST_FILE, arrays=arrays)
    with pytest.raises(CheckpointError, match=r"manifest.json and model.json do not agree") as caught:
        restore_weights(checkpoint, config)
    for part in (
        "embedding is float32[12, 13], the config needs float32[13, 12]",
        "layers.10.attn.q is missing",
        "layers.11.attn.q is left over",
    ):
        assert part in str(caught.value)


def test_the_config_is_read_or_refused(checkpoint: Path, config: ModelConfig) -> None:
    assert read_config(checkpoint) == config
    (checkpoint / MODEL_FILE).write_text("{}")
    with pytest.raises(ConfigError, match="missing fields"):
        read_config(checkpoint)
    (checkpoint / MODEL_FILE).write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"model.json cannot be read: .*utf-8"):
        read_config(checkpoint)
    (checkpoint / MODEL_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"model.json cannot be read"):
        read_config(checkpoint)


@pytest.mark.parametrize(
    ("fields", "ids"),
    [({"eos_token_id": [7, 9]}, (7, 9)), ({"eos_token_id": 7}, (7,)), ({"eos_token_id": 0}, (0,)), ({}, ())],
)
def test_end_of_text_ids_are_one_or_several(tmp_path: Path, fields: dict[str, Any], ids: tuple[int, ...]) -> None:
    (tmp_path / GENERATION_FILE).write_text(json.dumps(fields))
    assert read_eos_ids(tmp_path) == ids


def test_without_a_generation_config_there_are_no_end_of_text_ids(tmp_path: Path) -> None:
    assert read_eos_ids(tmp_path) == ()


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": [null]}', '{"eos_token_id": 1.5}'])
def test_a_damaged_generation_config_is_a_checkpoint_error(tmp_path: Path, text: str) -> None:
    (tmp_path / GENERATION_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=GENERATION_FILE):
        read_eos_ids(tmp_path)


# ---- Saving a model from memory.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("quantization", [None, Quantization(8), Quantization(4, 32, offsets=True, embedding=8)])
def test_a_saved_model_comes_back(
    tmp_path: Path, make_config: MakeConfig, dtype: Any, quantization: Quantization | None
) -> None:
    config = make_config(hidden_size=64, intermediate_size=64, head_dim=32)
    random = np.random.default_rng(0)
    weights = jax.tree.map(
        lambda info: jnp.asarray((100 * random.random(info.shape)).astype(info.dtype)),
        abstract_weights(config, dtype, quantization),
    )
    manifest = save_checkpoint(tmp_path / "new" / "model", config, weights, files={"tokenizer.json": b"{}"})
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]
    folder = tmp_path / "new" / "model"
    assert read_manifest(folder) == manifest
    assert (manifest.quantization, manifest.dtype) == (quantization, np.dtype(dtype).name)
    assert (manifest.source, manifest.receipt) == ({"kind": "saved"}, None)
    assert read_config(folder) == config
    assert (folder / "tokenizer.json").read_bytes() == b"{}"
    assert_same_arrays(restore_weights(folder, config), weights)


def test_only_a_checkpoint_is_replaced_and_only_when_asked(
    tmp_path: Path, config: ModelConfig, make_weights: MakeWeights
) -> None:
    old, new = make_weights(config), make_weights(config, seed=1)
    save_checkpoint(tmp_path / "model", config, old)
    with pytest.raises(CheckpointError, match=r"exists; choose another name, or replace it with overwrite=True"):
        save_checkpoint(tmp_path / "model", config, new)
    assert_same_arrays(restore_weights(tmp_path / "model", config), old)
    save_checkpoint(tmp_path / "model", config, new, overwrite=True)
    assert_same_arrays(restore_weights(tmp_path / "model", config), new)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("...")
    with pytest.raises(CheckpointError, match="is not a JLLM checkpoint, so it is not replaced"):
        save_checkpoint(tmp_path / "work", config, new, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "work"]


@pytest.mark.parametrize("failing", ["write", "write_orbax_metadata", "sync", "replace_folder"])
def test_a_save_that_fails_leaves_the_old_model_and_nothing_else(
    tmp_path: Path, config: ModelConfig, make_weights: MakeWeights, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    old = make_weights(config)
    save_checkpoint(tmp_path / "model", config, old)

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((ArrayStore, failing) if failing == "write" else (saving, failing)), fail)
    with pytest.raises(CheckpointError, match=r"writing .*model failed: .*No space left"):
        save_checkpoint(tmp_path / "model", config, make_weights(config, seed=1), overwrite=True)
    monkeypatch.undo()
    assert_same_arrays(restore_weights(tmp_path / "model", config), old)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    tmp_path: Path, config: ModelConfig, make_weights: MakeWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(saving, "save_weights", None)
    with pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes, .* has 1,000 free; choose another disk"):
        save_checkpoint(tmp_path / "model", config, make_weights(config))
    assert list(tmp_path.iterdir()) == []


def test_weights_that_no_checkpoint_holds_are_refused(
    tmp_path: Path, config: ModelConfig, make_config: MakeConfig, make_weights: MakeWeights
) -> None:
    weights = make_weights(config)
    mixed = dataclasses.replace(weights, embedding=weights.embedding.astype(jnp.bfloat16))
    for given, message in (
        (jax.tree.map(lambda array: array.astype(jnp.int32), weights), "bfloat16 or float16, these .* are int32"),
        (mixed, r"not those of the config: embedding is bfloat16\[13, 12\], the config needs float32\[13, 12\]"),
        (dataclasses.replace(weights, lm_head=None), "lm_head is missing"),
        (make_weights(make_config(num_layers=12, qk_norm=True, qkv_bias=True)), r"layers\.11\.attn\.k is left over"),
    ):
        with pytest.raises(CheckpointError, match=message):
            save_checkpoint(tmp_path / "model", config, given)
    assert list(tmp_path.iterdir()) == []
