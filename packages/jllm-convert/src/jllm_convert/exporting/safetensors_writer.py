"""Safetensors writer: files of known tensors that come in parts, in any order and from several threads.

Format: https://github.com/huggingface/safetensors#format. A file is the length of its header in 8 bytes, the header
(JSON: element type, shape and offsets of each tensor), and the data without gaps.
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

# The element types that can be written, with the format's names.
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_ALIGNMENT = 8  # of the data's start; safetensors pads its headers to 8 bytes too


@dataclass(frozen=True)
class TensorInfo:
    """Shape and element type of a tensor to write."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """The size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """A file of tensors.

    Attributes:
        name: its name.
        header: its first bytes, length and header.
        starts: the first byte of each tensor in the file.
        nbytes: its size.
    """

    name: str
    header: bytes
    starts: Mapping[str, int]
    nbytes: int


def split_into_shards(tensors: Mapping[str, TensorInfo], shard_bytes: int) -> list[Shard]:
    """Split tensors into files, in their order. A file ends before the tensor that would make it too large.

    A single file is called ``model.safetensors``; several are numbered and need the index that SafetensorsWriter adds.

    Args:
        tensors: the tensors by name.
        shard_bytes: the most bytes of tensors in a file. A larger tensor has a file of its own.
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
        return [shard(SINGLE_FILE, groups[0])]
    return [
        shard(f"model-{number:05}-of-{len(groups):05}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    ]


def shard(name: str, tensors: Mapping[str, TensorInfo]) -> Shard:
    """A file of this name with these tensors."""
    # Larger elements first, so that every tensor starts at a multiple of its element; then by name, like safetensors.
    order = sorted(tensors, key=lambda tensor: (-tensors[tensor].dtype.itemsize, tensor))
    # transformers 4 refuses files that do not state a format.
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
    """Writer of a model's files. Creating it creates the files, with their headers and at their full size.

    Args:
        folder: the folder of the files.
        tensors: the tensors by name.
        shards: the files, from ``split_into_shards`` of these tensors.

    Raises:
        OSError: the files cannot be written.
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
                file.truncate(shard.nbytes)  # the full size at once, so that parts may come in any order

    def write(self, name: str, box: Box, values: np.ndarray) -> None:
        """Write a box of a tensor. Boxes of one tensor must not overlap. Several threads may call this.

        Bytes that are contiguous in the file are written at once: all of the box where it cuts only the first axis,
        else a piece for each of its rows.

        Args:
            name: the tensor.
            box: the box.
            values: its values, in the tensor's element type.

        Raises:
            ValueError: the values have another shape or type.
            OSError: writing fails.
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
        # From the last axis that is cut on, everything is contiguous; the axes before it step over gaps.
        cut = max((axis for axis, size in enumerate(info.shape) if extent[axis] != size), default=0)
        steps = [np.arange(size) * stride for size, stride in zip(extent[:cut], strides, strict=False)]
        offsets = np.ravel(reduce(np.add.outer, steps, np.array(start))).tolist()
        # As uint8: numpy gives no buffer of foreign types such as bfloat16.
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        length = len(data) // len(offsets)
        # A descriptor for each call: several threads write, at positions of their own.
        file = os.open(self.folder / shard.name, os.O_WRONLY)
        try:
            for number, offset in enumerate(offsets):
                _write_all(file, data[number * length : (number + 1) * length], offset)
        finally:
            os.close(file)
        with self._lock:
            self._written[name] += values.nbytes

    def finish(self) -> None:
        """Write the index, if there are several files, and flush everything to the disk.

        Raises:
            ValueError: a part of a tensor was not written, or was written twice.
            OSError: writing fails.
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
    """Write all data at a byte of a file; the system may take less at a time than it is given."""
    while data:
        count = os.pwrite(file, data, offset)
        data, offset = data[count:], offset + count
