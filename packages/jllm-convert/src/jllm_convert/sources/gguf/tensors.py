"""Tensor entries of a GGUF header: shape, type and position in the file."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from jllm_convert.sources.gguf.cursor import GGUFCursor

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

MIN_TENSOR = 8 + 1 + 4 + 8 + 4 + 8
"""The fewest bytes of a tensor's entry."""
_MAX_NAME_BYTES, _MAX_AXES = 64, 4  # by the specification


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor entry of a GGUF header.

    Attributes:
        name: its name.
        shape: slowest axis first, the reverse of how GGUF writes it.
        kind: the quantisation type.
        block: the number of values in a block, neighbours in a row.
        block_bytes: the bytes of a block.
        offset: its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: "GGMLQuantizationType"
    block: int
    block_bytes: int
    offset: int

    @cached_property
    def end(self) -> int:
        """The byte after its last one."""
        return self.offset + math.prod(self.shape) // self.block * self.block_bytes


def read_tensors(cursor: GGUFCursor, count: int, alignment: int, problems: list[str]) -> list[GGUFTensor]:
    """Read the tensor entries of the header. Problems of single ones are added to ``problems``."""
    from gguf import GGML_QUANT_SIZES

    listed: dict[str, tuple[list[int], int, int]] = {}
    for _ in range(count):
        at = cursor.at
        name = cursor.name("a tensor name", _MAX_NAME_BYTES, listed)
        what = f"the entry of tensor {name!r}"
        axes = cursor.number("I", what)
        if not 1 <= axes <= _MAX_AXES:
            cursor.fail(f"tensor {name!r} has {axes} axes, expected 1 to {_MAX_AXES}", at)
        shape = cursor.numbers("Q", axes, what)[::-1]  # GGUF has the fastest axis first
        if not all(shape):
            cursor.fail(f"tensor {name!r} has shape {shape}, expected every length to be at least 1", at)
        listed[name] = (shape, cursor.number("I", what), cursor.number("Q", what))
    # The data start at the next multiple of the alignment; offsets count from there.
    data = -(-cursor.at // alignment) * alignment
    known = {int(kind): (kind, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
    tensors = []
    for name, (shape, number, offset) in listed.items():
        if number not in known:
            problems.append(f"{cursor.path.name}: tensor {name!r} is of type number {number}, which is not known")
            continue
        kind, block, block_bytes = known[number]
        tensor = GGUFTensor(name, tuple(shape), kind, block, block_bytes, data + offset)
        tensors.append(tensor)
        if shape[-1] % block:
            problems.append(
                f"{cursor.path.name}: tensor {name!r} has rows of {shape[-1]:,}, "
                f"type {kind.name} needs a multiple of {block}"
            )
    return tensors


def position_problems(path: Path, size: int, tensors: list[GGUFTensor], alignment: int) -> list[str]:
    """Problems of the tensors' positions: alignment, overlaps, and the end of the file."""
    problems = []
    if beyond := [tensor for tensor in tensors if tensor.end > size]:
        furthest = max(beyond, key=lambda tensor: tensor.end)
        others = f" ({len(beyond) - 1:,} other tensors end behind it, too)" if len(beyond) > 1 else ""
        problems.append(
            f"{path.name}: tensor {furthest.name!r} ends at byte {furthest.end:,}, the file has {size:,}{others}; it "
            "is cut short, download it again"
        )
    last: GGUFTensor | None = None
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        where = f"{path.name}: tensor {tensor.name!r}"
        if tensor.offset % alignment:
            problems.append(f"{where} starts at byte {tensor.offset:,}, expected a multiple of {alignment}")
        if last is not None and tensor.offset < last.end:
            problems.append(f"{where} starts at byte {tensor.offset:,}, within {last.name!r} (to {last.end:,})")
        # The one that reaches furthest: a later tensor may overlap it and not its neighbour.
        if last is None or tensor.end > last.end:
            last = tensor
    return problems
