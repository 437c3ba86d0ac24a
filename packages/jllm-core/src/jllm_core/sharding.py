"""Sharding rules: from the names of an array's axes to its place on the device mesh."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

MeshAxes = str | tuple[str, ...] | None
"""The mesh axis (or axes) over which a logical axis is split; None leaves it whole on every device."""

DATA_AXIS = "data"
EXPERT_AXIS = "expert"
TENSOR_AXIS = "tensor"

AnyMesh = Mesh | AbstractMesh
"""Devices, or only their number along each axis: enough to plan a model or to compile it for machines elsewhere."""


@runtime_checkable
class HasAxes(Protocol):
    """An array's description as far as its place goes by it: ``ArrayInfo``, or anything with the same two."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def logical_axes(self) -> tuple[str | None, ...]: ...


@dataclass(frozen=True)
class ShardingRules:
    """Which mesh axis splits which logical axis. The defaults are tensor-parallel inference.

    Each attribute is a logical axis; its value names the mesh axes that split it. A rule that names a mesh axis
    which the mesh does not have leaves the axis whole, so one set of rules serves every mesh (see ``mesh_axes.py``).

    With the defaults each device holds whole heads and a slice of the feed-forward layer: the two matrix products
    of a block need no communication between them, and one all-reduce after the second (Megatron-LM, arXiv:1909.08053).
    Heads and vocabulary go over ``expert`` as well: a mesh for a mixture replicates neither attention nor output head.

    ``tokens`` is the length of what flows between the layers, ``sequence`` that of the KV cache. An axis that the mesh
    axis does not divide stays whole (3 kv heads on 8 devices are replicated): each device computes a little more.
    """

    batch: MeshAxes = DATA_AXIS
    tokens: MeshAxes = None
    sequence: MeshAxes = None
    vocab: MeshAxes = (EXPERT_AXIS, TENSOR_AXIS)
    model: MeshAxes = None
    heads: MeshAxes = (EXPERT_AXIS, TENSOR_AXIS)
    kv_heads: MeshAxes = (EXPERT_AXIS, TENSOR_AXIS)
    head_dim: MeshAxes = None
    key_heads: MeshAxes = (EXPERT_AXIS, TENSOR_AXIS)
    value_heads: MeshAxes = (EXPERT_AXIS, TENSOR_AXIS)
    ffw: MeshAxes = TENSOR_AXIS
    shared_ffw: MeshAxes = (EXPERT_AXIS, TENSOR_AXIS)
    experts: MeshAxes = EXPERT_AXIS

    def partition_spec(
        self, shape: tuple[int, ...], logical_axes: tuple[str | None, ...], mesh: AnyMesh
    ) -> PartitionSpec:
        """The PartitionSpec of an array with these axes on this mesh.

        Raises:
            ValueError: a logical axis that no rule knows, or two axes of one array on the same mesh axis.
        """
        spec: list[tuple[str, ...]] = []
        for size, axis in zip(shape, logical_axes, strict=True):
            # Axes that do not divide stay whole and take no mesh axis, so they cannot collide with another.
            mesh_axes = self.axes_of(axis, size, mesh)
            if {name for names in spec for name in names} & set(mesh_axes):
                raise ValueError(
                    f"axis {axis!r} of {logical_axes} is to be split over {mesh_axes}, "
                    "which already splits another axis of the same array; change one of the two rules"
                )
            spec.append(mesh_axes)
        return partition(*spec)

    def axes_of(self, logical_axis: str | None, size: int, mesh: AnyMesh) -> tuple[str, ...]:
        """The mesh axes that split a logical axis of this size: its rule's, or as many of the last as divide it."""
        # An axis over one device is left out: jit would take it for another sharding than none, and compile anew.
        names = tuple(name for name in self._mesh_axes(logical_axis, mesh) if mesh.shape[name] > 1)
        while size % math.prod(mesh.shape[name] for name in names):
            names = names[1:]
        return names

    def sharding(self, info: HasAxes, mesh: AnyMesh) -> NamedSharding:
        """Where the described array lives on the mesh."""
        return NamedSharding(mesh, self.partition_spec(info.shape, info.logical_axes, mesh))

    def tree_shardings(self, tree: Any, mesh: AnyMesh) -> Any:
        """A tree of ArrayInfo with each leaf as its NamedSharding; refuses a mesh with an axis that nobody names."""
        from jllm_core.mesh_axes import check_mesh  # here, because the rules can be read without it

        check_mesh(self, mesh)
        return jax.tree.map(lambda info: self.sharding(info, mesh), tree)

    def _mesh_axes(self, axis: str | None, mesh: AnyMesh) -> tuple[str, ...]:
        if axis is None:
            return ()
        known = [field.name for field in fields(self)]
        if axis not in known:
            raise ValueError(f"no sharding rule for the logical axis {axis!r}; known: {', '.join(known)}")
        rule: MeshAxes = getattr(self, axis)
        names = (rule,) if isinstance(rule, str) else (rule or ())
        return tuple(name for name in names if name in mesh.shape)


