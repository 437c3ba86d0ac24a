"""Device mesh: the devices that run a model, and their axes."""

import inspect
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh
from jllm_core.sharding import DATA_AXIS, EXPERT_AXIS, TENSOR_AXIS

from jllm_runtime.errors import MeshError

# The tensor axis is last, so that devices next to each other share it: it has the most communication, in every layer.
AXES = (DATA_AXIS, EXPERT_AXIS, TENSOR_AXIS)
# Of the CPU alone, to see a layout: all of them share its cores.
MAX_CPU_DEVICES = 1024


def make_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh of devices with the axes ``data`` (the batch), ``expert`` and ``tensor`` (each layer's arrays).

    Args:
        shape: devices along each axis, such as ``{"data": 2, "tensor": 4}``; an axis that is left out has one.
            None puts every device on the tensor axis. ``load_model`` without a mesh makes the one that suits the model.
        devices: the devices to use, all of ``jax.devices()`` when None.

    Raises:
        MeshError: an unknown axis, a size below 1, or a number of devices that is not the product of the sizes.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = _sizes(shape, len(devices), devices[0].platform if devices else None)
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


def automatic_mesh(mesh: Mesh) -> Mesh:
    """The mesh with axes over which XLA derives the shardings, as the programs need them.

    ``jax.make_mesh`` makes axes whose shardings are part of every array's type (``AxisType.Explicit``).
    """
    if all(kind == AxisType.Auto for kind in mesh.axis_types):
        return mesh
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def make_cpu_devices(count: int) -> None:
    """Have JAX see the CPU as so many devices, and use no others. They share its cores: it shows that a layout works.

    Raises:
        MeshError: not between 1 and MAX_CPU_DEVICES, or JAX has started its devices already.
    """
    if not 1 <= count <= MAX_CPU_DEVICES:
        raise MeshError(f"the CPU can be seen as 1 to {MAX_CPU_DEVICES:,} devices, got {count}")
    try:
        jax.config.update("jax_num_cpu_devices", count)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError as error:
        raise MeshError(
            f"the CPU cannot be seen as {count} devices any more: JAX has started. Do it before anything else of JAX, "
            f"or set {_cpu_flag(count)} in the environment"
        ) from error


def _cpu_flag(count: int) -> str:
    return f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"


def abstract_device(kind: str, platform: str) -> AbstractDevice:
    """A device that is elsewhere, of this kind (``"TPU v5 lite"``), for ``abstract_mesh``."""
    # JAX keeps the platform with it since 0.10, and then asks for it.
    known = {"platform": platform} if "platform" in inspect.signature(AbstractDevice).parameters else {}
    return AbstractDevice(device_kind=kind, num_cores=None, **known)


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


def _sizes(shape: Mapping[str, int] | None, devices: int, platform: str | None = None) -> tuple[int, ...]:
    """Return the number of devices along each axis of AXES.

    Args:
        shape: as for ``make_mesh``.
        devices: how many there are.
        platform: what JAX calls their kind, where they are here.

    Raises:
        MeshError: as ``make_mesh``.
    """
    if not devices:
        raise MeshError("a mesh needs at least one device, got none")
    shape = {TENSOR_AXIS: devices} if shape is None else shape
    unknown = sorted(set(shape) - set(AXES))
    if unknown:
        raise MeshError(
            f"unknown mesh axes {unknown}; known: {DATA_AXIS} (the batch), {EXPERT_AXIS} (the experts of a mixture) "
            f"and {TENSOR_AXIS} (heads, widths and vocabulary, which others call model or tp)"
        )
    sizes = tuple(shape.get(axis, 1) for axis in AXES)
    if any(size < 1 for size in sizes):
        raise MeshError(f"every mesh axis needs at least one device, got {dict(shape)}")
    needed = math.prod(sizes)
    if needed != devices:
        kind = "" if platform is None else f" ({platform})"
        raise MeshError(
            f"the mesh {dict(zip(AXES, sizes, strict=True))} needs {needed} devices, there are {devices}{kind}; "
            f"{_advice(needed, devices, platform)}"
        )
    return sizes


def _advice(needed: int, devices: int, platform: str | None) -> str:
    """How to get a mesh: sizes that fit the devices, or on a CPU as many devices as the sizes need."""
    fitting = f"{TENSOR_AXIS}={devices}"
    if devices > 2 and devices % 2 == 0:
        fitting += f" or {DATA_AXIS}=2,{TENSOR_AXIS}={devices // 2}"
    advice = f"the sizes multiply to the number of devices, such as {fitting}"
    if platform == "cpu" and needed <= MAX_CPU_DEVICES:
        advice += (
            f". One CPU can be seen as {needed} devices: --devices {needed} with the commands, {_cpu_flag(needed)} in "
            f"the environment, or jax.config.update('jax_num_cpu_devices', {needed}) before anything else of JAX"
        )
    elif platform is not None and needed < devices:
        advice += f". To use some of them, in Python: make_mesh(shape, jax.devices()[:{needed}])"
    return advice
