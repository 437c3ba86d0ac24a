"""Mesh axes that no sharding rule names: refused, because every device along them would hold and compute the same."""

from dataclasses import fields

from jllm_core.errors import JLLMError
from jllm_core.sharding import DATA_AXIS, EXPERT_AXIS, TENSOR_AXIS, AnyMesh, MeshAxes, ShardingRules

KNOWN_AXES = (DATA_AXIS, EXPERT_AXIS, TENSOR_AXIS)
"""Axes that rules may leave out: that is a choice, not a misspelling."""


class ShardingError(JLLMError, ValueError):
    """Mesh that the sharding rules do not fit."""


def check_mesh(rules: ShardingRules, mesh: AnyMesh) -> None:
    """Refuse a mesh that has several devices along an axis which neither JLLM nor a rule knows.

    Raises:
        ShardingError: the message names the axis, and says what to call it or how to name it in the rules.
    """
    ruled: set[str] = set()
    for field in fields(rules):
        rule: MeshAxes = getattr(rules, field.name)
        ruled |= {rule} if isinstance(rule, str) else set(rule or ())
    unknown = [axis for axis, devices in mesh.shape.items() if devices > 1 and axis not in ruled.union(KNOWN_AXES)]
    if not unknown:
        return
    first = unknown[0]
    raise ShardingError(
        f"no sharding rule names the mesh axis {', '.join(map(repr, unknown))}, so all of its devices would hold and "
        f"compute the same; the mesh is {dict(mesh.shape)}, the rules name {', '.join(sorted(ruled)) or 'no axis'}. "
        f"Call the axes {', '.join(KNOWN_AXES)}, as jllm_runtime.make_mesh does, or name yours in the rules, such as "
        f"ShardingRules(heads={first!r}, kv_heads={first!r}, ffw={first!r}, vocab={first!r})"
    )