PRESETS: Mapping[str, ShardingRules] = MappingProxyType(
    {
        # Each device holds a part of every layer. One set of rules for whichever of the mesh's axes have devices: the
        # batch over `data`, the experts of a mixture over `expert`, widths over `tensor`, all else over both.
        "tensor": ShardingRules(),
        "data-tensor": ShardingRules(),
        "expert-tensor": ShardingRules(),
        # The weights over the devices of `data` as well, each gathered when it is used: for training, and for batches
        # that are worth it (ZeRO stage 3, arXiv:1910.02054).
        "fsdp": ShardingRules(model=DATA_AXIS),
        # Between the products, each device holds some of the tokens rather than all: a prefill's norms and sums are
        # shared out too, and an all-reduce becomes a reduce-scatter and an all-gather (arXiv:2205.05198).
        "sequence": ShardingRules(tokens=TENSOR_AXIS),
    }
)
"""Sharding rules by the names that users know them by."""


@dataclass(frozen=True)
class Placement:
    """A mesh and the rules of what goes where on it: all that the model's code knows of devices.

    It is hashable, so that jit takes it as a static argument.

    Attributes:
        mesh: the devices.
        rules: which axes are split over which of its axes.
        kernels: whether a backend may replace parts of the maths; without, XLA does all, to compare with.
    """

    mesh: AnyMesh
    rules: ShardingRules = ShardingRules()
    kernels: bool = True

    @property
    def is_single(self) -> bool:
        """Whether the mesh is one device, so that nothing is split."""
        return bool(self.mesh.size == 1)

    @property
    def device_kind(self) -> str | None:
        """What JAX calls the devices (``TPU v5 lite``); None where nothing but their number is known."""
        device = self.mesh.devices.flat[0] if isinstance(self.mesh, Mesh) else self.mesh.abstract_device
        return None if device is None else str(device.device_kind)

    def spec(self, shape: tuple[int, ...], *logical_axes: str | None) -> PartitionSpec:
        """The PartitionSpec of an array of this shape."""
        return self.rules.partition_spec(shape, logical_axes, self.mesh)

    def constrain(self, x: jax.Array, *logical_axes: str | None) -> jax.Array:
        """``x``, laid out over the mesh by its axes. For use inside jit."""
        sharding = NamedSharding(self.mesh, self.spec(x.shape, *logical_axes))
        constrained: jax.Array = jax.lax.with_sharding_constraint(x, sharding)
        return constrained

    def kv_copies(self, heads: int, kv_heads: int) -> int:
        """How often each kv head is kept: more than once where more devices share the query heads out than there are.

        Each device then has the one kv head that its query heads attend to, instead of all of them.
        """
        devices = math.prod(self.mesh.shape[name] for name in self.axes_of("heads", heads))
        # 8 devices, 16 query heads, 4 kv heads: two devices share a kv head, and each gets a copy of it.
        return devices // kv_heads if devices > kv_heads and devices % kv_heads == 0 else 1

    def axes_of(self, logical_axis: str, size: int) -> tuple[str, ...]:
        """The mesh axes that split a logical axis of this size; none where it is whole on every device."""
        return self.rules.axes_of(logical_axis, size, self.mesh)

    def shard_map(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """``function`` run by every device on its own parts, as the specs cut them."""
        # Whether a result is the same on all devices is for the caller to know: psum makes it so.
        mapped: Callable[..., Any] = jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
        return mapped


def partition(*axes: tuple[str, ...]) -> PartitionSpec:
    """A PartitionSpec from the mesh axes of each axis of an array."""
    return PartitionSpec(*(names if len(names) > 1 else names[0] if names else None for names in axes))
