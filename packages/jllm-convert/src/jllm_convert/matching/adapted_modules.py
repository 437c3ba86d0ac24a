"""Modules of a Hugging Face model that an adapter may change, and the arrays of ours that each of them holds."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jllm_core.adapters import abstract_adapter
from jllm_core.array_info import ArrayInfo, named_leaves
from jllm_core.checkpoint import Box, box_shape, whole
from jllm_core.config import ModelConfig
from jllm_core.weight_specs import abstract_weights

from jllm_convert.families import exported_family
from jllm_convert.matching.rules import targets_by_name


@dataclass(frozen=True)
class Rows:
    """Rows of a matrix ``[out, in]`` that are some of an array's outputs.

    Attributes:
        rows: the rows.
        place: the box of the array's output axes that they are, in order.
    """

    rows: slice
    place: Box


@dataclass(frozen=True)
class HeldArray:
    """An array ``[*inputs, *outputs]`` of the model in a module's matrix.

    Attributes:
        inputs: sizes of its input axes; flattened they are the matrix's columns.
        outputs: sizes of its output axes.
        parts: where each of its outputs is.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    parts: tuple[Rows, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return (*self.inputs, *self.outputs)

    def spread(self, b: np.ndarray, out: int) -> np.ndarray:
        """A factor ``[r, *outputs]`` in its rows of one ``[out, r]`` that is zero elsewhere."""
        matrix = np.zeros((out, len(b)), b.dtype)
        for part in self.parts:
            matrix[part.rows] = b[(slice(None), *part.place)].reshape(len(b), -1).T
        return matrix

    def take(self, matrix: np.ndarray) -> np.ndarray:
        """The factor ``[r, *outputs]`` in the rows of one ``[out, r]``."""
        rank = matrix.shape[1]
        b = np.empty((rank, *self.outputs), matrix.dtype)
        for part in self.parts:
            b[(slice(None), *part.place)] = matrix[part.rows].T.reshape(rank, *box_shape(part.place))
        return b


@dataclass(frozen=True)
class Module:
    """An ``nn.Linear`` of the Hugging Face model: one array of ours, or several that share its matrix.

    Attributes:
        shape: of the matrix, ``[out, in]``.
        arrays: what it holds, by the name in the Weights tree.
    """

    shape: tuple[int, ...]
    arrays: Mapping[str, HeldArray]


def adapted_modules(config: ModelConfig) -> dict[str, Module]:
    """The modules all of whose arrays may have an adapter (``jllm_core.init_adapter``), by their path."""
    # Of any rank: what is asked is which arrays there are, and which of their axes are inputs.
    factors = abstract_adapter(config, 1, 1.0, targets=None).factors
    infos: Mapping[str, ArrayInfo] = named_leaves(abstract_weights(config))
    family = exported_family(config)
    # Experts have no adapter, and may be tens of thousands of modules.
    family = replace(family, rules=tuple(rule for rule in family.rules if "{e}" not in (rule.hf or "")))
    modules: dict[str, Module] = {}
    for name, targets in targets_by_name(family, "hf", config, infos).items():
        if any(target.slots is None or target.array not in factors for target in targets):
            continue
        arrays: dict[str, HeldArray] = {}
        for target in targets:
            inputs = factors[target.array].a.shape[:-1]
            parts = []
            for slot in target.slots or ():
                shape = box_shape(slot.place)
                rows, _ = slot.layout.source_box(whole(shape), shape)
                parts.append(Rows(rows, slot.place[len(inputs) :]))
            arrays[target.array] = HeldArray(inputs, factors[target.array].b.shape[1:], tuple(parts))
        modules[name.removesuffix(".weight")] = Module(targets[0].expected, arrays)
    return modules
