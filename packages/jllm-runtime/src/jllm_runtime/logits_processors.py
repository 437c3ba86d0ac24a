"""What a request may change about the logits before one of them is drawn, and the probabilities that it may ask for."""

from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jllm_runtime.sampling import MAX_LOGPROBS, SamplingArrays


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenState:
    """What the device remembers of the tokens of each of its slots, for penalties and biases.

    A row's entries are set when a request that needs them gets the slot; those of other requests mean nothing.

    Attributes:
        generated: how often each token has been generated.
        prompted: whether the token is in the prompt.
        bias: what is added to the token's logit.
    """

    generated: Int[Array, "slots V"]
    prompted: Bool[Array, "slots V"]
    bias: Float[Array, "slots V"]

    def counted(self, slots: Int[Array, " B"], tokens: Int[Array, " B"], going: Bool[Array, " B"]) -> Self:
        """One more of each row's token; rows without a slot are passed over."""
        return replace(self, generated=self.generated.at[slots, tokens].add(going.astype(jnp.int32), mode="drop"))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """The rows of one step of decode, an entry each.

    Attributes:
        tables: each row's pages.
        tokens: its newest token, not in the cache yet.
        positions: where that token stands.
        done: rows without a request.
        limits: the last position that each row may fill.
        eos_ids: the ids that end each row's text, filled up with -1.
        known: tokens behind the newest that are known already, which are taken instead of drawn ones; -1 behind them.
        sampling: temperature and so on.
        slots: where its TokenState is; beyond the last where there is none.
        adjusted: rows with a penalty or a bias.
        repetition, presence, frequency: the penalties.
        earliest_end: the first position where an end-of-text id may stand.
        constrained: rows that a grammar holds.
        allowed: the tokens that the grammar lets pass, a bit each, lowest first.
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
    slots: Int[Array | np.ndarray, " B"]
    adjusted: Bool[Array | np.ndarray, " B"]
    repetition: Float[Array | np.ndarray, " B"]
    presence: Float[Array | np.ndarray, " B"]
    frequency: Float[Array | np.ndarray, " B"]
    earliest_end: Int[Array | np.ndarray, " B"]
    constrained: Bool[Array | np.ndarray, " B"]
    allowed: Int[Array | np.ndarray, "B W"]
    logprobs: Bool[Array | np.ndarray, " B"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of probabilities, by the model's own logits before anything was changed about them.

    Attributes:
        token: of the token that was taken.
        top_ids: the most probable tokens, best first.
        top: their log-probabilities.
    """

    token: Float[Array, "*rows"]
    top_ids: Int[Array, "*rows 20"]
    top: Float[Array, "*rows 20"]


def adjusted_logits(
    logits: Float[Array, "B V"], rows: Rows, state: TokenState, positions: Int[Array, " B"]
) -> Float[Array, "B V"]:
    """The logits that each row draws from: biased, penalised, and minus infinity where a token may not come.

    Args:
        logits: the model's.
        rows: what each row wants.
        state: its tokens so far.
        positions: where each new token will stand.

    References:
        Repetition penalty: arXiv:1909.05858, over prompt and answer. Presence and frequency: as the OpenAI API has
        them, over the answer.
    """
    vocabulary = logits.shape[1]

    def change() -> Array:
        slots = jnp.minimum(rows.slots, len(state.generated) - 1)
        counts, biased = state.generated[slots], logits + state.bias[slots]
        seen = (counts > 0) | state.prompted[slots]
        repeated = jnp.where(biased > 0, biased / rows.repetition[:, None], biased * rows.repetition[:, None])
        penalised = jnp.where(seen, repeated, biased)
        penalised -= rows.frequency[:, None] * counts + rows.presence[:, None] * (counts > 0)
        return jnp.where(rows.adjusted[:, None], penalised, logits)

    def constrain(logits: Array) -> Array:
        tokens = jnp.arange(vocabulary)
        allowed = (jnp.asarray(rows.allowed)[:, tokens // 32] >> (tokens % 32)) & 1
        return jnp.where(rows.constrained[:, None] & (allowed == 0), -jnp.inf, logits)

    changed = jax.lax.cond(jnp.any(rows.adjusted), change, lambda: logits)
    changed = jax.lax.cond(jnp.any(rows.constrained), constrain, lambda logits: logits, changed)
    too_early = (positions < rows.earliest_end)[:, None] & (rows.eos_ids >= 0)
    banned = jnp.where(too_early, rows.eos_ids, vocabulary)
    result: Array = changed.at[jnp.arange(len(logits))[:, None], banned].set(-jnp.inf, mode="drop")
    return result


def token_logprobs(logits: Float[Array, "B V"], tokens: Int[Array, " B"]) -> Logprobs:
    """The log-probabilities of these tokens and of the most probable ones."""
    normalised = jax.nn.log_softmax(logits, axis=-1)
    token = jnp.take_along_axis(normalised, tokens[:, None], axis=-1)[:, 0]
    count = min(MAX_LOGPROBS, logits.shape[1])
    top, top_ids = jax.lax.top_k(normalised, count)
    short = ((0, 0), (0, MAX_LOGPROBS - count))
    return Logprobs(token, jnp.pad(top_ids, short), jnp.pad(top, short, constant_values=-jnp.inf))


def no_logprobs(*rows: int) -> Logprobs:
    """Room for log-probabilities."""
    return Logprobs(
        token=jnp.zeros(rows, jnp.float32),
        top_ids=jnp.zeros((*rows, MAX_LOGPROBS), jnp.int32),
        top=jnp.zeros((*rows, MAX_LOGPROBS), jnp.float32),
    )
