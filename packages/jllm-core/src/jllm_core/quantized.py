"""Weights of 8 or 4 bits: the array, how numbers become one, and the product that takes either kind of weight.

Only weights are quantised; activations and sums stay in their own type. A weight is ``value * scale`` (symmetric), or
``value * scale + offset`` where it comes from a file that has offsets (GGUF's Q4_1).
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jllm_core.array_info import ArrayInfo
from jllm_core.errors import JLLMError

Bits = Literal[4, 8]
GROUPS = (32, 64, 128)

_PART_TYPES = {4: np.uint8, 8: np.int8}
_SCALE_INITIALIZER = jax.nn.initializers.constant(3e-4)

# How far below the largest magnitude the grid of a group of 4 bits may end: cutting off an outlier can make all others
# finer. The best of these, by squared error, is taken for each group. With 8/7 it becomes 7, not 8, so that
# matrices of that grid stay as they are.
_CLIPS = np.append(np.linspace(0.5, 1.0, 9), 8 / 7).astype(np.float32)


class QuantizationError(JLLMError):
    """A quantisation that is not supported, or that does not fit a model's shapes."""


@dataclass(frozen=True)
class Quantization:
    """How the weight matrices of a model are stored.

    Attributes:
        bits: 8 or 4.
        group: how many neighbouring inputs of an output share a scale; None is all of them (a scale per channel).
        offsets: whether each group has an offset besides its scale.
    """

    bits: Bits
    group: int | None = None
    offsets: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise QuantizationError(f"weights are quantised to 8 or 4 bits, got {self.bits!r}")
        if self.group is not None and self.group not in GROUPS:
            raise QuantizationError(f"a group is one of {', '.join(map(str, GROUPS))} inputs, got {self.group!r}")
        if self.group is None and (self.bits == 4 or self.offsets):
            raise QuantizationError("4 bits, and offsets, need a group: one scale for a whole channel is too coarse")

    @property
    def name(self) -> str:
        """``int8``, ``int4-g32``: how commands and manifests call it."""
        group = "" if self.group is None else f"-g{self.group}"
        return f"int{self.bits}{group}{'-offsets' if self.offsets else ''}"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedArray:
    """A weight matrix whose leading axes, up to ``axis``, are its inputs, and the rest its outputs.

    Its parts are arrays, or in the trees of ``abstract_weights`` the descriptions of arrays.

    Attributes:
        values: int8 in the array's own shape; for 4 bits uint8, two values a byte: of a group of g, byte j holds value
            j in its low half and value ``j + g/2`` in its high half, so that unpacking moves nothing across a group.
            A half of 0 to 15 stands for -8 to 7, or for 0 to 15 where there are offsets.
        scales: one for each group, in the array's shape with ``axis`` divided by the group's size (float16); without
            groups, with all input axes of size 1 (float32).
        offsets: added after scaling, in the shape and type of ``scales``; None where the grid is symmetric.
        axis: the axis along which groups run, the last of the inputs.
        bits: 8 or 4.
        batch: how many axes before the inputs are neither (1 for experts ``[E, D, F]``).
    """

    values: Any
    scales: Any
    offsets: Any = None
    axis: int = field(default=0, metadata={"static": True})
    bits: Bits = field(default=8, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix that this stands for."""
        shape = list(self.values.shape)
        shape[self.axis] *= 8 // self.bits
        return tuple(shape)

    @property
    def group(self) -> int | None:
        """Inputs that share a scale; None where all of them do."""
        size, groups = self.shape[self.axis], int(self.scales.shape[self.axis])
        return None if groups == 1 and self.bits == 8 and self.scales.dtype == np.float32 else size // groups


def abstract_quantized(info: ArrayInfo, quantization: Quantization, inputs: int = 1, batch: int = 0) -> QuantizedArray:
    """The descriptions of the parts that an array has when it is quantised.

    Args:
        info: the array, ``batch`` axes, then ``inputs`` axes, then the outputs.
        quantization: how it is to be stored.
        inputs: how many axes are inputs.
        batch: how many axes before them are neither inputs nor outputs.

    Raises:
        QuantizationError: the group does not divide the last input axis.
    """
    axis = batch + inputs - 1
    values, scales = list(info.shape), list(info.shape)
    if quantization.group is None:
        scales[batch : axis + 1] = [1] * inputs
    else:
        scales[axis] = group_count(info.shape, axis, quantization.group)
        values[axis] //= 8 // quantization.bits
    value_type, scale_type = _PART_TYPES[quantization.bits], np.float32 if quantization.group is None else np.float16
    scale = ArrayInfo(tuple(scales), scale_type, info.logical_axes, _SCALE_INITIALIZER)
    return QuantizedArray(
        ArrayInfo(tuple(values), value_type, info.logical_axes, _random_bits),
        scale,
        scale if quantization.offsets else None,
        axis=axis,
        bits=quantization.bits,
    )


def _random_bits(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    bits = jax.random.bits(key, shape, jnp.uint8)
    # -128 is on no grid of 8 bits.
    return bits if dtype == jnp.uint8 else jnp.maximum(jax.lax.bitcast_convert_type(bits, jnp.int8), -127)


def dequantize(array: QuantizedArray, dtype: Any = jnp.float32) -> Array:
    """The numbers that a quantised array stands for, in this type."""
    axis, groups = array.axis, array.scales.shape[array.axis]
    values = _split(array.values, axis, groups)
    if array.bits == 4:
        low, high = values & 0xF, values >> 4
        values = jnp.concatenate([low, high], axis=axis + 1).astype(jnp.int8)
        values = values if array.offsets is not None else values - 8
    numbers = values.astype(jnp.float32) * jnp.expand_dims(array.scales.astype(jnp.float32), axis + 1)
    if array.offsets is not None:
        numbers = numbers + jnp.expand_dims(array.offsets.astype(jnp.float32), axis + 1)
    dequantized: Array = numbers.reshape(array.shape).astype(dtype)
    return dequantized


def matmul(equation: str, x: Float[Array, "..."], w: Array | QuantizedArray) -> Array:
    """``einsum(equation, x, w)`` in the type of ``x``, summed in float32; ``w`` is a plain or a quantised matrix.

    In float32 the product is asked for at the highest precision: the defaults of TPU (bfloat16 passes) and of recent
    GPUs (TF32) would be off by more than the 1e-4 that float32 users are promised.

    Args:
        equation: such as ``"BTD,DF->BTF"``; the outputs of ``w`` are the last axes of the result.
        x: activations.
        w: weights.
    """
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    if isinstance(w, QuantizedArray):
        if w.group is None:
            # One scale an output: it comes after the sum, and the product reads nothing but int8.
            sums = jnp.einsum(
                equation, x, w.values.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32
            )
            scaled: Array = (sums * w.scales.reshape(w.shape[w.axis + 1 :])).astype(x.dtype)
            return scaled
        w = dequantize(w, x.dtype)
    product: Array = jnp.einsum(equation, x, w, precision=precision)
    return product


def quantize(matrix: np.ndarray, quantization: Quantization, inputs: int = 1, batch: int = 0) -> QuantizedArray:
    """The nearest matrix on the grid, in numpy.

    8 bits: the largest magnitude of a channel (or group) becomes 127. 4 bits: the largest magnitude becomes -8, or the
    grid ends a little below it where that has the smaller squared error.

    Args:
        matrix: float, ``batch`` axes, then ``inputs`` axes, then the outputs.
        quantization: bits and group; with offsets, nothing is searched: they are for grids that exist already.
        inputs: how many axes are inputs.
        batch: how many axes before them are neither inputs nor outputs.

    Raises:
        QuantizationError: numbers that are not finite, a group that does not divide the inputs, or offsets.
    """
    if quantization.offsets:
        raise QuantizationError("quantize() makes symmetric grids; offsets come from files that have them")
    if not np.isfinite(matrix).all():
        raise QuantizationError("the matrix holds numbers that are not finite")
    axis = batch + inputs - 1
    numbers = matrix.astype(np.float32)
    if quantization.group is None:
        axes = tuple(range(batch, batch + inputs))
        scales = np.max(np.abs(numbers), axis=axes, keepdims=True) / np.float32(127)
        return QuantizedArray(_rounded(numbers, scales, -127, 127), scales, axis=axis, bits=8)
    split = _split(numbers, axis, group_count(matrix.shape, axis, quantization.group))
    if quantization.bits == 8:
        scales = _float16(np.max(np.abs(split), axis=axis + 1) / np.float32(127))
        lowest, highest = -127, 127
    else:
        scales = _best_scales(split, axis + 1)
        lowest, highest = -8, 7
    if not np.isfinite(scales).all():
        raise QuantizationError(f"numbers as large as {np.abs(numbers).max():.3g} need scales beyond float16")
    values = _rounded(split, np.expand_dims(scales.astype(np.float32), axis + 1), lowest, highest)
    if quantization.bits == 8:
        return QuantizedArray(values.reshape(matrix.shape), scales, axis=axis, bits=8)
    return QuantizedArray(pack((values + 8).astype(np.uint8), axis), scales, axis=axis, bits=4)


def group_count(shape: tuple[int, ...], axis: int, group: int) -> int:
    """How many groups an axis is cut into.

    Raises:
        QuantizationError: the group does not divide the axis.
    """
    if shape[axis] % group:
        raise QuantizationError(
            f"groups of {group} do not divide axis {axis} of {list(shape)}; choose a smaller group or 8 bits"
        )
    return shape[axis] // group


def pack(halves: np.ndarray, axis: int) -> np.ndarray:
    """Values 0 to 15 in groups, ``[..., groups, g, ...]`` at ``axis``, as bytes ``[..., groups * g/2, ...]``."""
    low, high = np.split(halves, 2, axis=axis + 1)
    packed: np.ndarray = low | (high << 4)
    return packed.reshape(*packed.shape[:axis], -1, *packed.shape[axis + 2 :])


def _split(array: Any, axis: int, groups: int) -> Any:
    shape = array.shape
    return array.reshape(*shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :])


def _rounded(numbers: np.ndarray, scales: np.ndarray, lowest: int, highest: int) -> np.ndarray:
    """``numbers / scales`` to the nearest int8; a group of zeros has scale 0 and stays zeros."""
    steps = np.divide(numbers, scales, out=np.zeros_like(numbers), where=scales != 0)
    rounded: np.ndarray = np.clip(np.rint(steps), lowest, highest).astype(np.int8)
    return rounded


def _float16(scales: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # an infinite scale is refused by name
        return scales.astype(np.float16)


def _best_scales(split: np.ndarray, axis: int) -> np.ndarray:
    """For each group of 4-bit values the float16 scale of smallest squared error, of those that ``_CLIPS`` tries."""
    largest = np.take_along_axis(split, np.argmax(np.abs(split), axis=axis, keepdims=True), axis)
    best = np.full(largest.shape, np.inf, np.float16)  # and stays so where every scale that is tried overflows
    smallest = np.full(largest.shape, np.inf, np.float32)
    for clip in _CLIPS:
        tried = _float16(clip * largest / np.float32(-8))
        wide = tried.astype(np.float32)
        with np.errstate(invalid="ignore"):
            error = np.sum(np.square(_rounded(split, wide, -8, 7) * wide - split), axis=axis, keepdims=True)
        best, smallest = np.where(error < smallest, tried, best), np.minimum(error, smallest)
    scales: np.ndarray = np.squeeze(best, axis)
    return scales
