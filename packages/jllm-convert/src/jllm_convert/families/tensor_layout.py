"""Tensor layouts: reshaping, transposing and reordering between source tensors and arrays of the model."""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jllm_core.checkpoint import Box

# The tile of a transposition, small enough that both sides stay in the processor's cache: rows, and bytes of a row.
_TILE_ROWS, _TILE_BYTES = 128, 512
# Bytes between the rows of a tile: one line of the cache, so that a column's elements do not compete for the same few.
_TILE_GAP = 64


class Layout(Protocol):
    """A way of storing an array. ``shape`` is always the shape in the model, such as ``[D, N, H]``."""

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the source tensor for an array of this shape."""
        ...

    def source_box(self, box: Box, shape: tuple[int, ...]) -> Box:
        """The box of the source tensor for a box of the model's array.

        Raises:
            ValueError: there is no single one: the box cuts an axis that is flattened together with one before it.
        """
        ...

    def axes(self, ndim: int) -> tuple[int, ...]:
        """Those of an array's ``ndim`` axes along which its boxes may be cut, in the order of the source's axes."""
        ...

    def to_jax(self, part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Convert the values of a source box to the model's layout, of this shape; a view where possible."""
        ...

    def to_source(self, part: np.ndarray) -> np.ndarray:
        """Convert the values of a box of the model's array to the source's layout; a view where possible."""
        ...


