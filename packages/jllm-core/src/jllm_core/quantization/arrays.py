"""Quantised weight matrices: 8 or 4 bits a weight, with scales.

Only weights are quantised; activations and sums stay in their own type. A weight is ``value * scale`` (symmetric) or
``value * scale + offset`` (as in GGUF's Q4_1). How numbers become such an array is in grids.py.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from jllm_core.array_info import ArrayInfo
from jllm_core.errors import JLLMError
from jllm_core.ops.linear import linear, matmul_precision

Bits = Literal[4, 8]
GROUPS = (32, 64, 128)

_PART_TYPES = {4: np.uint8, 8: np.int8}
_SCALE_INITIALIZER = jax.nn.initializers.constant(3e-4)


class QuantizationError(JLLMError):
    """A quantisation that is not supported, or that does not fit a model's shapes."""


@dataclass(frozen=True)
class Quantization:
    """How the weight matrices of a model are stored.

    Attributes:
        bits: 8 or 4.
        group: how many neighbouring inputs of an output share a scale; None is all of them (a scale per channel).
        offsets: whether each group of 4-bit values has an offset besides its scale: the grid then spans from the
            smallest to the largest number of the group, and takes half a bit more a weight.
        embedding: 8 stores the embedding, which is the output head too where it is tied, in 8 bits with a scale a row,
            whatever ``bits`` and ``group`` are. None leaves it as it is.
    """

    bits: Bits
    group: int | None = None
    offsets: bool = False
    embedding: Literal[8] | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise QuantizationError(f"weights are quantised to 8 or 4 bits, got {self.bits!r}")
        if self.group is not None and self.group not in GROUPS:
            raise QuantizationError(f"a group is one of {', '.join(map(str, GROUPS))} inputs, got {self.group!r}")
        if self.bits == 4 and self.group is None:
            raise QuantizationError("4 bits need a group: one scale for a whole channel is too coarse")
        if self.bits == 8 and self.offsets:
            raise QuantizationError("offsets are for 4 bits; 8 bits are fine enough without")
        if self.embedding not in (None, 8):
            raise QuantizationError(f"the embedding is quantised to 8 bits or stays as it is, got {self.embedding!r}")

    @property
    def name(self) -> str:
        """``int8``, ``int4-g32``, ``int4-g32-embedding8``: how commands and reports call it."""
        group = "" if self.group is None else f"-g{self.group}"
        embedding = "" if self.embedding is None else f"-embedding{self.embedding}"
        return f"int{self.bits}{group}{'-offsets' if self.offsets else ''}{embedding}"


