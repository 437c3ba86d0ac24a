"""Completion outputs: from the engine's pieces to texts with log-probabilities."""

from itertools import takewhile
from typing import TYPE_CHECKING, Literal

from jllm_runtime.server.errors import shutting_down_error
from jllm_runtime.server.responses.logprobs import TokenTexts
from jllm_runtime.server.responses.prompt_echo import PromptEcho
from jllm_runtime.server.schemas.completions import CompletionChoice, CompletionLogprobs

if TYPE_CHECKING:
    from jllm_runtime.outputs import Piece, TokenLogprob


class CompletionOutput:
    """One sequence of a completion: turns its pieces into choices of chunks, and all of them into one choice.

    Args:
        index: the choice's index.
        token_texts: texts of tokens.
        echo: the prompt, where it comes before the output.
        with_logprobs: log-probabilities are asked for.
        prompt_only: nothing but the prompt is asked for.
    """

    def __init__(
        self, index: int, token_texts: TokenTexts, echo: PromptEcho | None, with_logprobs: bool, prompt_only: bool
    ) -> None:
        self._index = index
        self._echo = echo
        self._with_logprobs = with_logprobs
        self._prompt_only = prompt_only
        self._token_texts = token_texts
        # The log-probabilities of tokens whose text has not come yet: only then is it known where they begin.
        self._waiting: list[TokenLogprob] = []
        self._shown = 0
        self._texts: list[str] = []
        self._logprobs = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        self._finish_reason: Literal["stop", "length"] | None = None

    def add(self, piece: "Piece") -> CompletionChoice | None:
        """The choice of a piece, None where it brings nothing.

        Raises:
            ApiError: the server has ended the sequence.
        """
        text = "" if self._prompt_only else piece.text
        self._shown += len(text)
        if self._echo is not None and not self._texts:
            text = self._echo.text + text
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
        self._waiting += [] if self._prompt_only else piece.logprobs
        ready = self._waiting
        if piece.output is None:
            # The engine gives the prompt's log-probabilities with the last piece, and they come first in the list.
            ready = [] if self._echo else list(takewhile(lambda one: one.offset < self._shown, self._waiting))
            if not ready:
                return None
        self._waiting = self._waiting[len(ready) :]
        begin = len(self._echo.text) if self._echo else 0
        token_ids, logprobs = [one.token_id for one in ready], list["TokenLogprob | None"](ready)
        # A stop may have cut off the text of the last ones.
        offsets = [begin + min(one.offset, self._shown) for one in ready]
        if self._echo is not None and piece.output is not None:
            token_ids = [*self._echo.token_ids, *token_ids]
            logprobs = [*(piece.output.prompt_logprobs or []), *logprobs]
            offsets = [*self._echo.offsets, *offsets]
        found = self._token_texts.completion_logprobs(token_ids, logprobs, offsets)
        for name in CompletionLogprobs.model_fields:
            getattr(self._logprobs, name).extend(getattr(found, name))
        return found
