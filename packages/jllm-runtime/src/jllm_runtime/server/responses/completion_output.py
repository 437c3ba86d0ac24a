"""Completion outputs: from the engine's pieces to texts with log-probabilities."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from jllm_runtime.server.errors import shutting_down_error
from jllm_runtime.server.responses.logprobs import CompletionLogprobsBuilder, TokenTexts, visible_logprobs
from jllm_runtime.server.schemas.completions import CompletionChoice, CompletionLogprobs

if TYPE_CHECKING:
    from jllm_runtime.outputs import Piece, TokenLogprob


class CompletionOutput:
    """One sequence of a completion: turns its pieces into choices of chunks, and all of them into one choice.

    Args:
        index: the choice's index.
        token_texts: texts of tokens.
        eos_ids: tokens that end a text and are no part of it.
        echo: the prompt as text and as token ids, where it comes before the output.
        with_logprobs: log-probabilities are asked for.
        prompt_only: nothing but the prompt is asked for.
    """

    def __init__(
        self,
        index: int,
        token_texts: TokenTexts,
        eos_ids: Sequence[int],
        echo: tuple[str, list[int]] | None,
        with_logprobs: bool,
        prompt_only: bool,
    ) -> None:
        self._index = index
        self._eos_ids = eos_ids
        self._echo = echo
        self._with_logprobs = with_logprobs
        self._prompt_only = prompt_only
        self._builder = CompletionLogprobsBuilder(token_texts)
        # The engine gives the prompt's log-probabilities with the last piece. With echo they come first in the list, so
        # those of the output wait for them here.
        self._waiting: list[TokenLogprob] = []
        self._texts: list[str] = []
        self._logprobs = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        self._finish_reason: Literal["stop", "length"] | None = None

    def add(self, piece: "Piece") -> CompletionChoice | None:
        """The choice of a piece, None where it brings nothing.

        Raises:
            ApiError: the server has ended the sequence.
        """
        text = "" if self._prompt_only else piece.text
        if self._echo is not None and not self._texts:
            text = self._echo[0] + text
        if piece.output is not None:
            reason = piece.output.finish_reason
            if reason == "cancelled":
                raise shutting_down_error()
            self._finish_reason = "length" if self._prompt_only else reason
        logprobs = self._new_logprobs(piece)
        self._texts.append(text)
        # Half a character, or a possible stop text, is held back by the engine: nothing to send yet.
        if not text and logprobs is None and self._finish_reason is None:
            return None
        return CompletionChoice(index=self._index, text=text, logprobs=logprobs, finish_reason=self._finish_reason)

    def choice(self) -> CompletionChoice:
        """The whole choice, after the last piece."""
        return CompletionChoice(
            index=self._index,
            text="".join(self._texts),
            logprobs=self._logprobs if self._with_logprobs else None,
            finish_reason=self._finish_reason,
        )

    def _new_logprobs(self, piece: "Piece") -> CompletionLogprobs | None:
        if piece.logprobs is None:
            return None
        self._waiting += [] if self._prompt_only else visible_logprobs(piece, self._eos_ids)
        of_prompt: Sequence[TokenLogprob | None] = []
        if self._echo is not None:
            if piece.output is None:
                return None
            of_prompt = piece.output.prompt_logprobs or []
        new = [*of_prompt, *self._waiting]
        prompt_ids = self._echo[1] if of_prompt and self._echo is not None else []
        token_ids = [*prompt_ids, *(one.token_id for one in self._waiting)]
        self._waiting = []
        logprobs = self._builder.add(new, token_ids)
        for name in CompletionLogprobs.model_fields:
            getattr(self._logprobs, name).extend(getattr(logprobs, name))
        return logprobs
