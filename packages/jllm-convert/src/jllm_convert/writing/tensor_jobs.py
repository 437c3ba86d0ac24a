"""Tensor jobs: the stored arrays of a checkpoint, made from a source piece by piece."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from jllm_core.array_info import ArrayInfo
from jllm_core.checkpoint import Box, blocks, box_shape, chunk_shape, whole
from jllm_core.quantization.arrays import Quantization, QuantizationError, QuantizedArray
from jllm_core.quantization.grids import channel_maxima, quantize

from jllm_convert.errors import ConversionError
from jllm_convert.families.tensor_layout import copy_into
from jllm_convert.families.tensor_parts import inside
from jllm_convert.matching.rules import Match
from jllm_convert.writing.nonfinite_numbers import NonfiniteNumbers

Piece = tuple[str, Box, np.ndarray]
"""The name of a stored array, a box of whole chunks, and the values in it."""

# Bytes that quantising holds besides its input and its output.
_WORKSPACE = 8 << 20
_PIECES, _MIN_PIECE_BYTES = 16, 64 << 10


class TensorJob(Protocol):
    """The conversion of one array of the model.

    Attributes:
        array: its dotted name in the model.
        infos: descriptions of the stored arrays by dotted name: the array itself, or the parts of a quantised one.
        match: the array in the source.
    """

    @property
    def match(self) -> Match: ...

    @property
    def array(self) -> str: ...

    @property
    def infos(self) -> Mapping[str, ArrayInfo]: ...

    def peak_bytes(self, limit: int) -> int:
        """The most bytes of memory that ``pieces(limit)`` holds at a time."""
        ...

    def pieces(self, limit: int) -> Iterator[Piece]:
        """The values of all stored arrays in pieces, holding about ``limit`` bytes, or one chunk, at a time.

        A piece's values are good until the next one is asked for.

        Raises:
            ConversionError: the source cannot be read, or its numbers cannot be stored so.
        """
        ...


@dataclass(frozen=True)
class PlainTensorJob:
    """The conversion of an array that is not quantised: laid out, and cast to ``dtype``.

    Attributes:
        match: the array in the source.
        dtype: its element type.
        nonfinite: notes the numbers that this type cannot hold.
    """

    match: Match
    dtype: np.dtype
    nonfinite: NonfiniteNumbers

    @property
    def array(self) -> str:
        return self.match.array

    @property
    def infos(self) -> Mapping[str, ArrayInfo]:
        return {self.array: self._info}

    @property
    def _info(self) -> ArrayInfo:
        return replace(self.match.info, dtype=self.dtype)

    def peak_bytes(self, limit: int) -> int:
        most = max(math.prod(box_shape(box)) for box in self._boxes(limit))
        return most * self.dtype.itemsize + self._beside(limit)

    def _beside(self, limit: int) -> int:
        """Bytes of memory besides a box of the array."""
        # A piece as read, and as cast; and one chunk: zarr pads chunks at the edge to full size.
        source, own = self.match.dtype.itemsize, self.dtype.itemsize
        return _piece_nbytes(limit) * (source + own) // source + _chunk_nbytes(self._info)

    def _boxes(self, limit: int) -> list[Box]:
        return _blocks(self._info, max(limit - self._beside(limit), 1))

    def pieces(self, limit: int) -> Iterator[Piece]:
        boxes = self._boxes(limit)
        # The same memory for each box: fresh memory costs as much time as filling it does.
        memory = np.empty(max(math.prod(box_shape(box)) for box in boxes), self.dtype)
        for box in boxes:
            shape = box_shape(box)
            array = memory[: math.prod(shape)].reshape(shape)
            for piece, values in self.match.pieces(box, _piece_nbytes(limit)):
                cast = self.nonfinite.cast(self.match, piece, values, self.dtype)
                copy_into(array[inside(piece, box)], cast)
            yield self.array, box, array


@dataclass(frozen=True)
class QuantizedTensorJob:
    """The conversion of a weight matrix to quantised values and scales.

    Attributes:
        match: the matrix in the source.
        parts: descriptions of the stored parts.
        grid: the quantisation.
    """

    match: Match
    parts: QuantizedArray
    grid: Quantization

    @property
    def array(self) -> str:
        return self.match.array

    @property
    def infos(self) -> Mapping[str, ArrayInfo]:
        named = {"values": self.parts.values, "scales": self.parts.scales, "offsets": self.parts.offsets}
        return {f"{self.array}.{part}": info for part, info in named.items() if info is not None}

    def peak_bytes(self, limit: int) -> int:
        # The boxes are of stored values, of which a byte holds ``_per_byte``. Scales are kept until the end.
        most = max(math.prod(box_shape(box)) for box in self._boxes(limit)) * self._per_byte
        scales = sum(info.nbytes for name, info in self.infos.items() if not name.endswith(".values"))
        return int(most * self._element) + scales + _chunk_nbytes(self.parts.values) + _WORKSPACE

    @property
    def _per_byte(self) -> int:
        return 8 // self.grid.bits

    @property
    def _element(self) -> float:
        # As read, as transposed, and quantised.
        return 2 * self.match.dtype.itemsize + self.grid.bits / 8

    def _boxes(self, limit: int) -> list[Box]:
        """Boxes of the stored values."""
        elements = max(limit - _chunk_nbytes(self.parts.values) - _WORKSPACE, 1) / self._element
        return _blocks(self.parts.values, int(elements) // self._per_byte)

    def pieces(self, limit: int) -> Iterator[Piece]:
        boxes = self._boxes(limit)
        scales = np.empty(self.parts.scales.shape, self.parts.scales.dtype)
        offsets = None if self.parts.offsets is None else np.empty_like(scales)
        known = self.grid.group is None and len(boxes) > 1
        # A channel's scale depends on all of its inputs, so a matrix in several pieces is read twice.
        if known:
            scales[...] = self._channel_scales(boxes)
        for box in boxes:
            matrix, inside = self._groups_of(box)
            block = self._quantized(matrix, scales[self._scales_of(matrix)] if known else None)
            scales[self._scales_of(matrix)] = block.scales
            if offsets is not None:
                offsets[self._scales_of(matrix)] = block.offsets
            yield f"{self.array}.values", box, block.values[inside]
        # Scales come last: they are complete when all values are quantised.
        yield f"{self.array}.scales", whole(scales.shape), scales
        if offsets is not None:
            yield f"{self.array}.offsets", whole(offsets.shape), offsets

    def _groups_of(self, box: Box) -> tuple[Box, Box]:
        """The box of the matrix with all groups that a box of its values touches, and that box within the result."""
        axis, packed = self.parts.axis, self._per_byte
        # Chunks of the values may cut a group, whose scale needs all of its inputs: read whole groups around the box.
        start, stop = box[axis].start, box[axis].stop
        step = 1 if self.grid.group is None else self.grid.group // packed
        first, last = start // step * step, -(-stop // step) * step
        matrix = (*box[:axis], slice(first * packed, last * packed), *box[axis + 1 :])
        inside = [slice(0, size) for size in box_shape(box)]
        inside[axis] = slice(start - first, stop - first)
        return matrix, tuple(inside)

    def _scales_of(self, matrix: Box) -> Box:
        """The box of the scales for a box of the matrix."""
        axis, group = self.parts.axis, self.grid.group
        batch, inputs = self._axes["batch"], self._axes["inputs"]
        if group is None:
            # A channel has one scale: its input axes have one entry.
            return (*matrix[:batch], *[slice(0, 1)] * inputs, *matrix[axis + 1 :])
        return (*matrix[:axis], slice(matrix[axis].start // group, matrix[axis].stop // group), *matrix[axis + 1 :])

    @property
    def _axes(self) -> Mapping[str, int]:
        axes: Mapping[str, int] = self.parts.values.metadata
        return axes

    def _channel_scales(self, boxes: list[Box]) -> np.ndarray:
        """The scale of each channel of the whole matrix: its largest magnitude becomes 127."""
        maxima = np.zeros(self.parts.scales.shape, np.float32)
        for box in boxes:
            there = self._scales_of(box)
            with self._named_errors():
                own = channel_maxima(self.match.read(box), **self._axes)
            # Pieces along the input axes share channels.
            maxima[there] = np.maximum(maxima[there], own)
        return maxima / np.float32(127)  # int8 from -127 to 127

    def _quantized(self, box: Box, scales: np.ndarray | None) -> QuantizedArray:
        with self._named_errors():
            return quantize(self.match.read(box), self.grid, **self._axes, scales=scales)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except QuantizationError as error:
            raise ConversionError(f"{self.array} cannot be quantised: {error}") from error


def stored_nbytes(jobs: Iterable[TensorJob]) -> int:
    """Bytes of all stored arrays of these jobs."""
    return sum(info.nbytes for job in jobs for info in job.infos.values())


def _blocks(info: ArrayInfo, limit: int) -> list[Box]:
    return blocks(info.shape, info.dtype, chunk_shape(info.shape, info.dtype, info.logical_axes), limit)


def _piece_nbytes(limit: int) -> int:
    """Bytes of the pieces that an array is put together from, one at a time: a small part of the limit."""
    return max(limit // _PIECES, _MIN_PIECE_BYTES)


def _chunk_nbytes(info: ArrayInfo) -> int:
    return math.prod(chunk_shape(info.shape, info.dtype, info.logical_axes)) * int(info.dtype.itemsize)
