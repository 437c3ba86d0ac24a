"""Weights in 8-bit floating point with a scale for each block of them, as Qwen3's FP8 folders have them."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from jllm_core.checkpoint import Box

from jllm_convert.sources.stored_array import StoredArray

FP8 = "F8_E4M3"
"""The element type, by safetensors' name."""
SCALE_SUFFIX = "_scale_inv"
"""``NAME_scale_inv`` holds the scales of ``NAME``. It is a factor, whatever its name says: values = stored * scale."""
SCALE_DTYPES = ("F32", "BF16")
# What each of the 256 bytes stands for, 0x7F and 0xFF being NaN: a look-up takes a third of ml_dtypes' cast.
_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


@dataclass(frozen=True)
class ScaledMatrix:
    """A matrix of float8_e4m3fn ``[out, in]`` and a scale for each block of it.

    transformers (``integrations/finegrained_fp8.py``) has it in two ways. Its kernels and ``_dequantize_fp8_weight``
    cut a matrix into blocks of the config's size from its start on, the last ones being smaller where the size does
    not divide; so do we. ``Fp8Dequantize``, which loads such a folder where there is no GPU, derives the size of the
    blocks from the number of scales and refuses a matrix that does not divide. Where it does divide, as in every
    model that Qwen published, the two are the same: float32 values times float32 scales, rounded once to float32, and
    then to the model's own type. On a GPU the kernels also round the activations to 8 bits
    (``activation_scheme``: ``"dynamic"``), which is their way to be fast and not part of the weights: we do not.

    Attributes:
        stored: the values, a byte each (uint8), ``[out, in]``.
        scales: ``[ceil(out / block[0]), ceil(in / block[1])]``.
        block: rows and columns that share a scale.
    """

    stored: StoredArray
    scales: StoredArray
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out, in)``."""
        return self.stored.shape

    @property
    def dtype(self) -> np.dtype:
        """What ``read`` returns: float32."""
        return np.dtype(np.float32)

    def read(self, box: Box) -> np.ndarray:
        """The part that a box holds, in float32; the box need not start or end where a block does.

        Beside the result, its stored bytes and the floats of one row of blocks are held.

        Raises:
            ConversionError: the file cannot be read.
        """
        stored = self.stored.read(box)
        values = np.empty(stored.shape, np.float32)
        if not values.size:
            return values
        rows, columns = box
        touched = tuple(
            slice(part.start // size, -(-part.stop // size)) for part, size in zip(box, self.block, strict=True)
        )
        scales = self.scales.read(touched).astype(np.float32)
        # A scale for each column, once for each row of blocks.
        scales = scales[:, np.arange(columns.start, columns.stop) // self.block[1] - touched[1].start]
        # A scale that is damaged may make infinities, as a weight that is damaged may be one.
        with np.errstate(over="ignore", invalid="ignore"):
            for i, scale in enumerate(scales):
                start = (touched[0].start + i) * self.block[0] - rows.start
                part = slice(max(start, 0), start + self.block[0])
                np.multiply(_VALUES[stored[part]], scale, out=values[part])
        return values


def scales_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The shape that the scales of a matrix of this shape have."""
    return tuple(-(-size // length) for size, length in zip(shape, block, strict=True))
