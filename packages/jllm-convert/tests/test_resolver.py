"""The resolver of jllm-runtime: a model's name to a converted folder, kept in the cache."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from jllm_convert import convert, resolver
from jllm_convert.errors import ConversionError
from jllm_convert.files import content_hash
from jllm_convert.resolver import resolve
from jllm_core import Quantization, checkpoint

Tensors = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def config(tiny_config: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return tiny_config()


@pytest.fixture
def tensors(config: dict[str, Any], hf_tensors: Callable[..., Tensors]) -> Tensors:
    return hf_tensors(config)


@pytest.fixture
def source(tmp_path: Path, write_hf: Callable[..., Path], config: dict[str, Any], tensors: Tensors) -> Path:
    return write_hf(tmp_path / "model", config, tensors)


def resolved(model: str | Path) -> Path:
    path = resolve(str(model))
    assert path is not None
    return path


def gamma(folder: Path) -> np.ndarray:
    return np.asarray(checkpoint.restore_weights(folder, checkpoint.read_config(folder)).gamma_final)


def test_a_folder_is_converted_into_the_cache(source: Path, cache: Path, tensors: Tensors) -> None:
    path = resolved(source)
    assert path.is_relative_to(cache)
    assert path.name.startswith("model-")
    np.testing.assert_array_equal(gamma(path), tensors["model.norm.weight"])


def test_another_named_chat_template_is_another_model(source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.json").write_text("{}")
    (source / "additional_chat_templates").mkdir()
    named = source / "additional_chat_templates" / "tool_use.jinja"
    named.write_text("one")
    before = resolved(source)
    assert (before / "additional_chat_templates" / "tool_use.jinja").read_text() == "one"
    assert "Warning: model/chat_template.json is not read" in capfd.readouterr().err
    named.write_text("other")
    assert (resolved(source) / "additional_chat_templates" / "tool_use.jinja").read_text() == "other"


def test_the_second_call_converts_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = resolved(source)

    def convert(*arguments: Any, **options: Any) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr("jllm_convert.conversion.convert", convert)
    assert resolved(source) == path
    monkeypatch.chdir(source.parent)
    assert resolved("model") == path


def test_a_source_that_has_changed_is_converted_again(
    source: Path, write_hf: Callable[..., Path], config: dict[str, Any], tensors: Tensors
) -> None:
    before = resolved(source)
    stamp = (source / "model.safetensors").stat()
    write_hf(source, config, {name: tensor + 1 for name, tensor in tensors.items()})
    os.utime(source / "model.safetensors", ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1_000_000_000))
    after = resolved(source)
    assert after != before
    np.testing.assert_array_equal(gamma(after), tensors["model.norm.weight"] + 1)


def test_a_gguf_file_is_converted(
    tmp_path: Path,
    config: dict[str, Any],
    tensors: Tensors,
    gguf_metadata: Callable[..., dict[str, Any]],
    gguf_tensors: Callable[..., Tensors],
    write_gguf: Callable[..., Path],
) -> None:
    path = write_gguf(tmp_path / "tiny.GGUF", gguf_metadata(config), gguf_tensors(config, tensors))
    np.testing.assert_array_equal(gamma(resolved(path)), tensors["model.norm.weight"])


def test_sources_of_one_name_and_size_and_date_do_not_share_a_conversion(
    source: Path, tmp_path: Path, write_hf: Callable[..., Path], config: dict[str, Any], tensors: Tensors
) -> None:
    one_more = {name: tensor + 1 for name, tensor in tensors.items()}
    other = write_hf(tmp_path / "other" / "model", config, one_more)
    for path in (*source.iterdir(), *other.iterdir()):
        os.utime(path, ns=(0, 0))
    assert resolved(source) != resolved(other)


def test_another_format_version_is_converted_again(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = resolved(source)
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 2)
    assert resolved(source) != before


@pytest.mark.parametrize("name", ["nothing.gguf", "a/b/c", "x" * 300])
def test_names_of_nothing_are_left_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve(name) is None
    assert not cache.exists()


def test_a_file_of_another_kind_is_left_to_others(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("")
    assert resolve(str(tmp_path / "model.onnx")) is None


def test_a_source_that_cannot_be_converted_is_an_error_and_leaves_no_conversion(source: Path, cache: Path) -> None:
    (source / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConversionError, match="not a whole safetensors file"):
        resolve(str(source))
    assert [path for path in (cache / "converted").iterdir() if not path.name.startswith(".")] == []


def test_a_conversion_that_another_process_finished_first_is_used(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jllm_convert import conversion

    convert = conversion.convert

    def lose_the_race(src: Path, dst: Path, *types: Any, **options: Any) -> Any:
        # A copy of the same files, which has times of its own.
        shutil.copytree(src, other := src.with_name("copy"))
        convert(other, dst)
        return convert(src, dst, *types, **options)

    monkeypatch.setattr(conversion, "convert", lose_the_race)
    assert checkpoint.is_checkpoint(resolved(source))


def test_the_line_says_what_was_written_where_and_only_once(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = resolved(source)
    line = f"converted model (weights in F32) to {path}: 18.6 kB, float32; `jllm cache` lists and removes\n"
    warning = "Warning: model has no tokenizer.json: the model will take token ids only\n"
    assert capsys.readouterr() == ("", line + warning)
    resolved(source)
    assert capsys.readouterr() == ("", "")


def test_files_that_were_moved_renamed_or_touched_are_known_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = resolved(source)
    hashed: list[Path] = []
    real = content_hash.content_hash

    def counted(files: Any) -> str:
        hashed.extend(file.path for file in files)
        return real(files)

    monkeypatch.setattr(content_hash, "content_hash", counted)
    assert resolved(source) == path
    assert hashed == []  # their state is known
    moved = source.rename(tmp_path / "moved")
    for file in moved.iterdir():
        os.utime(file, ns=(1, 1))
    assert resolved(moved) == path
    assert sorted(file.name for file in hashed) == ["config.json", "model.safetensors"]
    resolved(moved)
    assert len(hashed) == 2


def test_a_file_that_was_written_to_is_another_though_its_size_and_date_are_the_same(source: Path) -> None:
    file = source / "model.safetensors"
    before, stamp = resolved(source), file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    with file.open("r+b") as stream:
        stream.write(content)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert resolved(source) != before


def test_a_large_file_is_hashed_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content_hash, "_PIECE_BYTES", 8)
    (tmp_path / "a.gguf").write_bytes(bytes(range(100)))
    (tmp_path / "b.gguf").write_bytes(bytes([*range(99), 0]))
    (tmp_path / "c.gguf").write_bytes(bytes(range(100)))
    one, other, same = (
        content_hash.content_hash(content_hash.model_files(tmp_path / f"{name}.gguf")) for name in "abc"
    )
    assert one == same != other


GGUF = Callable[..., Path]


@pytest.fixture
def gguf_file(
    tmp_path: Path,
    tiny_config: Callable[..., dict[str, Any]],
    hf_tensors: Callable[..., Tensors],
    gguf_metadata: Callable[..., dict[str, Any]],
    gguf_tensors: Callable[..., Tensors],
    write_gguf: Callable[..., Path],
) -> GGUF:
    """Writes a GGUF file whose matrices, embedding and one more matrix have the types given."""

    def write(matrices: Any, embedding: Any, other: Any = "same") -> Path:
        wide = tiny_config(hidden_size=64, intermediate_size=96, head_dim=32)
        named = gguf_tensors(wide, hf_tensors(wide))
        types = {
            name: embedding if name == "token_embd.weight" else matrices
            for name, tensor in named.items()
            if tensor.ndim == 2
        }
        if other != "same":
            types["output.weight"] = other
        for name, kind in types.items():
            if kind == Kind.F16:
                named[name] = named[name].astype(np.float16)
        quantised = {name: kind for name, kind in types.items() if kind not in (None, Kind.F16)}
        return write_gguf(tmp_path / "tiny.gguf", gguf_metadata(wide), named, types=quantised)

    return write


@pytest.mark.parametrize(
    ("types", "dtype", "quantization"),
    [
        ((Kind.Q4_1, Kind.Q8_0), "bfloat16", Quantization(4, 32, offsets=True, embedding=8)),
        ((Kind.Q4_0, Kind.Q4_0), "bfloat16", Quantization(4, 32, embedding=8)),
        ((Kind.Q8_0, Kind.Q8_0), "bfloat16", Quantization(8, 32, embedding=8)),
        ((Kind.Q8_0, Kind.F16), "bfloat16", Quantization(8, 32)),
        ((Kind.Q4_0, Kind.Q8_0, Kind.Q8_0), "bfloat16", None),  # to have one grid, one would be rounded again
        ((Kind.Q5_0, Kind.Q8_0), "bfloat16", None),  # a grid that JLLM has not
        ((Kind.F16, Kind.F16), "bfloat16", None),
        ((None, None), "float32", None),
    ],
)
def test_a_gguf_file_keeps_what_it_has(
    gguf_file: GGUF, types: tuple[Any, ...], dtype: str, quantization: Quantization | None
) -> None:
    path = gguf_file(*types)
    manifest = checkpoint.read_manifest(resolved(path))
    assert (manifest.dtype, manifest.quantization) == (dtype, quantization)
    assert manifest.receipt is None
    # What ``convert`` does by itself is another thing.
    assert convert(path, path.with_name("plain")).manifest.dtype == "float32"


def test_a_folder_of_the_callers_takes_the_conversion(source: Path, cache: Path, tmp_path: Path) -> None:
    path = resolve(str(source), tmp_path / "own")
    assert path == tmp_path / "own" / "model"
    assert checkpoint.is_checkpoint(path)
    assert not cache.exists()


# ---- Many at once


def test_threads_that_meet_on_one_cold_cache_share_a_conversion(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count, paths = 6, []
    barrier = threading.Barrier(count)

    def work() -> None:
        barrier.wait()
        paths.append(resolved(source))

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == count
    assert len(set(paths)) == 1
    assert capsys.readouterr().err.count("converted model") == 1


WORKER = """
import sys
from jllm_convert import conversion, resolver
print("ready", flush=True)
for line in sys.stdin:
    print(resolver.resolve(line.strip()), flush=True)
