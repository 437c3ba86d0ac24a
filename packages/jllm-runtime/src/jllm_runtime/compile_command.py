"""Command: ``jllm compile``."""

import time
from typing import Any

import click

from jllm_runtime.cli_options import DEFAULT_DRAFT, DTYPES, KV_DTYPES, NO_CACHE, load, mesh_options, pop_options

LOADING = ("dtype", "no_cache", "mesh", "sharding")


@click.command("compile")
@click.argument("model")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Prompts side by side.")
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help="Tokens of the longest text, prompt and answer  [default: 4096, or the model's]",
)
@click.option("--dtype", type=click.Choice(DTYPES), default=None, help="Load the weights as this type.")
@click.option(
    "--lookup",
    type=int,
    default=0,
    help=f"Compile what runs with --lookup N; {DEFAULT_DRAFT} is what it is without a number.",
)
@click.option("--kv-dtype", type=click.Choice(KV_DTYPES), default=None, help="Type of the KV cache.")
@NO_CACHE
@mesh_options
def compile_(model: str, batch: int, context: int | None, lookup: int, kv_dtype: Any, **options: Any) -> None:
    """Compile what MODEL runs on this machine, so that later starts need not.

    The programs of `jllm generate` and of `jllm chat --lookup` are compiled side by side, for every size of the cache
    up to --context, and kept on disk (`jllm cache`). They serve this machine's devices, the same mesh and types, and
    this version of JAX. Requests with penalties have others, which are compiled when they come.
    """
    from jllm_runtime.compile_cache import keeps_programs, use_compile_cache
    from jllm_runtime.errors import CacheError

    use_compile_cache()
    if not keeps_programs():
        raise CacheError("compiled programs are not kept here, so compiling them ahead is of no use; see JLLM_CACHE")
    loaded, _ = load(model, {**pop_options(options, LOADING), "no_compile_cache": False})

    from jllm_runtime.batch_compiler import compile_ahead

    start, count = time.perf_counter(), 0

    def show(name: str, seconds: float) -> None:
        nonlocal count
        count += 1
        click.echo(f"{name}: {seconds:.1f} s")

    # A default that is longer than the model's context would be an error nobody asked for.
    context = min(4096, loaded.config.context_length) if context is None else context
    compile_ahead(loaded, batch, context, lookup, kv_dtype, show)
    click.echo(f"{count} programs in {time.perf_counter() - start:.1f} s")
