"""Logits processors of the engine: penalties, biases, grammar masks, `min_tokens`; and log-probabilities."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jllm_runtime.penalties import Penalties, TokenState
from jllm_runtime.sampling import MAX_LOGPROBS, SamplingArrays

SAMPLING_FIELDS = tuple(field.name for field in fields(SamplingArrays))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Input of the decode program: an entry for each row of the batch.

    Attributes:
        tables: page table of each row.
        tokens: its newest token, whose keys and values are not in the cache yet.
        positions: position of that token.
        done: blank rows.
        limits: last position that each row may fill.
        eos_ids: ids that end each row's text, padded with -1.
        known: known tokens behind the newest, taken in place of drawn ones; padded with -1.
        sampling: temperature and so on.
        state_rows: index of each row in the TokenState, and in the pool of states; beyond the last for none. Where
            there are as many rows as state rows, it is the row's own number.
        penalized: rows with a penalty or a bias.
        repetition, presence, frequency: the penalties.
        earliest_end: first position where an end-of-text id may stand.
        constrained: rows with a grammar.
        allowed: tokens that the grammar allows, a bit each, lowest first.
        logprobs: rows whose log-probabilities are wanted.
    """

    tables: Int[Array | np.ndarray, "B n"]
    tokens: Int[Array | np.ndarray, " B"]
    positions: Int[Array | np.ndarray, " B"]
    done: Bool[Array | np.ndarray, " B"]
    limits: Int[Array | np.ndarray, " B"]
    eos_ids: Int[Array | np.ndarray, "B E"]
    known: Int[Array | np.ndarray, "B L"]
    sampling: SamplingArrays
    state_rows: Int[Array | np.ndarray, " B"]
    penalized: Bool[Array | np.ndarray, " B"]
    repetition: Float[Array | np.ndarray, " B"]
    presence: Float[Array | np.ndarray, " B"]
    frequency: Float[Array | np.ndarray, " B"]
    earliest_end: Int[Array | np.ndarray, " B"]
    constrained: Bool[Array | np.ndarray, " B"]
    allowed: Int[Array | np.ndarray, "B W"]
    logprobs: Bool[Array | np.ndarray, " B"]

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by their names, those of ``sampling`` among them: the form of a message."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "sampling"}
        return own | {name: getattr(self.sampling, name) for name in SAMPLING_FIELDS}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """Make Rows of what ``to_arrays`` has returned."""
        sampling = SamplingArrays(**{name: arrays[name] for name in SAMPLING_FIELDS})
        return cls(sampling=sampling, **{name: array for name, array in arrays.items() if name not in SAMPLING_FIELDS})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities, natural logarithms, by the model's own logits before any logits processor.

    Attributes:
        token: of the token that was taken.
        top_ids: the most probable tokens, best first.
        top: their log-probabilities.
    """

    token: Float[Array, "*rows"]
    top_ids: Int[Array, "*rows 20"]
    top: Float[Array, "*rows 20"]


def process_logits(
    logits: Float[Array, "B V"], rows: Rows, state: TokenState, positions: Int[Array, " B"]
) -> Float[Array, "B V"]:
    """Logits that each row draws from: biased, penalized, and minus infinity where a token must not come.

    Args:
        logits: the model's.
        rows: what each row asks for.
        state: its tokens so far.
        positions: position of each new token.
    """
    vocabulary = logits.shape[1]

    def penalize() -> Array:
        # Rows without a state row read some other's state; `penalized` is false for them, so it changes nothing.
        state_rows = jnp.minimum(rows.state_rows, len(state.generated) - 1)
        own = jax.tree.map(lambda each: each[state_rows], state)
        penalties = Penalties(own, rows.repetition, rows.presence, rows.frequency)
        return jnp.where(rows.penalized[:, None], penalties.on(logits), logits)

    def constrain(logits: Array) -> Array:
        tokens = jnp.arange(vocabulary)
        allowed = (jnp.asarray(rows.allowed)[:, tokens // 32] >> (tokens % 32)) & 1
        return jnp.where(rows.constrained[:, None] & (allowed == 0), -jnp.inf, logits)

    # Most batches need neither, and a branch that is not taken reads no `[B, V]` arrays.
    processed = jax.lax.cond(jnp.any(rows.penalized), penalize, lambda: logits)
    processed = jax.lax.cond(jnp.any(rows.constrained), constrain, lambda logits: logits, processed)
    # Ids that may not come yet get minus infinity. The others, and the padding, are put out of bounds and dropped.
    too_early = (positions < rows.earliest_end)[:, None] & (rows.eos_ids >= 0)
    banned = jnp.where(too_early, rows.eos_ids, vocabulary)
    result: Array = processed.at[jnp.arange(len(logits))[:, None], banned].set(-jnp.inf, mode="drop")
    return result


def token_logprobs(logits: Float[Array, "B V"], tokens: Int[Array, " B"]) -> Logprobs:
    """Log-probabilities of these tokens and of the most probable ones in their place."""
    normalised = jax.nn.log_softmax(logits, axis=-1)
    token = jnp.take_along_axis(normalised, tokens[:, None], axis=-1)[:, 0]
    count = min(MAX_LOGPROBS, logits.shape[1])
    top, top_ids = jax.lax.top_k(normalised, count)
    # A vocabulary of less than MAX_LOGPROBS tokens, as tests have it.
    short = ((0, 0), (0, MAX_LOGPROBS - count))
    return Logprobs(token, jnp.pad(top_ids, short), jnp.pad(top, short, constant_values=-jnp.inf))


def no_logprobs(*rows: int) -> Logprobs:
    """Log-probabilities of so many rows, all zero: a place for those to come, or for those that nobody wants."""
    return Logprobs(
        token=jnp.zeros(rows, jnp.float32),
        top_ids=jnp.zeros((*rows, MAX_LOGPROBS), jnp.int32),
        top=jnp.zeros((*rows, MAX_LOGPROBS), jnp.float32),
    )
