"""Streamed weight matrix: read and multiplied slab by slab, quantised or plain, and never in memory whole."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import jax
import numpy as np
from jllm_core.array_info import ArrayInfo
from jllm_core.checkpoint import Box, chunk_shape
from jllm_core.ops.linear import linear
from jllm_core.quantization.arrays import QuantizedArray
from jllm_core.quantization.grids import restore

Cut = Mapping[int, slice]
"""A part of an array by the axes that it does not have whole."""


class Read(Protocol):
    """Gives an array of a model by its dotted name, or a box of it, as a float array or as the part that is stored."""

    def __call__(self, name: str, box: Box | None = None) -> np.ndarray: ...


CUT_AXES = ("heads", "kv_heads", "key_heads", "value_heads", "ffw", "shared_ffw", "vocab")
"""The logical axes that a matrix is cut along. Files hold it in chunks along the same."""


@dataclass(frozen=True)
class StreamedMatrix:
    """A weight matrix of a model that is read slab by slab, and multiplies so (``jllm_core.ops.linear.Matrix``).

    Attributes:
        name: its dotted name, such as ``layers.0.attn.q``.
        info: its description: ArrayInfo, or a QuantizedArray of them, whose parts are then read (``NAME.values``).
        read: gives boxes of it.
        memory: bytes to stay within, roughly: a quarter is for what is read of a quantised matrix at once, a sixteenth
            for the float32 of a slab, which JAX copies. A slab has at least one entry of the axis that it is cut along,
            or one group.
        expert: the one entry of the first axis that this is, of a matrix of experts.
        loaded: gives numbers of it from what has been read together with its neighbours; None reads them anew.
        observe: called with the name, in words, and the numbers of what goes into each product and of what comes out.
    """

    name: str
    info: Any
    read: Read
    memory: int
    expert: int | None = None
    loaded: Callable[[Cut], np.ndarray] | None = None
    observe: Callable[[str, Any], None] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the numbers."""
        shape: tuple[int, ...] = self.info.shape
        return shape if self.expert is None else shape[1:]

    def entries(self, numbers: np.ndarray) -> Iterator[tuple[int, "StreamedMatrix"]]:
        """The matrices of some experts, given in ascending order; no other is read.

        Files hold several experts in a chunk, and a chunk is read whole: neighbours are read together.
        """
        share = 0 if not isinstance(self.info, QuantizedArray) else self._stored_bytes / self.info.shape[0]
        for run in runs(numbers):
            for some in self.pieces(0, within=run):
                # An expert that is too large for that alone is read piece by piece, when it is multiplied with.
                loaded = self.load({0: some}) if share <= self.memory // 4 else None
                for number in range(some.start, some.stop):
                    yield number, replace(self, expert=number, loaded=loaded)

    def matmul(self, equation: str, x: jax.Array) -> jax.Array:
        """``einsum(equation, x, self)`` in the type of ``x``, with one slab after another in memory."""
        y = self._multiply(equation, x)
        if self.observe is not None:
            self.observe(f"the input of {self.name}", x)
            self.observe(f"the output of {self.name}", y)
        return y

    def _multiply(self, equation: str, x: jax.Array) -> jax.Array:
        terms, out = equation.split("->")
        left, own = terms.split(",")
        axis = self._cut_axis
        letter = own[axis]
        # Cut and put together in numpy, where nothing is compiled for each range. Axes are counted from the end, for
        # equations may begin with an ellipsis.
        if letter in out:
            columns = [np.asarray(linear(equation, x, on_device(slab))) for _, slab in self.slabs(axis)]
            return on_device(np.concatenate(columns, axis=out.index(letter) - len(out)))
        # Cut along its inputs: each slab gives a part of every sum.
        place = left.index(letter) - len(left)
        inputs = np.moveaxis(np.asarray(x), place, 0)
        total: np.ndarray = np.zeros((), np.float32)
        for part, slab in self.slabs(axis):
            some = on_device(np.moveaxis(inputs[part], 0, place))
            # As numpy's array, which waits: JAX would go on to the next slab while this one is still in memory.
            total = total + np.asarray(linear(equation, some, on_device(slab)))
        return on_device(total)

    def rows(self, numbers: jax.Array, dtype: Any) -> jax.Array:
        """Rows of an embedding ``[V, D]`` that is stored plain; no other row is read."""
        own = np.unique(np.asarray(numbers))
        columns = slice(0, self.shape[1])
        read = np.concatenate([self.read(self.name, (run, columns)).astype(np.float32) for run in runs(own)])
        return on_device(read[np.searchsorted(own, np.asarray(numbers))].astype(dtype))

    def slabs(self, axis: int) -> Iterator[tuple[slice, np.ndarray]]:
        """The matrix cut along an axis: the entries of each slab, and its numbers in float32."""
        fixed: Cut = {} if self.expert is None else {0: slice(self.expert, self.expert + 1)}
        axis, beside = axis + len(fixed), None if self.expert is None else 1
        whole = slice(0, self.info.shape[axis])
        for piece in self.pieces(axis, beside=beside) if self.loaded is None else [whole]:
            numbers = self.loaded or self.load({**fixed, axis: piece})
            for own in self.cuts(axis, piece, beside=beside):
                slab = numbers({**fixed, axis: own})
                yield own, slab if self.expert is None else slab[0]

    @property
    def _stored_bytes(self) -> int:
        return sum(int(part.nbytes) for part in _parts(self.info).values())

    @property
    def _cut_axis(self) -> int:
        axes = _logical_axes(self.info)
        return next(axis for axis, name in enumerate(axes) if name in CUT_AXES) - (self.expert is not None)

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
        each = self._stored_bytes / size
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
            return restore(replace(self.info, **parts))

        return numbers


def runs(numbers: np.ndarray) -> list[slice]:
    """Ascending whole numbers as ranges of neighbours: 1, 2, 5 as 1:3 and 5:6."""
    ends = np.flatnonzero(np.diff(numbers) > 1)
    starts = numbers[np.concatenate([[0], ends + 1])] if len(numbers) else numbers
    stops = numbers[np.concatenate([ends, [len(numbers) - 1]])] + 1 if len(numbers) else numbers
    return [slice(int(start), int(stop)) for start, stop in zip(starts, stops, strict=True)]


def on_device(array: np.ndarray) -> jax.Array:
    """An array for JAX: by ``device_put``, for ``jnp.asarray`` compiles a copy for each shape."""
    placed: jax.Array = jax.device_put(array)
    return placed


def is_matrix(info: Any) -> bool:
    """Whether a description is that of a matrix, and not of a norm's weights, a bias or a router."""
    axes = _logical_axes(info)
    return "model" in axes and bool({*axes} & {*CUT_AXES})


def _logical_axes(info: Any) -> tuple[str | None, ...]:
    axes: tuple[str | None, ...] = (info.values if isinstance(info, QuantizedArray) else info).logical_axes
    return axes


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
