"""One answer of a chat on its way: from the engine's pieces to deltas, and from the deltas to a message."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from jllm_runtime.outputs import Piece, TokenLogprob
from jllm_runtime.server.errors import draining_error
from jllm_runtime.server.responses.logprobs import TokenTexts, shown_logprobs
from jllm_runtime.server.parsing.output_parser import Content, Event, OutputParser, Reasoning, ToolCallStart
from jllm_runtime.server.schemas.chat import (
    AnsweredCall,
    AnsweredFunction,
    AnsweredMessage,
    ChatChoice,
    ChatLogprobs,
    ChunkChoice,
    Delta,
    FinishReason,
    FunctionDelta,
    TokenLogprobs,
    ToolCallDelta,
)


@dataclass
class ChatAnswer:
    """Turns the pieces of one answer into choices of a stream's chunks.

    Attributes:
        index: its number.
        parser: finds thoughts and calls in its text.
        texts: names tokens, where log-probabilities are asked for.
        ends: ids that end a text, and are no part of it.
        single: end before a second call.
        finish_reason: once it has ended.
        cut: it has ended before the engine knows.
    """

    index: int
    parser: OutputParser
    texts: TokenTexts | None
    ends: Sequence[int]
    single: bool = False
    finish_reason: FinishReason | None = None
    cut: bool = False
    _calls: int = 0
    _logprobs: list[TokenLogprob] = field(default_factory=list)

    def begin(self) -> ChunkChoice:
        """What opens a stream."""
        return ChunkChoice(index=self.index, delta=Delta(role="assistant", content=""))

    def take(self, piece: Piece) -> list[ChunkChoice]:
        """What a piece brings, the end included."""
        if not self.cut:
            self._logprobs += shown_logprobs(piece, self.ends)
        events = self.parser.feed(piece.text)
        if piece.output is not None:
            events += self.parser.finish()
        choices = [self._choice(delta) for delta in self._deltas(events)]
        if piece.output is not None:
            choices.append(self._end(piece))
        return choices

    def _deltas(self, events: Iterable[Event]) -> Iterable[Delta]:
        for event in events:
            if isinstance(event, ToolCallStart):
                self.cut = self.cut or (self.single and self._calls == 1)
                self._calls += not self.cut
            if not self.cut:
                yield _delta(event)

    def _choice(self, delta: Delta) -> ChunkChoice:
        """With the log-probabilities since the last one: text may be held back until it is known what it is."""
        if self.texts is None:
            return ChunkChoice(index=self.index, delta=delta)
        logprobs, self._logprobs = self.texts.for_chat(self._logprobs), []
        return ChunkChoice(index=self.index, delta=delta, logprobs=logprobs)

    def _end(self, piece: Piece) -> ChunkChoice:
        reason = piece.output.finish_reason if piece.output else "stop"
        if reason == "cancelled" and not self.cut:
            raise draining_error()
        stopped = reason != "length" or self.cut
        self.finish_reason = "length" if not stopped else "tool_calls" if self._calls else "stop"
        choice = self._choice(Delta()) if self._logprobs else ChunkChoice(index=self.index, delta=Delta())
        choice.finish_reason = self.finish_reason
        return choice


def _delta(event: Event) -> Delta:
    if isinstance(event, Reasoning):
        return Delta(reasoning_content=event.text)
    if isinstance(event, Content):
        return Delta(content=event.text)
    if isinstance(event, ToolCallStart):
        function = FunctionDelta(name=event.name, arguments="")
        return Delta(tool_calls=[ToolCallDelta(index=event.index, id=event.id, type="function", function=function)])
    return Delta(tool_calls=[ToolCallDelta(index=event.index, function=FunctionDelta(arguments=event.text))])


class MessageBuilder:
    """Collects the deltas of one answer."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[AnsweredCall] = []
        self._tokens: list[TokenLogprobs] = []
        self._finish_reason: FinishReason = "stop"

    def add(self, choice: ChunkChoice) -> None:
        """The next delta."""
        delta = choice.delta
        self._content.append(delta.content or "")
        self._reasoning.append(delta.reasoning_content or "")
        for call in delta.tool_calls or []:
            if call.id is not None:
                function = AnsweredFunction(name=call.function.name or "", arguments="")
                self._calls.append(AnsweredCall(id=call.id, function=function))
            self._calls[call.index].function.arguments += call.function.arguments
        if choice.logprobs is not None:
            self._tokens += choice.logprobs.content
        self._finish_reason = choice.finish_reason or self._finish_reason

    def choice(self, with_logprobs: bool) -> ChatChoice:
        """The whole answer."""
        content = "".join(self._content)
        message = AnsweredMessage(
            content=content if content or not self._calls else None,
            reasoning_content="".join(self._reasoning) or None,
            tool_calls=self._calls or None,
        )
        return ChatChoice(
            index=self._index,
            message=message,
            logprobs=ChatLogprobs(content=self._tokens) if with_logprobs else None,
            finish_reason=self._finish_reason,
        )
