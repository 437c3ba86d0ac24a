"""What a model's text consists of: thinking, content, and calls of tools, as the text comes.

::

    parser = OutputParser("hermes", thinking=True, tools=True)
    for piece in request:
        for event in parser.feed(piece.text):
            ...
    parser.finish()

The events are the same wherever the text is cut. A call is given when it is whole: one that turns out to be broken, or
is cut off, is content, character by character, so that nothing is lost and nobody acts on half of a call.
"""

import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from jllm_runtime.server.parsing.reasoning import ReasoningSplitter, detect_thinking, opens_thinking
from jllm_runtime.server.parsing.tool_calls import Call, CallParser, Format, HermesCalls, Llama3Calls, detect_format

__all__ = [
    "Content",
    "Event",
    "Format",
    "OutputParser",
    "Reasoning",
    "ToolCallArguments",
    "ToolCallStart",
    "detect_format",
    "detect_thinking",
    "opens_thinking",
]


@dataclass(frozen=True)
class Reasoning:
    """More of the thinking."""

    text: str


@dataclass(frozen=True)
class Content:
    """More of the answer."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """A call begins.

    Attributes:
        index: from 0, in the order of the text.
        id: what the tool's result will be sent back with.
        name: of the tool.
    """

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """More of the arguments of the call ``index``: a JSON object, once all is there."""

    index: int
    text: str


Event = Reasoning | Content | ToolCallStart | ToolCallArguments


class OutputParser:
    """Takes the text of one answer piece by piece.

    Args:
        format: how the model writes calls, from ``detect_format``; None finds none.
        thinking: whether the model may think first, in ``<think>...</think>``; from ``detect_thinking``.
        tools: whether tools were offered; else what looks like a call is content.
        inside_thinking: the prompt has opened the thinking; from ``opens_thinking``. Only with ``thinking``.
        new_id: makes the ids of calls.
    """

    def __init__(
        self,
        format: Format | None,
        thinking: bool,
        tools: bool,
        inside_thinking: bool = False,
        new_id: Callable[[], str] | None = None,
    ) -> None:
        self._reasoning = ReasoningSplitter(inside_thinking) if thinking else None
        self._calls: CallParser | None = None
        if tools and format is not None:
            self._calls = HermesCalls() if format == "hermes" else Llama3Calls()
        self._new_id = new_id or _random_id
        self._count = 0

    def feed(self, text: str) -> list[Event]:
        """What is certain now that this piece has come."""
        reasoning, content = self._reasoning.feed(text) if self._reasoning else ("", text)
        return self._events(reasoning, self._calls.feed(content) if self._calls else [content])

    def finish(self) -> list[Event]:
        """What was held back, now that the text has ended."""
        reasoning, content = self._reasoning.finish() if self._reasoning else ("", "")
        found: list[str | Call] = [content]
        if self._calls:
            found = [*self._calls.feed(content), *self._calls.finish()]
        return self._events(reasoning, found)

    def _events(self, reasoning: str, found: Iterable[str | Call]) -> list[Event]:
        events: list[Event] = [Reasoning(reasoning)] if reasoning else []
        text = ""
        for part in [*found, ""]:
            if isinstance(part, str) and part:
                text += part
                continue
            if text:
                events.append(Content(text))
                text = ""
            if isinstance(part, Call):
                events += [
                    ToolCallStart(self._count, self._new_id(), part.name),
                    ToolCallArguments(self._count, part.arguments),
                ]
                self._count += 1
        return events


def _random_id() -> str:
    return f"call_{secrets.token_hex(12)}"
