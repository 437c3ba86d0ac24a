"""Tensors and files of a model by its headers, whether or not it can be converted."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jllm_core.checkpoint import WEIGHTS_FOLDER, Manifest

from jllm_convert.errors import ConversionError
from jllm_convert.files.model_folder import INDEX_FILE, ModelFolder, files_without_index
from jllm_convert.sources.gguf.header import GGUFHeader
from jllm_convert.sources.huggingface.safetensors_header import read_safetensors_header

WEIGHTS_SUFFIX = ".safetensors"
# Bytes of an element, by the types of a checkpoint's arrays. With any other type it cannot be loaded.
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "uint8": 1}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        name: its name in the file.
        shape: its shape, slowest axis first.
        dtype: its element type by the file's own name: ``BF16``, ``Q4_1``, ``float32``.
        parameters: the number of the model's values in it: 0 where it holds scales.
        nbytes: the bytes of its data.
        file: the name of the file, or in a checkpoint of the array's folder.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    nbytes: int
    file: str


@dataclass(frozen=True)
class ShardSummary:
    """A file that holds tensors; a checkpoint has its weights folder instead.

    Attributes:
        name: the file's name.
        nbytes: its size in bytes; None where it is missing or may not be read.
        tensors: the number of tensors in it; None where it is missing or cannot be read.
    """

    name: str
    nbytes: int | None
    tensors: int | None


TensorsAndShards = tuple[tuple[StoredTensor, ...], tuple[ShardSummary, ...]]
"""The tensors of a model, file by file, and its files."""


def stored_in_folder(folder: ModelFolder) -> TensorsAndShards:
    """List the tensors of a Hugging Face folder, as far as they can be read. Opening the source reports the rest."""
    tensors: list[StoredTensor] = []
    shards = []
    for name in _weight_files(folder):
        try:
            file = folder.file(name)
        except ConversionError:
            file = None
        if file is None:
            shards.append(ShardSummary(name, None, None))
            continue
        problems: list[str] = []
        # Sorted by position: the header's own order is arbitrary.
        entries = sorted(read_safetensors_header(file, problems), key=lambda entry: entry.start)
        tensors += [
            StoredTensor(each.name, each.shape, each.dtype, math.prod(each.shape), each.nbytes, name)
            for each in entries
        ]
        shards.append(ShardSummary(name, file.size, len(entries) if entries or not problems else None))
    return tuple(tensors), tuple(shards)


def stored_in_gguf(path: Path, size: int, header: GGUFHeader) -> TensorsAndShards:
    """List the tensors of a GGUF file."""
    tensors = tuple(
        StoredTensor(each.name, each.shape, each.kind.name, math.prod(each.shape), each.end - each.offset, path.name)
        for each in header.tensors
    )
    return tensors, (ShardSummary(path.name, size, len(tensors)),)


def stored_in_checkpoint(folder: Path, manifest: Manifest, problems: list[str]) -> TensorsAndShards:
    """List the arrays of a checkpoint's manifest. Missing folders are added to ``problems``."""
    tensors = []
    for name, entry in manifest.arrays.items():
        size, part = math.prod(entry["shape"]), name.rpartition(".")[2]
        packed = 2 if part == "values" and entry["dtype"] == "uint8" else 1  # two of 4 bits in a byte
        parameters = 0 if part in ("scales", "offsets") else size * packed
        nbytes = size * _ITEM_BYTES.get(entry["dtype"], 0)
        where = f"{WEIGHTS_FOLDER}/{name}"
        tensors.append(StoredTensor(name, tuple(entry["shape"]), entry["dtype"], parameters, nbytes, where))
    weights = folder / WEIGHTS_FOLDER
    if not weights.is_dir():
        problems.append(f"{WEIGHTS_FOLDER}/ is missing from {folder}")
        return tuple(tensors), (ShardSummary(WEIGHTS_FOLDER, None, None),)
    here = {path.name for path in weights.iterdir()}
    problems += [f"{each.name}: its folder {each.file} is missing" for each in tensors if each.name not in here]
    # lstat: a link in a checkpoint counts as itself, and is not followed out of the folder.
    nbytes = sum(path.lstat().st_size for path in weights.rglob("*") if not path.is_dir())
    return tuple(tensors), (ShardSummary(WEIGHTS_FOLDER, nbytes, sum(each.name in here for each in tensors)),)


def _weight_files(folder: ModelFolder) -> list[str]:
    """The weight files that a conversion reads; where it would find none, every safetensors file of the folder."""
    try:
        index = folder.read_json(INDEX_FILE)
    except ConversionError:
        index = {}
    names = files_without_index(folder.names) if index is None else sorted(set(_indexed(index)))
    return names or sorted(n for n in folder.names if n.endswith(WEIGHTS_SUFFIX))


def _indexed(index: dict[str, object]) -> Iterator[str]:
    """The files that an index names, without paths that leave the folder."""
    weight_map = index.get("weight_map")
    for name in weight_map.values() if isinstance(weight_map, dict) else ():
        # A name with a path could lead out of the folder; opening the source reports it.
        if isinstance(name, str) and Path(name).name == name:
            yield name
