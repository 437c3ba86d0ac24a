"""FP8 weights (float8_e4m3fn) with a scale for each block, as in the FP8 folders of Qwen3."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from jllm_core.checkpoint import Box

from jllm_convert.sources.stored_array import StoredArray

FP8 = "F8_E4M3"
"""The element type, by safetensors' name."""
SCALE_SUFFIX = "_scale_inv"
"""``NAME_scale_inv`` holds the scales of ``NAME``. They are factors in spite of "inv": values = stored * scale."""
SCALE_DTYPES = ("F32", "BF16")
# The value of each of the 256 bytes (0x7F and 0xFF are NaN): a look-up takes a third of the time of ml_dtypes' cast.
_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


@dataclass(frozen=True)
class ScaledMatrix:
    """A matrix of float8_e4m3fn ``[out, in]`` and a scale for each block of it.

    transformers (``integrations/finegrained_fp8.py``) has two ways to read it. Its kernels and
    ``_dequantize_fp8_weight`` cut a matrix into blocks of the config's size from its start on; the last ones are
    smaller where the size does not divide. This class does the same. ``Fp8Dequantize``, which loads such a folder
    without a GPU, derives the size of the blocks from the number of scales and refuses a matrix that does not divide.
    Where it divides, as in every model that Qwen published, the two agree: float32 values times float32 scales,
    rounded once to float32, and then to the model's own type. On a GPU the kernels also round the activations to
    8 bits (``activation_scheme``: ``"dynamic"``). That is for speed and not part of the weights; it is not done here.

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
        """The element type that ``read`` returns: float32."""
        return np.dtype(np.float32)

    def read(self, box: Box) -> np.ndarray:
        """Read a box in float32. It need not start or end at the edge of a block.

        Besides the result, memory holds its stored bytes and the floats of one row of blocks.

        Raises:
            ConversionError: the file cannot be read.
        """
        stored = self.stored.read(box)
        values = np.empty(stored.shape, np.float32)
        if not values.size:
            return values
        rows, columns = box
        # The blocks that the box touches, from the first to the last one in part.
        touched = tuple(
            slice(part.start // size, -(-part.stop // size)) for part, size in zip(box, self.block, strict=True)
        )
        scales = self.scales.read(touched).astype(np.float32)
        # [row of blocks, column of the box]
        scales = scales[:, np.arange(columns.start, columns.stop) // self.block[1] - touched[1].start]
        # A damaged scale may make infinities, as a damaged weight may be one; neither is worth a warning of numpy.
        with np.errstate(over="ignore", invalid="ignore"):
            for i, scale in enumerate(scales):
                start = (touched[0].start + i) * self.block[0] - rows.start
                part = slice(max(start, 0), start + self.block[0])
                # Straight into the result: no second array of floats.
                np.multiply(_VALUES[stored[part]], scale, out=values[part])
        return values


def scales_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the scales of a matrix of this shape."""
    return tuple(-(-size // length) for size, length in zip(shape, block, strict=True))
