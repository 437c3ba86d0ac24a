"""Plan report: table and JSON."""

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jllm_runtime.planner.memory import kv_info, parameter_count, prefill_chunk
from jllm_runtime.planner.plan import Plan
from jllm_runtime.planner.topologies import GIB, find_topology

BAR = 40
COLOURS = {
    "weights": "#4477aa",
    "KV cache": "#66ccee",
    "recurrent states": "#228833",
    "prefix snapshots": "#aa3377",
    "temporaries": "#ccbb44",
}
"""Colours of the memory's parts, in the table and in the chart: Paul Tol's bright scheme, which the colour-blind can
tell apart."""

OPTION_WIDTH = 24
"""Columns for an option that names a machine."""

OF_STATES = ("recurrent states", "prefix snapshots")
"""Parts that few models have."""


def memory_parts(plan: Plan) -> dict[str, int]:
    """Bytes on each device, by the names in COLOURS; states and snapshots where there are any."""
    memory = plan.memory
    sizes = (memory.weights, memory.kv, memory.states, memory.snapshots, memory.temp)
    return {name: size for name, size in zip(COLOURS, sizes, strict=True) if size or name not in OF_STATES}


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values; sizes are in bytes."""
    workload, memory = plan.workload, plan.memory
    return {
        "model": plan.name,
        "parameters": parameter_count(plan.config),
        "topology": plan.topology.name,
        "mesh": dict(plan.placement.mesh.shape),
        "batch": workload.batch,
        "context": workload.context,
        "dtype": workload.dtype,
        "quantize": workload.quantization.name if workload.quantization else None,
        "activations": workload.activations,
        "kv_dtype": workload.cache_dtype.name,
        "fits": plan.fits,
        "short_bytes": plan.short_bytes,
        "per_device": {
            "weights_bytes": memory.weights,
            "kv_bytes": memory.kv,
            "states_bytes": memory.states,
            "snapshots_bytes": memory.snapshots,
            "temp_bytes": memory.temp,
            "total_bytes": memory.total,
            "capacity_bytes": plan.topology.device.usable_bytes,
        },
        "temp_bytes_by_program": memory.temporaries,
        "roofline": asdict(plan.roofline),
        "largest_batch": plan.largest_batch,
        "largest_context": plan.largest_context,
        "alternatives": list(plan.alternatives),
        "compiled": asdict(plan.compilation) if plan.compilation else None,
        "assumed": dict(plan.assumed),
        "notes": list(plan.notes),
        "bounds": {name: asdict(bound) for name, bound in plan.bounds.items()},
        "engine": asdict(plan.engine) if plan.engine else None,
    }


def print_plan(plan: Plan, console: Console) -> None:
    """Print the plan as a table."""
    console.print(_heading(plan), highlight=False)
    if plan.assumed:
        console.print(plan.assumed["types"], highlight=False, markup=False)
    console.print(_memory_table(plan), highlight=False)
    roofline = plan.roofline
    console.print(
        f"Decoding, at best: {roofline.decode_tokens_per_s:,.0f} tokens/s, bound by {roofline.bound} "
        f"({_gib(roofline.bytes_per_step)} and {roofline.flops_per_step / 1e9:,.1f} GFLOP a step on each device)\n"
        f"Largest batch of this context: {plan.largest_batch or 'none'}. "
        f"Largest context of this batch: {format(plan.largest_context, ',') if plan.largest_context else 'none'}.",
        highlight=False,
    )
    if plan.engine:
        tokens = plan.engine.pages * plan.engine.page_size
        console.print(
            f"The engine's pool: {plan.engine.pages:,} pages of {plan.engine.page_size}, {tokens:,} tokens.",
            highlight=False,
        )
    for name, tokens in _tokens_of_steps(plan).items():
        console.print(_bound_words(name, tokens, plan), highlight=False)
    for note in plan.notes:
        console.print(f"Note: {note}", highlight=False, markup=False)
    console.print(_verdict(plan), highlight=False)


def _tokens_of_steps(plan: Plan) -> dict[str, int]:
    """Tokens that a step of each compiled program is for."""
    tokens = {
        "decode": plan.workload.batch,
        "prefill": plan.workload.batch * prefill_chunk(plan.config, plan.workload, plan.placement),
    }
    if plan.engine:
        tokens["prefill"] = plan.engine.chunk_pages * plan.engine.page_size
    return {name: count for name, count in tokens.items() if name in plan.bounds}


def _bound_words(name: str, tokens: int, plan: Plan) -> str:
    bound = plan.bounds[name]
    cycles = "cycles of unknown length" if bound.cycles_s is None else f"{1e3 * bound.cycles_s:,.1f} ms of cycles"
    rate = f"{tokens / bound.seconds:,.0f} tokens/s"
    return (
        f"By the compiler, {name} at best: {rate}, {1e3 * bound.seconds:,.1f} ms a step "
        f"({1e3 * bound.memory_s:,.1f} ms of memory, {cycles})"
    )


def _heading(plan: Plan) -> Text:
    workload, topology = plan.workload, plan.topology
    mesh = [f"{axis}={size}" for axis, size in plan.placement.mesh.shape.items() if size > 1]
    capacity = kv_info(plan.config, workload).shape[2]
    types = [f"weights {workload.quantization.name}"] if workload.quantization else []
    types += [f"products of {workload.activations}"] if workload.activations else []
    types.append(workload.dtype)
    if workload.cache_dtype != workload.dtype:
        types.append(f"keys and values {workload.cache_dtype}")
    padded = f" (runs as {workload.rows})" if workload.rows != workload.batch else ""
    cache = f" (in a cache of {capacity:,})" if capacity != workload.context else ""
    return Text.assemble(
        (plan.name, "bold"),
        f", {parameter_count(plan.config) / 1e9:.2f}B parameters, on ",
        (topology.name, "bold"),
        f": {', '.join([f'{topology.devices} x {topology.device.kind}', *mesh])}\n",
        f"{', '.join(types)}, batch {workload.batch}{padded}, context {workload.context:,}{cache}",
    )


def _memory_table(plan: Plan) -> Table:
    capacity = plan.topology.device.usable_bytes
    # A plan that does not fit is drawn past the capacity.
    scale = max(capacity, plan.memory.total)
    table = Table(title=f"each device, by {'the compiler' if plan.by_compiler else 'estimate'}", title_justify="left")
    table.add_column("memory")
    table.add_column("GiB", justify="right")
    table.add_column("")
    before = 0
    for name, size in memory_parts(plan).items():
        # Both ends are rounded, so that the bars of the parts join without gaps.
        start, end = (round(BAR * at / scale) for at in (before, before + size))
        table.add_row(name, f"{size / GIB:.2f}", Text(" " * start + "█" * (end - start), style=COLOURS[name]))
        before += size
    table.add_section()
    room = Text("·" * round(BAR * capacity / scale), style="dim")
    table.add_row("together", f"{before / GIB:.2f}", Text(f"{before / capacity:.0%} of what there is"))
    table.add_row("there is", f"{capacity / GIB:.2f}", room)
    return table


def _verdict(plan: Plan) -> Text:
    if plan.fits:
        return Text("It fits.", style="green")
    refusal = plan.compilation.too_large if plan.compilation else None
    words = f"the compiler: {refusal}" if refusal else f"{_gib(plan.short_bytes)} short on each device"
    these = "".join(f"\n  {change}{_machine_words(change)}" for change in plan.alternatives)
    return Text(f"It does not fit: {words}." + (f" These would:{these}" if these else ""), style="red")


def _machine_words(change: str) -> str:
    """Of an alternative that is another machine, what that is."""
    option, name, *_ = change.split()
    if option != "--topology":
        return ""
    machine = find_topology(name)
    memory = f"{machine.total_bytes / GIB:6,.0f} GiB"
    return f"{'':{OPTION_WIDTH - len(change)}}{memory}, {machine.devices} x {machine.device.kind}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
