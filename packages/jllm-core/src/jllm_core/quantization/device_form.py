"""Forms of quantised matrices on devices: how they lie in memory there, and which product reads them fastest.

A checkpoint has two values of 4 bits in a byte, and so have the kernels for CPUs. Compilers for accelerators make a
copy of such a matrix, in a wider type, in every step. What they read as it lies is an array in which each group has an
axis of its own, of the device's own int4 where it keeps two of them in a byte. Which form suits which device is said
here alone, by what the compilers for TPUs and CUDA make of them (docs/quantization.md has the numbers).
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jllm_core.array_info import ArrayInfo, path_name
from jllm_core.quantization.arrays import DeviceForm, Quantization, QuantizationError, QuantizedArray, split_groups
from jllm_core.quantization.grids import pack
from jllm_core.sharding import Placement

Activations = Literal["int8"]

TPU_INT4 = DeviceForm(grouped=True, int4=True, least_rows=8)
TPU_BYTES = DeviceForm(grouped=True, least_rows=8)
GPU = DeviceForm(grouped=True, int4=True, partial_sums=2)
GPU_WITHOUT_TRITON = DeviceForm(grouped=True, int4=True, dot_products=8)

OLD_TPUS = ("TPU v2", "TPU v3")
"""They keep an int4 in a byte."""
OLD_GPUS = ("Tesla T4", "Tesla P100", "Tesla V100")
"""XLA's compiler has no kernels of its own for products there, and the library's take no small integers."""
INT8_UNITS = ("TPU v5 lite", "TPU v5", "TPU v6 lite")
"""Devices whose matrix units multiply int8 with int8, at twice the rate of bfloat16."""
NIBBLE_ROWS = 32
"""Rows of bytes in a tile of a TPU: half a group in nibbles fills whole ones."""


def device_form(kind: str | None, activations: Activations | None = None) -> DeviceForm:
    """The form for devices of a kind.

    Args:
        kind: what JAX calls the devices (``TPU v5 lite``); None where nothing is known of them.
        activations: ``"int8"`` to round the activations that int8 matrices are multiplied with to 8 bits too.

    Raises:
        QuantizationError: the device does not multiply int8 with int8.
    """
    form = _form_of(kind or "cpu")
    if activations is None:
        return form
    if activations != "int8":
        raise QuantizationError(f"activations are rounded to 'int8' or stay as they are, got {activations!r}")
    if kind not in INT8_UNITS:
        raise QuantizationError(
            f"activations in int8 are for devices that multiply int8 faster than bfloat16: {', '.join(INT8_UNITS)}; "
            f"this is {kind or 'none that is known'}. Leave the option out"
        )
    return replace(form, int8_activations=True)


def form_note(kind: str | None, quantization: Quantization | None) -> str | None:
    """What a user should know of weights on this grid on devices of this kind, in words; None where all is well."""
    form = _form_of(kind or "cpu")
    if quantization is None or not form.grouped:
        return None
    if form.dot_products:
        return (
            f"{kind} has no products of small integers: steps of more than {form.dot_products} rows copy each "
            "quantised matrix, and are slower than with weights in float16"
        )
    group = quantization.group or 128
    if quantization.bits == 4 and not form.int4 and group // 2 < NIBBLE_ROWS:
        return (
            f"{kind} holds 4-bit weights in groups of {group} in a byte each, as much as int8 takes; convert with "
            "--group 64 or --group 128 for half of it"
        )
    if form.partial_sums and group < 128:
        return (
            f"{kind} moves more bytes for groups of {group} than for groups of 128: for 8 rows 2.5 times as many with "
            "32, 1.5 times with 64; convert with --group 128"
        )
    return None


def _form_of(kind: str) -> DeviceForm:
    if kind.startswith("TPU"):
        return TPU_BYTES if kind in OLD_TPUS else TPU_INT4
    if kind == "cpu":
        return DeviceForm()
    return GPU_WITHOUT_TRITON if kind.startswith(OLD_GPUS) else GPU


def held_weights(infos: Any, placement: Placement | None, activations: Activations | None = None) -> Any:
    """The description of a model's weights as they lie on devices, from that of a checkpoint.

    Args:
        infos: a tree of ``abstract_weights``.
        placement: the devices; None leaves the tree as it is.
        activations: as ``device_form`` takes it.
    """
    if placement is None:
        return infos
    form = device_form(placement.device_kind, activations)
    if form == DeviceForm():
        return infos

    def held(info: Any) -> Any:
        return _held(info, form, placement) if _is_quantized(info) else info

    return jax.tree.map(held, infos, is_leaf=_is_quantized)


def _held(stored: QuantizedArray, form: DeviceForm, placement: Placement) -> QuantizedArray:
    axis, size, group = stored.axis, stored.shape[stored.axis], stored.group
    if group is None:
        return replace(stored, form=form)
    name = stored.values.logical_axes[axis]
    names = placement.axes_of(name, size) if name else ()
    # Each device has whole groups: where the mesh would cut one, groups are halved, and their scales repeated.
    group = math.gcd(group, size // math.prod(placement.mesh.shape[name] for name in names))
    dtype: Any = np.dtype(np.int8)
    rows = group
    if stored.bits == 4 and form.int4:
        dtype = np.dtype(jnp.int4)
    elif stored.bits == 4 and group // 2 >= NIBBLE_ROWS:
        dtype, rows = np.dtype(np.uint8), group // 2

    def cut(info: ArrayInfo, *parts: int) -> ArrayInfo:
        shape = (*info.shape[:axis], *parts, *info.shape[axis + 1 :])
        axes = (*info.logical_axes[: axis + 1], *[None] * (len(parts) - 1), *info.logical_axes[axis + 1 :])
        return replace(info, shape=shape, logical_axes=axes, dtype=dtype if len(parts) > 1 else info.dtype)

    scales = cut(stored.scales, size // group)
    return replace(
        stored,
        values=cut(stored.values, size // group, rows),
        scales=scales,
        offsets=None if stored.offsets is None else scales,
        form=form,
    )


def held_part(
    name: str,
    stored: QuantizedArray,
    held: QuantizedArray,
    box: tuple[slice, ...],
    read: Callable[[tuple[slice, ...]], np.ndarray],
) -> np.ndarray:
    """A box of a part of a matrix as a device holds it, from the same part as it is stored.

    Args:
        name: of the part: ``values``, ``scales`` or ``offsets``.
        stored, held: the matrix as it is described in a checkpoint, and by ``held_weights``.
        box: a slice with both ends for each axis of the held part.
        read: gives a box of the stored part.
    """
    axis, before, after = stored.axis, stored.group, held.group
    if before is None or after is None:
        return read(box)
    repeats, cut = before // after, box[axis]
    # Whole groups of the checkpoint, from which the wanted ones are taken.
    first, last = cut.start // repeats, -(-cut.stop // repeats)
    own = slice(cut.start - first * repeats, cut.stop - first * repeats)
    others, behind = box[:axis], box[axis + 1 :]
    if name != "values":
        scales = read((*others, slice(first, last), *behind))
        repeated: np.ndarray = np.repeat(scales, repeats, axis=axis)[(slice(None),) * axis + (own,)]
        return repeated
    rows = before // 2 if stored.is_packed else before
    values: np.ndarray = split_groups(
        read((*others, slice(first * rows, last * rows), *behind[1:])), axis, last - first
    )
    if held.is_packed and repeats == 1:
        return values
    if stored.is_packed:
        values = np.concatenate([values & 0xF, values >> 4], axis=axis + 1)
    values = values.reshape(*values.shape[:axis], -1, after, *values.shape[axis + 2 :])[(slice(None),) * axis + (own,)]
    if held.is_packed:
        packed: np.ndarray = split_groups(pack(values, axis), axis, own.stop - own.start)
        return packed
    steps: np.ndarray = (values.view(np.int8) - np.int8(8 if stored.is_packed else 0)).astype(held.values.dtype)
    return steps


Conversion = Callable[[tuple[slice, ...], Callable[[tuple[slice, ...]], np.ndarray]], np.ndarray]
"""``held_part`` of one part: takes the box and ``read``."""


def conversions(stored: Any, held: Any) -> dict[str, Conversion]:
    """How the parts that lie otherwise on devices than in a checkpoint come from there, by their dotted names.

    Args:
        stored, held: the trees of ``abstract_weights`` and of ``held_weights``.
    """
    found: dict[str, Conversion] = {}
    of_checkpoint = jax.tree_util.tree_leaves_with_path(stored, is_leaf=_is_quantized)
    for (path, before), after in zip(of_checkpoint, jax.tree.leaves(held, is_leaf=_is_quantized), strict=True):
        if _is_quantized(before) and after.is_grouped:
            for part in ("values", "scales") if before.offsets is None else ("values", "scales", "offsets"):
                found[f"{path_name(path)}.{part}"] = partial(held_part, part, before, after)
    return found


def stored_weights(weights: Any) -> Any:
    """Weights as a checkpoint has them, from those that a device holds; in numpy where the two differ."""
    if not _is_quantized(own := weights.layers[0].attn.q) or own.group is None:
        return weights

    def stored(array: Any) -> Any:
        ours = _is_quantized(array) and array.is_grouped and getattr(array.values, "is_fully_addressable", True)
        return _stored(array, own.group) if ours else array

    return jax.tree.map(stored, weights, is_leaf=_is_quantized)


def _stored(array: QuantizedArray, group: int) -> QuantizedArray:
    axis, size = array.axis, array.shape[array.axis]
    repeats = group * array.scales.shape[axis] // size  # groups that were one
    values = np.asarray(array.values)
    if array.is_packed:
        values = np.concatenate([values & 0xF, values >> 4], axis=axis + 1)
    elif array.bits == 4:
        values = (values.astype(np.int8) + np.int8(8)).view(np.uint8)
    if array.bits == 4:
        values = pack(values.reshape(*values.shape[:axis], size // group, group, *values.shape[axis + 2 :]), axis)
    else:
        values = values.reshape(array.shape)

    def of_groups(part: Any) -> Any:
        return None if part is None else np.asarray(part)[(slice(None),) * axis + (slice(None, None, repeats),)]

    return QuantizedArray(values, of_groups(array.scales), of_groups(array.offsets), axis=axis, bits=array.bits)


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedArray)
