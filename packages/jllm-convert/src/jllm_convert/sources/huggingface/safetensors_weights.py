"""Safetensors entries as source tensors: plain ones, and FP8 matrices with their scales."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import ml_dtypes
import numpy as np

from jllm_convert.files.regular_file import RegularFile
from jllm_convert.sources.base import SourceTensor
from jllm_convert.sources.huggingface.safetensors_header import Entry, shown
from jllm_convert.sources.quantized.fp8 import FP8, SCALE_DTYPES, SCALE_SUFFIX, ScaledMatrix, scales_shape
from jllm_convert.sources.stored_array import StoredArray

# Element types by safetensors' names. The bytes of the last mean something with their scales only.
_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    FP8: np.dtype(np.uint8),
}
_OTHER_ADVICE = {"F64": "load the model with transformers in float32 and save it again"}
_ADVICE = "convert the publisher's unquantised weights, or a GGUF file, instead"

StoredTensors = Mapping[str, tuple[RegularFile, Entry]]
"""Every tensor of a folder by name: the file that holds it, and its header entry."""


def source_tensors(
    folder: Path, stored: StoredTensors, block: tuple[int, int] | None, problems: list[str]
) -> dict[str, SourceTensor]:
    """Make source tensors of all header entries.

    Args:
        folder: the folder of the files.
        stored: the header entries of all shards.
        block: the rows and columns that share a scale in FP8 matrices; None without a quantization_config.
        problems: problems are added here.

    Returns:
        The tensors by name, without those that hold scales.
    """
    tensors: dict[str, SourceTensor] = {}
    # What is wrong with the format is one problem, not one for each tensor.
    if wrong := _wrong_types(stored, quantized=block is not None):
        problems += wrong
        return tensors
    for name, (file, entry) in stored.items():
        found = _array(file, entry)
        if isinstance(found, str):
            problems.append(f"{file.name}: tensor {shown(name)} {found}")
            continue
        # Scales are read with their weight, and are no tensors of the model.
        if name.endswith(SCALE_SUFFIX):
            problems += _scale_problems(name, file, stored)
            continue
        values: StoredArray | ScaledMatrix = found
        also: tuple[Path, ...] = ()
        if entry.dtype == FP8:
            matrix = _matrix(found, stored, cast(tuple[int, int], block))
            if isinstance(matrix, str):
                problems.append(f"{file.name}: tensor {shown(name)} is stored as {FP8}, {matrix}")
                continue
            values, also = matrix, (folder / matrix.scales.file.name,)
        where = folder / file.name
        tensors[name] = SourceTensor(name, values.shape, values.dtype, where, values.read, entry.dtype, also)
    return tensors


def _wrong_types(stored: StoredTensors, quantized: bool) -> list[str]:
    """A problem for each element type that weights cannot have.

    Args:
        stored: the header entries.
        quantized: whether config.json says how FP8 values are meant.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for name, (file, entry) in stored.items():
        if entry.dtype not in _DTYPES or (entry.dtype == FP8 and not quantized):
            found.setdefault(entry.dtype, []).append((file.name, shown(name)))
    plain = {kind: places for kind, places in found.items() if kind in _OTHER_ADVICE}
    packed = {kind: places for kind, places in found.items() if kind not in _OTHER_ADVICE}
    problems = [
        f"{_counted(places)} stored as {kind}; supported: {', '.join(_DTYPES)}. To go on, {_OTHER_ADVICE[kind]}"
        for kind, places in plain.items()
    ]
    if packed:
        kinds = ", ".join(sorted(packed))
        why = "" if quantized else ", and config.json has no quantization_config that says what their values stand for"
        places = [place for each in packed.values() for place in each]
        problems.append(f"{_counted(places)} stored as {kinds}, as quantised weights are{why}. To go on, {_ADVICE}")
    return problems


def _counted(places: list[tuple[str, str]]) -> str:
    file, name = places[0]
    one = f"{file}: tensor {name} is"
    return one if len(places) == 1 else f"{len(places):,} tensors, such as {name} in {file}, are"


def _array(file: RegularFile, entry: Entry) -> StoredArray | str:
    """A tensor's data as stored, or their problem."""
    dtype = _DTYPES[entry.dtype]
    # The header parser leaves this check to the one who knows the element's size.
    needed = math.prod(entry.shape) * dtype.itemsize
    if entry.nbytes != needed:
        return f"has {entry.nbytes:,} bytes of data; {entry.dtype} {shown(list(entry.shape))} takes {needed:,}"
    return StoredArray(entry.name, file, entry.start, entry.shape, dtype)


def _matrix(found: StoredArray, stored: StoredTensors, block: tuple[int, int]) -> ScaledMatrix | str:
    """An FP8 matrix with its scales, or its problem."""
    if len(found.shape) != 2:
        return f"and has shape {shown(list(found.shape))}; only matrices can be"
    name = found.name + SCALE_SUFFIX
    if name not in stored:
        return f"and its scales {shown(name)} are missing; download the folder again"
    file, entry = stored[name]
    expected = scales_shape(found.shape, block)
    if entry.dtype not in SCALE_DTYPES or entry.shape != expected:
        return (
            f"and its scales {shown(name)} are {entry.dtype} {shown(list(entry.shape))}; the config's blocks of "
            f"{block[0]} by {block[1]} need {list(expected)} in {' or '.join(SCALE_DTYPES)}"
        )
    scales = _array(file, entry)
    # The scales themselves report the same problem, when it is their turn.
    return f"and its scales are damaged: {scales}" if isinstance(scales, str) else ScaledMatrix(found, scales, block)


def _scale_problems(name: str, file: RegularFile, stored: StoredTensors) -> Iterator[str]:
    """The problem of scales whose weight is missing, or is not stored as FP8."""
    weight = name.removesuffix(SCALE_SUFFIX)
    if weight not in stored:
        yield f"{file.name}: tensor {shown(name)} holds scales of {shown(weight)}, which is missing"
    elif (dtype := stored[weight][1].dtype) != FP8:
        yield f"{file.name}: tensor {shown(name)} holds scales of {shown(weight)}, which is {dtype} and takes none"
