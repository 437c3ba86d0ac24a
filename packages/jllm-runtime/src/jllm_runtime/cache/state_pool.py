"""Pool of recurrent states: what the delta nets keep of each running sequence, beside the pages of an engine.

A sequence has a state row of the pool as long as it runs. Nothing is cleared between two of them: a text that begins
reads zeros, whatever its state row holds.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int
from jllm_core.array_info import ArrayInfo
from jllm_core.backends.base import Backend
from jllm_core.config import ModelConfig
from jllm_core.recurrent_state import STATE_AXES, RecurrentState, abstract_state
from jllm_core.sharding import Placement

from jllm_runtime.cache.contiguous import placed, placed_state, started

# Any row of a batch may have any state row, so these are whole along the data axis, as pages are.
POOL_AXES = RecurrentState(**{name: (None, *axes[1:]) for name, axes in vars(STATE_AXES).items()})
"""Logical axes of the arrays of the pool."""


def state_pool_info(config: ModelConfig, state_rows: int) -> dict[int, RecurrentState]:
    """The description of the pool: the states of each delta net, by the number of its layer; none in other models."""
    if config.delta_net is None:
        return {}
    each, axes = abstract_state(config.delta_net, state_rows), vars(POOL_AXES)
    info = RecurrentState(**{name: replace(array, logical_axes=axes[name]) for name, array in vars(each).items()})
    return dict.fromkeys(config.layers_with("delta_net"), info)


def empty_states(config: ModelConfig, state_rows: int, backend: Backend) -> dict[int, RecurrentState]:
    """A pool whose state rows nobody has used. What they hold is never seen; on a CPU it is whatever was there."""

    def empty(info: ArrayInfo) -> Array:
        def zeros() -> Array:
            return placed(jnp.zeros(info.shape, info.dtype), backend.placement, info.logical_axes)

        return started(zeros, backend, True, info.logical_axes)

    states: dict[int, RecurrentState] = jax.tree.map(empty, state_pool_info(config, state_rows))
    return states


def take_states(
    pool: RecurrentState,
    state_rows: Int[Array, " B"] | None,
    begins: Bool[Array, " B"] | None,
    placement: Placement | None,
) -> RecurrentState:
    """The states of the rows of a step.

    Args:
        pool: the states of all state rows.
        state_rows: where those of each row are; the states of a row without any mean nothing. None: row b's are in
            state row b, and nothing is moved.
        begins: rows whose text begins, with zeros; None where none does.
        placement: where the pool lives.
    """

    def take(states: Array) -> Array:
        taken = states if state_rows is None else jnp.take(states, state_rows, axis=0, mode="clip")
        # Chosen and not multiplied: the last user may have left what is no number.
        return taken if begins is None else jnp.where(begins.reshape(-1, *[1] * (states.ndim - 1)), 0, taken)

    return placed_state(jax.tree.map(take, pool), placement)


def put_states(
    pool: RecurrentState, state_rows: Int[Array, " B"] | None, states: RecurrentState, placement: Placement | None
) -> RecurrentState:
    """The pool with these states, where ``take_states`` found them; those of rows without a state row are dropped."""

    def put(all: Array, new: Array, axes: tuple[str | None, ...]) -> Array:
        return placed(new if state_rows is None else all.at[state_rows].set(new, mode="drop"), placement, axes)

    axes, new = vars(POOL_AXES), vars(states)
    return RecurrentState(**{name: put(all, new[name], axes[name]) for name, all in vars(pool).items()})


def copied_states(
    pool: dict[int, RecurrentState], to: Int[Array, ""], source: dict[int, RecurrentState], row: Int[Array, ""]
) -> dict[int, RecurrentState]:
    """The pool, whose row ``to`` now has the states of a row of another pool."""

    def copied(all: Array, others: Array) -> Array:
        return all.at[to].set(others[row])

    states: dict[int, RecurrentState] = jax.tree.map(copied, pool, source)
    return states


def placed_pool(pool: dict[int, RecurrentState], placement: Placement | None) -> dict[int, RecurrentState]:
    """The pool laid out over the mesh."""
    axes = vars(POOL_AXES)
    return {
        layer: RecurrentState(**{name: placed(all, placement, axes[name]) for name, all in vars(states).items()})
        for layer, states in pool.items()
    }
