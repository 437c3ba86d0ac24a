"""Picture of a mesh: devices in a grid by its axes, and the part of the arrays and of the cache that each holds."""

import math
from dataclasses import dataclass
from typing import Any

from jllm_core.array_info import named_leaves

from jllm_runtime.planner.memory import kv_info, weights_info
from jllm_runtime.planner.plan import Plan

# What a cell has room for, in the order in which it is worth knowing.
_SHOWN = ("heads", "value_heads", "experts", "ffw", "vocab")
_SHORT = {"value_heads": "value heads", "kv_heads": "kv heads", "batch": "rows", "sequence": "tokens"}
MAX_COLUMNS = 8
# Paul Tol's light scheme: apart for the colour-blind, and dark text is read on all of them.
_COLOURS = ("#77aadd", "#eedd88", "#99ddff", "#ee8866", "#44bb99", "#ffaabb", "#bbcc33", "#dddddd")


@dataclass(frozen=True)
class DeviceShare:
    """What one device holds.

    Attributes:
        weights: the range of each split axis of the weights, in words: ``heads 0-4``.
        cache: the same of one layer's keys and values.
        part: the number of its part of the weights; devices with the same part hold the same.
    """

    weights: tuple[str, ...]
    cache: tuple[str, ...]
    part: int


def device_shares(plan: Plan) -> list[DeviceShare]:
    """The share of each device, in the order of the mesh, its last axis the fastest."""
    placement, config = plan.placement, plan.config
    sizes: dict[str, int] = {}
    for info in named_leaves(weights_info(config, plan.workload, placement)).values():
        for axis, size in zip(info.logical_axes, info.shape, strict=True):
            # The largest where several arrays have the axis: packed 4 bits have half.
            if axis is not None:
                sizes[axis] = max(size, sizes.get(axis, 0))
    split = {axis: names for axis, size in sizes.items() if (names := placement.axes_of(axis, size))}
    cache = kv_info(config, plan.workload, placement)
    cache_axes = [
        (axis, size, names)
        for axis, size in zip(cache.logical_axes, cache.shape, strict=True)
        if axis is not None and (names := placement.axes_of(axis, size))
    ]
    copies = placement.kv_copies(config.num_heads, config.num_kv_heads)
    shares, parts = [], dict[tuple[int, ...], int]()
    for device in range(placement.mesh.size):
        at = _coordinates(plan, device)
        used = tuple(index for name, index in at.items() if any(name in names for names in split.values()))
        weights = [_range(plan, at, axis, sizes[axis], split[axis]) for axis in _SHOWN if axis in split]
        own = [
            _range(plan, at, axis, size, names, copies if axis == "kv_heads" else 1) for axis, size, names in cache_axes
        ]
        shares.append(DeviceShare(tuple(weights), tuple(own), parts.setdefault(used, len(parts))))
    return shares


def _coordinates(plan: Plan, device: int) -> dict[str, int]:
    """The device's index along each axis of the mesh."""
    at: dict[str, int] = {}
    for name, size in reversed(plan.placement.mesh.shape.items()):
        device, at[name] = divmod(device, size)
    return dict(reversed(at.items()))


def _range(plan: Plan, at: dict[str, int], axis: str, size: int, names: tuple[str, ...], copies: int = 1) -> str:
    """``heads 5-9``: the entries of an axis that the device at these coordinates holds."""
    index = 0
    for name in names:
        index = index * plan.placement.mesh.shape[name] + at[name]
    each = size // math.prod(plan.placement.mesh.shape[name] for name in names)
    # Of heads that are kept several times, the one that it is a copy of.
    first, last = index * each // copies, ((index + 1) * each - 1) // copies
    entries = f"{first}" if first == last else f"{first}-{last}"
    return f"{_SHORT.get(axis, axis)} {entries}"


def grid(plan: Plan) -> tuple[int, int]:
    """Rows and columns of the picture: the last axis that has devices goes along a row, or along several."""
    mesh = plan.placement.mesh
    along = next((size for size in reversed(mesh.shape.values()) if size > 1), 1)
    columns = min(along, MAX_COLUMNS)
    return -(-mesh.size // columns), columns


def hosts(plan: Plan) -> int:
    """The number of hosts that the machine's devices are spread over."""
    target = plan.topology.target
    if target is None:
        return 1
    chips = math.prod(map(int, target.topology_name.partition(":")[2].split("x")))
    return -(-chips // math.prod(target.chips_per_host))


def draw_mesh(axes: Any, plan: Plan) -> None:
    """Draw the grid on matplotlib axes."""
    from matplotlib.patches import Rectangle

    rows, columns = grid(plan)
    shares, mesh = device_shares(plan), plan.placement.mesh
    for device, share in enumerate(shares):
        row, column = divmod(device, columns)
        colour = _COLOURS[share.part % len(_COLOURS)]
        # A paler round of colours where there are more parts than colours.
        alpha = 1.0 if share.part < len(_COLOURS) else 0.45
        box = Rectangle((column + 0.03, row + 0.04), 0.94, 0.92, facecolor=colour, edgecolor="#555555", alpha=alpha)
        axes.add_patch(box)
        lines = [f"device {device}", *share.weights]
        if share.cache:
            lines += ["cache:", *share.cache]
        if len(lines) == 1:
            lines += ["all weights", "whole cache"]
        axes.text(column + 0.5, row + 0.5, "\n".join(lines), ha="center", va="center", fontsize=6.5)
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)  # the first row on top
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    named = [f"{name} = {size}" for name, size in mesh.shape.items() if size > 1]
    several = f", {hosts(plan)} hosts" if hosts(plan) > 1 else ""
    title = f"mesh: {', '.join(named)}{several}" if named else "mesh: one device"
    axes.set_title(title, fontsize=10)
    if named:
        axes.set_xlabel(f"{named[-1].partition(' ')[0]} \N{RIGHTWARDS ARROW}", fontsize=9)
    if len(named) > 1:
        axes.set_ylabel(f"\N{LEFTWARDS ARROW} {', '.join(each.partition(' ')[0] for each in named[:-1])}", fontsize=9)
