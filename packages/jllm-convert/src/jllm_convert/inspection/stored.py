"""What the headers of a model's files list, whether or not the model can be converted. No tensor's data are read."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jllm_core.checkpoint import WEIGHTS_FOLDER, Manifest

from jllm_convert.inspection.gguf_header import GGUFHeader
from jllm_convert.sources.safetensors import INDEX_FILE, SINGLE_FILE

# safetensors itself refuses longer headers.
_LONGEST_HEADER = 100_000_000
# Bytes an element of the types that a checkpoint's arrays have.
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "uint8": 1}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as it stands in a file.

    Attributes:
        name: the name the file gives it.
        shape: its shape, slowest axis first.
        dtype: its element type by the file's own name: ``BF16``, ``Q4_1``, ``float32``.
        parameters: how many numbers of the model it holds: none where it holds scales.
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
class Shard:
    """A file that holds tensors; a checkpoint has its weights folder instead.

    Attributes:
        name: the file's name.
        nbytes: its size; None where it is missing.
        tensors: how many tensors it lists; None where it is missing or cannot be read.
    """

    name: str
    nbytes: int | None
    tensors: int | None


@dataclass(frozen=True)
class Stored:
    """The tensors of a model, the files that hold them, and what is wrong with the files' headers."""

    tensors: tuple[StoredTensor, ...]
    shards: tuple[Shard, ...]
    problems: tuple[str, ...] = ()


def stored_in_folder(folder: Path) -> Stored:
    """The tensors of a Hugging Face folder, as far as its files can be read."""
    tensors: list[StoredTensor] = []
    shards, problems = [], []
    for name in _weight_files(folder):
        path = folder / name
        try:
            found = list(_safetensors(path))
        except FileNotFoundError:
            problems.append(f"{name}: the file is missing from {folder}; download it again")
            shards.append(Shard(name, None, None))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            problems.append(f"{name}: not a whole safetensors file ({error}); it may be cut short, download it again")
            shards.append(Shard(name, path.stat().st_size if path.is_file() else None, None))
        else:
            shards.append(Shard(name, path.stat().st_size, len(found)))
            tensors += found
    return Stored(tuple(tensors), tuple(shards), tuple(problems))


def stored_in_gguf(path: Path, header: GGUFHeader) -> Stored:
    """The tensors of a GGUF file."""
    tensors = tuple(
        StoredTensor(each.name, each.shape, each.stored, math.prod(each.shape), each.nbytes, path.name)
        for each in header.tensors
    )
    return Stored(tensors, (Shard(path.name, path.stat().st_size, len(tensors)),))


def stored_in_checkpoint(folder: Path, manifest: Manifest) -> Stored:
    """The arrays that a checkpoint's manifest lists."""
    tensors, problems = [], []
    packed = 8 // manifest.quantization.bits if manifest.quantization else 1
    for name, entry in manifest.arrays.items():
        shape, dtype = entry["shape"], entry["dtype"]
        if not isinstance(dtype, str) or dtype not in _ITEM_BYTES or not all(_is_size(length) for length in shape):
            problems.append(f"{name}: the manifest lists an array of dtype {dtype!r} and shape {shape!r}")
            continue
        size = math.prod(shape)
        part = name.rpartition(".")[2]
        parameters = 0 if part in ("scales", "offsets") else size * (packed if part == "values" else 1)
        nbytes = size * _ITEM_BYTES[dtype]
        tensors.append(StoredTensor(name, tuple(shape), dtype, parameters, nbytes, f"{WEIGHTS_FOLDER}/{name}"))
    weights = folder / WEIGHTS_FOLDER
    if not weights.is_dir():
        problems.append(f"{WEIGHTS_FOLDER}/ is missing from {folder}")
        return Stored(tuple(tensors), (Shard(WEIGHTS_FOLDER, None, None),), tuple(problems))
    here = {path.name for path in weights.iterdir()}
    problems += [f"{each.name}: its folder {each.file} is missing" for each in tensors if each.name not in here]
    nbytes = sum(path.stat().st_size for path in weights.rglob("*") if path.is_file())
    shard = Shard(WEIGHTS_FOLDER, nbytes, sum(each.name in here for each in tensors))
    return Stored(tuple(tensors), (shard,), tuple(problems))


def _weight_files(folder: Path) -> list[str]:
    """The files that a conversion reads, or where it would find none, every safetensors file that is there."""
    if (folder / INDEX_FILE).is_file():
        try:
            weight_map = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
            names = {name for name in weight_map.values() if isinstance(name, str) and Path(name).name == name}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            names = set()
        if names:
            return sorted(names)
    elif (folder / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    return sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())


def _safetensors(path: Path) -> Iterator[StoredTensor]:
    """The tensors that the header of a file lists, by where their data lie."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
        header = json.loads(file.read(length))
    if not isinstance(header, Mapping):
        raise ValueError("its header is no JSON object")
    entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    for name, entry in sorted(entries, key=lambda each: _first_byte(*each)):
        shape, dtype, (start, stop) = entry.get("shape"), entry.get("dtype"), entry["data_offsets"]
        sound = isinstance(shape, list) and isinstance(dtype, str) and all(_is_size(each) for each in (*shape, stop))
        if not sound or stop < start:
            raise ValueError(f"tensor {name!r} is described as {entry!r}")
        yield StoredTensor(name, tuple(shape), dtype, math.prod(shape), stop - start, path.name)


def _first_byte(name: str, entry: Any) -> int:
    """Where a tensor's data begin; the file's own order tells a reader more than that of the names."""
    offsets = entry.get("data_offsets") if isinstance(entry, Mapping) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not _is_size(offsets[0]):
        raise ValueError(f"tensor {name!r} is described as {entry!r}")
    return int(offsets[0])


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
