"""Lowering of the engine's programs from descriptions of their arguments: nothing is allocated, and nothing runs.

For whoever wants them compiled before they are needed: the engine's warm-up, with the model's own arrays, and a plan,
for devices that are not there.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jllm_core.array_info import ArrayInfo
from jllm_core.backends.base import Backend
from jllm_core.config import ModelConfig
from jllm_core.quantization.keys_values import Slots
from jllm_core.weights import Weights

from jllm_runtime.cache.descriptions import described_slots
from jllm_runtime.cache.paged import Pages, pages_info
from jllm_runtime.cache.state_pool import state_pool_info
from jllm_runtime.logits_processors import Rows
from jllm_runtime.penalties import TokenState
from jllm_runtime.programs import paged_batch
from jllm_runtime.programs.paged_sizes import PagedSizes
from jllm_runtime.sampling import SamplingArrays

MASK_BITS = 32
"""Tokens in a word of ``Rows.allowed``."""

Lower = Callable[[], jax.stages.Lowered]


def lowered_programs(
    weights: Weights, config: ModelConfig, sizes: PagedSizes, dtype: jnp.dtype, backend: Backend
) -> Mapping[str, Lower]:
    """The engine's programs by name, each lowered when it is called.

    Args:
        weights: the model's arrays, or their descriptions.
        config: the model's architecture.
        sizes: what they are compiled for.
        dtype: of the cached keys and values.
        backend: the model's.
    """
    pages, number = describe_pages(config, sizes, dtype, backend), host_array(jnp.int32)
    state, rows = describe_state(config, sizes, backend), describe_rows(config, sizes)
    chunk = sizes.chunk_pages
    tokens = host_array(jnp.int32, chunk, sizes.page_size)
    each = host_array(jnp.int32, chunk)
    tables = host_array(jnp.int32, chunk, sizes.table_width)
    return {
        "decode": partial(paged_batch.decode_rows.lower, weights, pages, state, rows, number, config),
        "prefill": partial(paged_batch.prefill_pages.lower, weights, pages, tokens, each, each, tables, each, config),
    }


def describe_pages(config: ModelConfig, sizes: PagedSizes, dtype: jnp.dtype, backend: Backend) -> Pages:
    """The pool as ``paged_batch.empty_pages`` makes it."""
    placement = backend.placement
    info = pages_info(config, sizes.pages, sizes.page_size, dtype, placement)

    def described(part: ArrayInfo) -> Any:
        sharding = None if placement is None else placement.rules.sharding(part, placement.mesh)
        return jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=sharding)

    def slots(layer: int) -> Slots:
        heads = info.shape[1] if config.mixer(layer) == "attention" else 0
        values = replace(info, shape=(info.shape[0], heads, *info.shape[2:]))
        return jax.tree.map(described, described_slots(values))  # type: ignore[no-any-return]

    # Keys and values have the same description.
    each = [slots(layer) for layer in range(config.num_layers)]
    return Pages(each, each, backend, jax.tree.map(described, state_pool_info(config, sizes.state_rows)))


def describe_state(config: ModelConfig, sizes: PagedSizes, backend: Backend) -> TokenState:
    """The state as ``paged_batch.empty_state`` makes it."""
    placement, shape = backend.placement, (sizes.state_rows, config.vocab_size)
    sharding = (
        None if placement is None else NamedSharding(placement.mesh, placement.spec(shape, *paged_batch.STATE_AXES))
    )

    def described(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return TokenState(described(jnp.int32), described(jnp.bool_), described(jnp.float32))


def describe_rows(config: ModelConfig, sizes: PagedSizes) -> Rows:
    """The rows of a step as the executor makes them, on the host."""
    batch = sizes.rows
    whole, real, flag = (host_array(dtype, batch) for dtype in (jnp.int32, jnp.float32, jnp.bool_))
    return Rows(
        tables=host_array(jnp.int32, batch, sizes.table_width),
        tokens=whole,
        positions=whole,
        done=flag,
        limits=whole,
        eos_ids=host_array(jnp.int32, batch, sizes.eos_ids),
        known=host_array(jnp.int32, batch, sizes.decode_steps),
        sampling=SamplingArrays(real, whole, real, real, host_array(jnp.uint32, batch, 2)),
        state_rows=whole,
        penalized=flag,
        repetition=real,
        presence=real,
        frequency=real,
        earliest_end=whole,
        constrained=flag,
        allowed=host_array(jnp.int32, batch, -(-config.vocab_size // MASK_BITS)),
        logprobs=flag,
    )


def host_array(dtype: Any, *shape: int) -> Any:
    """The description of a numpy array, which a program may place as it likes."""
    return jax.ShapeDtypeStruct(shape, dtype)
