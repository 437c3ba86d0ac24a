"""Conversion of a model on the hub shard by shard: what is on the disk meanwhile, and after all that can go wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import constants
from jllm_convert import conversion, convert
from jllm_convert.cli import cli
from jllm_convert.errors import ConversionError, DownloadError
from jllm_convert.hub import repository
from jllm_convert.hub.store import CacheStore
from jllm_convert.quality.receipt import receipt_text
from jllm_convert.shards import remote_shards
from jllm_convert.shards.remote_shards import RemoteShards
from jllm_convert.shards.schedule import Schedule, Use
from jllm_convert.writing.progress import Progress
from jllm_convert.writing.writer import ArrayWriter
from safetensors.numpy import save
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from . import published_models
from .hub_server import HubServer
from .test_adapter import factors, save_adapter_folder
from .test_fp8 import FP8_CONFIG, random_matrix, write_folder

ID = "owner/model"
Tensors = dict[str, np.ndarray]
Write = Callable[..., Path]
# Large enough for the disk's blocks of 4 KiB not to matter: a layer has 1 MB in float32.
SIZES: dict[str, Any] = {
    **{"vocab_size": 512, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "head_dim": 32},
    "dtype": "float32",
}


@pytest.fixture(scope="module", autouse=True)
def one_session() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        huggingface_hub.close_session()
        yield
        huggingface_hub.close_session()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(repository, "WAITS", (0.0, 0.0))
        yield server


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "model"


def shard(number: int, of: int) -> str:
    return f"model-{number:05}-of-{of:05}.safetensors"


def layer_of(tensor: str) -> int:
    """The layer of a tensor; -1 for what comes before the first one."""
    parts = tensor.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else -1 if "embed" in tensor else 1000


def split(tensors: Mapping[str, np.ndarray], count: int) -> dict[str, Tensors]:
    """The tensors in shards of about the same size, in the order of the layers, as publishers write them."""
    names = sorted(tensors, key=layer_of)
    each = sum(tensor.nbytes for tensor in tensors.values()) / count
    shards: dict[str, Tensors] = {shard(number + 1, count): {} for number in range(count)}
    done = 0
    for name in names:
        shards[shard(min(int(done / each), count - 1) + 1, count)][name] = tensors[name]
        done += tensors[name].nbytes
    return shards


def add_to_hub(hub: HubServer, folder: Path) -> str:
    return hub.add(ID, {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")})


def add_tokenizer(folder: Path, size: int) -> None:
    """A tokenizer that knows words of the receipt's text."""
    words = list(dict.fromkeys(["?", *(word for word, _ in Whitespace().pre_tokenize_str(receipt_text()))]))
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(words[:size])}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture
def model(
    tmp_path: Path,
    hub: HubServer,
    tiny_config: Callable[..., dict[str, Any]],
    hf_tensors: Callable[..., Tensors],
    write_hf: Write,
) -> Callable[..., Path]:
    """Puts a model on the hub, in shards; gives its folder."""

    def make(shards: int = 6, with_tokenizer: bool = True, tied: bool = False, seed: int = 0) -> Path:
        config = tiny_config(**SIZES, tie_word_embeddings=tied)
        tensors = hf_tensors(config, seed)
        folder = write_hf(tmp_path / "source", config, shards=split(tensors, shards))
        if with_tokenizer:
            add_tokenizer(folder, config["vocab_size"])
        add_to_hub(hub, folder)
        return folder

    return make


def contents(folder: Path) -> dict[str, Any]:
    """Every file of a checkpoint, but for the time in orbax's metadata, and the state of the files it was made from."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "_CHECKPOINT_METADATA"]
    found: dict[str, Any] = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    manifest = json.loads(found["manifest.json"])
    del manifest["source"]["fingerprint"]
    return {**found, "manifest.json": manifest}


def assert_alone(target: Path) -> None:
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def stored_on(folder: Path) -> int:
    """The bytes that the files below a folder take on the disk, as ``du`` counts them."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


