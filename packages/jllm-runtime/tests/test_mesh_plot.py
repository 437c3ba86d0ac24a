"""The picture of a mesh: which device holds which part of the weights and of the cache."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from jllm_runtime.mesh import parse_mesh
from jllm_runtime.planner.memory import Workload
from jllm_runtime.planner.memory_plot import draw_plan, plan_figure
from jllm_runtime.planner.mesh_plot import DeviceShare, device_shares, draw_mesh, grid, hosts
from jllm_runtime.planner.model_configs import find_model
from jllm_runtime.planner.plan import Plan, for_model, make_placement, make_plan
from jllm_runtime.planner.topologies import find_topology
from matplotlib.backends.backend_agg import FigureCanvasAgg

MARGIN = 5.0
"""Pixels, of about 100 that a box is wide."""


@lru_cache
def plan(model: str, topology: str, mesh: str | None = None, batch: int = 1) -> Plan:
    config, machine = find_model(model).config, find_topology(topology)
    placement = None if mesh is None else for_model(make_placement(machine, parse_mesh(mesh)), config)
    return make_plan(model, config, machine, Workload(batch), placement)


def test_each_device_has_its_heads_and_its_part_of_the_layers() -> None:
    shares = device_shares(plan("qwen3-14b", "v5e-8"))
    assert shares[0] == DeviceShare(("heads 0-4", "ffw 0-2175", "vocab 0-18991"), ("kv heads 0",), 0)
    assert shares[7] == DeviceShare(("heads 35-39", "ffw 15232-17407", "vocab 132944-151935"), ("kv heads 7",), 7)


def test_an_axis_for_the_batch_repeats_the_weights() -> None:
    shares = device_shares(plan("qwen3-8b", "v5e-8", "data=2,tensor=4", 8))
    assert [share.part for share in shares] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert shares[1].weights == shares[5].weights == ("heads 8-15", "ffw 3072-6143", "vocab 37984-75967")
    assert (shares[1].cache, shares[5].cache) == (("rows 0-3", "kv heads 2-3"), ("rows 4-7", "kv heads 2-3"))
    assert grid(plan("qwen3-8b", "v5e-8", "data=2,tensor=4", 8)) == (2, 4)


def test_devices_that_share_a_kv_head_hold_copies_of_it() -> None:
    """Four kv heads, eight devices."""
    shares = device_shares(plan("qwen3-30b-a3b", "v5e-8", batch=8))
    assert [share.cache for share in shares] == [(f"kv heads {n // 2}",) for n in range(8)]
    assert shares[3].weights[:2] == ("heads 12-15", "experts 48-63")


def test_a_hybrid_shows_the_heads_of_its_delta_nets() -> None:
    shares = device_shares(plan("qwen3.5-4b", "v5e-4"))
    assert shares[3].weights[1].startswith("value heads 24-31")


def test_one_device_holds_everything() -> None:
    alone = plan("qwen3-4b", "v5e-1")
    assert device_shares(alone) == [DeviceShare((), (), 0)]
    assert (grid(alone), hosts(alone)) == ((1, 1), 1)


def test_long_axes_are_broken_and_hosts_are_counted() -> None:
    many = plan("qwen3-32b", "v5e-16", None, 8)
    assert (grid(many), hosts(many)) == ((2, 8), 4)
    assert hosts(plan("qwen3-14b", "v5e-8")) == 1


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (
            ("qwen3-8b", "v5e-8", "data=2,tensor=4", 8),
            ["mesh: data = 2, tensor = 4", "tensor \N{RIGHTWARDS ARROW}", "device 7\nheads 24-31"],
        ),
        (("qwen3-4b", "v5e-1"), ["mesh: one device", "device 0\nall weights\nwhole cache"]),
        (("qwen3-32b", "v5e-16", None, 8), ["mesh: tensor = 16, 4 hosts", "device 15"]),
    ],
)
def test_what_is_drawn(made: tuple[Any, ...], words: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    planned = plan(*made)
    figure = Figure()
    axes = figure.add_subplot()
    draw_mesh(axes, planned)
    drawn = "\n".join(text.get_text() for text in [axes.title, axes.xaxis.label, *axes.texts])
    missing = [word for word in words if word not in drawn]
    assert len(axes.patches) == planned.topology.devices
    assert not missing, drawn
    draw_plan(planned, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("model", "machine", "count"),
    [("qwen3.5-35b-a3b", "v6e-8", 8), ("qwen3-4b", "2xt4", 2), ("qwen3-14b", "v5e-16", 16)],
)
def test_what_a_device_holds_is_written_within_its_box(model: str, machine: str, count: int) -> None:
    figure = plan_figure(plan(model, machine))
    FigureCanvasAgg(figure).draw()
    mesh = figure.axes[1]
    assert len(mesh.texts) == len(mesh.patches) == count
    for text, box in zip(mesh.texts, mesh.patches, strict=True):
        inner, outer = text.get_window_extent(), box.get_window_extent()
        # With a margin, for another font of the same size may be wider.
        assert outer.x0 + MARGIN < inner.x0 < inner.x1 < outer.x1 - MARGIN, text.get_text()
        assert outer.y0 < inner.y0 < inner.y1 < outer.y1, text.get_text()