@dataclass(frozen=True)
class DeviceForm:
    """How quantised matrices lie on devices of one kind, and are multiplied there; as in a checkpoint by default.

    ``quantization.device_form`` knows the form for each kind of device.

    Attributes:
        grouped: groups have an axis of their own: values are ``[..., groups, group, ...]`` at the last input axis.
        int4: 4-bit values are the device's own int4, two in a byte. Otherwise they are nibbles, or take a byte each.
        partial_sums: up to ``group / partial_sums`` rows are multiplied group by group, and the sums scaled; for more
            rows, of which the sums would take more room than the matrix, its numbers are. 0 is none.
        least_rows: a single row is filled up to so many, for it alone would not go through the matrix units.
        dot_products: up to so many rows are multiplied without the product of matrices, which would copy the matrix.
        int8_activations: rows that are multiplied with int8 of a scale a channel are rounded to int8, a scale each.
    """

    grouped: bool = False
    int4: bool = False
    partial_sums: int = 0
    least_rows: int = 1
    dot_products: int = 0
    int8_activations: bool = False


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class QuantizedArray:
    """A weight matrix whose leading axes, up to ``axis``, are its inputs, and the rest its outputs.

    An embedding ``[V, D]`` has its outputs, as a head, before its inputs: they are its ``batch`` axis.

    Its parts are arrays, or in the trees of ``abstract_weights`` the descriptions of arrays.

    What is multiplied with it has gradients, it has none itself: a QuantizationError says so, where JAX has not refused
    the int8 numbers before.

    Attributes:
        values: int8 in the array's own shape; for 4 bits uint8, two values a byte: of a group of g, byte j holds value
            j in its low half and value ``j + g/2`` in its high half, so that unpacking moves nothing across a group.
            A half of 0 to 15 stands for -8 to 7, or for 0 to 15 where there are offsets. Devices may hold them in
            another form: int4 or int8 of -8 to 7, or the same bytes, with an axis more, for groups have their own.
        scales: one for each group, in the array's shape with ``axis`` divided by the group's size (float16); without
            groups, with all input axes of size 1 (float32).
        offsets: added after scaling, in the shape and type of ``scales``; None where the grid is symmetric.
        axis: the axis along which groups run, the last of the inputs.
        bits: 8 or 4.
        batch: how many axes before the inputs are neither (1 for experts ``[E, D, F]``).
        form: how the parts lie on a device.
    """

    values: Any
    scales: Any
    offsets: Any = None
    axis: int = field(default=0, metadata={"static": True})
    bits: Bits = field(default=8, metadata={"static": True})
    form: DeviceForm = field(default=DeviceForm(), metadata={"static": True})

    @property
    def is_grouped(self) -> bool:
        """Whether groups have an axis of their own."""
        return len(self.values.shape) > len(self.scales.shape)

    @property
    def is_packed(self) -> bool:
        """Whether two values share a byte, as nibbles."""
        return bool(self.values.dtype == np.uint8)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix that this stands for."""
        shape = list(self.values.shape)
        if self.is_grouped:
            shape[self.axis : self.axis + 2] = [shape[self.axis] * shape[self.axis + 1]]
        shape[self.axis] *= 2 if self.is_packed else 1
        return tuple(shape)

    @property
    def group(self) -> int | None:
        """Inputs that share a scale; None where all of them do."""
        size, groups = self.shape[self.axis], int(self.scales.shape[self.axis])
        return None if groups == 1 and self.bits == 8 and self.scales.dtype == np.float32 else size // groups

    @property
    def quantization(self) -> Quantization:
        """The grid of this one array: that of the embedding differs from the other matrices'."""
        return Quantization(self.bits, self.group, self.offsets is not None)

    def __repr__(self) -> str:
        # Its parts may be anything that a tree can hold, such as shardings.
        if not (hasattr(self.values, "shape") and hasattr(self.scales, "dtype")):
            return f"QuantizedArray(values={self.values!r}, scales={self.scales!r}, offsets={self.offsets!r})"
        return f"QuantizedArray({self.quantization.name}{list(self.shape)})"

    def matmul(self, equation: str, x: Float[Array, "..."]) -> Array:
        """``einsum(equation, x, self)`` in the type of ``x``, summed in float32 (``ops.linear.Matrix``)."""
        if self.form != DeviceForm():
            from jllm_core.quantization import device_products  # of accelerators; a CPU has no use for it

            return device_products.product(equation, x, self)
        if self.group is not None:
            product: Array = linear(equation, x, dequantize(self, x.dtype))
            return product
        # One scale an output: it comes after the sum, and the product reads nothing but int8.
        sums = jnp.einsum(
            equation,
            x,
            self.values.astype(x.dtype),
            precision=matmul_precision(x.dtype),
            preferred_element_type=jnp.float32,
        )
        outputs = self.shape[self.axis + 1 :] or self.shape[: self.axis]  # those of an embedding come first
        scaled: Array = (sums * without_gradient(self.scales).reshape(outputs)).astype(x.dtype)
        return scaled

    def rows(self, numbers: Int[Array, "..."], dtype: Any) -> Float[Array, "... D"]:
        """Rows of an embedding ``[V, D]``, in this type; no other row is dequantised."""
        scales = without_gradient(self.scales)[numbers]
        taken: Array = (self.values[numbers].astype(jnp.float32) * scales).astype(dtype)
        return taken


