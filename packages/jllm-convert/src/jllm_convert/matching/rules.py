"""Tensor matching by a family's rules: every tensor of a source to an array of the model, every array exactly once."""

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
from jllm_convert.families.tensor_layout import Layout
from jllm_convert.sources.base import Source, SourceTensor

_COMPARED_AT_ONCE = 1 << 21
"""Elements of a tied output head that are compared with the embedding at a time."""


@dataclass(frozen=True)
class Part:
    """The part of an array that one tensor holds.

    Attributes:
        tensor: the tensor.
        layout: its layout.
        expert: the index along the array's first axis that it holds; None is the whole array.
    """

    tensor: SourceTensor
    layout: Layout
    expert: int | None = None

    def read(self, box: Box, shape: tuple[int, ...]) -> np.ndarray:
        """Read a box of the part, which has this shape, in the model's layout and the tensor's element type."""
        return self.layout.to_jax(self.tensor.read(self.layout.source_box(box, shape)), box_shape(box))


@dataclass(frozen=True)
class Match:
    """An array of the model and its source: one tensor, or one for each expert."""

    array: str
    info: ArrayInfo
    parts: tuple[Part, ...]

    @property
    def dtype(self) -> np.dtype:
        """The element type that ``read`` returns."""
        return self.parts[0].tensor.dtype

    def read(self, box: Box | None = None) -> np.ndarray:
        """Read a box of the array, or all of it, in the model's layout and the tensors' own element type."""
        box = whole(self.info.shape) if box is None else box
        if self.parts[0].expert is None:
            return self.parts[0].read(box, self.info.shape)
        array = np.empty(box_shape(box), self.dtype)
        # ``parts`` is sorted by expert, so the box's first axis selects the experts.
        for values, part in zip(array, self.parts[box[0]], strict=True):
            values[...] = part.read(box[1:], self.info.shape[1:])
        return array


@dataclass(frozen=True)
class _Target:
    """An array, or a part of it, that a tensor of a certain name holds."""

    layout: Layout
    array: str
    expert: int | None

    def part_shape(self, info: ArrayInfo) -> tuple[int, ...]:
        return info.shape if self.expert is None else info.shape[1:]


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
    targets = _targets(family, source.naming, config)
    problems: list[str] = []
    parts: dict[str, dict[int | None, Part]] = {array: {} for array in infos}
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
        problems += _assign(tensor, targets[name], infos, parts, source, config)
    for array, info in infos.items():
        problems += _missing(array, info, parts[array], array in seen, source, family, config)
    if problems:
        raise ConversionError(problems)
    return [
        Match(array, info, tuple(parts[array][expert] for expert in sorted(parts[array], key=lambda e: e or 0)))
        for array, info in infos.items()
    ]


def _targets(family: Family, naming: str, config: ModelConfig) -> dict[str, list[_Target]]:
    """The targets of every name that a tensor may have; a tensor that holds several parts has several targets."""
    targets: dict[str, list[_Target]] = {}
    for rule in family.rules:
        pattern = rule.name_in(naming)
        if pattern is None:
            continue
        for i in range(config.num_layers if "{i}" in rule.array else 1):
            experts = range(config.moe.num_experts if config.moe else 0) if "{e}" in pattern else (None,)
            for e in experts:
                target = _Target(rule.layout_in(naming), rule.array.format(i=i), e)
                # A tensor may hold several parts (gate_up_proj). In a checkpoint, where every array has its own name,
                # all rules of an array give the same target.
                own = targets.setdefault(pattern.format(i=i, e=e), [])
                if target not in own:
                    own.append(target)
    return targets


def _assign(
    tensor: SourceTensor,
    targets: list[_Target],
    infos: Mapping[str, ArrayInfo],
    parts: dict[str, dict[int | None, Part]],
    source: Source,
    config: ModelConfig,
) -> Iterator[str]:
    """Add a tensor to ``parts``; yield its problems."""
    for target in targets:
        if target.array not in infos:
            yield from _unused(tensor, target.array, source, config)
            return
        expected = target.layout.source_shape(target.part_shape(infos[target.array]))
        if tensor.shape != expected:
            yield (
                f"{tensor.where.name}: tensor {tensor.name!r} has shape {list(tensor.shape)}, "
                f"the config needs {list(expected)}"
            )
            return
        # A whole array and single experts of it, or two whole ones, are two ways to store the same array.
        others = parts[target.array]
        if others and (None in others or target.expert is None):
            other = next(iter(others.values())).tensor
            yield (
                f"{tensor.where.name}: tensor {tensor.name!r} holds what {other.name!r} in {other.where.name} holds "
                f"already ({target.array}); keep one of the two ways to store it"
            )
            return
        others[target.expert] = Part(tensor, target.layout, target.expert)


def _missing(
    array: str,
    info: ArrayInfo,
    parts: Mapping[int | None, Part],
    seen: bool,
    source: Source,
    family: Family,
    config: ModelConfig,
) -> Iterator[str]:
    """Problems of an array without a tensor, or without one for each expert.

    An array whose tensors exist but do not fit has its problems already.
    """
    # None in parts: a whole array is there.
    if None in parts or (seen and not parts):
        return
    # Where publishers have several ways to store an array, the message names the usual one, the first rule.
    names = [name for rule in family.rules if (name := rule.name_in(source.naming)) and _fills(rule, array)]
    layer = array.split(".")[1] if array.startswith("layers.") else ""
    count = config.moe.num_experts if parts and config.moe else 1
    for expert in [e for e in range(count) if not parts or e not in parts]:
        name = names[0].format(i=layer, e=expert if parts else "*")
        yield f"{source.path.name}: tensor {name!r} is missing (needed for {array}, {list(info.shape)})"


def _fills(rule: Rule, array: str) -> bool:
    """Whether a rule is for this array."""
    prefix, marker, suffix = rule.array.partition("{i}")
    return array.startswith(prefix) and array.endswith(suffix) if marker else array == rule.array


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
