"""Choice of the quantisation grid, and the matrices that are quantised."""

from collections.abc import Sequence
from typing import Any, Literal

from jllm_core.quantization.arrays import GROUPS, Quantization, QuantizedArray

from jllm_convert.errors import ConversionError
from jllm_convert.matching.rules import Match

KINDS = ("int8", "int4")
EMBEDDINGS = ("keep", "int8")
GGUF_GROUP = 32
"""The number of inputs that share a scale in GGUF's Q8_0, Q4_0 and Q4_1."""


def choose_grid(
    kind: str, group: int | None, offsets: bool, matrices: Sequence[Match], embedding: str | None = None
) -> Quantization:
    """Choose the grid for ``int8`` or ``int4``.

    ``int8`` has a scale for each channel and ``int4`` one for each group of 32 inputs, unless a group is given. A
    source whose matrices all have one of GGUF's grids with as many bits (Q8_0; Q4_0; Q4_1, with offsets) keeps it:
    nothing is rounded again.

    Args:
        kind: ``"int8"`` or ``"int4"``.
        group: the number of inputs that share a scale, 32, 64 or 128; None chooses.
        offsets: whether each group of int4 has an offset, which adds half a bit to a weight.
        matrices: the matrices to quantise, without the embedding.
        embedding: ``"int8"`` for 8 bits with a scale for each row; ``"keep"`` or None leaves it as it is.

    Raises:
        ConversionError: an unknown kind, group or embedding, or offsets for 8 bits.
    """
    if kind not in KINDS:
        raise ConversionError(f"quantize must be one of {', '.join(KINDS)}, got {kind!r}")
    if group is not None and group not in GROUPS:
        raise ConversionError(f"group must be one of {', '.join(map(str, GROUPS))}, got {group!r}")
    if embedding not in (None, *EMBEDDINGS):
        raise ConversionError(f"embedding must be one of {', '.join(EMBEDDINGS)}, got {embedding!r}")
    if kind == "int8" and offsets:
        raise ConversionError("offsets are for int4; int8 is fine enough without")
    # The source's own types tell whether its values are on a GGUF grid already.
    rows: Literal[8] | None = 8 if embedding == "int8" else None
    stored = {part.tensor.stored for match in matrices for part in match.parts}
    if kind == "int8":
        return Quantization(8, GGUF_GROUP if group is None and stored == {"Q8_0"} else group, embedding=rows)
    group = GGUF_GROUP if group is None else group
    return Quantization(4, group, offsets or (stored == {"Q4_1"} and group == GGUF_GROUP), rows)


def matrices_of(infos: Any) -> dict[str, QuantizedArray]:
    """The quantised arrays of a tree of descriptions, by their dotted names."""
    import jax  # here, so that the module itself stays light
    from jllm_core.array_info import path_name

    leaves = jax.tree_util.tree_leaves_with_path(infos, is_leaf=lambda leaf: isinstance(leaf, QuantizedArray))
    return {path_name(path): leaf for path, leaf in leaves if isinstance(leaf, QuantizedArray)}
