"""Compiled programs of ``generate``, over a contiguous cache.

Each is compiled once for a model, a batch size and a cache capacity, and serves any mix of requests: lengths, limits
and sampling parameters are arrays. The cache is donated, so it is changed in place. With penalties a program is another
one: those without do not carry arrays of the vocabulary's size.
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
from jllm_core.weights import Weights

from jllm_runtime.cache.contiguous import PREFILL_CHUNK, ContiguousCache, placed, zero_cache
from jllm_runtime.penalties import Penalties
from jllm_runtime.sampling import NO_NUMBERS, SamplingArrays, not_numbers, sample
from jllm_runtime.speculative.prompt_lookup import Patience, find_draft

# So long a text may go unseen by the caller, who looks for stop texts and for an end only between two calls.
DECODE_BLOCK = 32
"""Most tokens that one call of ``decode`` adds to each row."""


@partial(jax.jit, static_argnames=("shape", "dtype", "config", "backend"))
def empty_cache(shape: tuple[int, ...], dtype: jnp.dtype, config: ModelConfig, backend: Backend) -> ContiguousCache:
    """A cache whose arrays have this shape, made in place."""

    # Kernels read whole vectors of slots, so a capacity of whole chunks is one that they pass over where it is empty.
    return zero_cache(shape, dtype, config, backend, backend.reads_filled_only and shape[2] % PREFILL_CHUNK == 0)


@partial(jax.jit, static_argnames=("capacity",))
def grow_cache(cache: ContiguousCache, capacity: int) -> ContiguousCache:
    """The same keys and values with more slots in each row. States are left out: to pass them on is to copy them."""

    def grow(slots: Array) -> Array:
        more = [(0, capacity - slots.shape[2]) if axis == 2 else (0, 0) for axis in range(slots.ndim)]
        return placed(jnp.pad(slots, more), cache.backend.placement)

    # Scales of int8 slots are leaves of their own, one axis shorter: the axis of the slots is the third of both.
    keys, values = jax.tree.map(grow, (cache.keys, cache.values))
    return replace(cache, keys=keys, values=values, states={})


@partial(jax.jit, static_argnames=("config", "size"), donate_argnames=("cache", "last_hidden"))
def prefill(
    weights: Weights,
    cache: ContiguousCache,
    tokens: Int[Array, "B S"],
    lengths: Int[Array, " B"],
    last_hidden: Float[Array, "B D"],
    chunks: tuple[Int[Array, ""], Int[Array, ""]],
    config: ModelConfig,
    size: int = PREFILL_CHUNK,
) -> tuple[ContiguousCache, Float[Array, "B D"]]:
    """Take aligned chunks of every prompt into the cache, one after another.

    Args:
        weights: the model.
        cache: what the chunks before have left.
        tokens: the prompts, from position 0, filled up to the cache's capacity with anything.
        lengths: tokens in each prompt.
        last_hidden: the hidden state of each prompt's last token, for those that ended in earlier chunks.
        chunks: the first chunk to take, and the one to stop before; chunk i is positions ``i*C .. (i+1)*C - 1``.
        config: the model's architecture.
        size: C, a multiple of PREFILL_CHUNK.

    Returns:
        The cache, and ``last_hidden`` with the prompts that end in these chunks.
    """
    batch = tokens.shape[0]

    # A loop inside the program, not one call a chunk: the cache stays donated, and the host has nothing to wait for.
    def take(chunk: Array, carry: tuple[ContiguousCache, Array]) -> tuple[ContiguousCache, Array]:
        cache, last_hidden = carry
        start = chunk * size
        piece = jax.lax.dynamic_slice_in_dim(tokens, start, size, axis=1)
        positions = jnp.broadcast_to(start + jnp.arange(size), (batch, size))
        cache = cache.counting(jnp.clip(lengths - start, 0, size))
        hidden, cache = hidden_states(piece, positions, weights, config, cache, cache.backend, lengths)
        # Prompts end in different chunks. Only the state behind a prompt's last token is needed: logits of all of them
        # would be V numbers a token.
        last = lengths - 1 - start
        ends_here = (last >= 0) & (last < size)
        end = jnp.take_along_axis(hidden, jnp.clip(last, 0, size - 1)[:, None, None], axis=1)[:, 0]
        return cache.counting(None), jnp.where(ends_here[:, None], end, last_hidden)

    cache, last_hidden = jax.lax.fori_loop(*chunks, take, (cache, last_hidden))
    return cache, replicated(last_hidden, cache.backend)


@partial(jax.jit, static_argnames=("backend",))
def first_token(
    weights: Weights,
    last_hidden: Float[Array, "B D"],
    positions: Int[Array, " B"],
    sampling: SamplingArrays,
    backend: Backend,
    penalties: Penalties | None = None,
) -> Int[Array, " B"]:
    """Choose the token that follows each prompt; it will stand at ``positions``."""
    logits = _logits(last_hidden, weights, backend)
    chosen = sample(_penalized(logits, penalties), positions, sampling, backend)
    return replicated(jnp.where(not_numbers(logits), NO_NUMBERS, chosen), backend)


@partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def decode(
    weights: Weights,
    cache: ContiguousCache,
    tokens: Int[Array, " B"],
    positions: Int[Array, " B"],
    done: Bool[Array, " B"],
    limits: Int[Array, " B"],
    eos_ids: Int[Array, "B E"],
    sampling: SamplingArrays,
    steps: Int[Array, ""],
    config: ModelConfig,
    penalties: Penalties | None = None,
) -> tuple[ContiguousCache, Int[Array, "B 32"]]:
    """Generate up to ``steps`` tokens for each row in one program, without coming back to Python in between.

    Args:
        weights: the model.
        cache: every position before ``positions`` is in it.
        tokens: each row's newest token, not in the cache yet.
        positions: where that token stands.
        done: rows that have ended; they are computed along and their results left out.
        limits: the last position that each row may fill.
        eos_ids: the ids that end each row's text, filled up with -1.
        sampling: each row's parameters.
        steps: at most DECODE_BLOCK; fewer are made when every row ends.
        config: the model's architecture.
        penalties: each row's, with its tokens up to the newest; None where no row has any.

    Returns:
        The cache, and the new tokens in order, -1 where a row had ended, NO_NUMBERS where a model fails it.
    """

    # while_loop, not fori_loop: where all rows have ended, the rest of the block costs nothing.
    def unfinished(carry: tuple[Any, ...]) -> Array:
        step, _, _, done, *_ = carry
        going_on: Array = (step < steps) & ~jnp.all(done)
        return going_on

    def add_one(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, token, position, done, made, penalties, cache = carry
        cache = cache.counting(jnp.where(done, 0, 1))
        hidden, cache = hidden_states(token[:, None], position[:, None], weights, config, cache, cache.backend)
        logits = _logits(hidden[:, 0], weights, cache.backend)
        # The key of a token is its seed and its own position: a row's draws do not depend on when it was begun.
        chosen = sample(_penalized(logits, penalties), position + 1, sampling, cache.backend)
        penalties = _counted(penalties, chosen, ~done)
        # Rows that have ended are computed along, for a batch has one shape; they write over the same slot again, and
        # their tokens do not count.
        broken = not_numbers(logits)
        made = made.at[:, step].set(jnp.where(done, -1, jnp.where(broken, NO_NUMBERS, chosen)))
        token, position = jnp.where(done, token, chosen), jnp.where(done, position, position + 1)
        done = done | broken | jnp.any(token[:, None] == eos_ids, axis=-1) | (position >= limits)
        return step + 1, token, position, done, made, penalties, cache.counting(None)

    # As wide as the largest block, whatever ``steps`` is: another width would be another program.
    made = jnp.full((tokens.shape[0], DECODE_BLOCK), -1, jnp.int32)
    carry = (jnp.int32(0), tokens, positions, done, made, jax.tree.map(jnp.asarray, penalties), cache)
    *_, made, _, cache = jax.lax.while_loop(unfinished, add_one, carry)
    return cache, replicated(made, cache.backend)


@partial(jax.jit, static_argnames=("config", "count"), donate_argnames=("cache",))
def decode_by_lookup(
    weights: Weights,
    cache: ContiguousCache,
    text: Int[Array, "B S"],
    positions: Int[Array, " B"],
    done: Bool[Array, " B"],
    limits: Int[Array, " B"],
    eos_ids: Int[Array, "B E"],
    patience: Patience,
    sampling: SamplingArrays,
    steps: Int[Array, ""],
    config: ModelConfig,
    count: int,
    penalties: Penalties | None = None,
) -> tuple[ContiguousCache, Patience, Int[Array, "B made"]]:
    """``decode``, but several tokens at once where a text repeats itself (``speculative.prompt_lookup``).

    The tokens are the same.

    Args:
        weights: the model.
        cache: every position before ``positions`` is in it.
        text: each row's tokens, prompt and answer, up to the newest at ``positions``; there is a place for each that
            will come.
        positions: where the newest token stands, which is not in the cache yet.
        done: rows that have ended; they are computed along and their results left out.
        limits: the last position that each row may fill.
        eos_ids: the ids that end each row's text, filled up with -1.
        patience: as the last call has left it.
        sampling: each row's parameters.
        steps: at most DECODE_BLOCK; it ends with the step in which a row has made so many tokens, or with every row.
        config: the model's architecture.
        count: tokens of a draft.
        penalties: as ``decode`` has them.

    Returns:
        The cache, the rows' patience, and the new tokens in order, up to DECODE_BLOCK and ``count`` more, -1 behind
        each row's last.
    """
    rows = jnp.arange(text.shape[0])

    def unfinished(carry: tuple[Any, ...]) -> Array:
        _, position, done, *_ = carry
        going_on: Array = (jnp.max(position - positions) < steps) & ~jnp.all(done)
        return going_on

    def has_drafts(carry: tuple[Any, ...]) -> Array:
        drafted: Array = carry[6]
        return jnp.any(drafted)

    def draft(text: Array, position: Array, done: Array, patience: Patience) -> tuple[Array, Array]:
        drafts, found = find_draft(text, position + 1, count)
        return drafts, found & ~done & (patience.pause == 0)

    def advance(length: int, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        """Take each row's newest token and so much of its draft; draw what follows each as long as they agree."""
        text, start, done, patience, penalties, drafts, drafted, broken, cache = carry
        newest = jnp.take_along_axis(text, start[:, None], axis=1)
        tokens = jnp.concatenate([newest, drafts[:, :length]], axis=1)
        places = start[:, None] + jnp.arange(1 + length)
        # Rows have kept different numbers of tokens, so their drafts stand at positions of their own.
        ragged = replace(cache, ragged=True)
        hidden, filled = hidden_states(tokens, places, weights, config, ragged, cache.backend, places + 1)
        logits = _logits(hidden, weights, cache.backend)

        def agree(carry: tuple[Any, ...]) -> Array:
            step, *_, going, _ = carry
            going_on: Array = (step <= length) & jnp.any(going)
            return going_on

        def draw(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            step, text, position, done, broken, going, penalties = carry
            # One after another, in the shape of a step without drafts: the sums of the filters have the same order.
            mine = jax.lax.dynamic_index_in_dim(logits, step, axis=1, keepdims=False)
            token = sample(_penalized(mine, penalties), start + step + 1, sampling, cache.backend)
            penalties = _counted(penalties, token, going)
            position = jnp.where(going, start + step + 1, position)
            # Rows that no longer agree write outside, where it is dropped.
            text = text.at[rows, jnp.where(going, position, text.shape[1])].set(token, mode="drop")
            failed = not_numbers(mine)
            ended = jnp.any(token[:, None] == eos_ids, axis=-1) | (position >= limits) | failed
            done, broken = done | (going & ended), broken | (going & failed)
            following = tokens[:, jnp.minimum(step + 1, length)]
            going = going & drafted & ~ended & (token == following)
            return step + 1, text, position, done, broken, going, penalties

        begun = (jnp.int32(0), text, start, done, broken, ~done, penalties)
        _, text, position, done, broken, _, penalties = jax.lax.while_loop(agree, draw, begun)
        # Keys of tokens that were not kept stay in the cache, behind the newest position, until others overwrite them.
        patience = patience.after(drafted, position - start - 1)
        drafts, drafted = draft(text, position, done, patience)
        return text, position, done, patience, penalties, drafts, drafted, broken, replace(filled, ragged=False)

    def add_some(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        # Loops, not a choice between two steps: for that, XLA would copy the cache.
        without = jax.lax.while_loop(lambda c: unfinished(c) & ~has_drafts(c), partial(advance, 0), carry)
        found: tuple[Any, ...] = jax.lax.while_loop(
            lambda c: unfinished(c) & has_drafts(c), partial(advance, count), without
        )
        return found

    patience, penalties = jax.tree.map(jnp.asarray, (patience, penalties))
    begun = (text, positions, done, patience, penalties, *draft(text, positions, done, patience))
    carry = (*begun, jnp.zeros(len(rows), bool), cache)
    text, last, _, patience, *_, broken, cache = jax.lax.while_loop(unfinished, add_some, carry)
    places = positions[:, None] + 1 + jnp.arange(DECODE_BLOCK + count)
    made = jnp.take_along_axis(text, jnp.minimum(places, text.shape[1] - 1), axis=1)
    made = jnp.where(places <= last[:, None], made, -1)
    made = jnp.where((places == last[:, None]) & broken[:, None], NO_NUMBERS, made)
    return cache, patience, replicated(made, cache.backend)


def _logits(hidden: Float[Array, "... D"], weights: Weights, backend: Backend) -> Float[Array, "... V"]:
    logits: Array = (backend.unembed or unembed)(hidden, weights)
    return logits


def _penalized(logits: Float[Array, "B V"], penalties: Penalties | None) -> Float[Array, "B V"]:
    return logits if penalties is None else penalties.on(logits)


def _counted(penalties: Penalties | None, tokens: Int[Array, " B"], going: Bool[Array, " B"]) -> Penalties | None:
    return None if penalties is None else penalties.counted(tokens, going)


def replicated(x: Array, backend: Backend) -> Array:
    """``x`` whole on every device of the mesh, so that any process can read it."""
    return x if backend.placement is None else backend.placement.constrain(x, *[None] * x.ndim)
