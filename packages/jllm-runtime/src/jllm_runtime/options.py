"""What commands that run a model have in common: options, and the loading that they ask for."""

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from jllm_runtime.loading import Model

SHARDINGS = ("tensor", "data-tensor", "expert-tensor", "fsdp", "sequence")
"""The names of ``jllm_core.sharding.PRESETS``; spelt out, so that ``--help`` need not wait for JAX."""


def mesh_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say on which devices a model runs, and how it is laid out over them."""
    options = (
        click.option("--mesh", help="Devices along each axis, such as data=2,tensor=4  [default: all on tensor]"),
        click.option(
            "--sharding",
            type=click.Choice(SHARDINGS),
            default=SHARDINGS[0],
            show_default=True,
            help="How weights and activations are laid out over the mesh.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def load(model: str, loading: Mapping[str, Any]) -> tuple["Model", float]:
    """The model, and how many seconds it took.

    Args:
        model: as a user names it.
        loading: ``dtype``, ``no_compile_cache``, ``mesh`` and ``sharding``, as options have them.
    """
    from jllm_core.sharding import PRESETS

    from jllm_runtime.compile_cache import use_compile_cache
    from jllm_runtime.loading import load_model
    from jllm_runtime.mesh import make_mesh, parse_mesh

    start = time.perf_counter()
    if not loading["no_compile_cache"]:
        use_compile_cache()
    mesh = None if loading["mesh"] is None else make_mesh(parse_mesh(loading["mesh"]))
    loaded = load_model(model, mesh, loading["dtype"], PRESETS[loading["sharding"]])
    return loaded, time.perf_counter() - start
