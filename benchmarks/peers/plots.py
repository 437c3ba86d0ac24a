"""The results as pictures: a panel a case, a bar a contender."""

import statistics
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.peers.cases import JLLM, LLAMA, TRANSFORMERS, Case
from benchmarks.peers.results import Results

# Paul Tol's colours, which everybody can tell apart.
COLOURS = {JLLM: "#4477aa", LLAMA: "#ccbb44", TRANSFORMERS: "#aa3377"}
COLUMNS, BAR_INCHES, PANEL_INCHES = 2, 0.24, 1.2


def draw(results: Results, cases: list[Case], title: str, path: Path) -> None:
    """Write a PNG with a panel for each case; a whisker spans the runs."""
    rows = -(-len(cases) // COLUMNS)
    bars = max(len(results.contenders(case.name)) for case in cases)
    with matplotlib.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure((6 * COLUMNS, rows * (PANEL_INCHES + BAR_INCHES * bars)), layout="constrained")
        figure.suptitle(title)
        panels = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
        for panel, case in zip(panels, cases, strict=False):
            _draw_case(panel, results, case)
        for panel in panels[len(cases) :]:
            panel.set_axis_off()
        figure.savefig(path, dpi=120)


def _draw_case(panel: Axes, results: Results, case: Case) -> None:
    def figures(seconds: list[float]) -> list[float]:
        return seconds if case.kind == "start" else [case.work / each for each in seconds]

    contenders = sorted(
        results.contenders(case.name), key=lambda who: -statistics.median(results.seconds(case.name, who))
    )
    for place, contender in enumerate(contenders):
        runs = figures(results.seconds(case.name, contender))
        middle = statistics.median(runs)
        spread = [[middle - min(runs)], [max(runs) - middle]]
        panel.barh(
            place, middle, color=COLOURS[contender.peer], xerr=spread, error_kw={"elinewidth": 0.8, "capsize": 2}
        )
        panel.annotate(f"{middle:,.3g}", (max(runs), place), (4, 0), textcoords="offset points", va="center")
    panel.set_yticks(range(len(contenders)), [contender.name for contender in contenders])
    panel.margins(x=0.12)
    panel.set_title(case.name, loc="left")
    panel.set_xlabel("seconds" if case.kind == "start" else "tokens/s")
