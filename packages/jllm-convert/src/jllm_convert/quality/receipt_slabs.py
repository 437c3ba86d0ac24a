"""Weight matrices in slabs: pieces in float32 of matrices that are never in memory whole, quantised ones or plain."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
from jllm_core.array_info import ArrayInfo
from jllm_core.checkpoint import Box, chunk_shape
from jllm_core.quantization.arrays import QuantizedArray
from jllm_core.quantization.grids import restore

Cut = Mapping[int, slice]
"""A part of an array by the axes that it does not have whole."""


class Read(Protocol):
    """Gives an array of a model by its dotted name, or a box of it, as a float array or as the part that is stored."""

    def __call__(self, name: str, box: Box | None = None) -> np.ndarray: ...


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of a model, to be read slab by slab.

    Attributes:
        name: its dotted name, such as ``layers.0.attn.q``.
        info: its description: ArrayInfo, or a QuantizedArray of them, whose parts are then read (``NAME.values``).
        read: gives boxes of it.
        memory: bytes to stay within, roughly: a quarter is for what is read of a quantised matrix at once, a sixteenth
            for the float32 of a slab, which JAX copies. A slab has at least one entry of the axis that it is cut along,
            or one group.
    """

    name: str
    info: Any
    read: Read
    memory: int

    def slabs(self, axis: int) -> Iterator[tuple[slice, np.ndarray]]:
        """The matrix cut along an axis: the entries of each slab, and its numbers in float32."""
        for piece in self.pieces(axis):
            numbers = self.load({axis: piece})
            for own in self.cuts(axis, piece):
                yield own, numbers({axis: own})

    def slabs_of(self, experts: np.ndarray, axis: int) -> Iterator[tuple[int, slice, np.ndarray]]:
        """Some entries of the first axis, each cut along another one.

        Args:
            experts: the entries, ascending. No other is read.
            axis: the axis to cut along, counted with the first.

        Yields:
            The entry, the range of ``axis``, and the numbers in float32, without the first axis.
        """
        for run in runs(experts):
            for some in self.pieces(0, run):
                count = some.stop - some.start
                for piece in self.pieces(axis, beside=count):  # more than one where a single expert is too large
                    numbers = self.load({0: some, axis: piece})
                    for expert in range(some.start, some.stop):
                        for own in self.cuts(axis, piece, beside=1):
                            yield expert, own, numbers({0: slice(expert, expert + 1), axis: own})[0]

    def pieces(self, axis: int, within: slice | None = None, beside: int | None = None) -> Iterator[slice]:
        """The ranges of an axis that are read at once. What is stored plain is read slab by slab: here it is one.

        Args:
            axis: the axis.
            within: a range of it; None is all.
            beside: entries of the first axis that are read together; None is all.
        """
        size = self.info.shape[axis]
        within = slice(0, size) if within is None else within
        if not isinstance(self.info, QuantizedArray):
            yield within
            return
        each = sum(part.nbytes for part in _parts(self.info).values()) / size
        yield from self._cuts(axis, within, each, self.memory // 4, beside)

    def cuts(self, axis: int, within: slice, beside: int | None = None, extra: int = 0) -> Iterator[slice]:
        """The ranges of an axis whose numbers, and ``extra`` bytes for each entry, are in memory at once."""
        each = 4 * int(np.prod(self.info.shape, dtype=np.int64)) / self.info.shape[axis]
        yield from self._cuts(axis, within, each + extra, self.memory // 16, beside)

    def _cuts(self, axis: int, within: slice, each: float, most: int, beside: int | None) -> Iterator[slice]:
        """Ranges of at most so many bytes: chunks of the files, or parts of one, so that little is read twice."""
        stored, grain = self.info, 1
        if isinstance(self.info, QuantizedArray):
            stored, grain = self.info.values, self.info.group or 1 if axis == self.info.axis else 1
        if beside is not None:
            each *= beside / self.info.shape[0]
        chunk = chunk_shape(stored.shape, stored.dtype, stored.logical_axes)[axis]
        chunk = -(-chunk * self.info.shape[axis] // stored.shape[axis] // grain) * grain
        step = max(int(most / each) // grain, 1) * grain
        step = step if step < chunk else step // chunk * chunk
        start = within.start
        while start < within.stop:
            edge = (start // max(step, chunk) + 1) * max(step, chunk)
            stop = min(start + step, edge, within.stop)
            yield slice(start, stop)
            start = stop

    def load(self, cut: Cut) -> Callable[[Cut], np.ndarray]:
        """Read what is stored of a part.

        Returns:
            What gives the numbers, in float32, of parts of that part; they are cut as the whole is. Of a plain matrix
            nothing is read before that.
        """
        shape = self.info.shape
        if not isinstance(self.info, QuantizedArray):
            return lambda own: self.read(self.name, _box(shape, shape, own)).astype(np.float32, copy=False)
        infos: dict[str, ArrayInfo] = _parts(self.info)
        whole = {name: _box(shape, info.shape, cut) for name, info in infos.items()}
        stored = {name: self.read(f"{self.name}.{name}", box) for name, box in whole.items()}

        def numbers(own: Cut) -> np.ndarray:
            parts = {}
            for name, info in infos.items():
                inner = zip(_box(shape, info.shape, {**cut, **own}), whole[name], strict=True)
                parts[name] = stored[name][tuple(slice(i.start - o.start, i.stop - o.start) for i, o in inner)]
            return restore(QuantizedArray(**parts, axis=self.info.axis, bits=self.info.bits))

        return numbers


def runs(numbers: np.ndarray) -> list[slice]:
    """Ascending whole numbers as ranges of neighbours: 1, 2, 5 as 1:3 and 5:6."""
    ends = np.flatnonzero(np.diff(numbers) > 1)
    starts = numbers[np.concatenate([[0], ends + 1])] if len(numbers) else numbers
    stops = numbers[np.concatenate([ends, [len(numbers) - 1]])] + 1 if len(numbers) else numbers
    return [slice(int(start), int(stop)) for start, stop in zip(starts, stops, strict=True)]


def _parts(array: QuantizedArray) -> dict[str, Any]:
    names = (field.name for field in fields(array) if not field.metadata.get("static"))
    return {name: part for name in names if (part := getattr(array, name)) is not None}


def _box(shape: Sequence[int], stored: Sequence[int], cut: Cut) -> Box:
    """The box that a part of a matrix has in an array that is stored of it, with fewer entries along some axes."""
    box = []
    for axis, (size, count) in enumerate(zip(shape, stored, strict=True)):
        own, ratio = cut.get(axis, slice(0, size)), size // count
        box.append(slice(own.start // ratio, -(-own.stop // ratio)))
    return tuple(box)
