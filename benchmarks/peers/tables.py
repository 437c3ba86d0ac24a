"""The results as Markdown."""

import statistics
from collections.abc import Iterator

from benchmarks.peers.cases import JLLM, LIMITS, Case, Contender
from benchmarks.peers.results import Results
from benchmarks.peers.targets import Target


def target_table(results: Results, targets: list[Target]) -> str:
    """A line for each target, and whether it is met."""
    lines = ["| case | against | at least | measured | met |", "|---|---|---|---|---|"]
    for target in targets:
        value = target.measure(results)
        bound = f"at most {target.bound:g}" if target.at_most else f"{target.bound:g}"
        found = "not run" if value is None else f"{value:.0f}" if target.bound > 100 else f"{value:.2f}"
        verdict = "" if value is None else "yes" if target.is_met(value) else "**no**"
        lines.append(f"| {target.case} | {target.against} | {bound} | {found} | {verdict} |")
    return "\n".join(lines)


def case_table(results: Results, case: Case) -> str:
    """A line for each contender, the fastest first."""
    best = results.fastest(case.name)
    unit = "seconds" if case.kind == "start" else "tokens/s"
    lines = [
        f"| {case.name} | {unit} | lowest to highest | runs | x of {best.name if best else 'the best peer'} "
        "| of limit | peak MB | as the reference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    contenders = results.contenders(case.name)
    for contender in sorted(contenders, key=lambda who: statistics.median(results.seconds(case.name, who))):
        lines.append("| " + " | ".join(_cells(results, case, contender, best)) + " |")
    return "\n".join(lines)


def _cells(results: Results, case: Case, contender: Contender, best: Contender | None) -> Iterator[str]:
    seconds, runs = results.seconds(case.name, contender), results.runs(case.name, contender)
    figures = seconds if case.kind == "start" else [case.work / each for each in seconds]
    yield f"**{contender.name}**" if contender.peer == JLLM else contender.name
    yield _figure(statistics.median(figures))
    yield f"{_figure(min(figures))} to {_figure(max(figures))}"
    yield f"{len(figures)}"
    ratio = None if best is None else results.speedup(case.name, contender, best)
    yield "" if ratio is None else f"{ratio:.2f}"
    limit = "flops_per_s" if case.kind == "prefill" else "bytes_per_s"
    share = None if case.kind == "start" else results.share_of_limit(case.name, contender, limit)
    yield "" if share is None else f"{share:.0%}"
    yield "" if case.kind == "start" else f"{max(run['peak_rss_bytes'] for run in runs) / 1e6:,.0f}"
    yield f"{min(run['same'] for run in runs):.0%}"


def limit_line(results: Results, cases: list[Case]) -> str:
    """What the machine did at best, over all rounds."""
    machine = [run for case in cases for run in results.runs(case.name, Contender(LIMITS))]
    if not machine:
        return "The machine's limits were not measured."
    reading, computing = ([run[name] / 1e9 for run in machine] for name in ("bytes_per_s", "flops_per_s"))
    return (
        f"The machine reads {statistics.median(reading):.1f} GB/s ({min(reading):.1f} to {max(reading):.1f}) and "
        f"multiplies float32 matrices at {statistics.median(computing):.0f} GFLOP/s "
        f"({min(computing):.0f} to {max(computing):.0f}), measured in the same rounds."
    )


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
