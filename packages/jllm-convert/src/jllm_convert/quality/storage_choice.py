"""Choice of the types to store a model in where nobody has said any: those of the file."""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from jllm_core.quantization.arrays import Quantization
from jllm_core.weight_specs import abstract_weights

from jllm_convert.matching.rules import match_tensors
from jllm_convert.quality.grid_choice import matrices_of
from jllm_convert.sources.base import Source

KEPT_GRIDS: dict[str, Literal["int8", "int4"]] = {"Q8_0": "int8", "Q4_0": "int4", "Q4_1": "int4"}
"""Types of GGUF tensors whose grid JLLM stores as it is, and the ``quantize`` of ``convert`` that does it."""
PLAIN = ("F32", "F16", "BF16")
"""Types of GGUF tensors that are not quantised."""


@dataclass(frozen=True)
class Storage:
    """Types for a source, as arguments of ``convert``.

    Attributes:
        dtype: None for what ``convert`` does by itself.
        quantize: the grid of the source's matrices; None where it has none that can be kept.
        embedding: ``"int8"`` where the source has its embedding in few bits too.
        words: what the source has, in a few words.
    """

    dtype: Literal["float32", "bfloat16"] | None
    quantize: Literal["int8", "int4"] | None
    embedding: Literal["int8"] | None
    words: str


def storage_of(source: Source) -> Storage:
    """The types in which ``jllm generate`` stores a source that it converts.

    A GGUF file keeps what it has: matrices that are all on one of the grids of ``KEPT_GRIDS`` stay on it, and are not
    rounded again; an embedding in few bits beside them is stored in 8 bits with a scale a row. Everything else becomes
    bfloat16, unless most of the file is float32. That is exact for most files in float16: publishers make them of
    bfloat16. Other sources keep their type as ``convert`` does by itself.

    Raises:
        ConversionError: the source is no model that can be converted.
    """
    config, elements = source.config(), Counter[str]()
    types: dict[str, set[str]] = {}  # by the array of the model
    for match in match_tensors(source, config):
        types[match.array] = {part.tensor.stored for part in match.parts}
        elements[match.parts[0].tensor.stored] += match.info.size
    most = elements.most_common(1)[0][0]
    if source.naming != "gguf":
        return Storage(None, None, None, f"weights in {most}")
    # Any grid will do: which arrays are matrices does not depend on it.
    matrices = matrices_of(abstract_weights(config, quantization=Quantization(8)))
    dtype: Literal["float32", "bfloat16"] = "float32" if most == "F32" else "bfloat16"
    # One grid is all that a model has: a file of several kinds would be rounded again to have one.
    stored = set[str]().union(*(types[name] for name in matrices))
    kept = next(iter(stored)) if len(stored) == 1 else most
    if stored != {kept} or kept not in KEPT_GRIDS:
        return Storage(dtype, None, None, f"weights in {kept}")
    in_few_bits = types["embedding"].isdisjoint(PLAIN)
    return Storage(dtype, KEPT_GRIDS[kept], "int8" if in_few_bits else None, f"weights in {kept}")