class Sampler:
    """The most bytes on the disk: looked at all the time, and before and after each shard is deleted or written."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.most, self.samples = folder, 0, 0
        for owner, name in ((RemoteShards, "release"), (ArrayWriter, "write")):
            monkeypatch.setattr(owner, name, self._looked_around(getattr(owner, name)))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _looked_around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def look_around(*arguments: Any) -> Any:
            self.look()
            result = function(*arguments)
            self.look()
            return result

        return look_around

    def look(self) -> None:
        self.most, self.samples = max(self.most, stored_on(self.folder)), self.samples + 1

    def _run(self) -> None:
        while not self._ended.wait(0.002):
            self.look()

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


# ---- The same checkpoint


@pytest.mark.parametrize(
    ("options", "tied"),
    [
        ({}, False),
        ({"dtype": "float16"}, True),
        ({"quantize": "int8"}, False),
        ({"quantize": "int4", "embedding": "int8"}, True),
    ],
    ids=str,
)
def test_the_checkpoint_is_that_of_an_ordinary_conversion(
    model: Callable[..., Path], hub: HubServer, home: Path, target: Path, tmp_path: Path, tied: bool, options: Any
) -> None:
    model(tied=tied)
    made = convert(ID, target, stream_from_hub=True, **options)
    assert_alone(target)
    assert not home.exists()  # nothing went to the hub's cache
    assert all(
        hub.sent(shard(n, 6)) < 1.2 * len(hub.repos[ID].commits[hub.repos[ID].branches["main"]][shard(n, 6)])
        for n in range(1, 7)
    )
    usual = convert(ID, tmp_path / "usual", **options)
    assert contents(target) == contents(usual.path)
    assert made.receipt == usual.receipt
    assert (made.receipt is None) == (options == {})
    assert convert(ID, target, exist_ok=True, **options).is_new is False


def test_an_adapter_is_merged_on_the_way(model: Callable[..., Path], target: Path, tmp_path: Path) -> None:
    model(with_tokenizer=False)
    name = "model.layers.3.mlp.up_proj"
    adapter = save_adapter_folder(tmp_path / "adapter", factors({name: (512, 128)}))
    convert(ID, target, adapter=adapter, stream_from_hub=True)
    assert contents(target) == contents(convert(ID, tmp_path / "usual", adapter=adapter).path)


def test_a_tied_model_that_ships_its_head_is_compared_and_not_trusted(
    model: Callable[..., Path], hub: HubServer, target: Path, tmp_path: Path, write_hf: Write
) -> None:
    folder = model(shards=2)
    config = {**json.loads((folder / "config.json").read_text()), "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    add_to_hub(hub, folder)
    with pytest.raises(ConversionError, match="config ties the output head to the embedding, but"):
        convert(ID, target, stream_from_hub=True)
    assert not list(target.parent.iterdir())


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_5"])
def test_families_whose_arrays_lie_in_several_shards(
    hub: HubServer, target: Path, tmp_path: Path, write_hf: Write, model_type: str
) -> None:
    tensors = published_models.hf_tensors(model_type, published_models.arrays(model_type), one_by_one=True)
    names = sorted(tensors)
    # Dealt out: the experts of a matrix are in all of the shards.
    shards = {shard(n + 1, 3): {name: tensors[name] for name in names[n::3]} for n in range(3)}
    add_to_hub(hub, write_hf(tmp_path / "source", published_models.CONFIGS[model_type], shards=shards))
    convert(ID, target, stream_from_hub=True)
    assert contents(target) == contents(convert(ID, tmp_path / "usual").path)
    assert_alone(target)


def test_a_shard_stays_until_the_scales_of_its_matrices_are_used(
    hub: HubServer, target: Path, tmp_path: Path, tiny_config: Any, hf_tensors: Any
) -> None:
    config = tiny_config(
        **{"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32},
        quantization_config=FP8_CONFIG,
    )
    values: Tensors = {}
    scales: Tensors = {}
    for name, tensor in hf_tensors(config).items():
        if "proj" in name:
            values[name], scales[f"{name}_scale_inv"] = random_matrix(tensor.shape, (128, 128))
        else:
            values[name] = tensor.astype(ml_dtypes.bfloat16)
    add_to_hub(hub, write_folder(tmp_path / "source", config, values, scales))
    # The random bytes have NaN among them.
    convert(ID, target, stream_from_hub=True, allow_nonfinite=True)
    assert contents(target) == contents(convert(ID, tmp_path / "usual", allow_nonfinite=True).path)


def test_a_gguf_file_is_one_shard(
    hub: HubServer, target: Path, tmp_path: Path, tiny_config: Any, hf_tensors: Any, request: pytest.FixtureRequest
) -> None:
    metadata, rename, write = (request.getfixturevalue(f"{n}") for n in ("gguf_metadata", "gguf_tensors", "write_gguf"))
    config = tiny_config()
    path = write(tmp_path / "small.gguf", metadata(config), rename(config, hf_tensors(config)))
    hub.add(ID, {"sub/small.gguf": path.read_bytes()})
    convert(f"{ID}/sub/small.gguf", target, stream_from_hub=True)
    assert contents(target) == contents(convert(f"{ID}/sub/small.gguf", tmp_path / "usual").path)
    assert_alone(target)


@pytest.fixture
def gguf_bytes(
    tmp_path: Path, tiny_config: Any, hf_tensors: Any, request: pytest.FixtureRequest
) -> Callable[..., bytes]:
    """Makes a GGUF file with tensors besides the model's at its end."""
    metadata, rename, write = (request.getfixturevalue(f"{n}") for n in ("gguf_metadata", "gguf_tensors", "write_gguf"))

    def make(seed: int = 0, **more: np.ndarray) -> bytes:
        config = tiny_config(**SIZES)
        tensors = {**rename(config, hf_tensors(config, seed)), **{f"{name}.weight": more[name] for name in more}}
        return bytes(write(tmp_path / "made.gguf", metadata(config), tensors).read_bytes())

    return make


