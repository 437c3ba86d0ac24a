"""Every tensor of a source matched to every array of the model, exactly once each."""

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
from jllm_convert.matching.layout import Layout
from jllm_convert.sources.base import Source, SourceTensor

_COMPARED_AT_ONCE = 1 << 21  # elements


@dataclass(frozen=True)
class Part:
    """What one tensor holds of an array.

    Attributes:
        tensor: the tensor.
        layout: how it stores the part.
        expert: the entry of the array's first axis that this is; None is the whole array.
    """

    tensor: SourceTensor
    layout: Layout
    expert: int | None = None

    def read(self, box: Box, shape: tuple[int, ...]) -> np.ndarray:
        """A box of the part, which as a whole has this shape, in the model's layout and the tensor's element type."""
        return self.layout.to_jax(self.tensor.read(self.layout.source_box(box, shape)), box_shape(box))


@dataclass(frozen=True)
class Match:
    """One array of the model and what it comes from: a tensor, or one for each expert."""

    array: str
    info: ArrayInfo
    parts: tuple[Part, ...]

    @property
    def dtype(self) -> np.dtype:
        """The element type of what is read."""
        return self.parts[0].tensor.dtype

    def read(self, box: Box | None = None) -> np.ndarray:
        """A box of the array, or all of it, in the model's layout and the tensors' own element type."""
        box = whole(self.info.shape) if box is None else box
        if self.parts[0].expert is None:
            return self.parts[0].read(box, self.info.shape)
        array = np.empty(box_shape(box), self.dtype)
        for values, part in zip(array, self.parts[box[0]], strict=True):
            values[...] = part.read(box[1:], self.info.shape[1:])
        return array


@dataclass(frozen=True)
class _Place:
    """Where a tensor of a known name belongs."""

    layout: Layout
    array: str
    expert: int | None

    def part_shape(self, info: ArrayInfo) -> tuple[int, ...]:
        return info.shape if self.expert is None else info.shape[1:]


def match_tensors(source: Source, config: ModelConfig) -> list[Match]:
    """Match a source's tensors to the arrays of a model.

    Raises:
        ConversionError: with every tensor that is missing, left over or of the wrong shape.
    """
    if config.num_layers > len(source.tensors):  # each would be missing; and an absurd number takes absurd time
        raise ConversionError(
            f"{source.path.name}: the config has {config.num_layers:,} layers, there are {len(source.tensors):,} "
            "tensors for all of them; the config is not of this model, or files are missing"
        )
    family = FAMILIES[config.model_type]
    infos: Mapping[str, ArrayInfo] = named_leaves(abstract_weights(config))
    places = _places(family, source.naming, config)
    problems: list[str] = []
    parts: dict[str, dict[int | None, Part]] = {array: {} for array in infos}
    seen: set[str] = set()
    for name, tensor in source.tensors.items():
        if name.endswith(family.derived):
            continue
        if name not in places:
            problems.append(
                f"{tensor.where.name}: tensor {name!r} ({list(tensor.shape)}) is not part of a "
                f"{config.model_type} model with {config.num_layers} layers"
            )
            continue
        seen |= {place.array for place in places[name]}
        problems += _place(tensor, places[name], infos, parts, source, config)
    for array, info in infos.items():
        problems += _missing(array, info, parts[array], array in seen, source, family, config)
    if problems:
        raise ConversionError(problems)
    return [
        Match(array, info, tuple(parts[array][expert] for expert in sorted(parts[array], key=lambda e: e or 0)))
        for array, info in infos.items()
    ]


def _places(family: Family, naming: str, config: ModelConfig) -> dict[str, list[_Place]]:
    """Every name that a tensor may have, and what it then holds; one that holds several parts has several places."""
    places: dict[str, list[_Place]] = {}
    for rule in family.rules:
        pattern = rule.name_in(naming)
        if pattern is None:
            continue
        for i in range(config.num_layers if "{i}" in rule.array else 1):
            experts = range(config.moe.num_experts if config.moe else 0) if "{e}" in pattern else (None,)
            for e in experts:
                place = _Place(rule.layout_in(naming), rule.array.format(i=i), e)
                own = places.setdefault(pattern.format(i=i, e=e), [])
                if place not in own:
                    own.append(place)
    return places


