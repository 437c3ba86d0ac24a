"""Warm-up of an engine: its programs compiled, and its pool fitted to what they need, before the first request."""

from collections.abc import Callable

import jax

from jllm_runtime.cache.paged import shortest_table
from jllm_runtime.compile_ahead import TOO_LARGE, Lowerings, compile_together, needed_bytes
from jllm_runtime.engine.config import EngineConfig
from jllm_runtime.engine.executor import MIN_EOS_IDS
from jllm_runtime.engine.pool_size import (
    device_page_bytes,
    device_state_bytes,
    fitted_pages,
    free_bytes,
    states_refused,
)
from jllm_runtime.model import Model
from jllm_runtime.programs.paged_lowering import lowered_programs
from jllm_runtime.programs.paged_sizes import PagedSizes, reserved_bytes
from jllm_runtime.progress_bar import progress_bar


def prepared_pages(model: Model, config: EngineConfig, progress: bool | None = None) -> int:
    """The number of pages of the pool, for which the programs are compiled now, if the engine warms up.

    Args:
        model: the model.
        config: sizes; the number of pages is where the search begins, or all there is where it is given.
        progress: show a bar on standard error; None shows it on a terminal or in a notebook.

    Raises:
        EngineError: pool and programs do not fit on the devices.
        JaxRuntimeError: a program cannot be compiled, for another reason.
    """
    pages, free = config.page_count(model), free_bytes(model)
    if not config.fits_pages(model):
        return pages

    states = device_state_bytes(model, config.state_copies)
    if free is not None and free < states:  # said before minutes of compilation
        raise states_refused(states, config.state_copies)
    reserved = reserved_bytes(model.config, config.max_batch, model.weights.dtype, model.placement)

    def needs(pages: int) -> int | None:
        programs = lowered(model, config, pages)
        with progress_bar("Compiling programs", len(programs), progress) as advance:
            try:
                compiled = compile_together(programs, lambda *_: advance())
            except jax.errors.JaxRuntimeError as error:
                if TOO_LARGE not in str(error) or free is None:
                    raise
                return None
        return reserved + max(map(needed_bytes, compiled.values()))

    if free is None:  # nothing to fit into
        needs(pages)
        return pages
    one = device_page_bytes(model, config.page_size, config.cache_dtype(model))
    return fitted_pages(pages, one, free - states, needs, fixed=config.pages is not None)


def program_sizes(model: Model, config: EngineConfig, pages: int, rows: int) -> PagedSizes:
    """The sizes of the engine's programs for texts that are not very long."""
    return PagedSizes(
        rows=rows,
        pages=pages,
        page_size=config.page_size,
        table_width=shortest_table(model.backend, model.config, config.page_size),
        chunk_pages=config.chunk_pages(model),
        state_rows=config.max_batch,
        snapshots=config.snapshots or 0,
        decode_steps=config.decode_steps,
        eos_ids=MIN_EOS_IDS,
    )


def lowered(model: Model, config: EngineConfig, pages: int) -> Lowerings:
    """What lowers each program, by its name."""
    programs: dict[str, Callable[[], jax.stages.Lowered]] = {}
    for rows in config.sizes(model):
        sizes = program_sizes(model, config, pages, rows)
        found = lowered_programs(model.weights, model.config, sizes, config.cache_dtype(model), model.backend)
        programs |= {"prefill": found["prefill"], f"decode of {rows} rows": found["decode"]}
    return programs