def test_rope_factors_that_lie_behind_the_header_belong_to_the_config(
    hub: HubServer,
    target: Path,
    tmp_path: Path,
    gguf_bytes: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Llama 3.1 and later have them: a tensor at any place, that says how to read the others."""
    content = gguf_bytes(rope_freqs=np.linspace(1, 8, 16).astype(np.float32))
    monkeypatch.setattr(remote_shards, "_GGUF_FIRST_BYTES", 1 << 16)
    hub.add(ID, {"small.gguf": content})
    made = convert(f"{ID}/small.gguf", target, stream_from_hub=True)
    assert made.config.rope_scaling is not None
    assert hub.sent("small.gguf") < len(content) + (1 << 18)
    assert contents(target) == contents(convert(f"{ID}/small.gguf", tmp_path / "usual").path)


def test_rope_factors_that_change_on_the_way_are_not_planned_by(
    hub: HubServer, target: Path, gguf_bytes: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = gguf_bytes(rope_freqs=np.linspace(1, 8, 16).astype(np.float32))
    monkeypatch.setattr(remote_shards, "_GGUF_FIRST_BYTES", 1 << 16)
    hub.add(ID, {"small.gguf": content})
    at = content.rindex(np.float32(8).tobytes())
    hub.served = {"small.gguf": content[:at] + np.float32(9).tobytes() + content[at + 4 :]}
    fetch = RemoteShards._fetch

    def restored(shards: RemoteShards, path: str) -> None:
        hub.served = {}
        fetch(shards, path)

    monkeypatch.setattr(RemoteShards, "_fetch", restored)
    with pytest.raises(DownloadError, match=r"small.gguf was another one"):
        convert(f"{ID}/small.gguf", target, stream_from_hub=True)


def test_another_gguf_file_that_an_earlier_run_has_left_is_deleted(
    hub: HubServer, target: Path, gguf_bytes: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = gguf_bytes(0), gguf_bytes(1)
    hub.add(ID, {"a.gguf": first, "b.gguf": second})
    hub.cut_after = {"a.gguf": [len(first), len(first) - 1000, 0, 0, 0, 0]}
    with pytest.raises(DownloadError):
        convert(f"{ID}/a.gguf", target, stream_from_hub=True)
    assert stored_on(target.parent) > 0.9 * len(first)
    with Sampler(target.parent, monkeypatch) as disk:
        made = convert(f"{ID}/b.gguf", target, stream_from_hub=True)
    assert disk.most < made.nbytes + len(second) + 0.5 * len(first)
    assert_alone(target)


def test_shards_in_which_nothing_is_wanted_are_not_fetched(
    hub: HubServer, target: Path, tmp_path: Path, write_hf: Write
) -> None:
    tensors = published_models.hf_tensors("qwen3_5", published_models.arrays("qwen3_5"))
    vision = {"model.visual.blocks.0.attn.qkv.weight": np.zeros((1000, 500), np.float32)}
    shards = {shard(1, 2): tensors, shard(2, 2): vision}
    add_to_hub(hub, write_hf(tmp_path / "source", published_models.CONFIGS["qwen3_5"], shards=shards))
    made = convert(ID, target, stream_from_hub=True)
    assert any("left out" in warning for warning in made.warnings)
    assert hub.sent(shard(2, 2)) <= 65_536


# ---- The disk


@pytest.mark.parametrize(
    ("options", "tied", "most_shards"),
    [({}, False, 2), ({"quantize": "int8"}, False, 2), ({"quantize": "int8"}, True, 3)],
)
def test_the_disk_holds_the_checkpoint_and_two_shards(
    model: Callable[..., Path],
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: Any,
    tied: bool,
    most_shards: int,
) -> None:
    """A tied embedding is the head too: with a receipt its shard stays to the end."""
    folder = model(shards=8, tied=tied)
    largest = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    whole = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    with Sampler(target.parent, monkeypatch) as disk:
        made = convert(ID, target, stream_from_hub=True, **options)
    small = 3 * sum(path.stat().st_size for path in folder.glob("*.json"))
    rounding = 8192 * sum(1 for _ in target.rglob("*"))
    assert disk.samples > 30
    assert made.nbytes < disk.most <= made.nbytes + most_shards * largest + small + rounding
    assert most_shards * largest < 0.6 * whole


def test_what_does_not_fit_is_refused_before_any_weights_come(
    model: Callable[..., Path], hub: HubServer, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model()
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    usage = shutil.disk_usage(target.parent)

    def have(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))

    have(stored // 2)
    with pytest.raises(ConversionError) as caught:
        convert(ID, target, stream_from_hub=True)
    for part in ("at its fullest", "of the checkpoint", "6 in all, the largest of", " free; make room"):
        assert part in str(caught.value)
    assert not list(target.parent.iterdir())
    assert all(hub.sent(shard(n, 6)) < 200_000 for n in range(1, 7))
    # A quarter of the numbers in 8 bits, and two shards: more than the checkpoint, less than the source.
    have(int(0.75 * stored))
    convert(ID, target, stream_from_hub=True, quantize="int8")


def test_headers_that_an_interrupted_run_has_left_are_no_room(
    model: Callable[..., Path], hub: HubServer, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stand in files as long as the shards, which take nearly nothing."""
    folder = model()
    interrupt(hub, shard(1, 6), target)
    usage = shutil.disk_usage(target.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(ConversionError, match=r"needs .* bytes, .* free; make room"):
        convert(folder, target)


def test_without_room_for_two_shards_one_is_here_at_a_time(
    model: Callable[..., Path], target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model()
    usage = shutil.disk_usage(target.parent)

    def have(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))

    have(1_000_000)
    options: Any = {"stream_from_hub": True, "quantize": "int8", "receipt": False}
    with pytest.raises(ConversionError) as caught:
        convert(ID, target, **options)
    needed = re.search(r"needs ([\d,]+) bytes", str(caught.value))
    assert needed
    have(int(needed[1].replace(",", "")))
    most: list[int] = []
    fetch = RemoteShards._fetch

    def counted(shards: RemoteShards, path: str) -> None:
        most.append(len(shards.here) + 1)
        fetch(shards, path)

    monkeypatch.setattr(RemoteShards, "_fetch", counted)
    convert(ID, target, **options)
    assert most == [1] * 6


# ---- What goes wrong on the way


def test_a_shard_of_another_hash_is_an_error_and_the_next_run_goes_on(
    model: Callable[..., Path], hub: HubServer, target: Path, tmp_path: Path
) -> None:
    folder = model()
    name = shard(4, 6)
    content = bytearray((folder / name).read_bytes())
    content[-100] ^= 1
    hub.served = {name: bytes(content)}
    with pytest.raises(DownloadError, match=rf"the content of {name} has hash .* deleted") as caught:
        convert(ID, target, stream_from_hub=True)
    assert "resumes from it" in caught.value.__notes__[0]
    assert [path.name for path in target.parent.iterdir()] == [".model.partial"]
    hub.served = {}
    hub.requests.clear()
    convert(ID, target, stream_from_hub=True)
    # Headers are asked for again, weights that are converted are not.
    assert sum(hub.sent(shard(n, 6)) for n in (1, 2)) <= 2 * 65_536
    assert contents(target) == contents(convert(folder, tmp_path / "usual").path) | {
        "manifest.json": contents(target)["manifest.json"]
    }
    assert_alone(target)


def test_a_header_that_changes_on_the_way_is_not_planned_by(
    model: Callable[..., Path], hub: HubServer, target: Path
) -> None:
    folder = model()
    name = shard(2, 6)
    content = (folder / name).read_bytes()
    # Two tensors of one shape that change places: nothing but the hash tells.
    damaged = content.replace(b"k_proj", b"x_proj").replace(b"v_proj", b"k_proj").replace(b"x_proj", b"v_proj")
    assert len(damaged) == len(content)
    hub.served = {name: damaged}
    fetch = RemoteShards._fetch

    def restored(shards: RemoteShards, path: str) -> None:
        hub.served = {}
        fetch(shards, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RemoteShards, "_fetch", restored)
        with pytest.raises(DownloadError, match=f"header of {name} was another one"):
            convert(ID, target, stream_from_hub=True)
    convert(ID, target, stream_from_hub=True)
    assert_alone(target)


def test_a_hub_that_breaks_off_for_good_is_an_error_and_the_next_run_goes_on(
    model: Callable[..., Path], hub: HubServer, target: Path
) -> None:
    folder = model()
    name = shard(3, 6)
    size = (folder / name).stat().st_size
    header = 65_536  # the bytes of the first request, for the header alone
    hub.cut_after = {name: [header, size // 2, 0, 0, 0]}
    with pytest.raises(DownloadError, match="cannot be reached") as caught:
        convert(ID, target, stream_from_hub=True)
    assert "resumes from it" in caught.value.__notes__[0]
    hub.requests.clear()
    convert(ID, target, stream_from_hub=True)
    assert hub.sent(name) <= size - size // 2 + header
    assert_alone(target)


def test_a_header_that_does_not_come_at_once_is_asked_for_again(
    model: Callable[..., Path], hub: HubServer, target: Path
) -> None:
    model()
    hub.cut_after = {shard(2, 6): [30, 0], shard(3, 6): [0, 0, 0]}
    with pytest.raises(DownloadError, match="cannot be reached"):
        convert(ID, target, stream_from_hub=True)
    assert not list(target.parent.iterdir())
    hub.cut_after = {shard(2, 6): [30, 0], shard(3, 6): [0, 0]}
    convert(ID, target, stream_from_hub=True)
    assert_alone(target)


def test_numbers_that_are_nan_end_it_at_their_shard(
    model: Callable[..., Path], hub: HubServer, target: Path, tiny_config: Any, hf_tensors: Any, write_hf: Write
) -> None:
    folder = model()
    config = tiny_config(**SIZES)
    tensors = hf_tensors(config)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    add_to_hub(hub, write_hf(folder, config, shards=split(tensors, 6)))
    for options in ({}, {"quantize": "int8"}):
        with pytest.raises(ConversionError, match=r"model.layers.1.mlp.up_proj.weight' \(at \[3, 4\]"):
            convert(ID, target, stream_from_hub=True, **options)
        assert not list(target.parent.iterdir())


def test_downloads_end_before_the_folder_is_removed(
    model: Callable[..., Path], target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model()
    there: list[bool] = []
    close = RemoteShards.close

    def looked(shards: RemoteShards) -> None:
        there.append(target.with_name(".model.partial").exists())
        close(shards)

    def fail(*_: object, **__: object) -> None:
        raise ConversionError("cannot be converted")

    monkeypatch.setattr(RemoteShards, "close", looked)
    monkeypatch.setattr(ArrayWriter, "write", fail)
    with pytest.raises(ConversionError, match="cannot be converted"):
        convert(ID, target, stream_from_hub=True)
    assert there[0]
    assert not list(target.parent.iterdir())


def test_the_folder_is_another_process_s_after_the_rename(
    model: Callable[..., Path], target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model(with_tokenizer=False)
    others = target.with_name(".model.partial") / "hub" / "its.file"

    def begin_another(*_: object) -> str:
        others.parent.mkdir(parents=True)
        others.write_bytes(b"its content")
        return ""

    monkeypatch.setattr(conversion, "ids_beyond", begin_another)
    convert(ID, target, stream_from_hub=True)
    assert others.exists()


def test_files_of_one_content_are_whole_each_by_itself(hub: HubServer, tmp_path: Path) -> None:
    content = save({"x": np.ones((300, 300), np.float32)})
    hub.add(ID, {"a.safetensors": content, "b.safetensors": content})
    listed = repository.Repository(ID, "main")
    store = CacheStore(ID, "main", listed.commit, tmp_path / "hub")
    files = [listed.files[name] for name in ("a.safetensors", "b.safetensors")]
    shards = RemoteShards(listed, store, files, lambda nbytes: None)
    shards.ensure(str(store.folder / "a.safetensors"))
    shards.close()
    again = RemoteShards(listed, store, files, lambda nbytes: None)
    assert again.here == {str(store.folder / "a.safetensors")}
    again.ensure(str(store.folder / "b.safetensors"))
    again.close()
    assert (store.folder / "b.safetensors").read_bytes() == content


CHILD = "import sys\nfrom jllm_convert import convert\nconvert(sys.argv[1], sys.argv[2], stream_from_hub=True)"


def start(hub: HubServer, home: Path, target: Path) -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment["HF_HUB_DOWNLOAD_TIMEOUT"] = "1"  # after which a silent connection is noticed
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, ID, str(target)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_is_stopped_leaves_what_the_next_run_uses(
    model: Callable[..., Path], hub: HubServer, home: Path, target: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    folder = model(with_tokenizer=False)
    name = shard(5, 6)
    half = (folder / name).stat().st_size // 2
    hub.hold_after = {name: half}
    with start(hub, home, target) as process:
        try:
            partial = target.with_name(".model.partial")
            end = time.monotonic() + 30
            # Until half of the fifth shard is here, and the third is converted and gone.
            while not (
                any(path.stat().st_size == half for path in partial.rglob("*.incomplete"))
                and not list(partial.rglob(shard(3, 6)))
                and list(partial.rglob(shard(5, 6)))
            ):
                assert time.monotonic() < end
                time.sleep(0.02)
            process.send_signal(stop)
            process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == (-stop)
    assert [path.name for path in target.parent.iterdir()] == [".model.partial"]
    hub.release()
    hub.cut_after, hub.hold_after = {}, {}
    hub.requests.clear()
    convert(ID, target, stream_from_hub=True)
    assert sum(hub.sent(shard(n, 6)) for n in (1, 2, 3)) <= 3 * 65_536  # headers
    assert hub.sent(name) <= half + 200_000
    assert_alone(target)
    assert contents(target) == contents(convert(ID, tmp_path / "usual").path)


def interrupt(
    hub: HubServer, name: str, target: Path, model_id: str = ID, after: int = 100_000, **options: Any
) -> None:
    """Converts, but the connection breaks for good in a file, behind its header and some more bytes."""
    hub.cut_after = {name: [65_536, after, 0, 0, 0, 0]}
    with pytest.raises(DownloadError):
        convert(model_id, target, stream_from_hub=True, **options)
    hub.cut_after = {}


def test_a_resumed_comparison_holds_two_shards_and_counts_what_it_fetches(
    model: Callable[..., Path], hub: HubServer, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A receipt reads the whole source again, that of the arrays which are written too."""
    folder = model(shards=8)
    interrupt(hub, shard(8, 8), target, quantize="int8")
    reports: list[Progress] = []
    largest = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    with Sampler(target.parent, monkeypatch) as disk:
        made = convert(ID, target, stream_from_hub=True, quantize="int8", on_progress=reports.append)
    small = 3 * sum(path.stat().st_size for path in folder.glob("*.json"))
    rounding = 8192 * sum(1 for _ in target.rglob("*"))
    # And the part of the last shard that came before.
    assert disk.most <= made.nbytes + 2 * largest + 200_000 + small + rounding
    assert reports[-1].nbytes == reports[-1].total_nbytes
    assert reports[-1].arrays == reports[-1].total_arrays
    assert contents(target) == contents(convert(ID, tmp_path / "usual", quantize="int8").path)
    assert_alone(target)


def test_progress_of_a_resumed_conversion_reaches_its_total(
    model: Callable[..., Path], hub: HubServer, target: Path
) -> None:
    folder = model(with_tokenizer=False)
    interrupt(hub, shard(5, 6), target)
    reports: list[Progress] = []
    convert(ID, target, stream_from_hub=True, on_progress=reports.append)
    assert reports[-1].nbytes == reports[-1].total_nbytes
    assert reports[-1].total_nbytes <= sum((folder / shard(n, 6)).stat().st_size for n in (4, 5, 6))
    assert reports[-1].arrays == reports[-1].total_arrays


def test_an_array_that_was_damaged_meanwhile_is_made_again(
    model: Callable[..., Path], hub: HubServer, target: Path, tmp_path: Path
) -> None:
    model(with_tokenizer=False)
    interrupt(hub, shard(5, 6), target)
    chunk = max(
        (target.with_name(".model.partial") / "weights").rglob("embedding/**/*"), key=lambda p: p.stat().st_size
    )
    chunk.write_bytes(bytes(chunk.stat().st_size))
    convert(ID, target, stream_from_hub=True)
    assert contents(target) == contents(convert(ID, tmp_path / "usual").path)
    assert_alone(target)


def test_another_commit_or_another_conversion_begins_anew(
    model: Callable[..., Path], hub: HubServer, target: Path, tmp_path: Path
) -> None:
    folder = model(with_tokenizer=False)

    interrupt(hub, shard(5, 6), target)
    assert list(target.with_name(".model.partial").glob("hub/models*"))
    convert(folder, target)
    assert_alone(target)
    shutil.rmtree(target)
    interrupt(hub, shard(5, 6), target)
    model(with_tokenizer=False, seed=1)
    convert(ID, target, stream_from_hub=True)
    assert contents(target) == contents(convert(ID, tmp_path / "usual").path)
    assert_alone(target)


# ---- The command


def test_what_is_not_on_the_hub_is_refused(
    model: Callable[..., Path], hub: HubServer, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model()
    with pytest.raises(ConversionError, match="no model on the hub"):
        convert(folder, target, stream_from_hub=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConversionError, match=r"offline .* to convert a copy in the cache"):
        convert(ID, target, stream_from_hub=True)
    assert not list(target.parent.iterdir())


def test_the_command_and_its_progress(
    model: Callable[..., Path], hub: HubServer, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model()
    cli(["convert", ID, str(target), "--stream-from-hub"], standalone_mode=False)
    assert str(target) in capsys.readouterr().out
    reports: list[Progress] = []
    convert(ID, tmp_path / "again", stream_from_hub=True, on_progress=reports.append)
    done = [report.nbytes for report in reports]
    assert done == sorted(done)
    assert done[-1] == reports[-1].total_nbytes == sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    assert reports[-1].arrays == reports[-1].total_arrays


def test_warnings_name_the_model(model: Callable[..., Path], target: Path, tmp_path: Path) -> None:
    model(with_tokenizer=False)
    made = convert(ID, target, stream_from_hub=True)
    assert made.warnings == (f"{ID} has no tokenizer.json: the model will take token ids only",)
    assert made.warnings == convert(ID, tmp_path / "usual").warnings


# ---- The schedule


def use(array: str, shards: str, first: int, last: int | None = None, nbytes: int = 10) -> Use:
    return Use(array, frozenset(shards), first, first if last is None else last, nbytes)


def order(schedule: Schedule, last: int) -> list[str]:
    """What happens: +a fetched, =x converted, -a released."""
    events = []
    for step in range(last + 2):
        events += [f"-{name}" for name in schedule.release(step)]
        while step <= last and not schedule.is_ready(step):
            shard = schedule.coming[0]
            schedule.fetched(shard)
            events += [f"+{shard}", *(f"={array}" for array in schedule.take_ready())]
            events += [f"-{name}" for name in schedule.release(step)]
    return events


def test_a_shard_goes_with_its_last_array() -> None:
    uses = [use("x", "a", 0), use("y", "ab", 1), use("z", "c", 2)]
    assert order(Schedule(uses, compared=False), 2) == ["+a", "=x", "+b", "=y", "-a", "-b", "+c", "=z", "-c"]


def test_shards_come_in_the_order_of_the_layers_whatever_their_names() -> None:
    uses = [use("head", "a", 9), use("embedding", "c", 0), use("layer", "b", 1)]
    assert order(Schedule(uses, compared=True), 9) == [
        "+c",
        "=embedding",
        "-c",
        "+b",
        "=layer",
        "-b",
        "+a",
        "=head",
        "-a",
    ]


def test_a_comparison_keeps_a_tied_embedding_to_the_end() -> None:
    uses = [use("embedding", "a", 0, 3), use("x", "a", 1), use("y", "b", 2), use("norm", "c", 3)]
    assert order(Schedule(uses, compared=True), 3) == [
        "+a",
        "=embedding",
        "=x",
        "+b",
        "=y",
        "-b",
        "+c",
        "=norm",
        "-a",
        "-c",
    ]
    assert order(Schedule(uses, compared=False), 3)[:4] == ["+a", "=embedding", "=x", "-a"]


@pytest.mark.parametrize(
    ("compared", "ahead", "most"),
    [(False, 0, 30 + 100), (False, 1, 20 + 200), (True, 0, 30 + 200), (True, 1, 20 + 300)],
)
def test_the_fullest_moment_is_known_before(compared: bool, ahead: int, most: int) -> None:
    uses = [use("embedding", "a", 0, 3), use("y", "b", 2), use("norm", "c", 3)]
    assert Schedule(uses, compared).peak(dict.fromkeys("abc", 100), ahead) == most


def test_a_comparison_fetches_again_what_an_earlier_run_has_converted() -> None:
    uses = [use("embedding", "a", 0), use("x", "b", 1), use("y", "c", 2)]
    schedule = Schedule(uses, compared=True, held="c")
    schedule.forget(["embedding", "x"])
    assert order(schedule, 2) == ["+a", "=y", "-a", "+b", "-b", "-c"]
    alone = Schedule(uses, compared=False)
    alone.forget(["embedding", "x"])
    assert order(alone, 2) == ["+c", "=y", "-c"]


def test_the_fullest_moment_of_a_resumed_conversion() -> None:
    """What is written and the first, large shard are there together, and what has come of a later one."""
    uses = [use("embedding", "a", 0, nbytes=100), use("x", "b", 1, nbytes=50), use("y", "c", 2, nbytes=50)]
    sizes, resumed = {"a": 400, "b": 50, "c": 50}, Schedule(uses, compared=True)
    assert resumed.peak(sizes, 0) == 500
    resumed.forget(["embedding", "x"])
    assert resumed.peak(sizes, 0, {"c": 20}) == 150 + 400 + 20
