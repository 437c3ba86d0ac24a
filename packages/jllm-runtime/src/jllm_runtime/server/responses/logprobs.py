"""Log-probabilities in the forms of the API, with the tokens as texts."""

import codecs
import math
from collections.abc import Sequence
from functools import lru_cache

from jllm_runtime.outputs import Piece, TokenLogprob
from jllm_runtime.server.schemas.chat import ChatLogprobs, TokenLogprobs, TopLogprob
from jllm_runtime.server.schemas.completions import CompletionLogprobs
from jllm_runtime.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON has no word for."""


class TokenTexts:
    """The texts of tokens, and of their log-probabilities."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.bytes_of = lru_cache(maxsize=2**16)(tokenizer.token_bytes)

    def name(self, token_id: int) -> str:
        """The token's text; bytes that are no characters on their own are written ``\\xf0``."""
        return self.bytes_of(token_id).decode("utf-8", "backslashreplace")

    def for_chat(self, logprobs: Sequence[TokenLogprob]) -> ChatLogprobs:
        """As chat completions have them."""
        return ChatLogprobs(
            content=[
                TokenLogprobs(
                    token=self.name(one.token_id),
                    logprob=finite(one.logprob),
                    bytes=list(self.bytes_of(one.token_id)),
                    top_logprobs=[self._top(token_id, logprob) for token_id, logprob in one.top],
                )
                for one in logprobs
            ]
        )

    def _top(self, token_id: int, logprob: float) -> TopLogprob:
        return TopLogprob(token=self.name(token_id), logprob=finite(logprob), bytes=list(self.bytes_of(token_id)))


def shown_logprobs(piece: Piece, ends: Sequence[int]) -> list[TokenLogprob]:
    """Those of a piece's tokens that are part of the text: the one that ends it is not."""
    logprobs = piece.logprobs or []
    ended = piece.output is not None and piece.output.finish_reason == "stop"
    return logprobs[:-1] if ended and logprobs and logprobs[-1].token_id in ends else logprobs


class TextOffsets:
    """Where in a text its tokens begin, in characters, as they come."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def completion(self, logprobs: Sequence[TokenLogprob | None], token_ids: Sequence[int]) -> CompletionLogprobs:
        """The next tokens, as completions have them. The first token of a prompt has no log-probability."""
        name, result = (
            self._texts.name,
            CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[]),
        )
        for token_id, one in zip(token_ids, logprobs, strict=True):
            result.tokens.append(name(token_id))
            result.text_offset.append(self._length)
            self._length += len(self._decoder.decode(self._texts.bytes_of(token_id)))
            result.token_logprobs.append(None if one is None else finite(one.logprob))
            top = None if one is None else {name(other): finite(logprob) for other, logprob in one.top}
            if top is not None and one is not None:
                # OpenAI's list has the token itself, too, be it among the likeliest or not.
                top.setdefault(name(token_id), finite(one.logprob))
            result.top_logprobs.append(top)
        return result


def finite(logprob: float) -> float:
    """A number that JSON can hold."""
    return max(logprob, MIN_LOGPROB) if not math.isnan(logprob) else MIN_LOGPROB
