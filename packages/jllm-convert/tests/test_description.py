"""Descriptions of models for `jllm plan`: the same architecture and types as a conversion has, without its bytes."""

import json
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from huggingface_hub import constants
from jllm_convert import description
from jllm_convert.conversion import convert
from jllm_convert.description import Description, describe
from jllm_convert.errors import ConversionError
from jllm_convert.hub import repository
from jllm_convert.quality.storage_choice import storage_of
from jllm_convert.sources.opening import open_source
from jllm_core.quantization.arrays import Quantization

from .hub_server import HubServer

ID = "owner/model"
Tensors = dict[str, np.ndarray]


@pytest.fixture
def config(tiny_config: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    # Wide enough for GGUF's blocks of 32.
    return tiny_config(hidden_size=64, intermediate_size=96, head_dim=32, vocab_size=64)


@pytest.fixture
def tensors(config: dict[str, Any], hf_tensors: Callable[..., Tensors]) -> Tensors:
    return hf_tensors(config)


@pytest.fixture
def make_gguf(
    tmp_path: Path,
    config: dict[str, Any],
    tensors: Tensors,
    gguf_metadata: Callable[..., dict[str, Any]],
    gguf_tensors: Callable[..., Tensors],
    write_gguf: Callable[..., Path],
) -> Callable[..., Path]:
    """Writes the model as a GGUF file with its matrices in one type and its embedding in another."""

    def make(matrices: Kind, embedding: Kind) -> Path:
        named = gguf_tensors(config, tensors)
        types = {name: matrices for name, tensor in named.items() if tensor.ndim > 1}
        types["token_embd.weight"] = embedding
        path = tmp_path / f"{matrices.name}-{embedding.name}.gguf"
        return write_gguf(path, gguf_metadata(config), named, types=types)

    return make


@pytest.fixture(scope="module", autouse=True)
def one_session() -> Iterator[None]:
    """One session of huggingface_hub for all tests, which reads the certificates once, and closes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        huggingface_hub.close_session()
        yield
        huggingface_hub.close_session()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A hub that huggingface_hub takes for its own, with a cache and without a token."""
    with HubServer() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(repository, "WAITS", (0.0, 0.0))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield server


def described(model: str | Path) -> Description:
    found = describe(str(model))
    assert found is not None
    return found


def as_converted(source: Path, folder: Path) -> Description:
    """What a conversion by the same rule has, with the words of the description left out."""
    storage = storage_of(open_source(source))
    made = convert(source, folder, storage.dtype, storage.quantize, embedding=storage.embedding)
    return Description(made.config, made.manifest.dtype, made.manifest.quantization, "")


# ---- Paths.


@pytest.mark.parametrize(
    ("matrices", "embedding", "dtype", "quantization"),
    [
        (Kind.Q4_1, Kind.Q8_0, "bfloat16", Quantization(4, 32, offsets=True, embedding=8)),
        (Kind.Q4_0, Kind.F16, "bfloat16", Quantization(4, 32)),
        (Kind.Q8_0, Kind.Q8_0, "bfloat16", Quantization(8, 32, embedding=8)),
        (Kind.Q5_0, Kind.Q8_0, "bfloat16", None),
        (Kind.F16, Kind.F16, "bfloat16", None),
        (Kind.F32, Kind.F32, "float32", None),
    ],
)
def test_a_gguf_file_is_described_as_it_is_converted(
    make_gguf: Callable[..., Path],
    tmp_path: Path,
    matrices: Kind,
    embedding: Kind,
    dtype: str,
    quantization: Quantization | None,
) -> None:
    path = make_gguf(matrices, embedding)
    found = described(path)
    assert (found.dtype, found.quantization) == (dtype, quantization)
    assert found.origin == f"as `jllm generate` would convert it (weights in {matrices.name})"
    made = as_converted(path, tmp_path / "made")
    assert (found.config, found.dtype, found.quantization) == (made.config, made.dtype, made.quantization)


@pytest.mark.parametrize(("stored", "dtype"), [(np.float32, "float32"), (np.float16, "float32"), ("bf16", "bfloat16")])
def test_a_folder_is_described_by_its_weights(
    tmp_path: Path, config: dict[str, Any], tensors: Tensors, write_hf: Callable[..., Path], stored: Any, dtype: str
) -> None:
    import ml_dtypes

    kind = ml_dtypes.bfloat16 if stored == "bf16" else stored
    # config.json says another type than the weights have.
    folder = write_hf(
        tmp_path / "model",
        config | {"torch_dtype": "float64"},
        {name: tensor.astype(kind) for name, tensor in tensors.items()},
    )
    found = described(folder)
    made = as_converted(folder, tmp_path / "made")
    assert (found.dtype, found.quantization) == (dtype, None)
    assert (found.config, found.dtype) == (made.config, made.dtype)


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": None, "dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float32"),
        ({"torch_dtype": None}, "float32"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "bfloat16"),
    ],
)
def test_a_folder_without_weights_is_described_by_its_config(
    tmp_path: Path, config: dict[str, Any], write_hf: Callable[..., Path], fields: dict[str, Any], dtype: str
) -> None:
    folder = write_hf(tmp_path / "model", config | fields)
    assert described(folder).dtype == dtype
    assert "as `jllm generate` would convert it" in described(folder).origin


