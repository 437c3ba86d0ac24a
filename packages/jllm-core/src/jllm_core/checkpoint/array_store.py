"""One array on disk: a zarr 3 array whose chunks are raw little-endian elements, each with its crc32c.

A chunk is one file, written and read as a whole, so that an array of any size passes through a window of memory. The
format is zarr's (https://zarr-specs.readthedocs.io/en/latest/v3/core/), and tensorstore and orbax read it; here are the
few lines that it takes to write it without a copy to spare.
"""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jllm_core.array_info import ArrayInfo
from jllm_core.checkpoint.direct_file import WriteBuffer
from jllm_core.checkpoint.manifest import CheckpointError

Box = tuple[slice, ...]
"""A part of an array: for each axis a slice with a start and a stop inside the array, and no step."""

METADATA_FILE = "zarr.json"
CHECKSUM_BYTES = 4

# Each large array is cut into this many chunks along the axis that tensor parallelism splits, so that a device reads
# its own part of the file and nothing else. Eight serves 2, 4 and 8 devices.
CHUNKS_PER_AXIS = 8
MIN_CHUNKED_BYTES = 1 << 20
# Chunks are cut further until they are about this small: what writes or reads one holds it whole.
DEFAULT_CHUNK_BYTES = 8 << 20
# Axes in the order of preference for cutting: the ones that ShardingRules splits by default. Experts are cut besides.
CHUNKED_AXES = ("heads", "kv_heads", "ffw", "vocab")
EXPERTS_AXIS = "experts"
# A hash of an array whose bytes are not in the order of its chunks takes so much of it at a time.
_HASHED_AT_ONCE = 32 << 20


def whole(shape: tuple[int, ...]) -> Box:
    """The box that holds all of an array of this shape."""
    return tuple(slice(0, size) for size in shape)


def box_shape(box: Box) -> tuple[int, ...]:
    """The shape of what is in a box."""
    return tuple(part.stop - part.start for part in box)


def dtype_named(name: str) -> np.dtype:
    """The element type of this name, numpy's own or one of ml_dtypes, such as ``bfloat16``.

    Raises:
        TypeError: there is none.
    """
    return np.dtype(getattr(ml_dtypes, name, name))


