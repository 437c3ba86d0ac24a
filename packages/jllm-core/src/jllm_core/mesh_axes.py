"""Mesh axes for a model: the default for its shape, and those that waste devices, which are refused or told.

Refused is an axis that no sharding rule names, because every device along it would hold and compute the same.
"""

import math
from dataclasses import fields, replace

from jllm_core.config import ModelConfig
from jllm_core.errors import JLLMError
from jllm_core.sharding import DATA_AXIS, EXPERT_AXIS, TENSOR_AXIS, AnyMesh, MeshAxes, Placement, ShardingRules

KNOWN_AXES = (DATA_AXIS, EXPERT_AXIS, TENSOR_AXIS)
"""Axes that rules may leave out: that is a choice, not a misspelling."""


LANES = 128
"""Multiple that a TPU fills the last axis of an array up to where it works on it."""


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


def default_axes(config: ModelConfig, devices: int, rules: ShardingRules | None = None) -> dict[str, int]:
    """The devices along each axis of the mesh that suits a model best.

    A dense model is split over ``tensor``. The devices of a mixture share its experts out, and split the width of each
    only as far as that does not come out even: as wide as they can be, experts have whole lanes on a TPU wherever any
    mesh gives them such.

    Args:
        config: the architecture.
        devices: how many there are.
        rules: where each axis goes; the defaults when None.
    """
    moe, splits = config.moe, (rules or ShardingRules()).experts
    if moe is None or EXPERT_AXIS not in ((splits,) if isinstance(splits, str) else splits or ()):
        return {TENSOR_AXIS: devices}

    sharers = math.gcd(devices, moe.num_experts)
    return {EXPERT_AXIS: sharers, TENSOR_AXIS: devices // sharers}


def model_rules(config: ModelConfig, mesh: AnyMesh, rules: ShardingRules | None = None) -> ShardingRules:
    """The rules for a model: key and value heads of its delta nets are split over the same devices, or neither is.

    A value head goes by the keys of its key head, and a mesh may divide the value heads alone: what each device then
    lacks of the keys and their states would be sent to it in every layer of every step.

    Args:
        config: the architecture.
        mesh: the devices.
        rules: where each axis goes; the defaults when None.
    """
    rules, net = rules or ShardingRules(), config.delta_net
    if net is None:
        return rules
    keys = rules.axes_of("key_heads", net.num_key_heads, mesh)
    values = rules.axes_of("value_heads", net.num_value_heads, mesh)
    if keys == values:
        return rules
    both = tuple(axis for axis in keys if axis in values) or None
    return replace(rules, key_heads=both, value_heads=both)


def partial_lanes(config: ModelConfig, placement: Placement) -> str | None:
    """What is lost, in words, where a mesh cuts the experts of a mixture into widths that are no whole lanes of a TPU.

    None where nothing is: on other devices, and where the model's own width is to blame and no mesh would help.
    """
    moe, mesh = config.moe, placement.mesh
    if moe is None or moe.intermediate_size % LANES or not (placement.device_kind or "").startswith("TPU"):
        return None
    split_over = placement.axes_of("ffw", moe.intermediate_size)
    width = moe.intermediate_size // math.prod(mesh.shape[axis] for axis in split_over)
    if width % LANES == 0:
        return None
    better = ",".join(f"{axis}={size}" for axis, size in default_axes(config, int(mesh.size)).items() if size > 1)
    return (
        f"on the mesh {dict(mesh.shape)} each device has {width} of the {moe.intermediate_size} columns of an expert, "
        f"which is no multiple of the {LANES} lanes of a TPU: each call copies all of its experts, filled up to "
        f"{-(-width // LANES) * LANES}. The mesh {better}, the default for this model, copies the least"
    )
