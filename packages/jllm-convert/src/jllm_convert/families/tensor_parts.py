"""Parts of tensors: arrays that share a tensor, heads in another order, and numbers that are stored transformed.

A layout (``tensor_layout``) says how a whole tensor becomes an array. Here is the rest: where a box of an array lies in
a tensor that also holds other things. Each such box is a ``Slot``; the slots of an array fill it without overlaps, and
so do the slots of all arrays of a tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from jllm_core.checkpoint import Box, whole

from jllm_convert.families.tensor_layout import Layout

if TYPE_CHECKING:
    from jllm_core.array_info import ArrayInfo

Shape = tuple[int, ...]
_HEADS = 1
"""The axis of the heads in arrays ``[D, heads, features]``, ``[D, heads]`` and ``[W, heads, features]``."""


class LayoutError(ValueError):
    """Numbers of a tensor that cannot be what the layout says; the message goes on behind the tensor's name."""


@dataclass(frozen=True)
class Slot:
    """A box of an array that lies in one piece of a tensor.

    Attributes:
        place: the box in the model's array.
        layout: the layout of that box, as of an array of its own, in the tensor.
    """

    place: Box
    layout: Layout


@runtime_checkable
class Arrangement(Protocol):
    """A way of storing an array in several pieces of a tensor, or beside other arrays."""

    def source_shape(self, shape: Shape) -> Shape:
        """The shape of what a tensor would be that held nothing but an array of this shape."""
        ...

    def slots(self, array: str, shapes: Mapping[str, Shape]) -> list[Slot]:
        """The slots of an array in the tensor.

        Args:
            array: the last part of the array's name.
            shapes: the model's shapes, by the last part of the name, of the arrays of the same part of the model.

        Raises:
            KeyError: an array that the tensor holds too is not there.
        """
        ...


