"""Sizes of the engine's programs, and what requests take on the devices beside programs and pages."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jllm_core.array_info import ArrayInfo
from jllm_core.config import ModelConfig
from jllm_core.recurrent_state import abstract_state
from jllm_core.sharding import Placement

from jllm_runtime.cache.contiguous import cache_info
from jllm_runtime.embedding import ROWS_AT_A_TIME, TOKENS_AT_A_TIME
from jllm_runtime.programs.paged_batch import STATE_AXES

STATE_BYTES = 9
"""Of each token of the vocabulary in a row of the TokenState: a count, whether it is of the prompt, and a bias."""


@dataclass(frozen=True)
class PagedSizes:
    """Sizes that the engine's programs are compiled for.

    Attributes:
        rows: rows of the decode program.
        pages: pages of the pool.
        page_size: tokens in a page.
        table_width: pages in a row's table.
        chunk_pages: pages of prompts that the prefill program takes.
        state_rows: rows of the TokenState, and of the pool of states.
        snapshots: copies of states beside the pool, which no program but a copy has to do with.
        decode_steps: width of ``Rows.known``.
        eos_ids: width of ``Rows.eos_ids``.
    """

    rows: int
    pages: int
    page_size: int
    table_width: int
    chunk_pages: int
    state_rows: int
    snapshots: int
    decode_steps: int
    eos_ids: int


def reserved_bytes(config: ModelConfig, rows: int, dtype: jnp.dtype, placement: Placement) -> int:
    """Bytes on each device for the TokenState, and for cache and states of a batch of embeddings, which run beside the
    steps.

    Args:
        config: the model.
        rows: state rows.
        dtype: of the activations.
        placement: where the model runs.
    """

    def local(info: ArrayInfo) -> int:
        return math.prod(placement.rules.sharding(info, placement.mesh).shard_shape(info.shape))

    state = local(ArrayInfo((rows, config.vocab_size), jnp.dtype(jnp.int32), STATE_AXES)) * STATE_BYTES
    nets = [abstract_state(config.delta_net, ROWS_AT_A_TIME)] if config.delta_net else []
    states: int = sum(local(info) * info.dtype.itemsize for info in jax.tree.leaves(nets)) * len(
        config.layers_with("delta_net")
    )
    cache = local(cache_info(config, 1, min(TOKENS_AT_A_TIME, config.context_length), dtype, placement))
    return state + states + config.kv_arrays * cache * jnp.dtype(dtype).itemsize
