"""Logits processors: penalties, biases, grammar masks, `min_tokens`; and log-probabilities."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jllm_runtime.sampling import MAX_LOGPROBS, PENALTIES, SamplingArrays, SamplingParams

SAMPLING_FIELDS = tuple(field.name for field in fields(SamplingArrays))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenState:
    """Counts and biases of penalized sequences: a row for each.

    The engine keeps one on the device, with a row for each sequence that runs. A row is set when a sequence gets it
    that has a penalty or a bias. What it holds for others means nothing.

    Attributes:
        generated: number of times that each token has been generated.
        prompted: whether the token is in the prompt.
        bias: added to the token's logit.
    """

    generated: Int[Array | np.ndarray, "state_rows V"]
    prompted: Bool[Array | np.ndarray, "state_rows V"]
    bias: Float[Array | np.ndarray, "state_rows V"]

    def counted(self, state_rows: Int[Array, " B"], tokens: Int[Array, " B"], going: Bool[Array, " B"]) -> Self:
        """Count a token for each row.

        Args:
            state_rows: each row's state row; beyond the last for none.
            tokens: each row's token.
            going: rows that have not ended.
        """
        # mode="drop": a row without a state row has an index out of bounds, and writes nothing.
        generated = jnp.asarray(self.generated).at[state_rows, tokens].add(going.astype(jnp.int32), mode="drop")
        return replace(self, generated=generated)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Penalties:
    """Penalties and biases of a batch, with the tokens that they go by.

    Attributes:
        tokens: a row for each of the batch.
        repetition, presence, frequency: the penalties.

    References:
        Repetition penalty: arXiv:1909.05858, over prompt and answer. Presence and frequency: as the OpenAI API has
        them, over the answer.
    """

    tokens: TokenState
    repetition: Float[Array | np.ndarray, " B"]
    presence: Float[Array | np.ndarray, " B"]
    frequency: Float[Array | np.ndarray, " B"]

    @classmethod
    def of(cls, rows: Sequence[SamplingParams], prompts: Sequence[Sequence[int]], vocabulary: int) -> Self:
        """Those of a batch that begins.

        Args:
            rows: the parameters of each row.
            prompts: its token ids.
            vocabulary: V.
        """
        shape = (len(rows), vocabulary)
        prompted, bias = np.zeros(shape, bool), np.zeros(shape, np.float32)
        for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            prompted[number, list(prompt)] = True
            bias[number, list(row.logit_bias)] = list(row.logit_bias.values())
        each = [np.array([getattr(row, name) for row in rows], np.float32) for name in PENALTIES]
        return cls(TokenState(np.zeros(shape, np.int32), prompted, bias), *each)

    def counted(self, tokens: Int[Array, " B"], going: Bool[Array, " B"]) -> Self:
        """Count a token for each row that has not ended."""
        return replace(self, tokens=self.tokens.counted(jnp.arange(len(tokens)), tokens, going))

    def on(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """The logits that each row draws from. Where a row has no penalty and no bias they are the same to the bit."""
        counts, biased = jnp.asarray(self.tokens.generated), logits + self.tokens.bias
        repetition, presence, frequency = (
            jnp.asarray(each)[:, None] for each in (self.repetition, self.presence, self.frequency)
        )
        # A division would raise a negative logit, so those are multiplied.
        repeated = jnp.where(biased > 0, biased / repetition, biased * repetition)
        penalized = jnp.where((counts > 0) | self.tokens.prompted, repeated, biased)
        return penalized - (frequency * counts + presence * (counts > 0))


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
        state_rows: index of each row in the TokenState; beyond the last for none.
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
