"""Chart of a plan, as a PNG: the memory of each device, and the mesh."""

import importlib.util
import os
import textwrap
from pathlib import Path
from typing import Any

from jllm_core.errors import reason

from jllm_runtime.errors import PlanError
from jllm_runtime.planner.mesh_plot import draw_mesh, grid
from jllm_runtime.planner.plan import Plan
from jllm_runtime.planner.report import COLOURS, memory_parts
from jllm_runtime.planner.topologies import GIB

CELL_INCHES = 1.4
"""Width of a device in the picture of the mesh: its longest line, ``vocab 217280-248319``, has room."""


def check_plot(path: Path) -> None:
    """Raise a PlanError where no chart can be drawn, before any work is done."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PlanError("--png needs matplotlib: pip install 'jllm-runtime[plot]'")
    if not path.parent.is_dir():
        raise PlanError(f"there is no folder {path.parent} to put the picture in")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PlanError(f"the picture cannot be written to {path}; expected the path of a file that may be written")


def draw_plan(plan: Plan, path: Path) -> None:
    """Write a PNG of ``plan_figure``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    try:
        FigureCanvasAgg(plan_figure(plan)).print_png(str(path))
    except OSError as error:
        raise PlanError(f"the picture cannot be written to {path}: {reason(error)}") from error


def plan_figure(plan: Plan) -> Any:
    """A figure of matplotlib: a bar for each device, a line at its capacity, and below the devices as the mesh has
    them."""
    from matplotlib.figure import Figure

    topology, workload = plan.topology, plan.workload
    devices = range(topology.devices)
    # Without pyplot, which keeps figures in global state and may ask for a display.
    rows, columns = grid(plan)
    width, below = max(4.5, 1.0 + CELL_INCHES * columns, 1.5 + 0.5 * topology.devices), 0.5 + 1.15 * rows
    figure = Figure(figsize=(width, 4.5 + below), layout="constrained")
    axes, mesh_axes = figure.subplots(2, 1, height_ratios=(4.5, below))
    before = 0.0
    for name, size in memory_parts(plan).items():
        height = size / GIB
        # Stacked on the parts before it.
        axes.bar(devices, height, bottom=before, width=0.7, color=COLOURS[name], label=f"{name}, {height:.2f} GiB")
        before += height
    capacity = topology.device.usable_bytes / GIB
    axes.axhline(capacity, color="#bb5566", linestyle="--", label=f"there is, {capacity:.2f} GiB")
    axes.set_xlim(-0.8, topology.devices - 0.2)
    axes.set_ylim(0, 1.15 * max(before, capacity))
    axes.set_xticks(list(devices), [str(device) for device in devices])
    label = f"device ({topology.device.kind})"
    if plan.assumed:
        # As wide as the picture, which has room for about 13 of these letters an inch.
        label += "\n\n" + textwrap.fill(plan.assumed["types"], int(13 * width))
    axes.set_xlabel(label, fontsize=9)
    axes.set_ylabel("GiB")
    stored = workload.quantization.name if workload.quantization else workload.dtype
    axes.set_title(
        f"{plan.name} on {topology.name}\n{stored}, batch {workload.batch}, context {workload.context:,}", fontsize=11
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    draw_mesh(mesh_axes, plan)
    return figure
