"""Penalties and biases: logits that depend on the tokens of the text so far."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jllm_runtime.sampling import PENALTIES, SamplingParams


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
