"""Zarr 3 arrays on disk: chunks of raw little-endian elements, each a file with its crc32c.

A chunk is written and read as a whole, so an array of any size passes through a bounded part of memory. The format is
zarr's (https://zarr-specs.readthedocs.io/en/latest/v3/core/), which tensorstore and orbax read too. It is written and
read here without a copy to spare, and without their time to start up.
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
from jllm_core.checkpoint.chunk_grid import Box, blocks, box_shape, chunk_shape, whole
from jllm_core.checkpoint.direct_io import WriteBuffer
from jllm_core.checkpoint.manifest import CheckpointError

METADATA_FILE = "zarr.json"
CHECKSUM_BYTES = 4

# The bytes of an array are not in the order of its chunks. For a hash, rows of it are put together, so many bytes at a
# time.
_HASH_BLOCK_BYTES = 32 << 20


def dtype_named(name: str) -> np.dtype:
    """The element type of this name, numpy's own or one of ml_dtypes, such as ``bfloat16``.

    Raises:
        TypeError: there is none.
    """
    return np.dtype(getattr(ml_dtypes, name, name))


class ArrayStore:
    """One array: a folder of chunks. Several threads may read and write different chunks at once.

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
        """Create an array without chunks; they are still to be written.

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
        """Open an existing array.

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
        if fields["chunk_key_encoding"] == {"name": "default"}:  # zarr's short form for the separator "/"
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
        """The array cut into boxes of whole chunks, each of at most ``limit`` bytes (see ``chunk_grid.blocks``)."""
        return blocks(self.shape, self.dtype, self.chunk_shape, limit)

    def write(self, box: Box, values: np.ndarray) -> list[Path]:
        """Write the chunks of a box.

        Args:
            box: it begins and ends at chunks.
            values: what is in it, in the array's element type.

        Returns:
            The files that were written.

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
        scratch: np.ndarray | None = None
        for index in self._chunks_in(box):
            start = [i * size for i, size in zip(index, self.chunk_shape, strict=True)]
            part = self._chunk_box(index)
            common = [slice(max(p.start, b.start), min(p.stop, b.stop)) for p, b in zip(part, box, strict=True)]
            inside = [slice(c.start - b.start, c.stop - b.start) for c, b in zip(common, box, strict=True)]
            place: Any = (..., *inside)  # with the dots, a view also of an array without axes
            target = values[place]
            # A chunk that lies in the result in one piece is read into it directly; others take a copy.
            if target.shape == self.chunk_shape and target.flags.c_contiguous:
                self._read_chunk(index, target)
                continue
            scratch = np.empty(self.chunk_shape, self.dtype) if scratch is None else scratch
            self._read_chunk(index, scratch)
            target[...] = scratch[tuple(slice(c.start - s, c.stop - s) for c, s in zip(common, start, strict=True))]
        return values

    def digest(self) -> str:
        """The SHA-256 of the array's bytes in C order, in hexadecimal. Checksums are not looked at."""
        hashed = hashlib.sha256()
        # Arrays without axes or without elements have no rows to go along.
        if not self.shape or math.prod(self.shape) == 0:
            hashed.update(self.read().tobytes())
            return hashed.hexdigest()
        row = self.nbytes // self.shape[0]
        for start in range(0, self.shape[0], max(_HASH_BLOCK_BYTES // row, 1)):
            stop = min(start + max(_HASH_BLOCK_BYTES // row, 1), self.shape[0])
            hashed.update(self._read_rows(start, stop).reshape(-1).view(np.uint8).data)
        return hashed.hexdigest()

    def damage(self) -> Iterator[str]:
        """Read every chunk; an error message for each that is missing, cut short or damaged."""
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
        """The content of zarr.json. An array with other metadata (compressed, say) is refused."""
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
        """The part of the array that is in a chunk."""
        return tuple(
            slice(i * chunk, min((i + 1) * chunk, size))
            for i, chunk, size in zip(index, self.chunk_shape, self.shape, strict=True)
        )

    def _chunk_file(self, index: tuple[int, ...]) -> Path:
        return self.path / self._separator.join(["c", *map(str, index)])

    def _write_chunk(self, index: tuple[int, ...], values: np.ndarray, buffer: WriteBuffer) -> Path:
        elements = buffer.content[:-CHECKSUM_BYTES]
        chunk = elements.view(self.dtype).reshape(self.chunk_shape)
        # The last chunk along an axis is stored whole, filled up with zeros, as zarr has it.
        if values.shape != self.chunk_shape:
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