@dataclass(frozen=True)
class Fused:
    """Several arrays in one tensor, one after another: q, k and v; or in each group of heads: q and gate.

    Attributes:
        base: the layout of each.
        arrays: the last parts of their names, in order.
        groups: the array that has as many heads as there are groups, each with its own heads of every array; None is
            one group.
        axis: the tensor's axis along which they follow each other.
    """

    base: Layout | Arrangement
    arrays: tuple[str, ...]
    groups: str | None = None
    axis: int = 0

    def source_shape(self, shape: Shape) -> Shape:
        return self.base.source_shape(shape)

    def slots(self, array: str, shapes: Mapping[str, Shape]) -> list[Slot]:
        sizes = [self.base.source_shape(shapes[name])[self.axis] for name in self.arrays]
        groups = 1 if self.groups is None else shapes[self.groups][_HEADS]
        before, all_sizes = sum(sizes[: self.arrays.index(array)]) // groups, sum(sizes)
        return [
            Slot(slot.place, Window(slot.layout, number * all_sizes // groups + before, all_sizes, self.axis))
            for number, group in enumerate(_by_group(self.base, array, shapes, groups))
            for slot in group
        ]


@dataclass(frozen=True)
class Tiled:
    """Value heads in GGUF's order: first those that are the first of their key head, then all second ones, and so on.

    The model has them as Hugging Face, those of a key head side by side. llama.cpp (conversion/qwen.py) turns them
    round so that its kernels may repeat the keys as a whole.

    Attributes:
        base: the layout of the array.
        heads: the array's axis of heads.
        axis: the tensor's axis that holds them, with all features of a head side by side.
        keys: the array that has as many heads as there are key heads.
    """

    base: Layout
    heads: int = _HEADS
    axis: int = 0
    keys: str = "q"

    def source_shape(self, shape: Shape) -> Shape:
        return self.base.source_shape(shape)

    def slots(self, array: str, shapes: Mapping[str, Shape]) -> list[Slot]:
        shape, keys = shapes[array], shapes[self.keys][_HEADS]
        count, size = shape[self.heads], self.base.source_shape(shape)[self.axis]
        of_a_key = count // keys
        if of_a_key == 1:
            return [Slot(whole(shape), self.base)]
        slots = []
        for head in range(count):
            key, number = divmod(head, of_a_key)
            first = (number * keys + key) * (size // count)
            slots.append(Slot(_cut(shape, self.heads, head, head + 1), Window(self.base, first, size, self.axis)))
        return slots


@dataclass(frozen=True)
class Window:
    """``base`` as a range of a larger tensor.

    Attributes:
        base: the layout of what is in the range.
        first: the index at which the range starts.
        size: the size of the whole tensor.
        axis: the tensor's axis of both.
    """

    base: Layout
    first: int
    size: int
    axis: int = 0

    def source_shape(self, shape: Shape) -> Shape:
        own = self.base.source_shape(shape)
        return (*own[: self.axis], self.size, *own[self.axis + 1 :])

    def source_box(self, box: Box, shape: Shape) -> Box:
        own = self.base.source_box(box, shape)
        at = slice(self.first + own[self.axis].start, self.first + own[self.axis].stop)
        return (*own[: self.axis], at, *own[self.axis + 1 :])

    def axes(self, ndim: int) -> tuple[int, ...]:
        return self.base.axes(ndim)

    def to_jax(self, part: np.ndarray, shape: Shape) -> np.ndarray:
        return self.base.to_jax(part, shape)

    def to_source(self, part: np.ndarray) -> np.ndarray:
        return self.base.to_source(part)


@dataclass(frozen=True)
class Entry:
    """One entry of an array's first axis, in a tensor of its own: one expert."""

    base: Layout

    def source_shape(self, shape: Shape) -> Shape:
        return self.base.source_shape(shape[1:])

    def source_box(self, box: Box, shape: Shape) -> Box:
        return self.base.source_box(box[1:], shape[1:])

    def axes(self, ndim: int) -> tuple[int, ...]:
        return tuple(axis + 1 for axis in self.base.axes(ndim - 1))

    def to_jax(self, part: np.ndarray, shape: Shape) -> np.ndarray:
        return self.base.to_jax(part, shape[1:])[None]

    def to_source(self, part: np.ndarray) -> np.ndarray:
        return self.base.to_source(part[0])


@dataclass(frozen=True)
class _Transformed:
    """Where ``base`` has it, but with other numbers."""

    base: Layout

    def source_shape(self, shape: Shape) -> Shape:
        return self.base.source_shape(shape)

    def source_box(self, box: Box, shape: Shape) -> Box:
        return self.base.source_box(box, shape)

    def axes(self, ndim: int) -> tuple[int, ...]:
        return self.base.axes(ndim)


@dataclass(frozen=True)
class OneAdded(_Transformed):
    """``base`` with 1 added to each number: GGUF's weights of norms that multiply by ``1 + gamma``."""

    def to_jax(self, part: np.ndarray, shape: Shape) -> np.ndarray:
        return self.base.to_jax(part.astype(np.float32) - np.float32(1), shape)

    def to_source(self, part: np.ndarray) -> np.ndarray:
        return self.base.to_source(part.astype(np.float32) + np.float32(1))


@dataclass(frozen=True)
class Decay(_Transformed):
    """``base`` as ``-exp(numbers)``: GGUF's ``ssm_a``, of which the model has the logarithm."""

    def to_jax(self, part: np.ndarray, shape: Shape) -> np.ndarray:
        if (part > 0).any():
            raise LayoutError(
                f"holds {part[part > 0][0]}, a decay must be below zero; the file is damaged, or its converter stores "
                "decays in another form"
            )
        # One that was rounded to zero stands for a state that never decays.
        smallest = np.finfo(np.float32).tiny
        return self.base.to_jax(np.log(np.maximum(-part.astype(np.float32), smallest)), shape)

    def to_source(self, part: np.ndarray) -> np.ndarray:
        return self.base.to_source(-np.exp(part.astype(np.float32)))


def shapes_by_owner(infos: "Mapping[str, ArrayInfo]") -> dict[str, dict[str, Shape]]:
    """The shapes of arrays by the part of the model that they belong to, such as ``layers.0.attn``, and their own name.

    Arrays that share a tensor are of the same part.
    """
    shapes: dict[str, dict[str, Shape]] = {}
    for name, info in infos.items():
        owner, _, own = name.rpartition(".")
        shapes.setdefault(owner, {})[own] = info.shape
    return shapes


def slots_of(
    layout: Layout | Arrangement, array: str, shapes: Mapping[str, Mapping[str, Shape]], expert: int | None = None
) -> tuple[Slot, ...]:
    """The slots of an array in a tensor that is stored in this way.

    Args:
        layout: the way.
        array: the array's whole name.
        shapes: the model's shapes, as ``shapes_by_owner`` gives them.
        expert: the entry of the array's first axis that the tensor holds; None is all of it.

    Raises:
        KeyError: the model has no such array, or none of those that the tensor would hold too.
    """
    owner, _, own = array.rpartition(".")
    beside = shapes.get(owner, {})
    if isinstance(layout, Arrangement):
        return tuple(layout.slots(own, beside))
    if expert is not None:
        return (Slot(_cut(beside[own], 0, expert, expert + 1), Entry(layout)),)
    return (Slot(whole(beside[own]), layout),)


def intersection(one: Box, other: Box) -> Box | None:
    """The box that two boxes of an array share; None where there is none."""
    pairs = list(zip(one, other, strict=True))
    shared = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in pairs)
    return shared if all(part.start < part.stop for part in shared) else None


def inside(box: Box, outer: Box) -> Box:
    """A box of an array by its position in a box around it."""
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(box, outer, strict=True))


def _by_group(base: Layout | Arrangement, array: str, shapes: Mapping[str, Shape], groups: int) -> list[list[Slot]]:
    """The slots of an array by the group of heads that they belong to."""
    if isinstance(base, Arrangement):
        return [base.slots(array, shapes)]
    shape = shapes[array]
    if groups == 1:
        return [[Slot(whole(shape), base)]]
    heads = shape[_HEADS] // groups
    return [[Slot(_cut(shape, _HEADS, first, first + heads), base)] for first in range(0, shape[_HEADS], heads)]


def _cut(shape: Shape, axis: int, start: int, stop: int) -> Box:
    box = list(whole(shape))
    box[axis] = slice(start, stop)
    return tuple(box)
