"""Conversion plan: the architecture, the quantisation and a job for each array, made before anything is written."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jllm_core import checkpoint
from jllm_core.array_info import named_leaves
from jllm_core.config import ModelConfig
from jllm_core.quantization.arrays import Quantization, QuantizationError
from jllm_core.weight_specs import abstract_weights
from jllm_core.weights import Weights

from jllm_convert.__about__ import __version__
from jllm_convert.errors import ConversionError
from jllm_convert.matching.adapter_changes import with_changes
from jllm_convert.matching.rules import Match, match_tensors
from jllm_convert.quality.grid_choice import choose_grid, matrices_of
from jllm_convert.sources.base import Source
from jllm_convert.sources.peft_adapter import AdapterSource
from jllm_convert.sources.quantized.fp8 import FP8
from jllm_convert.writing.nonfinite_numbers import NonfiniteNumbers
from jllm_convert.writing.tensor_jobs import PlainTensorJob, QuantizedTensorJob, TensorJob


@dataclass(frozen=True)
class ConversionPlan:
    """Plan of a conversion.

    Attributes:
        config: the architecture.
        dtype: the element type of arrays that are not quantised.
        grid: the quantisation of the matrices, or None.
        infos: the tree of descriptions of the stored arrays.
        matches: each array of the model with the tensors that it comes from.
        jobs: a job for each array of the model.
        adapter: what is merged into the arrays; None is nothing.
    """

    config: ModelConfig
    dtype: np.dtype
    grid: Quantization | None
    infos: Weights
    matches: Sequence[Match]
    jobs: Sequence[TensorJob]
    adapter: AdapterSource | None = None

    def fingerprint(self, source: Source) -> str:
        """A hash that identifies the conversion: another one with the same hash can resume from its files."""
        # The version too: another one may quantise or lay out in another way. Not the initialisers of random weights,
        # which are functions, and in each process others.
        infos = {name: info for each in self.jobs for name, info in each.infos.items()}
        stored = [(name, info.shape, info.dtype.name, info.logical_axes) for name, info in infos.items()]
        parts = [__version__, checkpoint.FORMAT_VERSION, source.fingerprint(), stored, str(self.grid)]
        text = json.dumps(parts if self.adapter is None else [*parts, self.adapter.fingerprint()])
        return hashlib.sha256(text.encode()).hexdigest()


def plan_conversion(
    source: Source,
    dtype: str | None = None,
    quantize: str | None = None,
    group: int | None = None,
    offsets: bool = False,
    embedding: str | None = None,
    nonfinite: NonfiniteNumbers | None = None,
    adapter: AdapterSource | None = None,
) -> ConversionPlan:
    """Match a source's tensors and plan how each array is stored. The arguments are those of ``convert``.

    Args:
        nonfinite: notes numbers that are not finite, whenever one of the jobs reads them or makes them by a cast.
        adapter: what is merged into the arrays.

    Raises:
        ConversionError: everything that is wrong with the source or the arguments.
    """
    config = source.config()
    matches = match_tensors(source, config)
    if nonfinite is not None:
        matches = [nonfinite.watched(match) for match in matches]
    if adapter is not None:
        matches = with_changes(matches, adapter, config, *([] if nonfinite is None else [nonfinite.watched]))
    # After matching: "keep" depends on the types of the matched tensors alone, not on tensors that are ignored.
    target = np.dtype(_kept_dtype(matches) if dtype in (None, "keep") else dtype)
    grid = _grid(quantize, group, offsets, embedding, matches, config)
    infos = _described(config, target, grid, source)
    # Empty without a grid: then every array is copied as it is.
    matrices = matrices_of(infos)
    plain = named_leaves(infos)
    jobs: list[TensorJob] = [
        PlainTensorJob(match, plain[match.array].dtype, nonfinite or NonfiniteNumbers())
        if grid is None or match.array not in matrices
        else QuantizedTensorJob(match, matrices[match.array], matrices[match.array].quantization)
        for match in matches
    ]
    return ConversionPlan(config, target, grid, infos, matches, jobs, adapter)


def _kept_dtype(matches: list[Match]) -> np.dtype:
    """The element type for "keep": bfloat16 if most weights are bfloat16 or FP8, else float32, which holds the rest.

    Not float16, in which publishers store models that were never computed in it, but a checkpoint's own.
    """
    weight: dict[str, int] = dict.fromkeys(checkpoint.DTYPES, 0)  # elements by type
    for match in matches:
        tensor = match.parts[0].tensor
        # Publishers make FP8 weights from a model in bfloat16.
        name = "bfloat16" if tensor.stored == FP8 else tensor.dtype.name
        is_kept = name == "bfloat16" or tensor.stored == "float16"  # as checkpoints name it; others say F16
        weight[name if is_kept else "float32"] += match.info.size
    return np.dtype(max(checkpoint.DTYPES, key=lambda name: weight[name]))


def _grid(
    quantize: str | None,
    group: int | None,
    offsets: bool,
    embedding: str | None,
    matches: list[Match],
    config: ModelConfig,
) -> Quantization | None:
    if quantize is None:
        if group is not None or offsets:
            raise ConversionError("group and offsets say how to quantise; give quantize as well (int8 or int4)")
        if embedding not in (None, "keep"):
            raise ConversionError(
                f"the embedding is quantised only beside the matrices: embedding is {embedding!r} and quantize is not "
                "given; give quantize as well (int8 or int4)"
            )
        return None
    # Any grid will do here: which arrays are matrices does not depend on it.
    matrices = matrices_of(abstract_weights(config, quantization=Quantization(8)))
    return choose_grid(quantize, group, offsets, [match for match in matches if match.array in matrices], embedding)


def _described(config: ModelConfig, dtype: np.dtype, grid: Quantization | None, source: Source) -> Weights:
    try:
        return abstract_weights(config, dtype, grid)
    except QuantizationError as error:
        raise ConversionError(f"{source.path.name} cannot be quantised so: {error}") from error