def chunk_shape(shape: tuple[int, ...], dtype: Any, logical_axes: tuple[str | None, ...]) -> tuple[int, ...]:
    """The shape of one chunk of an array's file: a slice along the axes that devices share out, or all of it."""
    itemsize = np.dtype(dtype).itemsize
    nbytes = math.prod(shape) * itemsize
    axis = next((logical_axes.index(name) for name in CHUNKED_AXES if name in logical_axes), None)
    if axis is None or nbytes < MIN_CHUNKED_BYTES:
        return shape
    chunk = list(shape)
    chunk[axis] = -(-shape[axis] // CHUNKS_PER_AXIS)
    if EXPERTS_AXIS in logical_axes and nbytes >= CHUNKS_PER_AXIS * MIN_CHUNKED_BYTES:
        experts = logical_axes.index(EXPERTS_AXIS)
        chunk[experts] = -(-shape[experts] // CHUNKS_PER_AXIS)
    chunk[axis] = _even_part(chunk[axis], DEFAULT_CHUNK_BYTES // (math.prod(chunk) * itemsize // chunk[axis] or 1))
    return tuple(chunk)


def _even_part(size: int, limit: int) -> int:
    """A divisor of ``size`` that is no more than half above ``limit``; the limit itself where all are much smaller."""
    limit = max(limit, 1)
    divisor = next(part for part in range(min(size, limit * 3 // 2), 0, -1) if size % part == 0)
    return divisor if divisor * 4 >= min(size, limit) else limit


def blocks(shape: tuple[int, ...], dtype: Any, chunk: tuple[int, ...], limit: int) -> list[Box]:
    """An array in boxes of whole chunks, each of at most ``limit`` bytes, or of one chunk if that has more.

    They come in the order of the array's bytes as far as the chunks allow.
    """
    take = [-(-size // part) for size, part in zip(shape, chunk, strict=True)]
    chunk_nbytes = math.prod(chunk) * np.dtype(dtype).itemsize
    for axis in range(len(take)):
        others = chunk_nbytes * math.prod(take) // max(take[axis], 1)
        take[axis] = min(take[axis], max(limit // max(others, 1), 1))
    steps = [count * size for count, size in zip(take, chunk, strict=True)]
    ranges = [
        [slice(start, min(start + step, size)) for start in range(0, size, max(step, 1))]
        for size, step in zip(shape, steps, strict=True)
    ]
    return list(itertools.product(*ranges))


class ArrayStore:
    """An array's folder of chunks. Several threads may read and write different chunks at once.

    Attributes:
        path: the folder.
        shape: the array's shape.
        dtype: its element type.
        chunk_shape: the shape of a chunk; the last along an axis is stored whole though the array ends before it does.
    """

    def __init__(
        self, path: Path, shape: tuple[int, ...], dtype: np.dtype, chunk_shape: tuple[int, ...], separator: str = "."
    ) -> None:
        self.path, self.shape, self.dtype, self.chunk_shape = path, shape, dtype, chunk_shape
        # All chunks lie in one folder: a folder for each index (zarr's default, "/", as in older ones) would take as
        # long to make as the chunks in it to write.
        self._separator = separator

    @classmethod
    def create(cls, folder: Path, name: str, info: ArrayInfo) -> "ArrayStore":
        """Begin an array of that description; its chunks are to be written.

        Args:
            folder: the checkpoint's folder of weights.
            name: the array's dotted name.
            info: shape, element type, and the axes that say where to cut it.
        """
        path = folder / name
        store = cls(path, info.shape, info.dtype, chunk_shape(info.shape, info.dtype, info.logical_axes))
        path.mkdir(exist_ok=True)
        (path / METADATA_FILE).write_text(json.dumps(store._metadata()), encoding="utf-8")
        return store

    @classmethod
    def open(cls, folder: Path, name: str) -> "ArrayStore":
        """Open an array that is there.

        Raises:
            CheckpointError: it is missing, or its metadata are not those of an array of this format.
        """
        path = folder / name
        try:
            fields = json.loads((path / METADATA_FILE).read_text(encoding="utf-8"))
            dtype = dtype_named(fields["data_type"])
            chunk = fields["chunk_grid"]["configuration"]["chunk_shape"]
            separator = fields["chunk_key_encoding"].get("configuration", {}).get("separator", "/")
            store = cls(path, _sizes(fields["shape"], 0), dtype, _sizes(chunk, 1), "." if separator == "." else "/")
            if len(store.shape) != len(store.chunk_shape):
                raise ValueError(f"shape {list(store.shape)} and chunk shape {chunk} differ in length")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"the array {name} in {folder} cannot be read: {path / METADATA_FILE} is missing or damaged "
                f"({type(error).__name__}: {error})"
            ) from error
        known = store._metadata()
        if fields["chunk_key_encoding"] == {"name": "default"}:  # which is this separator
            known["chunk_key_encoding"] = {"name": "default"}
        different = sorted(key for key in known if fields.get(key) != known[key])
        if different:
            raise CheckpointError(
                f"the array {name} in {folder} cannot be read: {', '.join(different)} in {METADATA_FILE} is "
                f"{', '.join(repr(fields.get(key)) for key in different)}, "
                f"expected {', '.join(repr(known[key]) for key in different)}"
            )
        return store

    @property
    def name(self) -> str:
        """The array's dotted name."""
        return self.path.name

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of one chunk, without its checksum."""
        return math.prod(self.chunk_shape) * self.dtype.itemsize

    def blocks(self, limit: int) -> list[Box]:
        """The array in boxes of whole chunks (see the function ``blocks``)."""
        return blocks(self.shape, self.dtype, self.chunk_shape, limit)

    def write(self, box: Box, values: np.ndarray) -> list[Path]:
        """Write the chunks of a box.

        Args:
            box: it begins and ends at chunks.
            values: what is in it, in the array's element type.

        Returns:
            The files.

        Raises:
            ValueError: values of another shape or type, or a box that cuts a chunk.
            OSError: the disk cannot take them.
        """
        if values.shape != box_shape(box) or values.dtype != self.dtype:
            raise ValueError(
                f"{self.name}: {values.dtype}{list(values.shape)} was to be written, "
                f"expected {self.dtype}{list(box_shape(box))}"
            )
        files = []
        buffer = WriteBuffer(self.chunk_nbytes + CHECKSUM_BYTES)
        for index in self._chunks_in(box):
            part = self._chunk_box(index)
            if any(p.start < b.start or p.stop > b.stop for p, b in zip(part, box, strict=True)):
                raise ValueError(f"{self.name}: the box {box} cuts the chunk {index}")
            inside = tuple(slice(p.start - b.start, p.stop - b.start) for p, b in zip(part, box, strict=True))
            files.append(self._write_chunk(index, np.asarray(values[inside]), buffer))
        return files

    def read(self, box: Box | None = None, into: np.ndarray | None = None) -> np.ndarray:
        """Read a box, or all of the array; every chunk that it touches is read whole and checked.

        Args:
            box: what to read.
            into: an array of the box's shape and this element type that is filled and returned.

        Raises:
            CheckpointError: a chunk is missing, cut short or damaged.
        """
        box = whole(self.shape) if box is None else box
        values = np.empty(box_shape(box), self.dtype) if into is None else into
        apart: np.ndarray | None = None
        for index in self._chunks_in(box):
            start = [i * size for i, size in zip(index, self.chunk_shape, strict=True)]
            part = self._chunk_box(index)
            common = [slice(max(p.start, b.start), min(p.stop, b.stop)) for p, b in zip(part, box, strict=True)]
            inside = [slice(c.start - b.start, c.stop - b.start) for c, b in zip(common, box, strict=True)]
            place: Any = (..., *inside)  # with the dots, a view also of an array without axes
            there = values[place]
            if there.shape == self.chunk_shape and there.flags.c_contiguous:
                self._read_chunk(index, there)
                continue
            apart = np.empty(self.chunk_shape, self.dtype) if apart is None else apart
            self._read_chunk(index, apart)
            there[...] = apart[tuple(slice(c.start - s, c.stop - s) for c, s in zip(common, start, strict=True))]
        return values

    def digest(self) -> str:
        """The SHA-256 of the array's bytes in C order, in hexadecimal. Checksums are not looked at."""
        hashed = hashlib.sha256()
        if not self.shape or math.prod(self.shape) == 0:
            hashed.update(self.read().tobytes())
            return hashed.hexdigest()
        row = self.nbytes // self.shape[0]
        for start in range(0, self.shape[0], max(_HASHED_AT_ONCE // row, 1)):
            stop = min(start + max(_HASHED_AT_ONCE // row, 1), self.shape[0])
            hashed.update(self._read_rows(start, stop).reshape(-1).view(np.uint8).data)
        return hashed.hexdigest()

    def damage(self) -> Iterator[str]:
        """What is wrong with each chunk that is missing, cut short or damaged."""
        chunk = np.empty(self.chunk_shape, self.dtype)
        for index in self._chunks_in(whole(self.shape)):
            try:
                self._read_chunk(index, chunk)
            except CheckpointError as error:
                yield str(error)

    def files(self) -> list[Path]:
        """All the files of the array."""
        return [self.path / METADATA_FILE, *map(self._chunk_file, self._chunks_in(whole(self.shape)))]

    def _metadata(self) -> dict[str, Any]:
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunk_shape)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": self._separator}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "fill_value": 0 if self.dtype.kind in "iu" else 0.0,
        }

    def _chunks_in(self, box: Box) -> Iterator[tuple[int, ...]]:
        """The indices of the chunks that a box touches."""
        return itertools.product(
            *(
                range(part.start // chunk, -(-part.stop // chunk) if part.stop > part.start else 0)
                for part, chunk in zip(box, self.chunk_shape, strict=True)
            )
        )

    def _chunk_box(self, index: tuple[int, ...]) -> Box:
        """What of the array is in a chunk."""
        return tuple(
            slice(i * chunk, min((i + 1) * chunk, size))
            for i, chunk, size in zip(index, self.chunk_shape, self.shape, strict=True)
        )

    def _chunk_file(self, index: tuple[int, ...]) -> Path:
        return self.path / self._separator.join(["c", *map(str, index)])

    def _write_chunk(self, index: tuple[int, ...], values: np.ndarray, buffer: WriteBuffer) -> Path:
        elements = buffer.content[:-CHECKSUM_BYTES]
        chunk = elements.view(self.dtype).reshape(self.chunk_shape)
        if values.shape != self.chunk_shape:  # the last one along an axis
            chunk[...] = np.zeros((), self.dtype)
        chunk[tuple(slice(0, size) for size in values.shape)] = values
        buffer.content[-CHECKSUM_BYTES:] = np.frombuffer(_crc32c(elements).to_bytes(CHECKSUM_BYTES, "little"), np.uint8)
        path = self._chunk_file(index)
        buffer.write(path)
        return path

    def _read_chunk(self, index: tuple[int, ...], into: np.ndarray) -> None:
        """Read a chunk into an array of its shape, and check it."""
        path = self._chunk_file(index)
        elements = into.reshape(-1).view(np.uint8)
        try:
            with open(path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size != self.chunk_nbytes + CHECKSUM_BYTES:  # nothing is read: it may be anything
                    raise CheckpointError(
                        f"the array {self.name} is damaged: {path} has {size:,} bytes, "
                        f"expected {self.chunk_nbytes + CHECKSUM_BYTES:,}"
                    )
                _fill(file, elements, self.name)
                checksum = file.read(CHECKSUM_BYTES)
        except OSError as error:
            raise CheckpointError(f"the array {self.name} cannot be read: {path}: {error.strerror}") from error
        if _crc32c(elements) != int.from_bytes(checksum or b"", "little"):
            raise CheckpointError(f"the array {self.name} is damaged: the checksum of {path} is off")

    def _read_rows(self, start: int, stop: int) -> np.ndarray:
        """Entries ``start`` to ``stop`` of the first axis, from the parts of the chunks that hold them."""
        rows = np.empty((stop - start, *self.shape[1:]), self.dtype)
        row_nbytes = self.chunk_nbytes // self.chunk_shape[0]
        for index in self._chunks_in((slice(start, stop), *whole(self.shape[1:]))):
            part = self._chunk_box(index)
            first, last = max(part[0].start, start), min(part[0].stop, stop)
            values = np.empty((last - first, *self.chunk_shape[1:]), self.dtype)
            with open(self._chunk_file(index), "rb", buffering=0) as file:
                file.seek((first - index[0] * self.chunk_shape[0]) * row_nbytes)
                _fill(file, values, self.name)
            inside = tuple(slice(0, p.stop - p.start) for p in part[1:])
            rows[(slice(first - start, last - start), *part[1:])] = values[(slice(None), *inside)]
        return rows


def _fill(file: Any, values: np.ndarray, name: str) -> None:
    view = values.reshape(-1).view(np.uint8).data
    while view:
        got = file.readinto(view)
        if not got:
            raise CheckpointError(f"the array {name} is damaged: {file.name} is cut short")
        view = view[got:]


def _sizes(value: Any, smallest: int) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(size) is not int or size < smallest for size in value):
        raise ValueError(f"{value!r} is no shape")
    return tuple(value)


def _crc32c(data: bytes | np.ndarray) -> int:
    import google_crc32c

    checksum: int = google_crc32c.value(data)
    return checksum
