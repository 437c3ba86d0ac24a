"""How one tensor of a source becomes one array of the model: reshaped, transposed, rotary pairs put back in order."""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Layout(Protocol):
    """A way of storing an array. ``shape`` is always the model's own, such as ``[D, N, H]``."""

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that the source stores an array of this shape in."""
        ...

    def to_jax(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The source's tensor as the model's array; a view where that is possible."""
        ...


@dataclass(frozen=True)
class Same:
    """Stored as it is used: embeddings and norms."""

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def to_jax(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return tensor


@dataclass(frozen=True)
class Flat:
    """Stored with its axes run together: a bias ``[N, H]`` as ``[N*H]``."""

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (math.prod(shape),)

    def to_jax(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return tensor.reshape(shape)


@dataclass(frozen=True)
class Linear:
    """A torch ``nn.Linear`` weight, stored ``[out, in]`` with its heads run together; the model has ``[in, out]``.

    Attributes:
        inputs: how many leading axes of the model's array are inputs: 1 for q ``[D, N, H]``, 2 for o ``[N, H, D]``.
    """

    inputs: int = 1

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs]))

    def to_jax(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return np.ascontiguousarray(tensor.T).reshape(shape)


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

    def to_jax(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        *outer, head_dim = shape
        pairs = self.base.to_jax(tensor, shape).reshape(*outer, head_dim // 2, 2)
        return np.ascontiguousarray(np.swapaxes(pairs, -1, -2)).reshape(shape)


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

    def to_jax(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        outputs = shape[2]
        own = tensor[:, self.part * outputs : (self.part + 1) * outputs]
        return np.ascontiguousarray(np.swapaxes(own, 1, 2))