"""


def test_processes_that_meet_on_one_cold_cache_share_a_conversion(source: Path, tmp_path: Path, cache: Path) -> None:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    workers = [subprocess.Popen([sys.executable, "-c", WORKER], text=True, **pipes) for _ in range(3)]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for number in range(5):
        model = shutil.copytree(source, tmp_path / f"model{number}")
        (model / "generation_config.json").write_text(json.dumps({"top_k": number}))
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write(f"{model}\n")
            worker.stdin.flush()
        answers = {worker.stdout.readline() for worker in workers if worker.stdout is not None}
        assert len(answers) == 1
        assert checkpoint.is_checkpoint(Path(answers.pop().strip()))
    errors = "".join(worker.communicate()[1] for worker in workers)
    assert "Traceback" not in errors
    assert [worker.returncode for worker in workers] == [0] * len(workers)
    assert errors.count("converted model") == 5
    assert len([path for path in (cache / "converted").iterdir() if not path.name.startswith(".")]) == 5


# ---- Caches that cannot be used


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/1/cache", "/dev/null"])
def test_a_cache_that_cannot_be_written_is_one_sentence(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JLLM_CACHE", str(tmp_path / place))
    with pytest.raises(ConversionError, match=r"the cache folder .* cannot be used .*; set JLLM_CACHE to") as caught:
        resolve(str(source))
    assert "\n" not in str(caught.value)


def test_a_cache_without_room_is_one_sentence(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(source)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(ConversionError, match=r"has 100 free.*; set JLLM_CACHE to .*`jllm cache remove`"):
        resolve(str(source))


def test_a_cache_that_may_not_be_read_is_one_sentence(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listdir = os.listdir

    def refuse(path: Any) -> Any:
        if not Path(path).is_relative_to(cache):
            return listdir(path)
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(ConversionError, match=r"cannot be used \(.*Permission denied.*; set JLLM_CACHE to"):
        resolve(str(source))


def test_a_read_only_cache_that_has_the_model_is_used(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = resolved(source)

    def refuse(path: Path, *_: Any, **__: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    for name in ("mkdir", "touch", "write_text"):
        monkeypatch.setattr(Path, name, refuse)
    resolver._use.cache_clear()
    assert resolved(source) == path
    for file in source.iterdir():
        os.utime(file, ns=(5, 5))
    assert resolved(source) == path  # though the hash cannot be noted


def test_the_entry_point_names_the_resolver() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    value = "jllm_convert.resolver:resolve"
    assert f'[project.entry-points."jllm.resolvers"]\nconvert = "{value}"' in project
    assert EntryPoint("convert", value, "jllm.resolvers").load() is resolve
