"""Products with quantised matrices as accelerators hold them: no copy of a matrix is made in a step.

Each group has an axis of its own. So the compilers fuse what turns small integers into numbers with the product, which
they do not where groups have to be split off an axis first.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jllm_core.ops.linear import matmul_precision
from jllm_core.quantization.arrays import QuantizedArray, without_gradient

INT8_MAX = 127


def product(equation: str, x: Float[Array, "..."], array: QuantizedArray) -> Float[Array, "..."]:
    """``QuantizedArray.matmul`` of a matrix in a device's form.

    Args:
        equation: as ``ops.linear.linear`` takes it.
        x: activations.
        array: the matrix, without a batch axis unless it is an embedding.
    """
    first = x.ndim - (array.axis + 1 if array.group is not None else len(array.shape) - len(_outputs(array)))
    rows = x[..., *[0] * (x.ndim - first)].size
    least = array.form.least_rows
    # One row alone is summed by the vector units, an order of magnitude more slowly than the matrix units would.
    filled = jnp.pad(x, [(0, least - 1), *[(0, 0)] * (x.ndim - 1)]) if rows == 1 < least and first else x
    if rows <= array.form.dot_products:
        sums = _by_dot_products(filled, array, first)
    elif array.group is None:
        sums = _by_channel(equation, filled, array)
    else:
        sums = _by_group(filled, array, first, rows * array.form.partial_sums)
    multiplied: Array = (sums if filled is x else sums[:1]).astype(x.dtype)
    return multiplied


def _outputs(array: QuantizedArray) -> tuple[int, ...]:
    """The sizes of the output axes; those of an embedding come first."""
    return array.shape[array.axis + 1 :] or array.shape[: array.axis]


def _by_channel(equation: str, x: Array, array: QuantizedArray) -> Array:
    """One scale an output: it comes after the sum, and the product reads nothing but int8."""
    scales = without_gradient(array.scales).reshape(_outputs(array))
    if not array.form.int8_activations:
        values = array.values.astype(x.dtype)
        precision = matmul_precision(x.dtype)
        sums: Array = jnp.einsum(equation, x, values, precision=precision, preferred_element_type=jnp.float32)
        by_channel: Array = sums * scales
        return by_channel
    # A scale for each row, from its largest number (as in LLM.int8(), Dettmers et al., arXiv:2208.07339, without its
    # outliers). Sums of products of int8 are exact in int32.
    inputs = tuple(range(x.ndim - (len(array.shape) - len(_outputs(array))), x.ndim))
    wide = x.astype(jnp.float32)
    steps = jnp.max(jnp.abs(wide), axis=inputs, keepdims=True) / INT8_MAX
    rounded = jnp.round(wide / jnp.where(steps > 0, steps, 1.0)).astype(jnp.int8)
    whole = jnp.einsum(equation, rounded, array.values, preferred_element_type=jnp.int32)
    by_row = steps.reshape(*x.shape[: inputs[0]], *[1] * len(scales.shape))
    scaled: Array = whole.astype(jnp.float32) * by_row * scales
    return scaled


def _by_group(x: Array, array: QuantizedArray, first: int, weighed_rows: int) -> Array:
    """A product for each group with scales after it, or where rows are many one product with all numbers scaled.

    Args:
        x: activations, ``[rows..., inputs...]``.
        array: the matrix.
        first: the first input axis of ``x``.
        weighed_rows: the number of rows, times how much more a sum costs than a number of the matrix.
    """
    axis, precision = array.axis, matmul_precision(x.dtype)
    group = array.shape[axis] // array.scales.shape[axis]
    # Behind a barrier: TPU compilers move the split into the product that makes x, and then transpose its matrix.
    rows = jax.lax.optimization_barrier(x.reshape(-1, *x.shape[first:]))
    split = rows.reshape(*rows.shape[:-1], -1, group)
    letters = "abcdefghij"
    outer = letters[: axis + 1]  # the inputs before the last, and groups
    outputs = letters[axis + 1 : axis + 1 + len(_outputs(array))]
    scales, offsets = _grid(array)
    by_group = weighed_rows and weighed_rows <= group

    def multiplied(numbers: Array, of: Array) -> Array:
        result = f"{outer}r{outputs}" if by_group else f"r{outputs}"
        equation = f"r{outer}z,{outer}z{outputs}->{result}"
        sums: Array = jnp.einsum(equation, of, numbers, precision=precision, preferred_element_type=jnp.float32)
        return sums

    total: Any = 0
    for values, of in _pieces(array, split):
        if by_group:
            numbers = values.astype(x.dtype)
        else:
            # In float32, which the compilers fuse with the product; in bfloat16, vector units have no arithmetic.
            wide = values.astype(jnp.float32) * scales
            numbers = (wide if offsets is None else wide + offsets).astype(x.dtype)
        total = total + multiplied(numbers, of)
    if by_group:
        # The scales have an axis of size 1 after the groups, where the sums have their rows.
        total = jnp.sum(total * scales, axis=tuple(range(axis + 1)))
        if offsets is not None:
            sums = jnp.sum(split.astype(jnp.float32), axis=-1)
            equation = f"r{outer},{outer}{outputs}->r{outputs}"
            total += jnp.einsum(equation, sums, offsets.squeeze(axis + 1), precision=jax.lax.Precision.HIGHEST)
    result: Array = total.reshape(*x.shape[:first], *_outputs(array))
    return result


def _grid(array: QuantizedArray) -> tuple[Array, Array | None]:
    """The scales of the groups, and the offsets of values from -8 on, each with an axis for the group."""

    def wide(part: Array) -> Array:
        return jnp.expand_dims(without_gradient(part).astype(jnp.float32), array.axis + 1)

    scales = wide(array.scales)
    # Those of a checkpoint are for values from 0 on.
    return scales, None if array.offsets is None else wide(array.offsets) + 8 * scales


def _pieces(array: QuantizedArray, x: Array) -> list[tuple[Array, Array]]:
    """The values, from -8 on, and the activations that each is for; nibbles in two halves, which nothing joins."""
    if not array.is_packed:
        return [(array.values, x)]
    low, high = array.values & 0xF, array.values >> 4
    half = x.shape[-1] // 2
    return [(low.astype(jnp.int8) - 8, x[..., :half]), (high.astype(jnp.int8) - 8, x[..., half:])]


def _by_dot_products(x: Array, array: QuantizedArray, first: int) -> Array:
    """Each row by itself, multiplied and summed in float32: a fusion that reads the matrix once for two rows."""
    outputs, axis = _outputs(array), array.axis
    if array.group is None:
        numbers, trailing = array.values.astype(jnp.float32), axis + 1 < len(array.shape)
        rows = x.astype(jnp.float32).reshape(-1, *x.shape[first:])
        inputs = tuple(range(x.ndim - first)) if trailing else (axis,)
        shaped = [row.reshape(*row.shape, *[1] * len(outputs)) if trailing else row for row in rows]
        sums = jnp.stack([jnp.sum(row * numbers, inputs) for row in shaped])
        by_channel: Array = sums * without_gradient(array.scales).reshape(outputs)
        return by_channel.reshape(*x.shape[:first], *outputs)
    scales, offsets = _grid(array)
    numbers = array.values.astype(jnp.float32) * scales
    if offsets is not None:
        numbers += offsets
    split = x.astype(jnp.float32).reshape(-1, *x.shape[first:-1], *array.values.shape[axis : axis + 2])
    sums = jnp.stack(
        [jnp.sum(row.reshape(*row.shape, *[1] * len(outputs)) * numbers, range(axis + 2)) for row in split]
    )
    return sums.reshape(*x.shape[:first], *outputs)
