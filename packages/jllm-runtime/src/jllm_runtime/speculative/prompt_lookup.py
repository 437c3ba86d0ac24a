"""Prompt-lookup speculative decoding: a text that repeats itself probably goes on as it did before.

The last tokens of a text are searched for in what comes before them, and what followed there is the draft of what
follows now. The model takes the whole draft in one step, which costs little more than one token, and as much of it is
kept as the model would have said itself.

References:
    Prompt lookup decoding: Saxena, 2023, https://github.com/apoorvumang/prompt-lookup-decoding.
    Speculative decoding: Leviathan et al., arXiv:2211.17192; Chen et al., arXiv:2302.01318. A draft that is certain of
    its token d is accepted there with the probability p(d) that the model gives it; otherwise a token is drawn from p
    without d. Here each token is drawn from p as it would be without a draft, with the key of its own position, and the
    draft holds as long as it says the same: the same probabilities, and the very same tokens.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int
from jllm_core.backends.base import Backend

from jllm_runtime.errors import RequestError

DEFAULT_DRAFT = 7
"""With the token before it, a draft makes eight rows of a matrix product."""
MAX_DRAFT = 15

MIN_MATCH, MAX_MATCH = 3, 8
"""Tokens that must agree before a draft is made, and how many are compared: of several places, the one where most agree
is taken, and of these the latest."""

MAX_PAUSE = 31
"""Tokens without a draft, at most, after drafts that have failed."""


def draft_length(asked: int, rows: int, backend: Backend) -> int:
    """The tokens of a draft: as many as asked for, and as one step of the backend takes for all rows at once.

    Raises:
        RequestError: not a whole number from 0 to MAX_DRAFT.
    """
    if not isinstance(asked, int) or isinstance(asked, bool) or not 0 <= asked <= MAX_DRAFT:
        raise RequestError(f"lookup must be a whole number from 0 (off) to {MAX_DRAFT}, got {asked!r}")
    if backend.max_step_tokens is None:
        return asked
    return min(asked, max(backend.max_step_tokens // rows - 1, 0))


def find_draft(
    text: Int[Array, "B S"], lengths: Int[Array, " B"], count: int
) -> tuple[Int[Array, "B draft"], Bool[Array, " B"]]:
    """What may follow each text.

    Args:
        text: token ids.
        lengths: tokens in each text, at least 1; what stands behind them is not read.
        count: tokens of a draft. Where the text ends before them, it is taken to repeat what it has of them.

    Returns:
        The drafts, and in which rows there is one.
    """
    slots = text.shape[1]
    ends = jnp.arange(slots)
    before = jnp.pad(text, ((0, 0), (MAX_MATCH, 0)), constant_values=-1)
    newest = jnp.take_along_axis(before, lengths[:, None] + jnp.arange(MAX_MATCH), axis=1)
    agrees, agreed = jnp.ones(text.shape, bool), jnp.zeros(text.shape, jnp.int32)
    for at in range(MAX_MATCH, 0, -1):
        # Of a text that is shorter than this, -1 agrees with nothing.
        one = newest[:, at - 1 : at]
        agrees &= (before[:, at : at + slots] == one) & (one >= 0)
        agreed += agrees
    agreed = jnp.where(ends < lengths[:, None] - 1, agreed, 0)
    best = jnp.max(agreed, axis=1)
    end = jnp.max(jnp.where(agreed == best[:, None], ends, 0), axis=1)
    period = jnp.maximum(lengths - 1 - end, 1)
    places = end[:, None] + 1 + jnp.arange(count) % period[:, None]
    return jnp.take_along_axis(text, places, axis=1), best >= MIN_MATCH


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Patience:
    """How long each row goes without a draft, so that a text which only seems to repeat itself loses little time.

    Attributes:
        pause: tokens before the next draft.
        failures: drafts in a row of which nothing was kept.
    """

    pause: Int[Array | np.ndarray, " B"]
    failures: Int[Array | np.ndarray, " B"]

    @classmethod
    def of(cls, rows: int) -> "Patience":
        """That of rows that have had no draft yet."""
        return cls(np.zeros(rows, np.int32), np.zeros(rows, np.int32))

    def after(self, tried: Bool[Array, " B"], kept: Int[Array, " B"]) -> "Patience":
        """After a step in which some rows have tried drafts, and kept so many tokens of them."""
        failures = jnp.where(tried, jnp.where(kept > 0, 0, self.failures + 1), self.failures)
        # None after the first failure, then 1, 3, 7 and so on.
        pause = jnp.minimum((1 << jnp.minimum(jnp.maximum(failures - 1, 0), 16)) - 1, MAX_PAUSE)
        return Patience(jnp.where(tried, pause, jnp.maximum(self.pause - 1, 0)), failures)