@dataclass(frozen=True)
class Identity:
    """The model's own layout: embeddings and norms."""

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def source_box(self, box: Box, shape: tuple[int, ...]) -> Box:
        return box

    def axes(self, ndim: int) -> tuple[int, ...]:
        return tuple(range(ndim))

    def to_jax(self, part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return part

    def to_source(self, part: np.ndarray) -> np.ndarray:
        return part


@dataclass(frozen=True)
class Flat:
    """All axes flattened into one: a bias ``[N, H]`` as ``[N*H]``."""

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (math.prod(shape),)

    def source_box(self, box: Box, shape: tuple[int, ...]) -> Box:
        return (_flattened(box, shape),)

    def axes(self, ndim: int) -> tuple[int, ...]:
        return (0,)

    def to_jax(self, part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return part.reshape(shape)

    def to_source(self, part: np.ndarray) -> np.ndarray:
        return part.reshape(-1)


@dataclass(frozen=True)
class Linear:
    """A torch ``nn.Linear`` weight ``[out, in]`` with its heads flattened; the model has ``[in, out]``.

    Attributes:
        inputs: the number of leading input axes of the model's array: 1 for q ``[D, N, H]``, 2 for o ``[N, H, D]``.
    """

    inputs: int = 1

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        # q: [D, N, H] -> [N*H, D]. o: [N, H, D] -> [D, N*H].
        return (math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs]))

    def source_box(self, box: Box, shape: tuple[int, ...]) -> Box:
        i = self.inputs
        return (_flattened(box[i:], shape[i:]), _flattened(box[:i], shape[:i]))

    def axes(self, ndim: int) -> tuple[int, ...]:
        return (self.inputs, 0)

    def to_jax(self, part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return part.T.reshape(shape)  # [out, in] -> [in, out] -> heads apart

    def to_source(self, part: np.ndarray) -> np.ndarray:
        # -1 is the product of the output axes; the part may be a box, so its own shape counts.
        return contiguous(part.reshape(math.prod(part.shape[: self.inputs]), -1).T)


@dataclass(frozen=True)
class RotaryPairs:
    """``base`` with the features of each head interleaved for RoPE, as GGUF stores q and k of Llama.

    llama.cpp rotates features ``(2i, 2i+1)`` together, and its converter reorders the rows of each head to match. The
    Hugging Face models and ours rotate ``(i, i + H/2)``. The heads are those of the array itself: query heads for q,
    kv heads for k.
    """

    base: Layout

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.base.source_shape(shape)

    def source_box(self, box: Box, shape: tuple[int, ...]) -> Box:
        return self.base.source_box(box, shape)

    def axes(self, ndim: int) -> tuple[int, ...]:
        return self.base.axes(ndim)

    def to_jax(self, part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        *outer, head_dim = shape
        # [..., H/2, 2] -> [..., 2, H/2]: the first of all pairs, then the second of all.
        pairs = self.base.to_jax(part, shape).reshape(*outer, head_dim // 2, 2)
        return contiguous(np.swapaxes(pairs, -1, -2)).reshape(shape)

    def to_source(self, part: np.ndarray) -> np.ndarray:
        *outer, head_dim = part.shape
        # The inverse: [..., 2, H/2] -> [..., H/2, 2].
        halves = part.reshape(*outer, 2, head_dim // 2)
        return self.base.to_source(np.ascontiguousarray(np.swapaxes(halves, -1, -2)).reshape(part.shape))


@dataclass(frozen=True)
class Stacked:
    """The matrices of all experts in one tensor ``[E, out, in]``; the model has ``[E, in, out]``."""

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        experts, inputs, outputs = shape
        return experts, outputs, inputs

    def source_box(self, box: Box, shape: tuple[int, ...]) -> Box:
        experts, inputs, outputs = box
        return experts, outputs, inputs

    def axes(self, ndim: int) -> tuple[int, ...]:
        return (0, 2, 1)

    def to_jax(self, part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return np.swapaxes(part, 1, 2)

    def to_source(self, part: np.ndarray) -> np.ndarray:
        return contiguous(np.swapaxes(part, 1, 2))


@dataclass(frozen=True)
class Row:
    """A torch ``nn.Linear`` weight with one output, ``[1, in]``; the model has ``[in]``: a shared expert's gate."""

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (1, *shape)

    def source_box(self, box: Box, shape: tuple[int, ...]) -> Box:
        return (slice(0, 1), *box)

    def axes(self, ndim: int) -> tuple[int, ...]:
        return (0,)

    def to_jax(self, part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return part.reshape(shape)

    def to_source(self, part: np.ndarray) -> np.ndarray:
        return part[None]


@dataclass(frozen=True)
class Depthwise:
    """A torch ``nn.Conv1d`` weight with a kernel for each channel, ``[heads*features, 1, W]``; the model has
    ``[W, heads, features]``.

    Attributes:
        middle: the tensor's axes of one entry between the channels and the kernel; GGUF has none.
    """

    middle: int = 1

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (math.prod(shape[1:]), *[1] * self.middle, shape[0])

    def source_box(self, box: Box, shape: tuple[int, ...]) -> Box:
        return (_flattened(box[1:], shape[1:]), *[slice(0, 1)] * self.middle, box[0])

    def axes(self, ndim: int) -> tuple[int, ...]:
        return (1, 0)

    def to_jax(self, part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return part.reshape(-1, shape[0]).T.reshape(shape)

    def to_source(self, part: np.ndarray) -> np.ndarray:
        kernels = np.ascontiguousarray(part.reshape(part.shape[0], -1).T)
        return kernels.reshape(len(kernels), *[1] * self.middle, part.shape[0])


def contiguous(values: np.ndarray) -> np.ndarray:
    """The same numbers, one behind another; the array itself where they are."""
    if values.flags.c_contiguous:
        return values
    array = np.empty(values.shape, values.dtype)
    copy_into(array, values)
    return array


def copy_into(target: np.ndarray, values: np.ndarray) -> None:
    """Copy an array into another one of its shape and type, by tiles where it is transposed.

    numpy's own way, by columns, takes 4 times as long.
    """
    size = values.dtype.itemsize
    # As whole numbers: numpy copies them with vector instructions, and bfloat16 element by element.
    source, target = values.view(f"u{size}"), target.view(f"u{size}")
    last = values.ndim - 1
    # The axis along which the numbers lie side by side.
    axis = min(range(values.ndim), key=lambda each: (values.shape[each] < 2, values.strides[each]), default=last)
    if axis == last or not values.size:
        target[...] = source
        return
    source, target = (np.moveaxis(each, (last, axis), (-2, -1)) for each in (source, target))  # [..., last, axis]
    width = _TILE_BYTES // size
    buffer = np.empty((_TILE_ROWS, width + _TILE_GAP // size), source.dtype)
    *outer, rows, columns = source.shape
    for index in np.ndindex(*outer):
        for row in range(0, rows, _TILE_ROWS):
            for column in range(0, columns, width):
                place = (*index, slice(row, row + _TILE_ROWS), slice(column, column + width))
                part = source[place]
                tile = buffer[: part.shape[0], : part.shape[1]]
                tile[...] = part
                target[place] = tile


def _flattened(box: Box, shape: tuple[int, ...]) -> slice:
    """The slice of a flattened axis for a box of several axes."""
    # Only the first axis may be cut: then the entries are contiguous when flattened.
    if any(part != slice(0, size) for part, size in zip(box[1:], shape[1:], strict=True)):
        raise ValueError(f"the box {box} of {list(shape)} is in several pieces when its axes are flattened")
    inner = math.prod(shape[1:])
    return slice(box[0].start * inner, box[0].stop * inner)
