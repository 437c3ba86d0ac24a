"""NaN and infinity in arrays: where the first is, and whether a cast has made it."""

import ml_dtypes
import numpy as np

# By element type: whole numbers of its width, signed and not, and the bits of infinity. NaN has the same exponent and
# more bits, so both are the largest whole numbers of their sign.
_INFINITIES = {
    "float32": (np.int32, np.uint32, 0x7F800000),
    "float16": (np.int16, np.uint16, 0x7C00),
    "bfloat16": (np.int16, np.uint16, 0x7F80),
}
# Numbers looked at in one step: few enough to stay in the processor's cache.
_BLOCK = 1 << 17


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


def first_made_infinite(values: np.ndarray, cast: np.ndarray) -> tuple[int, ...] | None:
    """The index of the first finite number of ``values`` that is not finite in ``cast``; None where there is none."""
    # Looked at only where the new type ends earlier. In the order in which they lie: they may be transposed.
    narrower = ml_dtypes.finfo(cast.dtype).max < ml_dtypes.finfo(values.dtype).max
    if not narrower or first_nonfinite(cast.ravel(order="K")) is None:
        return None
    bad = np.isfinite(values) & ~np.isfinite(cast)
    return _index(int(np.argmax(bad)), bad.shape) if bad.any() else None


def _index(place: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(place, shape))
