"""Command: ``jllm plan``."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from jllm_runtime.cli_options import ACTIVATIONS, DTYPES, KV_DTYPE

if TYPE_CHECKING:
    from jllm_runtime.cache.contiguous import KVDtype

DEFAULT_CONTEXT = 4096
# Values of other modules, repeated here because importing those would make --help wait for JAX. Tests compare them.
DEFAULT_PAGE_SIZE = 64
"""``engine_memory.DEFAULT_PAGE_SIZE``."""
QUANTIZE = ("int8", "int4", "none")
"""Names of ``assumptions.QUANTIZATIONS``, and ``assumptions.UNQUANTIZED``."""
GROUPS = ("32", "64", "128")
"""``jllm_core.quantization.arrays.GROUPS``."""


def _list_names(context: click.Context, parameter: click.Parameter, asked: bool) -> None:
    if not asked or context.resilient_parsing:
        return
    from jllm_runtime.planner.catalogue import PUBLISHED
    from jllm_runtime.planner.topologies import TOPOLOGIES

    click.echo("Models (and their variants of the same architecture, such as -Instruct and -Chat):")
    click.echo("\n".join(f"  {name}" for name in PUBLISHED))
    click.echo("Machines (of GPUs also several, such as 4xh100):")
    click.echo("\n".join(f"  {each.name:10} {each.devices} x {each.device.kind}" for each in TOPOLOGIES.values()))
    context.exit()


@click.command()
@click.argument("model_or_config")
@click.option("--topology", help="The machine, such as v2-8, v5e-4, t4, 2xt4, h100 or cpu.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences side by side.")
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help="Tokens of a sequence, prompt and output  [default: 4096, or the model's]",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Type of the arrays  [default: the checkpoint's own, else bfloat16]",
)
@click.option(
    "--quantize",
    type=click.Choice(QUANTIZE),
    help="Store weight matrices in 8 or 4 bits  [default: as the checkpoint has them]",
)
@click.option(
    "--group",
    type=click.Choice(GROUPS),
    help="With --quantize: inputs that share a scale  [default: all for int8, 32 for int4]",
)
@click.option("--offsets", is_flag=True, help="With --quantize int4: an offset for each group.")
@click.option("--embedding", type=click.Choice(["keep", "int8"]), help="With --quantize: the embedding in 8 bits, too.")
@ACTIVATIONS
@KV_DTYPE
@click.option("--mesh", help="Devices along each axis, such as data=2,tensor=4  [default: as suits the model]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, sizes in bytes.")
@click.option(
    "--png", type=click.Path(path_type=Path, dir_okay=False), help="Draw the memory of each device and the mesh."
)
@click.option("--compile", "ask_compiler", is_flag=True, help="Ask the machine's compiler. No TPU or GPU is needed.")
@click.option(
    "--engine", is_flag=True, help="Plan `jllm serve`'s engine: its programs and its pages. Asks the compiler."
)
@click.option(
    "--page-size",
    type=click.IntRange(min=1),
    help=f"Tokens in a page of the engine  [default: {DEFAULT_PAGE_SIZE}]",
)
@click.option(
    "--list",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_names,
    help="List the models and machines that are known by name, and exit.",
)
def plan(
    model_or_config: str,
    topology: str | None,
    batch: int,
    context: int | None,
    dtype: str | None,
    quantize: str | None,
    group: str | None,
    offsets: bool,
    embedding: str | None,
    activations: Literal["int8"] | None,
    kv_dtype: "KVDtype | None",
    mesh: str | None,
    as_json: bool,
    png: Path | None,
    ask_compiler: bool,
    engine: bool,
    page_size: int | None,
) -> None:
    """Plan a model for a machine: memory of each device, and the best decode rate.

    MODEL_OR_CONFIG is the name of a published model (Qwen3-14B), a checkpoint, its model.json, or anything that
    `jllm generate` takes. Nothing is allocated or converted, and no weights are downloaded: of a model on the hub that
    is not known by name, config.json is read. The exit code is 1 if it does not fit.
    """

    from jllm_runtime.mesh import parse_mesh
    from jllm_runtime.planner.assumptions import assume
    from jllm_runtime.planner.engine_memory import engine_sizes
    from jllm_runtime.planner.memory import Workload
    from jllm_runtime.planner.model_configs import find_model
    from jllm_runtime.planner.plan import default_placement, for_model, make_placement, make_plan
    from jllm_runtime.planner.topologies import find_topology

    if topology is None:
        raise click.UsageError(
            "--topology is missing: the machine to plan for, such as v5e-1; `jllm plan --list` has all"
        )
    if page_size is not None and not engine:
        raise click.UsageError("--page-size is of the engine's pages: add --engine")
    if page_size is not None and page_size & (page_size - 1):
        raise click.BadParameter(f"must be a power of two, got {page_size}", param_hint="--page-size")
    if quantize in (None, "none"):
        for name, given in (("--group", group), ("--offsets", offsets), ("--embedding", embedding == "int8")):
            if given:
                raise click.UsageError(f"{name} says how matrices are quantised: add --quantize int8 or int4")
    machine = find_topology(topology)
    # Before the model is looked up, which may take a while.
    asked = None if mesh is None else make_placement(machine, parse_mesh(mesh))
    if png is not None:
        from jllm_runtime.planner.memory_plot import check_plot, draw_plan

        # Before the plan, which may take the compiler a minute.
        check_plot(png)
    found = find_model(model_or_config)
    placement = default_placement(found.config, machine) if asked is None else for_model(asked, found.config)
    types = assume(
        *(found, dtype, quantize, kv_dtype),
        group=int(group) if group else None,
        offsets=offsets,
        embedding=8 if embedding == "int8" else None,
    )
    workload = Workload(
        batch=batch,
        # A default that is longer than the model's context would be an error nobody asked for.
        context=min(DEFAULT_CONTEXT, found.config.context_length) if context is None else context,
        dtype=types.dtype,
        quantization=types.quantization,
        activations=activations,
        kv_dtype=kv_dtype,
    )
    sizes = None
    if engine:
        sizes = engine_sizes(
            found.config, workload, placement, machine.device, DEFAULT_PAGE_SIZE if page_size is None else page_size
        )
    made = make_plan(
        *(found.name, found.config, machine, workload, placement, ask_compiler or engine, types.words), engine=sizes
    )
    if as_json:
        from jllm_runtime.planner.report import as_json as plan_as_json

        click.echo(json.dumps(plan_as_json(made), ensure_ascii=False))
    else:
        from rich.console import Console

        from jllm_runtime.planner.report import print_plan

        print_plan(made, Console())
    if png is not None:
        draw_plan(made, png)
    sys.exit(0 if made.fits else 1)
