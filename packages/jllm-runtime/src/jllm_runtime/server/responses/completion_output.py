"""One answer of a completion on its way: from the engine's pieces to a text with its log-probabilities."""

from collections.abc import Sequence
from typing import Literal

from jllm_runtime.outputs import Piece, TokenLogprob
from jllm_runtime.server.errors import draining_error
from jllm_runtime.server.responses.logprobs import TextOffsets, TokenTexts, shown_logprobs
from jllm_runtime.server.schemas.completions import CompletionChoice, CompletionLogprobs


class CompletionAnswer:
    """Turns the pieces of one answer into choices, and all of them into one.

    Args:
        index: its number.
        texts: names tokens.
        ends: ids that end a text, and are no part of it.
        echo: the prompt as text and as token ids, where it is wanted before the answer.
        with_logprobs: whether log-probabilities are wanted.
        scores_only: whether nothing but the prompt is wanted.
    """

    def __init__(
        self,
        index: int,
        texts: TokenTexts,
        ends: Sequence[int],
        echo: tuple[str, list[int]] | None,
        with_logprobs: bool,
        scores_only: bool,
    ) -> None:
        self._index = index
        self._ends = ends
        self._echo = echo
        self._with_logprobs = with_logprobs
        self._scores_only = scores_only
        self._offsets = TextOffsets(texts)
        # With the scores of a prompt, which are known at the end, the answer's wait for them.
        self._waiting: list[TokenLogprob] = []
        self._texts: list[str] = []
        self._logprobs = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        self._finish_reason: Literal["stop", "length"] | None = None

    def take(self, piece: Piece) -> CompletionChoice | None:
        """What a piece brings, None where it is nothing."""
        text = "" if self._scores_only else piece.text
        if self._echo is not None and not self._texts:
            text = self._echo[0] + text
        if piece.output is not None:
            reason = piece.output.finish_reason
            if reason == "cancelled":
                raise draining_error()
            self._finish_reason = "length" if self._scores_only else reason
        logprobs = self._new_logprobs(piece)
        self._texts.append(text)
        if not text and logprobs is None and self._finish_reason is None:
            return None
        return CompletionChoice(index=self._index, text=text, logprobs=logprobs, finish_reason=self._finish_reason)

    def whole(self) -> CompletionChoice:
        """All that has come."""
        return CompletionChoice(
            index=self._index,
            text="".join(self._texts),
            logprobs=self._logprobs if self._with_logprobs else None,
            finish_reason=self._finish_reason,
        )

    def _new_logprobs(self, piece: Piece) -> CompletionLogprobs | None:
        if piece.logprobs is None:
            return None
        self._waiting += [] if self._scores_only else shown_logprobs(piece, self._ends)
        before: Sequence[TokenLogprob | None] = []
        if self._echo is not None:
            if piece.output is None:
                return None
            before = piece.output.prompt_logprobs or []
        new = [*before, *self._waiting]
        prompt_ids = self._echo[1] if before and self._echo is not None else []
        token_ids = [*prompt_ids, *(one.token_id for one in self._waiting)]
        self._waiting = []
        logprobs = self._offsets.completion(new, token_ids)
        for name in CompletionLogprobs.model_fields:
            getattr(self._logprobs, name).extend(getattr(logprobs, name))
        return logprobs
