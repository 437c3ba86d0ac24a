"""Every tensor of a source matched to every array of the model, exactly once each."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jllm_core.array_info import ArrayInfo, named_leaves
from jllm_core.config import ModelConfig
from jllm_core.weights import abstract_weights

from jllm_convert.errors import ConversionError
from jllm_convert.families import FAMILIES
from jllm_convert.families.table import Family, Rule
from jllm_convert.layout import Layout
from jllm_convert.sources.base import Source, SourceTensor


@dataclass(frozen=True)
class Match:
    """One array of the model and the tensor it comes from."""

    array: str
    info: ArrayInfo
    tensor: SourceTensor
    layout: Layout

    def read(self) -> np.ndarray:
        """The array's values, in the model's layout and the tensor's own element type."""
        return self.layout.to_jax(self.tensor.read(), self.info.shape)


def match_tensors(source: Source, config: ModelConfig) -> list[Match]:
    """Match a source's tensors to the arrays of a model.

    Raises:
        ConversionError: with every tensor that is missing, left over or of the wrong shape.
    """
    family = FAMILIES[config.model_type]
    infos: Mapping[str, ArrayInfo] = named_leaves(abstract_weights(config))
    by_name = {name: (rule, array) for rule, name, array in _expand(family, source.naming, config.num_layers)}
    problems: list[str] = []
    matches: list[Match] = []
    for name, tensor in source.tensors.items():
        if name.endswith(family.derived):
            continue
        if name not in by_name:
            problems.append(
                f"{tensor.where.name}: tensor {name!r} ({list(tensor.shape)}) is not part of a "
                f"{config.model_type} model with {config.num_layers} layers"
            )
            continue
        rule, array = by_name[name]
        if array not in infos:
            problems += _unused(tensor, array, source, config)
            continue
        layout = rule.layout_in(source.naming)
        expected = layout.source_shape(infos[array].shape)
        if tensor.shape != expected:
            problems.append(
                f"{tensor.where.name}: tensor {name!r} has shape {list(tensor.shape)}, "
                f"the config needs {list(expected)}"
            )
            continue
        matches.append(Match(array, infos[array], tensor, layout))
    found = {by_name[name][1] for name in source.tensors if name in by_name}
    names = {array: name for name, (_, array) in by_name.items()}
    problems += [
        f"{source.path.name}: tensor {names[array]!r} is missing (needed for {array}, {list(info.shape)})"
        for array, info in infos.items()
        if array not in found
    ]
    if problems:
        raise ConversionError(problems)
    order = {array: number for number, array in enumerate(infos)}
    return sorted(matches, key=lambda match: order[match.array])


def _expand(family: Family, naming: str, num_layers: int) -> list[tuple[Rule, str, str]]:
    """Each rule with its tensor's and its array's name, once for each layer where it has ``{i}``."""
    return [
        (rule, rule.name_in(naming).format(i=i), rule.array.format(i=i))
        for rule in family.rules
        for i in range(num_layers if "{i}" in rule.array else 1)
    ]


def _unused(tensor: SourceTensor, array: str, source: Source, config: ModelConfig) -> list[str]:
    """Problems with a tensor that the family knows and this config has no use for.

    A tied model that ships its output head anyway is fine as long as the head is the embedding: the reference model
    ignores it.
    """
    if array == "lm_head" and config.tie_embeddings:
        embedding = next(
            rule.name_in(source.naming) for rule in FAMILIES[config.model_type].rules if rule.array == "embedding"
        )
        tied = source.tensors.get(embedding)
        if tied is None or (tied.shape == tensor.shape and np.array_equal(tied.read(), tensor.read())):
            return []
        return [
            f"{tensor.where.name}: the config ties the output head to the embedding, but {tensor.name!r} differs from "
            f"{embedding!r}; set tie_word_embeddings to false to use it, or remove the tensor"
        ]
    return [f"{tensor.where.name}: the config has no use for tensor {tensor.name!r} ({list(tensor.shape)})"]
