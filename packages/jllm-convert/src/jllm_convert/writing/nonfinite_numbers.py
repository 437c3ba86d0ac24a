"""NaN and infinity in a source's tensors, found as they are read."""

from dataclasses import replace
from threading import Lock

import numpy as np
from jllm_core.checkpoint import Box

from jllm_convert.matching.rules import Match, Part
from jllm_convert.sources.base import SourceTensor

# By element type: whole numbers of its width, signed and not, and the bits of infinity. NaN has the same exponent and
# more bits, so both are the largest whole numbers of their sign.
_INFINITIES = {
    "float32": (np.int32, np.uint32, 0x7F800000),
    "float16": (np.int16, np.uint16, 0x7C00),
    "bfloat16": (np.int16, np.uint16, 0x7F80),
}
# Numbers looked at in one step: few enough to stay in the processor's cache.
_BLOCK = 1 << 17
_MAX_NAMED = 20


class NonfiniteNumbers:
    """Tensors in which NaN or infinity was read. Several threads may read at a time."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._found: dict[str, str] = {}  # by the tensor's name, where its first one is
        self._arrays: set[str] = set()

    def __contains__(self, array: object) -> bool:
        """Whether some were read for this array of the model."""
        return array in self._arrays

    def watched(self, match: Match) -> Match:
        """The same match, of tensors whose numbers are looked at whenever they are read."""

        def watch(part: Part) -> Part:
            tensor = part.tensor

            def read(box: Box) -> np.ndarray:
                values = tensor.read_box(box)
                if (at := first_nonfinite(values)) is not None:
                    self._note(match.array, tensor, box, at)
                return values

            return replace(part, tensor=replace(tensor, read_box=read))

        return replace(match, parts=tuple(map(watch, match.parts)))

    def description(self) -> str | None:
        """A sentence that names the tensors; None where all numbers are finite."""
        if not self._found:
            return None
        named = [f"{name!r} {place}" for name, place in sorted(self._found.items())]
        more = f" and {len(named) - _MAX_NAMED:,} more" if len(named) > _MAX_NAMED else ""
        count = "1 tensor holds" if len(named) == 1 else f"{len(named):,} tensors hold"
        return f"{count} numbers that are NaN or infinite: {', '.join(named[:_MAX_NAMED])}{more}"

    def _note(self, array: str, tensor: SourceTensor, box: Box, at: tuple[int, ...]) -> None:
        index = [part.start + i for part, i in zip(box, at, strict=True)]
        with self._lock:
            self._arrays.add(array)
            self._found.setdefault(tensor.name, f"(at {index} in {tensor.where.name})")


def first_nonfinite(values: np.ndarray) -> tuple[int, ...] | None:
    """The index of the first number that is NaN or infinite; None where there is none."""
    if values.dtype.name not in _INFINITIES:
        bad = ~np.isfinite(values).reshape(-1)
        return _index(int(np.argmax(bad)), values.shape) if bad.any() else None
    # By their bits: ten times as fast as isfinite for bfloat16, and without memory.
    signed, unsigned, infinity = _INFINITIES[values.dtype.name]
    bits = values.reshape(-1).view(unsigned)
    negative = infinity | 1 << (8 * values.dtype.itemsize - 1)
    for start in range(0, bits.size, _BLOCK):
        block = bits[start : start + _BLOCK]
        if block.view(signed).max() >= infinity or block.max() >= negative:
            bad = (block.view(signed) >= infinity) | (block >= negative)
            return _index(start + int(np.argmax(bad)), values.shape)
    return None


def _index(place: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(place, shape))
