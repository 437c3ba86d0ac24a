"""Matching of an adapter's changes to the arrays of the model, and arrays that are read with their changes added."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jllm_core.array_info import ArrayInfo, named_leaves
from jllm_core.checkpoint import Box
from jllm_core.config import ModelConfig
from jllm_core.weight_specs import abstract_weights

from jllm_convert.errors import ConversionError
from jllm_convert.families import FAMILIES
from jllm_convert.families.tensor_parts import inside
from jllm_convert.matching.rules import PIECE_BYTES, Match, Part, targets_by_name
from jllm_convert.sources.base import SourceTensor
from jllm_convert.sources.peft_adapter import AdapterSource


@dataclass(frozen=True)
class AdaptedMatch(Match):
    """An array of the model, and a change that is added to it when it is read.

    Attributes:
        change: the change, which may lack parts of the array (some experts).
    """

    change: Match

    @property
    def dtype(self) -> np.dtype:
        """float32: the sum is rounded once, to the type that it is stored in."""
        return np.dtype(np.float32)

    def pieces(self, box: Box, nbytes: int = PIECE_BYTES) -> Iterator[tuple[Box, np.ndarray]]:
        """``Match.pieces`` with the change added."""
        # Each piece is there twice more in float32, as the sum and as the change.
        for piece, values in super().pieces(box, nbytes // 4):
            total = np.array(values, np.float32)
            for place, change in self.change.pieces(piece, nbytes):
                total[inside(place, piece)] += change
            yield piece, total


def with_changes(
    matches: Sequence[Match],
    adapter: AdapterSource,
    config: ModelConfig,
    watched: Callable[[Match], Match] = lambda match: match,
) -> list[Match]:
    """The matches of a model with an adapter's changes, each of which is used once.

    An adapter names matrices as Hugging Face does, whatever the model's own source is: its changes are matched by the
    same rules as the tensors of a Hugging Face folder.

    Args:
        matches: of the model.
        adapter: the adapter.
        config: the architecture.
        watched: makes a match that notes what it reads.

    Raises:
        ConversionError: every change of a matrix that the model has not, or that has another shape.
    """
    infos: Mapping[str, ArrayInfo] = named_leaves(abstract_weights(config))
    targets = targets_by_name(FAMILIES[config.model_type], "hf", config, infos)
    problems: list[str] = []
    parts: dict[str, list[Part]] = {}
    for name, tensor in adapter.changes.items():
        known = [target for target in targets.get(name, ()) if target.slots]
        fitting = [target for target in known if target.expected == tensor.shape]
        if not fitting:
            problems.append(_problem(tensor, name, [target.expected for target in known], config))
            continue
        for target in fitting:
            parts.setdefault(target.array, []).extend(Part(tensor, slot) for slot in target.slots or ())
    if problems:
        raise ConversionError(problems)
    return [
        AdaptedMatch(match.array, match.info, match.parts, watched(Match(match.array, match.info, tuple(own))))
        if (own := parts.get(match.array))
        else match
        for match in matches
    ]


def _problem(tensor: SourceTensor, name: str, expected: Sequence[tuple[int, ...]], config: ModelConfig) -> str:
    where = f"{tensor.where.name}: {tensor.name}"
    if expected:
        needed = " or ".join(str(list(shape)) for shape in dict.fromkeys(expected))
        return f"{where} has shape {list(tensor.shape)}, {name} of the model {needed}; it was trained on another model"
    tied = " whose output head is the embedding" if name == "lm_head.weight" and config.tie_embeddings else ""
    model = f"a {config.model_type} model with {config.num_layers} layers{tied}"
    return f"{where} changes {name}, which is not part of {model}"