def test_what_cannot_be_converted_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], write_hf: Callable[..., Path]
) -> None:
    folder = write_hf(tmp_path / "model", config | {"model_type": "gpt2"})
    with pytest.raises(ConversionError, match="model_type 'gpt2' is not supported"):
        describe(str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match=r"it has no config\.json, and no manifest\.json"):
        describe(str(tmp_path / "empty"))


@pytest.mark.parametrize("name", ["nothing.gguf", "a/b/c", "x" * 300, "a\0b"])
def test_names_of_nothing_are_left_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert describe(name) is None


def test_checkpoints_and_other_files_are_left_to_others(
    tmp_path: Path, config: dict[str, Any], tensors: Tensors, write_hf: Callable[..., Path]
) -> None:
    made = convert(write_hf(tmp_path / "model", config, tensors), tmp_path / "made").path
    assert describe(str(made)) is None
    (tmp_path / "model.onnx").write_text("")
    assert describe(str(tmp_path / "model.onnx")) is None


# ---- The hub.


@pytest.fixture
def published(hub: HubServer, config: dict[str, Any]) -> HubServer:
    """A hub with the model in safetensors, whose contents nobody may ask for."""
    files = {"config.json": json.dumps(config | {"torch_dtype": "bfloat16"}).encode()}
    hub.add(ID, {**files, "model.safetensors": bytes(1_000_000), "tokenizer.json": b"{}"})
    return hub


def test_of_a_model_on_the_hub_config_json_alone_is_downloaded(published: HubServer, config: dict[str, Any]) -> None:
    found = described(ID)
    assert (found.dtype, found.config.hidden_size) == ("bfloat16", config["hidden_size"])
    assert "config.json has torch_dtype bfloat16" in found.origin
    assert set(published.asked()) == {"config.json"}
    published.requests.clear()
    assert described(ID) == found
    assert published.asked() == []  # it is in the cache


def test_offline_the_config_in_the_cache_is_used(published: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ConversionError, match=r"offline \(HF_HUB_OFFLINE\).*no config.json of owner/model"):
            describe(ID)
    found = described(ID)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    published.requests.clear()
    assert described(ID) == found
    assert published.requests == []


def test_a_whole_model_in_the_cache_stays_the_one_that_is_used_offline(
    hub: HubServer, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jllm_convert.hub.downloading import download

    files = {"config.json": json.dumps(config).encode(), "model.safetensors": bytes(100)}
    hub.add(ID, files)
    whole = download(ID)
    hub.repos[ID].commit({**files, "config.json": json.dumps(config | {"rms_norm_eps": 1e-4}).encode()})
    assert described(ID).config.rms_norm_eps == 1e-4
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download(ID) == whole


def test_a_repository_of_gguf_files_names_them(hub: HubServer) -> None:
    hub.add(ID, {"a.gguf": b"GGUF", "b.gguf": b"GGUF"})
    with pytest.raises(
        ConversionError, match=r"download one by its own name: owner/model/a\.gguf, owner/model/b\.gguf"
    ):
        describe(ID)
    assert hub.asked("GET") == []


def test_a_repository_without_config_is_refused(hub: HubServer) -> None:
    hub.add(ID, {"model.safetensors": b""})
    with pytest.raises(ConversionError, match=r"lacks config\.json"):
        describe(ID)


@pytest.mark.parametrize("first", [16, 8 << 20], ids=["in several pieces", "at once"])
def test_of_a_gguf_file_on_the_hub_the_header_is_downloaded(
    hub: HubServer, make_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    monkeypatch.setattr(description, "_FIRST_BYTES", first)
    path = make_gguf(Kind.Q4_0, Kind.Q8_0)
    # As long as a real one, whose end would never come: what comes after the header does not matter.
    content = path.read_bytes()
    hub.add(ID, {"files/model.gguf": content})
    hub.hold_after = {"files/model.gguf": len(content) - 1} if first == 16 else {}
    found, local = described(f"{ID}/files/model.gguf"), described(path)
    assert found == local
    hub.release()


def test_a_gguf_file_on_the_hub_without_a_header_is_refused(hub: HubServer) -> None:
    hub.add(ID, {"model.gguf": b"GGUF" + bytes(1000)})
    with pytest.raises(ConversionError, match=r"the header of model\.gguf cannot be read: .*version 0"):
        describe(f"{ID}/model.gguf")


def test_a_gguf_file_in_the_cache_is_not_asked_for_again(hub: HubServer, make_gguf: Callable[..., Path]) -> None:
    from jllm_convert.hub.downloading import download

    path = make_gguf(Kind.Q4_0, Kind.Q8_0)
    hub.add(ID, {"model.gguf": path.read_bytes()})
    download(f"{ID}/model.gguf")
    hub.requests.clear()
    assert described(f"{ID}/model.gguf") == described(path)
    assert hub.asked("GET") == []


def test_a_model_that_is_not_on_the_hub_is_refused(hub: HubServer) -> None:
    with pytest.raises(ConversionError, match="there is no model at"):
        describe("owner/nothing")


def test_the_entry_point_names_the_description() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    value = "jllm_convert.description:describe"
    assert f'[project.entry-points."jllm.descriptions"]\nconvert = "{value}"' in project
    assert EntryPoint("convert", value, "jllm.descriptions").load() is describe
