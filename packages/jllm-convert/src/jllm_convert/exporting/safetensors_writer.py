"""Safetensors files of tensors that are known beforehand and come in parts, in any order and from several threads.

Format: https://github.com/huggingface/safetensors#format. A file is the length of its header in 8 bytes, the header
(JSON: element type, shape and place of each tensor), and the data without gaps.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from threading import Lock

import numpy as np
from jllm_core.checkpoint import Box, sync

from jllm_convert.files.model_folder import INDEX_FILE, SINGLE_FILE

# The element types that can be written, and the format's names for them.
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that is to be written: its shape and element type."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One file: its name, the bytes that it begins with, and at which byte of it each tensor begins."""

    name: str
    header: bytes
    starts: Mapping[str, int]
    nbytes: int


def split_into_shards(tensors: Mapping[str, TensorInfo], shard_bytes: int) -> list[Shard]:
    """Share tensors out to files, in their order; a file that a tensor would make too large is closed before it.

    One file is called ``model.safetensors``; several are numbered and need the index that SafetensorsWriter adds.

    Args:
        tensors: by name.
        shard_bytes: most bytes of tensors in a file. A tensor that is larger has a file for itself.
    """
    groups: list[dict[str, TensorInfo]] = [{}]
    free = shard_bytes
    for name, info in tensors.items():
        if info.nbytes > free and groups[-1]:
            groups.append({})
            free = shard_bytes
        groups[-1][name] = info
        free -= info.nbytes
    if len(groups) == 1:
        return [_shard(SINGLE_FILE, groups[0])]
    return [
        _shard(f"model-{number:05}-of-{len(groups):05}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    ]


def _shard(name: str, tensors: Mapping[str, TensorInfo]) -> Shard:
    # Larger elements first, so that every tensor begins at a multiple of its element; then by name, as others do.
    order = sorted(tensors, key=lambda tensor: (-tensors[tensor].dtype.itemsize, tensor))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for tensor in order:
        info, start = tensors[tensor], end
        end = start + info.nbytes
        offsets[tensor] = start
        header[tensor] = {
            "dtype": _DTYPES[info.dtype.name],
            "shape": list(info.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    data = 8 + len(text)
    starts = {tensor: data + offset for tensor, offset in offsets.items()}
    return Shard(name, len(text).to_bytes(8, "little") + text, starts, data + end)


class SafetensorsWriter:
    """The files of a model, being written.

    Making it creates the files, with their headers and at their full size.

    Args:
        folder: where they go.
        tensors: what is to be written, by name.
        shards: the files, as ``split_into_shards`` has planned them for these tensors.

    Raises:
        OSError: they cannot be written.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo], shards: Iterable[Shard]) -> None:
        self.folder = folder
        self._tensors = tensors
        self._shards = tuple(shards)
        self._shard_of = {tensor: shard for shard in self._shards for tensor in shard.starts}
        self._written = dict.fromkeys(tensors, 0)
        self._lock = Lock()
        for shard in self._shards:
            with open(folder / shard.name, "wb") as file:
                file.write(shard.header)
                file.truncate(shard.nbytes)

    def write(self, name: str, box: Box, values: np.ndarray) -> None:
        """Put a part of a tensor in its place. Parts of one tensor must not overlap.

        What lies together in the file is written at once: all of it where only the first axis is cut, else as many
        pieces as the box has rows.

        Args:
            name: the tensor.
            box: where in it the part lies.
            values: the part, in the tensor's element type.

        Raises:
            ValueError: values of another shape or type.
            OSError: the disk cannot take them.
        """
        info, shard = self._tensors[name], self._shard_of[name]
        extent = tuple(part.stop - part.start for part in box)
        if values.shape != extent or values.dtype != info.dtype:
            raise ValueError(
                f"{name}: {values.dtype}{list(values.shape)} was to be written, expected {info.dtype}{list(extent)}"
            )
        if values.size == 0:
            return
        strides = [math.prod(info.shape[axis + 1 :]) * info.dtype.itemsize for axis in range(len(extent))]
        start = shard.starts[name] + sum(part.start * stride for part, stride in zip(box, strides, strict=True))
        # From the last axis that is cut on, everything lies together; the axes before it step over gaps.
        cut = max((axis for axis, size in enumerate(info.shape) if extent[axis] != size), default=0)
        steps = [np.arange(size) * stride for size, stride in zip(extent[:cut], strides, strict=False)]
        offsets = np.ravel(reduce(np.add.outer, steps, np.array(start))).tolist()
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        length = len(data) // len(offsets)
        file = os.open(self.folder / shard.name, os.O_WRONLY)
        try:
            for number, offset in enumerate(offsets):
                _write_all(file, data[number * length : (number + 1) * length], offset)
        finally:
            os.close(file)
        with self._lock:
            self._written[name] += values.nbytes

    def finish(self) -> None:
        """Write the index, if there are several files, and wait until everything is on the disk.

        Raises:
            ValueError: parts of a tensor were not written, or were written twice.
            OSError: the disk cannot take it.
        """
        for name, info in self._tensors.items():
            if self._written[name] != info.nbytes:
                raise ValueError(f"{name}: {self._written[name]:,} bytes were written, it has {info.nbytes:,}")
        names = [shard.name for shard in self._shards]
        if len(names) > 1:
            index = {
                "metadata": {"total_size": sum(info.nbytes for info in self._tensors.values())},
                "weight_map": {tensor: self._shard_of[tensor].name for tensor in self._tensors},
            }
            (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        sync(self.folder)


def _write_all(file: int, data: memoryview, offset: int) -> None:
    """Write at a byte of a file; the system may take less at a time than it is given."""
    while data:
        count = os.pwrite(file, data, offset)
        data, offset = data[count:], offset + count
