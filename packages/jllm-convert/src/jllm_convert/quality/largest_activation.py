"""Largest activation of a model on a text, and whether float16 holds it."""

from typing import Any

import numpy as np

FLOAT16_MAX = float(np.finfo(np.float16).max)
"""65504: what is larger becomes infinite in float16. bfloat16 goes as far as float32."""
NEAR = FLOAT16_MAX / 4
"""Other texts may have activations so many times larger than the one that was read."""


class LargestActivation:
    """The largest magnitude among arrays that are shown one after another, and the name of its array.

    Once a NaN was shown, that is the largest.

    Attributes:
        size: the magnitude.
        where: a name, in words.
    """

    def __init__(self) -> None:
        self.size, self.where = 0.0, ""

    def see(self, where: str, numbers: Any) -> None:
        """Look at an array."""
        array = np.asarray(numbers)
        # By both ends: magnitudes of all would be a copy.
        size = float(max(array.max(), -array.min())) if array.size else 0.0
        if size > self.size or (np.isnan(size) and not np.isnan(self.size)):
            self.size, self.where = size, where
