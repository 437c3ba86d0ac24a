"""Device mesh: the devices that run a model, and their axes."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh
from jllm_core.sharding import DATA_AXIS, EXPERT_AXIS, TENSOR_AXIS

from jllm_runtime.errors import MeshError

# The tensor axis is last, so that devices next to each other share it: it has the most communication, in every layer.
AXES = (DATA_AXIS, EXPERT_AXIS, TENSOR_AXIS)


def make_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh of devices with the axes ``data`` (the batch), ``expert`` and ``tensor`` (each layer's arrays).

    Args:
        shape: devices along each axis, such as ``{"data": 2, "tensor": 4}``; an axis that is left out has one.
            None puts every device on the tensor axis.
        devices: the devices to use, all of ``jax.devices()`` when None.

    Raises:
        MeshError: an unknown axis, a size below 1, or a number of devices that is not the product of the sizes.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = _sizes(shape, len(devices))
    grid = np.array(devices, dtype=object).reshape(sizes)
    # Auto: XLA derives the shardings between those that the code states. Explicit axes would put them into every type.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(shape: Mapping[str, int] | None, devices: int, device: AbstractDevice | None = None) -> AbstractMesh:
    """Make a mesh of devices that are elsewhere, of which only the number and perhaps the kind is known; for planning.

    Raises:
        MeshError: as ``make_mesh``.
    """
    axis_types = (AxisType.Auto,) * len(AXES)
    return AbstractMesh(_sizes(shape, devices), AXES, axis_types, abstract_device=device)


def parse_mesh(text: str) -> dict[str, int]:
    """Parse ``"data=2,tensor=4"`` as a shape for ``make_mesh``.

    Raises:
        MeshError: not of that form, or an axis that is given twice.
    """
    shape: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = (word.strip() for word in part.partition("="))
        # isdigit alone accepts digits such as "²", which int refuses.
        if axis in shape or not size.isascii() or not size.isdigit():
            raise MeshError(f"a mesh is given as AXIS=DEVICES,AXIS=DEVICES, such as data=2,tensor=4, got {text!r}")
        shape[axis] = int(size)
    return shape


def _sizes(shape: Mapping[str, int] | None, devices: int) -> tuple[int, ...]:
    """Return the number of devices along each axis of AXES.

    Raises:
        MeshError: as ``make_mesh``.
    """
    if not devices:
        raise MeshError("a mesh needs at least one device, got none")
    shape = {TENSOR_AXIS: devices} if shape is None else shape
    unknown = sorted(set(shape) - set(AXES))
    if unknown:
        raise MeshError(f"unknown mesh axes {unknown}; known: {', '.join(AXES)}")
    sizes = tuple(shape.get(axis, 1) for axis in AXES)
    if any(size < 1 for size in sizes):
        raise MeshError(f"every mesh axis needs at least one device, got {dict(shape)}")
    if math.prod(sizes) != devices:
        raise MeshError(
            f"the mesh {dict(zip(AXES, sizes, strict=True))} needs {math.prod(sizes)} devices, there are {devices}"
        )
    return sizes
