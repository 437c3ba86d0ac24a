"""NaN and infinity in a source's tensors, found as they are read, and finite numbers that a cast makes infinite."""

from collections.abc import Mapping
from dataclasses import replace
from threading import Lock

import numpy as np
from jllm_core.checkpoint import Box, first_made_infinite, first_nonfinite

from jllm_convert.matching.rules import Match, Part
from jllm_convert.sources.base import SourceTensor

_MAX_NAMED = 20


class NonfiniteNumbers:
    """Tensors in which NaN or infinity was read, or made by a cast. Several threads may read at a time."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._found: dict[str, str] = {}  # by the tensor's name, where its first one is
        self._too_large: dict[str, dict[str, str]] = {}  # by the element type, the same of numbers that it cannot hold
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

    def cast(self, match: Match, box: Box, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Cast a box of a match, and note the finite numbers that become infinite."""
        with np.errstate(over="ignore"):  # said in our own words
            cast = values.astype(dtype, copy=False)
        if (at := first_made_infinite(values, cast)) is not None:
            self._note_too_large(match, box, values, at, dtype)
        return cast

    def description(self) -> str | None:
        """A sentence that names the tensors; None where all numbers are finite."""
        kinds = [("that are NaN or infinite", self._found)]
        kinds += [(f"that {dtype} cannot hold", found) for dtype, found in sorted(self._too_large.items())]
        return "; ".join(_named(kind, found) for kind, found in kinds if found) or None

    @property
    def advice(self) -> str:
        """What to do about them, as the end of a sentence."""
        damaged = "The files are damaged, or the model's training has failed: download them again"
        wider = "Store them in a wider type (--dtype float32)"
        remedies = [*([damaged] if self._found else []), *([wider] if self._too_large else [])]
        return f"{'. '.join(remedies)}, or take the numbers as they are with --allow-nonfinite (allow_nonfinite)"

    def _note(self, array: str, tensor: SourceTensor, box: Box, at: tuple[int, ...]) -> None:
        index = [part.start + i for part, i in zip(box, at, strict=True)]
        with self._lock:
            self._arrays.add(array)
            self._found.setdefault(tensor.name, f"(at {index} in {tensor.where.name})")

    def _note_too_large(self, match: Match, box: Box, values: np.ndarray, at: tuple[int, ...], dtype: np.dtype) -> None:
        index = [part.start + i for part, i in zip(box, at, strict=True)]
        tensor = match.tensor_at(tuple(index))
        with self._lock:
            self._arrays.add(match.array)
            place = f"({values[at]:.4g} in {tensor.where.name}, {match.array} at {index})"
            self._too_large.setdefault(dtype.name, {}).setdefault(tensor.name, place)


def _named(kind: str, found: Mapping[str, str]) -> str:
    named = [f"{name!r} {place}" for name, place in sorted(found.items())]
    more = f" and {len(named) - _MAX_NAMED:,} more" if len(named) > _MAX_NAMED else ""
    count = "1 tensor holds" if len(named) == 1 else f"{len(named):,} tensors hold"
    return f"{count} numbers {kind}: {', '.join(named[:_MAX_NAMED])}{more}"
