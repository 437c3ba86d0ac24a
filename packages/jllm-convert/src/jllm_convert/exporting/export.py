"""Export of a checkpoint to a Hugging Face folder, with the publisher's tensors bit for bit."""

import contextlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from jllm_core import checkpoint
from jllm_core.checkpoint.atomic_rename import recover, remove, replace_folder
from jllm_core.config import ModelConfig

from jllm_convert.errors import ConversionError
from jllm_convert.exporting.exported_arrays import open_arrays, write_arrays
from jllm_convert.exporting.huggingface_config import to_hf_config
from jllm_convert.exporting.safetensors_writer import SafetensorsWriter, split_into_shards
from jllm_convert.files.disk_space import free_space
from jllm_convert.files.model_folder import CONFIG_FILE, tokenizer_file_names
from jllm_convert.files.paths import checked_path
from jllm_convert.progress_bar import reporting
from jllm_convert.writing.memory_budget import DEFAULT_MEMORY, check_memory
from jllm_convert.writing.progress import Progress, ProgressCounter

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""The element types that can be exported, by name."""

# Space for everything besides the counted files: the index, and disk blocks that are filled in part.
_SPARE_BYTES = 1 << 20


@dataclass(frozen=True)
class Exported:
    """Result of an export.

    Attributes:
        path: the folder.
        config: the model's architecture.
        dtype: the element type of the tensors.
        tensors: the number of tensors.
        files: the names of the safetensors files.
        nbytes: the total size of these files in bytes.
        warnings: what a user should know though it is no error, such as a missing tokenizer.
    """

    path: Path
    config: ModelConfig
    dtype: str
    tensors: int
    files: tuple[str, ...]
    nbytes: int
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        files = f"{len(self.files)} file{'s' if len(self.files) > 1 else ''}"
        return f"{self.path}: {self.tensors} tensors, {self.dtype}, {self.nbytes:,} bytes in {files}"

    def __repr__(self) -> str:
        # Not the generated one: the config has many fields, and there may be many files.
        return f"<Exported {self}>"


def export(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    memory: int = DEFAULT_MEMORY,
    progress: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Exported:
    """Export a JLLM checkpoint to a Hugging Face folder, without torch.

    The tensors have the publisher's names, shapes and values. They pass through memory within a budget. The folder is
    written beside ``dst`` under a temporary name and renamed when it is complete and on the disk.

    Args:
        src: the checkpoint.
        dst: the folder to create.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or None for the element type of the checkpoint's source,
            where the manifest states it and the checkpoint has all of its bits, else the checkpoint's own. Values that
            would overflow are an error. Quantised matrices are dequantised.
        shard_bytes: the most bytes of tensors in a file.
        overwrite: replace a Hugging Face folder that is at ``dst``. Nothing but such a folder is ever replaced.
        memory: bytes of weights to hold in memory at a time, from 64 MiB on; the libraries take 150 to 350 MiB besides.
        progress: draw a bar on standard error, or in a notebook's cell, and print the result at the end.
        on_progress: called as tensors are written, from one thread at a time.

    Raises:
        CheckpointError: ``src`` is no checkpoint, or is damaged.
        ConversionError: an architecture that config.json cannot express, a destination that may not be replaced, or a
            full disk.
    """
    with reporting("exporting", progress, on_progress) as report:
        made = _export(checked_path(src), checked_path(dst), dtype, shard_bytes, overwrite, memory, report)
    if progress:
        print(made, file=sys.stderr)
    return made


def _export(
    src: Path,
    dst: Path,
    dtype: str | None,
    shard_bytes: int,
    overwrite: bool,
    memory: int,
    on_progress: Callable[[Progress], None] | None,
) -> Exported:
    _check_arguments(dtype, shard_bytes, memory)
    manifest, config = checkpoint.read_manifest(src), checkpoint.read_config(src)
    # First: after a kill in a replacement, the old folder has another name, and ``dst`` would look free.
    recover(dst)
    _check_destination(src, dst, overwrite)
    # Everything is checked and planned before the folder is created.
    infos = checkpoint.check_against_config(src, config, manifest)
    kept = _kept_dtype(manifest)
    target = DTYPES[dtype or kept]
    generation = _generation_config(src)
    fields = _config_fields(src, config, target.name, generation)
    arrays = open_arrays(src, config, manifest, infos, DTYPES)
    tensors = {name: info for array in arrays for name, info in array.tensors(target).items()}
    shards = split_into_shards(tensors, shard_bytes)
    tokenizer = [name for name in tokenizer_file_names(src) if (src / name).is_file()]
    nbytes = sum(shard.nbytes for shard in shards)
    _check_space(dst, nbytes + sum((src / name).stat().st_size for name in tokenizer))
    with temporary_folder(dst) as folder:
        _write_json(folder / CONFIG_FILE, fields)
        if generation:
            _write_json(folder / checkpoint.GENERATION_FILE, generation)
        for name in tokenizer:
            (folder / name).parent.mkdir(exist_ok=True)  # that of named templates
            shutil.copyfile(src / name, folder / name)
        writer = SafetensorsWriter(folder, tensors, shards)
        counter = ProgressCounter(len(arrays), sum(info.nbytes for info in tensors.values()), on_progress, "exporting")
        # Back to the source's type every value must fit exactly; a type that the user asks for may round.
        exact = dtype is None and manifest.quantization is None
        write_arrays(arrays, writer, target, memory, exact, counter.add)
        writer.finish()
    files = tuple(shard.name for shard in shards)
    return Exported(dst, config, target.name, len(tensors), files, nbytes, _warnings(src, manifest, target, tokenizer))


def _check_arguments(dtype: str | None, shard_bytes: int, memory: int) -> None:
    problems = []
    if dtype is not None and dtype not in DTYPES:
        problems.append(f"dtype must be one of {', '.join(DTYPES)} or None, got {dtype!r}")
    if shard_bytes < 1:
        problems.append(f"shard_bytes must be at least 1, got {shard_bytes:,}")
    if problems:
        raise ConversionError(problems)
    check_memory(memory)


def _check_destination(src: Path, dst: Path, overwrite: bool) -> None:
    # Replacing the destination would delete the checkpoint, or part of it.
    ours, theirs = src.resolve(), dst.resolve()
    if ours == theirs or ours in theirs.parents or theirs in ours.parents:
        raise ConversionError(f"{dst} is, holds or lies in the checkpoint {src}; choose a folder beside it")
    if not dst.exists() and not dst.is_symlink():
        return
    if dst.is_dir() and not any(dst.iterdir()):
        return
    is_model = dst.is_dir() and (dst / CONFIG_FILE).is_file() and any(dst.glob("*.safetensors"))
    if not is_model or checkpoint.is_checkpoint(dst):
        raise ConversionError(
            f"{dst} exists and is not a Hugging Face folder ({CONFIG_FILE} and *.safetensors), so it is not replaced; "
            "choose another name"
        )
    if not overwrite:
        raise ConversionError(f"{dst} exists; choose another name, or replace it with overwrite (--overwrite)")


def _check_space(dst: Path, nbytes: int) -> None:
    needed, (disk, free) = nbytes + _SPARE_BYTES, free_space(Path(os.path.abspath(dst)).parent)
    if free < needed:
        raise ConversionError(
            f"exporting to {dst} needs {needed:,} bytes, {disk} has {free:,} free; "
            f"make room for {needed - free:,} more, or choose another disk"
        )


def _kept_dtype(manifest: checkpoint.Manifest) -> str:
    """The source's element type where the checkpoint has all of its bits (float32 holds the others), else its own."""
    # A quantised or bfloat16 checkpoint of a float32 source has lost bits: claiming float32 would be wrong.
    stated = manifest.source.get("dtype")
    if manifest.quantization is None and manifest.dtype == "float32" and isinstance(stated, str) and stated in DTYPES:
        return stated
    return manifest.dtype


