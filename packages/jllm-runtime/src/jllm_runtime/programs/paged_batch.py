"""Compiled programs of the engine: over pages instead of rows of slots, else as those of ``batch``.

One program takes pages of prompts, one decodes: each is compiled for a number of rows and a width of the page table,
and serves any mix of requests.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from jllm_core.backends.base import Backend
from jllm_core.config import ModelConfig
from jllm_core.model import hidden_states, unembed
from jllm_core.quantization.keys_values import Slots
from jllm_core.recurrent_state import RecurrentState
from jllm_core.sharding import Placement
from jllm_core.weights import Weights

from jllm_runtime.cache.contiguous import empty_slots, started
from jllm_runtime.cache.paged import LOGICAL_AXES, PagedCache, Pages
from jllm_runtime.cache.state_pool import copied_states, empty_states, placed_pool
from jllm_runtime.logits_processors import Logprobs, Rows, no_logprobs, process_logits, token_logprobs
from jllm_runtime.penalties import TokenState
from jllm_runtime.sampling import NO_NUMBERS, not_numbers, sample

STATE_AXES = (None, "vocab")
"""Logical axes of the arrays of a TokenState."""


@partial(jax.jit, static_argnames=("shape", "dtype", "config", "backend", "state_rows"))
def empty_pages(
    shape: tuple[int, ...], dtype: jnp.dtype, config: ModelConfig, backend: Backend, state_rows: int
) -> Pages:
    """Pages whose arrays have this shape, and so many states of each delta net, made in place. What they hold before
    they are filled is never seen; on a CPU it is whatever was there."""

    def zeros() -> list[Slots]:
        # Delta nets have pages of no heads: no memory, and no layer counted otherwise than the model counts it.
        none = (shape[0], 0, *shape[2:])
        shapes = [shape if config.mixer(layer) == "attention" else none for layer in range(config.num_layers)]
        return [empty_slots(each, dtype, backend.placement, LOGICAL_AXES) for each in shapes]

    def pages() -> Pages:
        return Pages(zeros(), zeros(), backend)

    # PagedCache.append masks what is not filled, for pages go from one text to another as they are.
    made = started(pages, backend, True, LOGICAL_AXES)
    return replace(made, states=empty_states(config, state_rows, backend))


@partial(jax.jit, static_argnames=("state_rows", "vocabulary", "placement"))
def empty_state(state_rows: int, vocabulary: int, placement: Placement | None) -> TokenState:
    """The state of rows that no sequence has used."""
    shape = (state_rows, vocabulary)
    state = TokenState(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool), jnp.zeros(shape, jnp.float32))
    return _split_state(state, placement)


@partial(jax.jit, static_argnames=("placement",), donate_argnames=("state",))
def set_state_row(
    state: TokenState,
    state_row: Int[Array, ""],
    prompted: Bool[Array, " V"],
    bias: Float[Array, " V"],
    placement: Placement | None,
) -> TokenState:
    """Begin a row of the state anew: nothing generated, this prompt, this bias."""
    begun = TokenState(jnp.zeros(prompted.shape, jnp.int32), prompted, bias)
    return _split_state(jax.tree.map(lambda rows, row: rows.at[state_row].set(row), state, begun), placement)


@partial(jax.jit, static_argnames=("config", "count", "backend"))
def empty_snapshots(config: ModelConfig, count: int, backend: Backend) -> dict[int, RecurrentState]:
    """Room for so many snapshots of the states of each delta net."""
    return empty_states(config, count, backend)


@partial(jax.jit, static_argnames=("placement",), donate_argnames=("pool",))
def copy_states(
    pool: dict[int, RecurrentState],
    to: Int[Array, ""],
    source: dict[int, RecurrentState],
    row: Int[Array, ""],
    placement: Placement | None,
) -> dict[int, RecurrentState]:
    """The pool, whose row ``to`` now has the states of a row of another: a snapshot made, or restored."""
    return placed_pool(copied_states(pool, to, source, row), placement)


@partial(jax.jit, static_argnames=("config",), donate_argnames=("pages",))
def prefill_pages(
    weights: Weights,
    pages: Pages,
    tokens: Int[Array, "M C"],
    starts: Int[Array, " M"],
    lengths: Int[Array, " M"],
    tables: Int[Array, "M n"],
    state_rows: Int[Array, " M"],
    config: ModelConfig,
) -> tuple[Pages, Float[Array, "M C D"]]:
    """Take pages of prompts into the cache: of one prompt, or of several.

    Each row is a page, computed as if it were alone: the same tokens leave the same bits, whoever's pages are beside
    them, and whichever row they are.

    Args:
        weights: the model.
        pages: every page of a text before a row's ``start`` is filled, or is another row. In a model with states it is
            filled: each page goes on from the state that the one before it has left.
        tokens: the prompts from ``starts`` on, filled up with anything.
        starts: multiples of the page size.
        lengths: tokens in the whole prompt of each row.
        tables: the pages of each row's text; rows of padding have none.
        state_rows: where each row's states are; beyond the last for none.
        config: the model's architecture.

    Returns:
        The pages, and the hidden state of each token.
    """
    # What fills a prompt's last page up is computed along: causal, so that no token before it sees it, and written
    # where the text's next tokens will come.
    positions = starts[:, None] + jnp.arange(tokens.shape[1])
    # A prompt's last token is decode's first input, and what follows it here is none of the text: a state that took
    # them in would have taken them in twice, or be another text's.
    counts = jnp.clip(lengths - 1 - starts, 0, tokens.shape[1])
    cache = PagedCache(pages, tables, state_rows, counts, begins=starts == 0)
    hidden, cache = hidden_states(tokens, positions, weights, config, cache, pages.backend, lengths)
    return cache.pages, hidden


@partial(jax.jit, static_argnames=("placement",))
def prompt_logprobs(
    weights: Weights,
    hidden: Float[Array, "M C D"],
    row: Int[Array, ""],
    following: Int[Array, " C"],
    placement: Placement | None,
) -> Logprobs:
    """The log-probability of the token that follows each of a page of a prompt, which was this row of the prefill."""
    # By XLA on every backend: a softmax over the vocabulary for each token of a page, once a request that asks for it.
    logprobs: Logprobs = _replicated(token_logprobs(unembed(hidden[row], weights), following), placement)
    return logprobs


@partial(jax.jit, static_argnames=("config",), donate_argnames=("pages", "state"))
def decode_rows(
    weights: Weights,
    pages: Pages,
    state: TokenState,
    rows: Rows,
    steps: Int[Array, ""],
    config: ModelConfig,
) -> tuple[Pages, TokenState, Int[Array, "B L"], Logprobs]:
    """Generate up to ``steps`` tokens for each row in one program.

    Args:
        weights: the model.
        pages: every position before ``rows.positions`` is in them, and in the states.
        state: the tokens of each state row so far.
        rows: the requests.
        steps: at most L, the width of ``rows.known``; fewer are made when every row ends.
        config: the model's architecture.

    Returns:
        The pages, the state, the new tokens in order, -1 where a row had ended, NO_NUMBERS where the model fails it,
        and their log-probabilities, which mean something for the rows that asked for them.
    """

    def unfinished(carry: tuple[Any, ...]) -> Array:
        step, _, _, done, *_ = carry
        going_on: Array = (step < steps) & ~jnp.all(done)
        return going_on

    def add_one(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, token, position, done, pages, state, made, logprobs = carry
        # Pages for the whole block have been given out before: tables do not change within a program.
        # A row that has ended, or is blank, neither takes a token in nor begins a text: its states stay as they are.
        cache = PagedCache(pages, tables, own_states, jnp.where(done, 0, 1), begins=(position == 0) & ~done)
        hidden, cache = hidden_states(token[:, None], position[:, None], weights, config, cache, pages.backend)
        logits: Array = (pages.backend.unembed or unembed)(hidden[:, 0], weights)
        adjusted = process_logits(logits, rows, state, position + 1)
        drawn = sample(adjusted, position + 1, rows.sampling, pages.backend)
        # Tokens that are known already: a sequence that had to give way is fed its own answer again, not drawn anew.
        known = jnp.asarray(rows.known)[:, step]
        chosen = jnp.where(known >= 0, known, drawn)
        # A softmax over the vocabulary for every row, so only where one asks for it.
        now = jax.lax.cond(
            jnp.any(rows.logprobs), lambda: token_logprobs(logits, chosen), lambda: no_logprobs(len(chosen))
        )
        logprobs = jax.tree.map(lambda all, one: all.at[:, step].set(one), logprobs, now)
        broken = not_numbers(logits) & (known < 0)
        made = made.at[:, step].set(jnp.where(done, -1, jnp.where(broken, NO_NUMBERS, chosen)))
        # Counted here and not on the host: penalties of the next token in the same program go by it.
        state = state.counted(state_rows, chosen, ~done)
        token, position = jnp.where(done, token, chosen), jnp.where(done, position, position + 1)
        done = done | broken | jnp.any(token[:, None] == rows.eos_ids, axis=-1) | (position >= rows.limits)
        return step + 1, token, position, done, cache.pages, state, made, logprobs

    shape, tables, state_rows = rows.known.shape, jnp.asarray(rows.tables), jnp.asarray(rows.state_rows)
    # A row for each state row, as always on an accelerator: the states are changed where they lie.
    own_states = None if len(state_rows) == len(state.generated) else state_rows
    begun = (jnp.int32(0), jnp.asarray(rows.tokens), jnp.asarray(rows.positions), jnp.asarray(rows.done))
    carry = (*begun, pages, state, jnp.full(shape, -1, jnp.int32), no_logprobs(*shape))
    *_, pages, state, made, logprobs = jax.lax.while_loop(unfinished, add_one, carry)
    # Pages and state stay split over the mesh; what the host reads is whole on every device.
    made, logprobs = _replicated((made, logprobs), pages.backend.placement)
    # Said again behind the loop, or the compiler leaves the states split as the rows are.
    pages = replace(pages, states=placed_pool(pages.states, pages.backend.placement))
    return pages, _split_state(state, pages.backend.placement), made, logprobs


def _split_state(state: TokenState, placement: Placement | None) -> TokenState:
    """The state split over the mesh as the logits are, to which each device adds its own part of it."""
    if placement is None:
        return state
    split: TokenState = jax.tree.map(lambda array: placement.constrain(array, *STATE_AXES), state)
    return split


def _replicated(tree: Any, placement: Placement | None) -> Any:
    """The arrays whole on every device of the mesh, so that any process can read them."""
    if placement is None:
        return tree
    return jax.tree.map(lambda array: placement.constrain(array, *[None] * array.ndim), tree)
