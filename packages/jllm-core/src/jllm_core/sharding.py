"""From the names of an array's axes to its place on the mesh."""

from dataclasses import dataclass, fields
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jllm_core.array_info import ArrayInfo

MeshAxes = str | tuple[str, ...] | None
"""The mesh axis (or axes) over which a logical axis is split; None leaves it whole on every device."""

DATA_AXIS = "data"
EXPERT_AXIS = "expert"
TENSOR_AXIS = "tensor"

AnyMesh = Mesh | AbstractMesh
"""Devices, or only their number along each axis: enough to plan a model or to compile it for machines elsewhere."""


@dataclass(frozen=True)
class ShardingRules:
    """Which mesh axis splits which logical axis. The defaults are tensor-parallel inference.

    Each attribute is a logical axis; its value names the mesh axes that split it. A rule that names a mesh axis
    which the mesh does not have leaves the axis whole, so one set of rules serves every mesh.

    With the defaults each device holds whole heads and a slice of the feed-forward layer: the two matrix products
    of a block need no communication between them, and one all-reduce after the second (Megatron-LM, arXiv:1909.08053).

    An axis that the mesh axis does not divide stays whole (3 kv heads on 8 devices are replicated):
    the result is the same, each device computes a little more.
    """

    batch: MeshAxes = DATA_AXIS
    sequence: MeshAxes = None
    vocab: MeshAxes = TENSOR_AXIS
    model: MeshAxes = None
    heads: MeshAxes = TENSOR_AXIS
    kv_heads: MeshAxes = TENSOR_AXIS
    head_dim: MeshAxes = None
    ffw: MeshAxes = TENSOR_AXIS
    experts: MeshAxes = EXPERT_AXIS

    def partition_spec(
        self, shape: tuple[int, ...], logical_axes: tuple[str | None, ...], mesh: AnyMesh
    ) -> PartitionSpec:
        """The PartitionSpec of an array with these axes on this mesh.

        Raises:
            ValueError: a logical axis that no rule knows, or two axes of one array on the same mesh axis.
        """
        spec: list[MeshAxes] = []
        used: set[str] = set()
        for size, axis in zip(shape, logical_axes, strict=True):
            mesh_axes = self._mesh_axes(axis, mesh)
            devices = 1
            for name in mesh_axes:
                devices *= mesh.shape[name]
            if not mesh_axes or devices == 1 or size % devices:
                spec.append(None)
                continue
            if used & set(mesh_axes):
                raise ValueError(
                    f"axis {axis!r} of {logical_axes} is to be split over {mesh_axes}, "
                    "which already splits another axis of the same array; change one of the two rules"
                )
            used |= set(mesh_axes)
            spec.append(mesh_axes if len(mesh_axes) > 1 else mesh_axes[0])
        return PartitionSpec(*spec)

    def sharding(self, info: ArrayInfo, mesh: AnyMesh) -> NamedSharding:
        """Where the described array lives on the mesh."""
        return NamedSharding(mesh, self.partition_spec(info.shape, info.logical_axes, mesh))

    def tree_shardings(self, tree: Any, mesh: AnyMesh) -> Any:
        """A tree of ArrayInfo with each leaf as its NamedSharding."""
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


@dataclass(frozen=True)
class Placement:
    """A mesh and the rules of what goes where on it: all that the model's code knows of devices.

    It is hashable, so that jit takes it as a static argument.
    """

    mesh: AnyMesh
    rules: ShardingRules = ShardingRules()

    def spec(self, shape: tuple[int, ...], *logical_axes: str | None) -> PartitionSpec:
        """The PartitionSpec of an array of this shape."""
        return self.rules.partition_spec(shape, logical_axes, self.mesh)

    def constrain(self, x: jax.Array, *logical_axes: str | None) -> jax.Array:
        """``x``, laid out over the mesh by its axes. For use inside jit."""
        sharding = NamedSharding(self.mesh, self.spec(x.shape, *logical_axes))
        constrained: jax.Array = jax.lax.with_sharding_constraint(x, sharding)
        return constrained
