"""Log-probabilities in the forms of the OpenAI API."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from jllm_runtime.server.schemas.chat import ChatCompletionTokenLogprob, ChoiceLogprobs, TopLogprob
from jllm_runtime.server.schemas.completions import CompletionLogprobs
from jllm_runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jllm_runtime.outputs import TokenLogprob

MIN_LOGPROB = -9999.0
"""OpenAI's value for tokens that cannot be: JSON has no minus infinity."""

MAX_CACHED_TOKENS = 2**16


class TokenTexts:
    """Texts of single tokens. They are cached, since the same few tokens come up again and again."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.bytes_of = lru_cache(maxsize=MAX_CACHED_TOKENS)(tokenizer.token_bytes)

    def text(self, token_id: int) -> str:
        """The token's text. Bytes that are no whole character are written ``\\xf0``."""
        return self.bytes_of(token_id).decode("utf-8", "backslashreplace")

    def choice_logprobs(self, logprobs: Sequence["TokenLogprob"]) -> ChoiceLogprobs:
        """Log-probabilities in the form of chat completions."""
        return ChoiceLogprobs(
            content=[
                ChatCompletionTokenLogprob(
                    token=self.text(one.token_id),
                    logprob=finite_logprob(one.logprob),
                    bytes=list(self.bytes_of(one.token_id)),
                    top_logprobs=[self._top_logprob(token_id, logprob) for token_id, logprob in one.top],
                )
                for one in logprobs
            ]
        )

    def completion_logprobs(
        self, token_ids: Sequence[int], logprobs: Sequence["TokenLogprob | None"], offsets: Sequence[int]
    ) -> CompletionLogprobs:
        """Log-probabilities in the form of completions.

        Args:
            token_ids: the tokens.
            logprobs: one for each token; None for the first token of a prompt, which nothing predicts.
            offsets: the character at which each token begins.
        """
        return CompletionLogprobs(
            tokens=[self.text(token_id) for token_id in token_ids],
            token_logprobs=[None if one is None else finite_logprob(one.logprob) for one in logprobs],
            top_logprobs=[None if one is None else self._likeliest(one) for one in logprobs],
            text_offset=list(offsets),
        )

    def _likeliest(self, one: "TokenLogprob") -> dict[str, float]:
        found: dict[str, float] = {}
        # As in OpenAI's API, the token itself is in the list even if it is not among the likeliest. Of tokens with the
        # same text, the likelier one stays: clients take the largest value for that of the likeliest token.
        for token_id, logprob in [*one.top, (one.token_id, one.logprob)]:
            found.setdefault(self.text(token_id), finite_logprob(logprob))
        return found

    def _top_logprob(self, token_id: int, logprob: float) -> TopLogprob:
        return TopLogprob(
            token=self.text(token_id), logprob=finite_logprob(logprob), bytes=list(self.bytes_of(token_id))
        )


def finite_logprob(logprob: float) -> float:
    """A log-probability as a number that JSON can hold."""
    return max(logprob, MIN_LOGPROB) if not math.isnan(logprob) else MIN_LOGPROB
