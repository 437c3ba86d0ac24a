"""Output parser: events of thinking, content and tool calls, from a text that comes in pieces.

::

    parser = OutputParser("hermes", thinking=True, tools=True)
    for piece in request:
        for event in parser.feed(piece.text):
            ...
    parser.finish()

The events do not depend on where the text is cut, apart from the lengths of their texts. A tool call becomes an event
when it is complete, or at the end where a limit has cut it off. A broken or unfinished one is content, character by
character: nothing is lost.
"""

import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from jllm_runtime.reasoning import ReasoningParser, detect_thinking, opens_thinking
from jllm_runtime.server.parsing.call_object import ParsedCall
from jllm_runtime.server.parsing.thought_calls import ThoughtCallFinder
from jllm_runtime.server.parsing.tool_calls import PARSERS, ToolCallFormat, ToolCallParser, detect_format
from jllm_runtime.server.parsing.xml_call import Schemas

__all__ = [
    "Content",
    "Event",
    "OutputParser",
    "Reasoning",
    "ToolCallArguments",
    "ToolCallFormat",
    "ToolCallStart",
    "detect_format",
    "detect_thinking",
    "opens_thinking",
]


@dataclass(frozen=True)
class Reasoning:
    """A piece of the thinking."""

    text: str


@dataclass(frozen=True)
class Content:
    """A piece of the content."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """The start of a tool call.

    Attributes:
        index: number of the call, from 0.
        id: id of the call, which the message with the tool's result refers to.
        name: the tool's name.
    """

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """A piece of the arguments of the call with this index; together they are a JSON object, unless it is cut off."""

    index: int
    text: str


Event = Reasoning | Content | ToolCallStart | ToolCallArguments


class OutputParser:
    """Parser of one output.

    Args:
        format: how the model writes tool calls, from ``detect_format``; None finds none.
        thinking: the model may think first, in ``<think>...</think>``; from ``detect_thinking``.
        tools: the request has tools. Without any, what looks like a call is content.
        inside_thinking: the prompt has opened the thinking; from ``opens_thinking``. Only with ``thinking``.
        only_calls: a grammar allows no content but calls. What is left of a call that has ended early is none either.
        new_id: makes the ids of tool calls.
        schemas: of the tools' arguments, by the tools' names. They tell numbers from texts where a format does not.
    """

    def __init__(
        self,
        format: ToolCallFormat | None,
        thinking: bool,
        tools: bool,
        inside_thinking: bool = False,
        only_calls: bool = False,
        new_id: Callable[[], str] | None = None,
        schemas: Schemas | None = None,
    ) -> None:
        self._reasoning = ReasoningParser(inside_thinking) if thinking else None
        self._calls: ToolCallParser | None = None
        # Without tools in the request, a user may well ask for text that looks like a call.
        if tools and format is not None:
            self._calls = PARSERS[format](schemas or {})
        # In the thinking only calls of tools that there are; most texts about calls are no more than that.
        self._thought: ThoughtCallFinder | None = None
        if self._reasoning and self._calls and format is not None and schemas:
            self._thought = ThoughtCallFinder(PARSERS[format](schemas), schemas)
        self._only_calls = only_calls
        self._new_id = new_id or _random_id
        self._count = 0

    def feed(self, text: str) -> list[Event]:
        """Add a piece; the events that are certain now."""
        # Thinking comes first, and calls are searched in the content only: a model may think about calls.
        reasoning, content = self._reasoning.feed(text) if self._reasoning else ("", text)
        reasoning = self._certain(reasoning)
        return self._events(reasoning, self._calls.feed(content) if self._calls else [content])

    def finish(self, cut: bool = False) -> list[Event]:
        """End the text; the events of what was held back.

        Args:
            cut: the text would go on, but for a limit. As in OpenAI's API, a call is then given as far as it goes.
        """
        reasoning, content = self._reasoning.finish() if self._reasoning else ("", "")
        reasoning = self._certain(reasoning)
        found: list[str | ParsedCall] = [content]
        if self._calls:
            found = [*self._calls.feed(content), *self._calls.finish(cut)]
        if self._thought and self._reasoning and not self._reasoning.closed:
            rest, calls = self._thought.finish(cut)
            reasoning, found = reasoning + rest, [*calls, *found]
        return self._events(reasoning, found)

    def _certain(self, reasoning: str) -> str:
        """What is certain to be thinking, with this new piece of it."""
        if self._thought is None or self._reasoning is None:
            return reasoning
        return self._thought.feed(reasoning) + (self._thought.close() if self._reasoning.closed else "")

    def _events(self, reasoning: str, found: Iterable[str | ParsedCall]) -> list[Event]:
        events: list[Event] = [Reasoning(reasoning)] if reasoning else []
        text = ""
        # Neighbouring texts become one event; the empty part at the end flushes the last.
        for part in [*found, ""]:
            if isinstance(part, str) and part:
                text += part
                continue
            if text and not self._only_calls:
                events.append(Content(text))
            text = ""
            if isinstance(part, ParsedCall):
                events.append(ToolCallStart(self._count, self._new_id(), part.name))
                if part.arguments:
                    events.append(ToolCallArguments(self._count, part.arguments))
                self._count += 1
        return events


def _random_id() -> str:
    return f"call_{secrets.token_hex(12)}"
