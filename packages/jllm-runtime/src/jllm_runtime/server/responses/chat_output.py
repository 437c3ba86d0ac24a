"""Chat outputs: from the engine's pieces to deltas, and from deltas to a message."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jllm_runtime.server.errors import shutting_down_error
from jllm_runtime.server.parsing.output_parser import Content, Event, OutputParser, Reasoning, ToolCallStart
from jllm_runtime.server.responses.logprobs import TokenTexts
from jllm_runtime.server.schemas.chat import (
    ChatCompletionChoice,
    ChatCompletionChunkChoice,
    ChatCompletionMessage,
    ChatCompletionMessageFunction,
    ChatCompletionMessageToolCall,
    ChatCompletionTokenLogprob,
    ChoiceDelta,
    ChoiceDeltaFunction,
    ChoiceDeltaToolCall,
    ChoiceLogprobs,
    FinishReason,
)

if TYPE_CHECKING:
    from jllm_runtime.outputs import Piece, TokenLogprob


@dataclass
class ChatOutput:
    """One sequence of a chat: turns its pieces into the choices of a stream's chunks.

    Attributes:
        index: the choice's index.
        parser: separates thinking, content and tool calls.
        token_texts: texts of tokens; None where no log-probabilities are asked for.
        single_call: end before a second tool call.
        only_calls: the message has no content, not even an empty one.
        finish_reason: set at the end.
        truncated: the output has ended here, at a second call, while the engine still makes tokens of it.
    """

    index: int
    parser: OutputParser
    token_texts: TokenTexts | None
    single_call: bool = False
    only_calls: bool = False
    finish_reason: FinishReason | None = None
    truncated: bool = False
    _calls: int = 0
    _logprobs: "list[TokenLogprob]" = field(default_factory=list)

    def first_choice(self) -> ChatCompletionChunkChoice:
        """The choice that opens a stream, with the role."""
        delta = ChoiceDelta(role="assistant", content=None if self.only_calls else "")
        return ChatCompletionChunkChoice(index=self.index, delta=delta)

    def add(self, piece: "Piece") -> list[ChatCompletionChunkChoice]:
        """The choices that a piece completes; with the last piece, the one that has the finish reason.

        Raises:
            ApiError: the server has ended the sequence.
        """
        if not self.truncated:
            self._logprobs += piece.logprobs or []
        events = self.parser.feed(piece.text)
        if piece.output is not None:
            events += self.parser.finish(cut=piece.output.finish_reason == "length")
        choices = [self._choice(delta) for delta in self._deltas(events)]
        if piece.output is not None:
            choices.append(self._last_choice(piece))
        return choices

    def _deltas(self, events: Iterable[Event]) -> Iterable[ChoiceDelta]:
        for event in events:
            if isinstance(event, ToolCallStart):
                self.truncated = self.truncated or (self.single_call and self._calls == 1)
                # Only calls that the client gets to see are counted.
                self._calls += not self.truncated
            if not self.truncated:
                yield _delta(event)

    def _choice(self, delta: ChoiceDelta) -> ChatCompletionChunkChoice:
        # All log-probabilities since the last choice: the parser may have held back the text of several pieces.
        if self.token_texts is None:
            return ChatCompletionChunkChoice(index=self.index, delta=delta)
        logprobs, self._logprobs = self.token_texts.choice_logprobs(self._logprobs), []
        return ChatCompletionChunkChoice(index=self.index, delta=delta, logprobs=logprobs)

    def _last_choice(self, piece: "Piece") -> ChatCompletionChunkChoice:
        reason = piece.output.finish_reason if piece.output else "stop"
        # After a truncation the handler cancels the engine's request itself.
        if reason == "cancelled" and not self.truncated:
            raise shutting_down_error()
        stopped = reason != "length" or self.truncated
        self.finish_reason = "length" if not stopped else "tool_calls" if self._calls else "stop"
        empty = ChoiceDelta()
        choice = self._choice(empty) if self._logprobs else ChatCompletionChunkChoice(index=self.index, delta=empty)
        choice.finish_reason = self.finish_reason
        return choice


def _delta(event: Event) -> ChoiceDelta:
    if isinstance(event, Reasoning):
        return ChoiceDelta(reasoning_content=event.text)
    if isinstance(event, Content):
        return ChoiceDelta(content=event.text)
    if isinstance(event, ToolCallStart):
        function = ChoiceDeltaFunction(name=event.name, arguments="")
        call = ChoiceDeltaToolCall(index=event.index, id=event.id, type="function", function=function)
    else:
        call = ChoiceDeltaToolCall(index=event.index, function=ChoiceDeltaFunction(arguments=event.text))
    return ChoiceDelta(tool_calls=[call])


class MessageBuilder:
    """The message of one choice, collected from its deltas."""

    def __init__(self, index: int, only_calls: bool = False) -> None:
        self._index = index
        self._only_calls = only_calls
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[ChatCompletionMessageToolCall] = []
        self._logprobs: list[ChatCompletionTokenLogprob] = []
        self._finish_reason: FinishReason = "stop"

    def add(self, choice: ChatCompletionChunkChoice) -> None:
        """Add the next delta."""
        delta = choice.delta
        self._content.append(delta.content or "")
        self._reasoning.append(delta.reasoning_content or "")
        for call in delta.tool_calls or []:
            # Only the first delta of a call has an id; later ones extend its arguments.
            if call.id is not None:
                function = ChatCompletionMessageFunction(name=call.function.name or "", arguments="")
                self._calls.append(ChatCompletionMessageToolCall(id=call.id, function=function))
            self._calls[call.index].function.arguments += call.function.arguments
        if choice.logprobs is not None:
            self._logprobs += choice.logprobs.content
        self._finish_reason = choice.finish_reason or self._finish_reason

    def choice(self, with_logprobs: bool) -> ChatCompletionChoice:
        """The whole choice."""
        content = "".join(self._content)
        message = ChatCompletionMessage(
            # OpenAI: null beside tool calls, but an empty text where the model has said nothing.
            content=content if content or not (self._calls or self._only_calls) else None,
            reasoning_content="".join(self._reasoning) or None,
            tool_calls=self._calls or None,
        )
        return ChatCompletionChoice(
            index=self._index,
            message=message,
            logprobs=ChoiceLogprobs(content=self._logprobs) if with_logprobs else None,
            finish_reason=self._finish_reason,
        )
