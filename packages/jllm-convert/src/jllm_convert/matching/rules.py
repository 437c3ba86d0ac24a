"""Tensor matching by a family's rules: every row of a source's tensors to an array of the model, every array once."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jllm_core.array_info import ArrayInfo, named_leaves
from jllm_core.checkpoint import Box, box_shape, whole
from jllm_core.config import ModelConfig
from jllm_core.weight_specs import abstract_weights

from jllm_convert.errors import ConversionError
from jllm_convert.families import FAMILIES
from jllm_convert.families.table import Family, Rule
from jllm_convert.families.tensor_layout import copy_into
from jllm_convert.families.tensor_parts import LayoutError, Slot, inside, intersection, shapes_by_owner, slots_of
from jllm_convert.sources.base import Source, SourceTensor

_COMPARED_AT_ONCE = 1 << 21
"""Elements of a tied output head that are compared with the embedding at a time."""
PIECE_BYTES = 4 << 20
"""Bytes that are read at a time and copied to their place in the model's layout: they stay in a processor's cache."""


@dataclass(frozen=True)
class Part:
    """A box of an array, and where a tensor holds it.

    Attributes:
        tensor: the tensor.
        slot: the box, and its layout in the tensor.
    """

    tensor: SourceTensor
    slot: Slot

    def pieces(self, box: Box, nbytes: int) -> Iterator[tuple[Box, np.ndarray]]:
        """Read a box of the array, inside this part's, in smaller ones of at most ``nbytes``, or of one entry.

        Raises:
            ConversionError: the tensor cannot be read, or its numbers cannot be what the layout says.
        """
        # Cut along the axes that come first in the tensor: each piece lies in one run of the file, where the box does.
        steps = list(box_shape(box))
        for axis in self.slot.layout.axes(len(steps)):
            others = math.prod(steps) // max(steps[axis], 1) * self.tensor.dtype.itemsize
            steps[axis] = min(steps[axis], max(nbytes // max(others, 1), 1))
        ranges = [
            [slice(start, min(start + step, part.stop)) for start in range(part.start, part.stop, max(step, 1))]
            for part, step in zip(box, steps, strict=True)
        ]
        for piece in itertools.product(*ranges):
            yield piece, self._read(piece)

    def _read(self, box: Box) -> np.ndarray:
        layout, place = self.slot.layout, self.slot.place
        values = self.tensor.read(layout.source_box(inside(box, place), box_shape(place)))
        try:
            return layout.to_jax(values, box_shape(box))
        except LayoutError as error:
            raise ConversionError(f"{self.tensor.where.name}: tensor {self.tensor.name!r} {error}") from error


@dataclass(frozen=True)
class Match:
    """An array of the model and its parts in the source: one tensor, one for each expert, or pieces of one."""

    array: str
    info: ArrayInfo
    parts: tuple[Part, ...]

    @property
    def dtype(self) -> np.dtype:
        """The element type that ``read`` returns."""
        return self.parts[0].tensor.dtype

    def pieces(self, box: Box, nbytes: int = PIECE_BYTES) -> Iterator[tuple[Box, np.ndarray]]:
        """Read a box of the array in smaller ones, in the model's layout and the tensors' own element type.

        Args:
            box: the box.
            nbytes: bytes of a piece as it is stored, where it has more than one entry.
        """
        for part in self.parts:
            if (shared := intersection(part.slot.place, box)) is not None:
                yield from part.pieces(shared, nbytes)

    def read(self, box: Box | None = None) -> np.ndarray:
        """Read a box of the array, or all of it, in the model's layout and the tensors' own element type."""
        box = whole(self.info.shape) if box is None else box
        array = np.empty(box_shape(box), self.dtype)
        for piece, values in self.pieces(box):
            copy_into(array[inside(piece, box)], values)
        return array

    def tensor_at(self, index: tuple[int, ...]) -> SourceTensor:
        """The tensor that holds one element of the array."""
        at = tuple(slice(i, i + 1) for i in index)
        return next(part.tensor for part in self.parts if intersection(part.slot.place, at) is not None)


_Parts = dict[tuple[int, ...], Part]
"""The parts of an array by where their boxes start."""


@dataclass(frozen=True)
class Target:
    """An array, or a part of it, that a tensor of a certain name holds.

    Attributes:
        array: the array's name.
        pattern: the name's pattern in the rule: one way to store the array.
        slots: the array's boxes in the tensor; None where the config has no such array, or not all of those that the
            tensor holds.
    """

    array: str
    pattern: str
    slots: tuple[Slot, ...] | None

    @property
    def expected(self) -> tuple[int, ...]:
        """The tensor's shape: that of any slot's layout."""
        slot = (self.slots or ())[0]
        return slot.layout.source_shape(box_shape(slot.place))


def match_tensors(source: Source, config: ModelConfig) -> list[Match]:
    """Match a source's tensors to the arrays of a model.

    Raises:
        ConversionError: every tensor that is missing, left over or of the wrong shape.
    """
    # One problem in place of one for each missing tensor, and no loop over an absurd number of layers.
    if config.num_layers > len(source.tensors):
        raise ConversionError(
            f"{source.path.name}: the config has {config.num_layers:,} layers, there are {len(source.tensors):,} "
            "tensors for all of them; the config is not of this model, or files are missing"
        )
    family = FAMILIES[config.model_type]
    infos: Mapping[str, ArrayInfo] = named_leaves(abstract_weights(config))
    targets = targets_by_name(family, source.naming, config, infos)
    problems: list[str] = []
    parts: dict[str, _Parts] = {array: {} for array in infos}
    ways: dict[str, str] = {}
    seen: set[str] = set()
    for name, tensor in source.tensors.items():
        if name.endswith(family.buffer_suffixes):
            continue  # computed from the config
        if name not in targets:
            problems.append(
                f"{tensor.where.name}: tensor {name!r} ({list(tensor.shape)}) is not part of a "
                f"{config.model_type} model with {config.num_layers} layers"
            )
            continue
        # Even a tensor that does not fit counts as seen: its array then is not reported as missing too.
        seen |= {target.array for target in targets[name]}
        problems += _assign(tensor, targets[name], parts, ways, source, config)
    for array, info in infos.items():
        problems += _missing(array, info, parts[array], ways.get(array), array in seen, source, family, config)
    if problems:
        raise ConversionError(problems)
    return [Match(array, info, tuple(parts[array][at] for at in sorted(parts[array]))) for array, info in infos.items()]


def targets_by_name(
    family: Family, naming: str, config: ModelConfig, infos: Mapping[str, ArrayInfo]
) -> dict[str, list[Target]]:
    """The targets of every name that a tensor may have; a tensor that holds several arrays has several targets."""
    shapes = shapes_by_owner(infos)
    targets: dict[str, list[Target]] = {}
    for rule in family.rules:
        pattern = rule.name_in(naming)
        if pattern is None:
            continue
        for i in range(config.num_layers if "{i}" in rule.array else 1):
            if rule.mixer not in (None, config.mixer(i)):
                continue
            array = rule.array.format(i=i)
            experts = range(config.moe.num_experts if config.moe else 0) if "{e}" in pattern else (None,)
            for e in experts:
                try:
                    slots = slots_of(rule.layout_in(naming), array, shapes, e)
                except KeyError:
                    slots = None
                target = Target(array, pattern, slots)
                # In a checkpoint, where every array has its own name, all rules of an array give the same target.
                own = targets.setdefault(pattern.format(i=i, e=e), [])
                if target not in own:
                    own.append(target)
    return targets


def _assign(
    tensor: SourceTensor,
    targets: list[Target],
    parts: dict[str, _Parts],
    ways: dict[str, str],
    source: Source,
    config: ModelConfig,
) -> Iterator[str]:
    """Add a tensor to ``parts`` and ``ways``; yield its problems."""
    ways_by_array: dict[str, list[Target]] = {}
    for target in targets:
        ways_by_array.setdefault(target.array, []).append(target)
    for array, choices in ways_by_array.items():
        # Where a name stands for two layouts, the shape tells which one it is.
        known = [target for target in choices if target.slots is not None]
        if not known:
            yield from _unused(tensor, array, source, config)
            return
        fitting = next((target for target in known if tensor.shape == target.expected), None)
        if fitting is None:
            needed = " or ".join(dict.fromkeys(str(list(target.expected)) for target in known))
            yield (
                f"{tensor.where.name}: tensor {tensor.name!r} has shape {list(tensor.shape)}, the config needs {needed}"
            )
            return
        others = parts[array]
        if ways.setdefault(array, fitting.pattern) != fitting.pattern:
            other = next(iter(others.values())).tensor
            yield (
                f"{tensor.where.name}: tensor {tensor.name!r} holds what {other.name!r} in {other.where.name} holds "
                f"already ({array}); keep one of the two ways to store it"
            )
            return
        for slot in fitting.slots or ():
            others[tuple(part.start for part in slot.place)] = Part(tensor, slot)


def _missing(
    array: str,
    info: ArrayInfo,
    parts: _Parts,
    way: str | None,
    seen: bool,
    source: Source,
    family: Family,
    config: ModelConfig,
) -> Iterator[str]:
    """Problems of an array without a tensor, or without one for each expert.

    An array whose tensors exist but do not fit has its problems already.
    """
    if seen and not parts:
        return
    of_experts = way is not None and "{e}" in way
    if parts and not of_experts:
        return  # all of its parts are in one tensor
    # Where publishers have several ways to store an array, the message names the usual one, the first rule.
    layer = array.split(".")[1] if array.startswith("layers.") else ""
    name = way or next(
        name for rule in family.rules if (name := rule.name_in(source.naming)) and _fills(rule, array, config)
    )
    there = {at[0] for at in parts}
    for expert in [e for e in range(info.shape[0]) if e not in there] if of_experts else ["*"]:
        tensor = name.format(i=layer, e=expert)
        yield f"{source.path.name}: tensor {tensor!r} is missing (needed for {array}, {list(info.shape)})"


def _fills(rule: Rule, array: str, config: ModelConfig) -> bool:
    """Whether a rule is for this array."""
    prefix, marker, suffix = rule.array.partition("{i}")
    if not marker:
        return array == rule.array
    fits = array.startswith(prefix) and array.endswith(suffix)
    return fits and rule.mixer in (None, config.mixer(int(array.removeprefix(prefix).removesuffix(suffix))))


def _same(first: SourceTensor, second: SourceTensor) -> bool:
    """Whether two matrices hold the same numbers, compared a few rows at a time."""
    rows, columns = first.shape
    step = max(_COMPARED_AT_ONCE // max(columns, 1), 1)
    boxes = [(slice(row, min(row + step, rows)), slice(0, columns)) for row in range(0, rows, step)]
    return all(_equal(first.read(box), second.read(box)) for box in boxes)


def _equal(first: np.ndarray, second: np.ndarray) -> bool:
    # NaN, which differs from itself, is the same in both: the conversion says that it is there.
    return bool(np.array_equal(first, second) or ((first == second) | ((first != first) & (second != second))).all())


def _unused(tensor: SourceTensor, array: str, source: Source, config: ModelConfig) -> list[str]:
    """Problems of a tensor that the family has and this config does not use.

    A tied model may ship its output head anyway, if it equals the embedding: the reference model ignores it.
    """
    if array == "lm_head" and config.tie_embeddings:
        embedding = next(
            rule.name_in(source.naming) for rule in FAMILIES[config.model_type].rules if rule.array == "embedding"
        )
        tied = source.tensors.get(embedding or "")
        # A missing embedding is reported on its own.
        if tied is None or (tied.shape == tensor.shape and _same(tied, tensor)):
            return []
        return [
            f"{tensor.where.name}: the config ties the output head to the embedding, but {tensor.name!r} differs from "
            f"{embedding!r}; set tie_word_embeddings to false to use it, or remove the tensor"
        ]
    return [f"{tensor.where.name}: the config has no use for tensor {tensor.name!r} ({list(tensor.shape)})"]
