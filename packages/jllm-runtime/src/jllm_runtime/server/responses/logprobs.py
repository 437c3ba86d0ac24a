"""Log-probabilities in the forms of the OpenAI API."""

import codecs
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from jllm_runtime.server.schemas.chat import ChatCompletionTokenLogprob, ChoiceLogprobs, TopLogprob
from jllm_runtime.server.schemas.completions import CompletionLogprobs
from jllm_runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jllm_runtime.outputs import Piece, TokenLogprob

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

    def _top_logprob(self, token_id: int, logprob: float) -> TopLogprob:
        return TopLogprob(
            token=self.text(token_id), logprob=finite_logprob(logprob), bytes=list(self.bytes_of(token_id))
        )


def visible_logprobs(piece: "Piece", eos_ids: Sequence[int]) -> list["TokenLogprob"]:
    """Log-probabilities of the piece's tokens, without the EOS token that ends the output: it has no text."""
    logprobs = piece.logprobs or []
    ended = piece.output is not None and piece.output.finish_reason == "stop"
    return logprobs[:-1] if ended and logprobs and logprobs[-1].token_id in eos_ids else logprobs


class CompletionLogprobsBuilder:
    """Log-probabilities of one text in the form of completions, which has the character offset of each token."""

    def __init__(self, token_texts: TokenTexts) -> None:
        self._token_texts = token_texts
        # The incremental decoder counts a character with the token that completes it.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def add(self, logprobs: Sequence["TokenLogprob | None"], token_ids: Sequence[int]) -> CompletionLogprobs:
        """The next tokens of the text.

        Args:
            logprobs: one for each token; None for the first token of a prompt, which nothing predicts.
            token_ids: the tokens.
        """
        result = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        text = self._token_texts.text
        for token_id, one in zip(token_ids, logprobs, strict=True):
            result.tokens.append(text(token_id))
            result.text_offset.append(self._length)
            self._length += len(self._decoder.decode(self._token_texts.bytes_of(token_id)))
            result.token_logprobs.append(None if one is None else finite_logprob(one.logprob))
            top = None if one is None else {text(other): finite_logprob(logprob) for other, logprob in one.top}
            if top is not None and one is not None:
                # As in OpenAI's API, the token itself is in the list even if it is not among the likeliest.
                top.setdefault(text(token_id), finite_logprob(one.logprob))
            result.top_logprobs.append(top)
        return result


def finite_logprob(logprob: float) -> float:
    """A log-probability as a number that JSON can hold."""
    return max(logprob, MIN_LOGPROB) if not math.isnan(logprob) else MIN_LOGPROB
