"""How a tensor of a source becomes an array of the model, and back: reshaped, transposed, rotary pairs put in order."""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jllm_core.checkpoint import Box

# A transposition reads so many rows of so many columns at a time: both sides then stay in the processor's cache.
_TILE_ROWS, _TILE_COLUMNS = 32, 512


class Layout(Protocol):
    """A way of storing an array. ``shape`` is always the model's own, such as ``[D, N, H]``."""

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the source's tensor for an array of this shape."""
        ...

    def source_box(self, box: Box, shape: tuple[int, ...]) -> Box:
        """Where in the source's tensor a box of the model's array lies.

        Raises:
            ValueError: it does not lie in one box: an axis is cut that is run together with one before it.
        """
        ...

    def to_jax(self, part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """What is in the source's box, as it is in the model's, which has this shape; a view where that is possible."""
        ...

    def to_source(self, part: np.ndarray) -> np.ndarray:
        """What is in a box of the model's array, as it is in the source's; a view where that is possible."""
        ...


@dataclass(frozen=True)
class Same:
    """Stored as it is used: embeddings and norms."""

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def source_box(self, box: Box, shape: tuple[int, ...]) -> Box:
        return box

    def to_jax(self, part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return part

    def to_source(self, part: np.ndarray) -> np.ndarray:
        return part


@dataclass(frozen=True)
class Flat:
    """Stored with its axes run together: a bias ``[N, H]`` as ``[N*H]``."""

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (math.prod(shape),)

    def source_box(self, box: Box, shape: tuple[int, ...]) -> Box:
        return (_run_together(box, shape),)

    def to_jax(self, part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return part.reshape(shape)

    def to_source(self, part: np.ndarray) -> np.ndarray:
        return part.reshape(-1)


@dataclass(frozen=True)
class Linear:
    """A torch ``nn.Linear`` weight, stored ``[out, in]`` with its heads run together; the model has ``[in, out]``.

    Attributes:
        inputs: how many leading axes of the model's array are inputs: 1 for q ``[D, N, H]``, 2 for o ``[N, H, D]``.
    """

    inputs: int = 1

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs]))

    def source_box(self, box: Box, shape: tuple[int, ...]) -> Box:
        i = self.inputs
        return (_run_together(box[i:], shape[i:]), _run_together(box[:i], shape[:i]))

    def to_jax(self, part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return transpose(part).reshape(shape)

    def to_source(self, part: np.ndarray) -> np.ndarray:
        return transpose(part.reshape(math.prod(part.shape[: self.inputs]), -1))


@dataclass(frozen=True)
class RotaryPairs:
    """As ``base``, but with each head's features in neighbouring pairs, the way GGUF stores q and k of Llama.

    llama.cpp rotates features ``(2i, 2i+1)`` together and its converter reorders the rows of each head to match;
    the Hugging Face models and ours rotate ``(i, i + H/2)``. The heads are the ones of the array itself, so q goes
    by the number of query heads and k by the number of kv heads.
    """

    base: Layout

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.base.source_shape(shape)

    def source_box(self, box: Box, shape: tuple[int, ...]) -> Box:
        return self.base.source_box(box, shape)

    def to_jax(self, part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        *outer, head_dim = shape
        pairs = self.base.to_jax(part, shape).reshape(*outer, head_dim // 2, 2)
        return np.ascontiguousarray(np.swapaxes(pairs, -1, -2)).reshape(shape)

    def to_source(self, part: np.ndarray) -> np.ndarray:
        *outer, head_dim = part.shape
        halves = part.reshape(*outer, 2, head_dim // 2)
        return self.base.to_source(np.ascontiguousarray(np.swapaxes(halves, -1, -2)).reshape(part.shape))


@dataclass(frozen=True)
class Stacked:
    """The matrices of all experts in one tensor ``[E, out, in]``; the model has ``[E, in, out]``.

    Attributes:
        part: which of the matrices that are stacked along ``out`` this is.
        parts: how many there are: 2 where gate and up are in one tensor.
    """

    part: int = 0
    parts: int = 1

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        experts, inputs, outputs = shape
        return experts, outputs * self.parts, inputs

    def source_box(self, box: Box, shape: tuple[int, ...]) -> Box:
        experts, inputs, outputs = box
        first = self.part * shape[2]
        return experts, slice(first + outputs.start, first + outputs.stop), inputs

    def to_jax(self, part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        array = np.empty(shape, part.dtype)
        for expert, matrix in enumerate(part):
            array[expert] = transpose(matrix)
        return array

    def to_source(self, part: np.ndarray) -> np.ndarray:
        experts, inputs, outputs = part.shape
        return self.to_jax(part, (experts, outputs, inputs))


def transpose(matrix: np.ndarray) -> np.ndarray:
    """The transposed matrix, contiguous. By tiles: numpy's own way, a column at a time, takes four times as long."""
    rows, columns = matrix.shape
    # As whole numbers: numpy copies those with instructions of its own, and bfloat16 one element after another.
    elements = np.ascontiguousarray(matrix).view(f"u{matrix.dtype.itemsize}")
    turned = np.empty((columns, rows), elements.dtype)
    for row in range(0, rows, _TILE_ROWS):
        for column in range(0, columns, _TILE_COLUMNS):
            tile = slice(row, row + _TILE_ROWS), slice(column, column + _TILE_COLUMNS)
            turned[tile[::-1]] = elements[tile].T
    return turned.view(matrix.dtype)


def _run_together(box: Box, shape: tuple[int, ...]) -> slice:
    """A box of several axes as a slice of the one axis that they are when run together."""
    if any(part != slice(0, size) for part, size in zip(box[1:], shape[1:], strict=True)):
        raise ValueError(f"the box {box} of {list(shape)} is in several pieces when its axes are run together")
    inner = math.prod(shape[1:])
    return slice(box[0].start * inner, box[0].stop * inner)