def quantization_of(matrix: Any, embedding: Any) -> Quantization | None:
    """How a model's weights are stored, by one of its matrices and its embedding; None where they are not quantised."""
    matrix = getattr(matrix, "base", matrix)  # of an adapted one
    if not isinstance(matrix, QuantizedArray):
        return None
    return replace(matrix.quantization, embedding=8 if isinstance(embedding, QuantizedArray) else None)


def abstract_quantized(info: ArrayInfo, quantization: Quantization, inputs: int = 1, batch: int = 0) -> QuantizedArray:
    """The descriptions of the parts that an array has when it is quantised.

    The metadata of the values' description says how the axes are meant: ``inputs`` and ``batch``, as here.

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
        ArrayInfo(tuple(values), value_type, info.logical_axes, _random_bits, {"inputs": inputs, "batch": batch}),
        scale,
        scale if quantization.offsets else None,
        axis=axis,
        bits=quantization.bits,
    )


def _random_bits(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    bits = jax.random.bits(key, shape, jnp.uint8)
    if dtype == jnp.int4:
        return ((bits >> 4).astype(jnp.int8) - 8).astype(jnp.int4)
    # -128 is on no grid of 8 bits.
    return bits if dtype == jnp.uint8 else jnp.maximum(jax.lax.bitcast_convert_type(bits, jnp.int8), -127)


def dequantize(array: QuantizedArray, dtype: Any = jnp.float32) -> Array:
    """The numbers that a quantised array stands for, in this type."""
    axis, groups = array.axis, array.scales.shape[array.axis]
    values = array.values if array.is_grouped else split_groups(array.values, axis, groups)
    if array.is_packed:
        low, high = values & 0xF, values >> 4
        values = jnp.concatenate([low, high], axis=axis + 1).astype(jnp.int8)
        values = values if array.offsets is not None else values - 8
    elif array.offsets is not None:
        values = values.astype(jnp.int8) + 8
    scales = without_gradient(array.scales).astype(jnp.float32)
    numbers = values.astype(jnp.float32) * jnp.expand_dims(scales, axis + 1)
    if array.offsets is not None:
        offsets = without_gradient(array.offsets).astype(jnp.float32)
        numbers = numbers + jnp.expand_dims(offsets, axis + 1)
    dequantized: Array = numbers.reshape(array.shape).astype(dtype)
    return dequantized


@jax.custom_jvp
def without_gradient(scales: Any) -> Any:
    """The same array. It is an error to differentiate with respect to it, and costs nothing where nobody does."""
    return scales


def _refuse_gradient(primals: tuple[Array], tangents: tuple[Any]) -> tuple[Array, Any]:
    if not isinstance(tangents[0], SymbolicZero):
        raise QuantizationError(
            "quantised weights have no gradient: no small step leads from one whole number to the next, and to train "
            "their scales alone would train something else. Load the checkpoint that they were made from, in float32 "
            "or bfloat16, to train the weights; or keep these as constants and train weights of your own beside them "
            "(an adapter), whose gradients go through them"
        )
    return primals[0], tangents[0]


# With symbolic zeros: what is differentiated with respect to other arrays alone has none but those here.
without_gradient.defjvp(_refuse_gradient, symbolic_zeros=True)


def entry(array: Any, number: Any) -> Any:
    """One entry of the first axis of an array, or of a quantised one whose first axis is not an input."""
    if isinstance(array, QuantizedArray):
        offsets = None if array.offsets is None else array.offsets[number]
        parts = array.values[number], array.scales[number], offsets
        return QuantizedArray(*parts, axis=array.axis - 1, bits=array.bits, form=array.form)
    return array[number]


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


def split_groups(array: Any, axis: int, groups: int) -> Any:
    """The array with this axis as two: groups, and what is in each."""
    shape = array.shape
    return array.reshape(*shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :])