def _generation_config(src: Path) -> dict[str, Any]:
    """Read the checkpoint's generation_config.json, with end-of-text ids in the publishers' form; may be empty."""
    path, eos_ids = src / checkpoint.GENERATION_FILE, checkpoint.read_eos_ids(src)
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    # No empty list: transformers takes the first id of the list for padding.
    settings.pop("eos_token_id", None)
    return settings | ({"eos_token_id": eos_ids[0] if len(eos_ids) == 1 else list(eos_ids)} if eos_ids else {})


def _config_fields(src: Path, config: ModelConfig, dtype: str, generation: dict[str, Any]) -> dict[str, Any]:
    bos, pad = (generation.get(name) for name in ("bos_token_id", "pad_token_id"))
    return to_hf_config(
        config,
        dtype,
        checkpoint.read_eos_ids(src),
        bos_id=bos if isinstance(bos, int) else None,
        pad_id=pad if isinstance(pad, int) else None,
    )


def _warnings(src: Path, manifest: checkpoint.Manifest, dtype: np.dtype, tokenizer: list[str]) -> tuple[str, ...]:
    warnings: tuple[str, ...] = ()
    if manifest.quantization is not None:
        warnings += (
            f"{src.name} is quantised ({manifest.quantization.name}): its matrices are exported as the numbers they "
            f"stand for, in {dtype}; they are not the ones that were quantised",
        )
    if "tokenizer.json" not in tokenizer:
        warnings += (f"{src.name} has no tokenizer.json: the exported folder takes token ids only",)
    return warnings


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def temporary_folder(dst: Path) -> Iterator[Path]:
    """Create a folder beside ``dst``; rename it to ``dst`` when the block succeeds, else remove it."""
    dst = Path(os.path.abspath(dst))
    # A random name: unlike a conversion, an export is not resumed, so two at a time do not disturb each other.
    folder = dst.with_name(f".{dst.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConversionError(f"cannot write beside {dst}: {error}") from error
    try:
        yield folder
        checkpoint.sync(folder)
        replace_folder(folder, dst)
    except OSError as error:
        raise ConversionError(f"writing {dst} failed: {error}") from error
    finally:
        if os.path.lexists(folder):
            remove(folder)
