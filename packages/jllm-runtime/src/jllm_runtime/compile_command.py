"""Command: ``jllm compile``."""

import time
from typing import TYPE_CHECKING, Any

import click

from jllm_runtime.cli_options import (
    ACTIVATIONS,
    DEFAULT_DRAFT,
    DTYPES,
    KV_DTYPE,
    NO_CACHE,
    load,
    mesh_options,
    pop_options,
)

if TYPE_CHECKING:
    from jllm_runtime.model import Model

LOADING = ("dtype", "activations", "no_cache", "mesh", "sharding")


@click.command("compile")
@click.argument("model")
@click.option("--serve", is_flag=True, help="Compile what `jllm serve` runs, and not what `jllm generate` does.")
@click.option(
    "--batch", type=click.IntRange(min=1), help="Texts side by side  [default: 1; with --serve 16, its --max-batch]"
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help="Tokens of the longest text, prompt and answer  [default: 4096, or the model's]",
)
@click.option("--dtype", type=click.Choice(DTYPES), default=None, help="Load the weights as this type.")
@ACTIVATIONS
@click.option(
    "--lookup",
    type=int,
    default=0,
    help=f"Compile what runs with --lookup N; {DEFAULT_DRAFT} is what it is without a number.",
)
@KV_DTYPE
@NO_CACHE
@mesh_options
def compile_(
    model: str, serve: bool, batch: int | None, context: int | None, lookup: int, kv_dtype: Any, **options: Any
) -> None:
    """Compile what MODEL runs on this machine, so that later starts need not.

    The programs of `jllm generate` and of `jllm chat --lookup` are compiled side by side, for every size of the cache
    up to --context, and kept on disk (`jllm cache`). They serve this machine's devices, the same mesh and types, and
    this version of JAX. Requests with penalties have others, which are compiled when they come. With --serve they are
    those of the engine, for as many pages as the free memory holds now and for the defaults of the other options of
    `jllm serve`; on a CPU those of texts of up to 256 tokens.
    """
    if serve and (lookup or context is not None):
        raise click.UsageError("--lookup and --context are of `jllm generate`: leave them out, or --serve")
    from jllm_runtime.compile_cache import keeps_programs, use_compile_cache
    from jllm_runtime.errors import CacheError

    use_compile_cache()
    if not keeps_programs():
        raise CacheError("compiled programs are not kept here, so compiling them ahead is of no use; see JLLM_CACHE")
    loaded, _ = load(model, {**pop_options(options, LOADING), "no_compile_cache": False})

    from jllm_runtime.batch_compiler import compile_ahead

    start, count = time.perf_counter(), 0
    if serve:
        pages = _compile_engine(loaded, batch, kv_dtype)
        click.echo(f"programs of the engine with {pages:,} pages: {time.perf_counter() - start:.1f} s")
        return

    def show(name: str, seconds: float) -> None:
        nonlocal count
        count += 1
        click.echo(f"{name}: {seconds:.1f} s")

    # A default that is longer than the model's context would be an error nobody asked for.
    context = min(4096, loaded.config.context_length) if context is None else context
    compile_ahead(loaded, batch or 1, context, lookup, kv_dtype, show)
    click.echo(f"{count} programs in {time.perf_counter() - start:.1f} s")


def _compile_engine(model: "Model", batch: int | None, kv_dtype: Any) -> int:
    """Compile what an engine runs; the number of its pages."""
    from jllm_runtime.engine.config import EngineConfig
    from jllm_runtime.engine.warm_up import prepared_pages

    rows = EngineConfig.max_batch if batch is None else batch
    return prepared_pages(model, EngineConfig(max_batch=rows, kv_dtype=kv_dtype, warm_up=True).fitted(model))
