"""Numbers of a GGUF file's metadata, checked as they are read."""

import math
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jllm_convert.errors import ConversionError


class Numbers:
    """The metadata below the architecture's name.

    Args:
        known: the values by key.
        where: the text before a key in error messages.
    """

    def __init__(self, known: Mapping[str, Any], where: str) -> None:
        self.known, self.where = known, where

    def fail(self, key: str, expected: str) -> ConversionError:
        return ConversionError(f"{self.where}{key} must be {expected}, got {reprlib.repr(self.known.get(key))}")

    def size(self, key: str, default: int) -> int:
        value = self.known.get(key, default)
        if type(value) is not int:
            raise self.fail(key, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Read a float32 as the shortest decimal: GGUF stores 1e-05 as 9.999999747378752e-06."""
        value = self.known.get(key, default)
        if type(value) not in (int, float):
            raise self.fail(key, "a number")
        with np.errstate(over="ignore"):
            shortest = float(str(np.float32(value)))
        if not math.isfinite(shortest):
            raise self.fail(key, "a finite number")
        return shortest