def _place(
    tensor: SourceTensor,
    places: list[_Place],
    infos: Mapping[str, ArrayInfo],
    parts: dict[str, dict[int | None, Part]],
    source: Source,
    config: ModelConfig,
) -> Iterator[str]:
    """Enter a tensor into ``parts``; the problems with it."""
    for place in places:
        if place.array not in infos:
            yield from _unused(tensor, place.array, source, config)
            return
        expected = place.layout.source_shape(place.part_shape(infos[place.array]))
        if tensor.shape != expected:
            yield (
                f"{tensor.where.name}: tensor {tensor.name!r} has shape {list(tensor.shape)}, "
                f"the config needs {list(expected)}"
            )
            return
        others = parts[place.array]
        if others and (None in others or place.expert is None):
            other = next(iter(others.values())).tensor
            yield (
                f"{tensor.where.name}: tensor {tensor.name!r} holds what {other.name!r} in {other.where.name} holds "
                f"already ({place.array}); keep one of the two ways to store it"
            )
            return
        others[place.expert] = Part(tensor, place.layout, place.expert)


def _missing(
    array: str,
    info: ArrayInfo,
    parts: Mapping[int | None, Part],
    seen: bool,
    source: Source,
    family: Family,
    config: ModelConfig,
) -> Iterator[str]:
    """Problems with an array that no tensor was there for, or not one for each expert.

    An array whose tensors were there and did not fit has its problems already.
    """
    if None in parts or (seen and not parts):
        return
    names = [name for rule in family.rules if (name := rule.name_in(source.naming)) and _fills(rule, array)]
    layer = array.split(".")[1] if array.startswith("layers.") else ""
    count = config.moe.num_experts if parts and config.moe else 1
    for expert in [e for e in range(count) if not parts or e not in parts]:
        name = names[0].format(i=layer, e=expert if parts else "*")
        yield f"{source.path.name}: tensor {name!r} is missing (needed for {array}, {list(info.shape)})"


def _fills(rule: Rule, array: str) -> bool:
    prefix, marker, suffix = rule.array.partition("{i}")
    return array.startswith(prefix) and array.endswith(suffix) if marker else array == rule.array


def _same(first: SourceTensor, second: SourceTensor) -> bool:
    """Whether two matrices hold the same numbers, compared a few rows at a time."""
    rows, columns = first.shape
    step = max(_COMPARED_AT_ONCE // max(columns, 1), 1)
    boxes = [(slice(row, min(row + step, rows)), slice(0, columns)) for row in range(0, rows, step)]
    return all(np.array_equal(first.read(box), second.read(box)) for box in boxes)


def _unused(tensor: SourceTensor, array: str, source: Source, config: ModelConfig) -> list[str]:
    """Problems with a tensor that the family knows and this config has no use for.

    A tied model that ships its output head anyway is fine as long as the head is the embedding: the reference model
    ignores it.
    """
    if array == "lm_head" and config.tie_embeddings:
        embedding = next(
            rule.name_in(source.naming) for rule in FAMILIES[config.model_type].rules if rule.array == "embedding"
        )
        tied = source.tensors.get(embedding or "")
        if tied is None or (tied.shape == tensor.shape and _same(tied, tensor)):
            return []
        return [
            f"{tensor.where.name}: the config ties the output head to the embedding, but {tensor.name!r} differs from "
            f"{embedding!r}; set tie_word_embeddings to false to use it, or remove the tensor"
        ]
    return [f"{tensor.where.name}: the config has no use for tensor {tensor.name!r} ({list(tensor.shape)})"]
