"""What an answer must be, by ``response_format`` and ``tool_choice``, as a grammar around the model's own marks."""

import json
from dataclasses import dataclass
from typing import Any

from jllm_runtime.grammar import Grammar
from jllm_runtime.server.errors import ApiError
from jllm_runtime.server.schemas.chat import ChatRequest, JSONObjectFormat, JSONSchemaFormat
from jllm_runtime.server.schemas.messages import Function, NamedTool, Tool
from jllm_runtime.server.tool_calls import Format
from jllm_runtime.tokenizer import Tokenizer

# White space without end is valid JSON, and small models like it. The separators are those that models are trained on.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
THINKING = ("<think>", "</think>")
CALL = ("<tool_call>", "</tool_call>")


@dataclass(frozen=True)
class Thinking:
    """Whether the model may think before what the grammar describes.

    Attributes:
        allowed: it may.
        begun: the prompt has opened the thinking already.
    """

    allowed: bool = False
    begun: bool = False


def offered_tools(body: ChatRequest) -> list[Tool]:
    """The tools that the model may call.

    Raises:
        ApiError: a choice among tools that are not there.
    """
    choice = body.tool_choice
    if not body.tools and choice not in (None, "none"):
        raise ApiError(400, "tool_choice needs tools", "invalid_value", "tool_choice")
    if isinstance(choice, NamedTool) and choice.function.name not in [tool.function.name for tool in body.tools]:
        message = f"tool_choice names {choice.function.name!r:.80}, which is none of the tools"
        raise ApiError(400, message, "invalid_value", "tool_choice")
    return [] if choice == "none" else body.tools


def answer_grammar(
    body: ChatRequest, tools: list[Tool], tool_format: Format | None, tokenizer: Tokenizer, thinking: Thinking
) -> Grammar | None:
    """What the answer must be, None where it may be anything.

    Args:
        body: the request.
        tools: those that are offered.
        tool_format: how the model writes calls.
        tokenizer: knows which marks are tokens of their own.
        thinking: what may come before it.

    Raises:
        ApiError: requirements that exclude each other.
    """
    own, schema = body.own_grammar(), _schema(body)
    forced = body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool)
    if own is not None:
        if schema is not None or tools:
            other = "response_format" if schema is not None else "tools"
            raise ApiError(400, f"{own.kind} and {other} exclude each other", "invalid_value", other)
        return own
    strict = any(tool.function.strict for tool in tools)
    if schema is None and not forced and not strict:
        return None
    if not tools and not thinking.allowed and schema is not None:
        return Grammar.json_schema(schema)
    writer = _Writer(tokenizer)
    answers = []
    if schema is not None and not forced:
        answers.append(writer.json(schema))
    if tools:
        functions = [tool.function for tool in tools]
        if isinstance(body.tool_choice, NamedTool):
            functions = [f for f in functions if f.name == body.tool_choice.function.name]
        calls = writer.calls(functions, tool_format or "hermes", body.parallel_tool_calls)
        free = not forced and schema is None
        answers.append(f"{writer.text_before(tool_format or 'hermes')} | {calls}" if free else calls)
    return writer.grammar(" | ".join(answers), thinking)


def _schema(body: ChatRequest) -> dict[str, Any] | None:
    if isinstance(body.response_format, JSONSchemaFormat):
        return body.response_format.json_schema.json_schema
    return {"type": "object"} if isinstance(body.response_format, JSONObjectFormat) else None


class _Writer:
    """Writes rules in Lark's notation, as llguidance reads it: a mark that is a token of its own has no quotes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._rules: list[str] = []

    def grammar(self, answer: str, thinking: Thinking) -> Grammar:
        """The whole, with room for thoughts."""
        start = f"start: answer\nanswer: {answer}"
        if thinking.allowed:
            opened, closed = map(self._mark, THINKING)
            thought = self._anything_without(THINKING[1], "THOUGHT")
            start = f"start: {'thought' if thinking.begun else 'thought?'} answer\nanswer: {answer}\n"
            start += f"thought: {'' if thinking.begun else opened} {thought}? {closed} /\\n{{0,2}}/"
        return Grammar.lark("\n".join([start, *self._rules]))

    def json(self, schema: dict[str, Any]) -> str:
        """The name of a rule for JSON of this schema."""
        name = f"json_{len(self._rules)}"
        self._rules.append(f"{name}: %json {json.dumps({'x-guidance': JSON_STYLE, **schema})}")
        return name

    def calls(self, functions: list[Function], tool_format: Format, parallel: bool) -> str:
        """The name of a rule for calls of these functions, one or more."""
        key = "arguments" if tool_format == "hermes" else "parameters"
        each = []
        for function in functions:
            head = json.dumps(f'{{"name": {json.dumps(function.name)}, "{key}": ')
            # A function without parameters takes none.
            arguments = '"{}"' if function.parameters is None else self.json(function.parameters)
            each.append(f'{head} {arguments} "}}"')
        call, between = " | ".join(each), '"; "'
        if tool_format == "hermes":
            opened, closed = map(self._mark, CALL)
            call, between = f'{opened} "\\n" ({call}) "\\n" {closed}', '"\\n"'
        self._rules.append(f"call: {call}")
        self._rules.append(f"calls: call ({between} call)*" if parallel else "calls: call")
        return "calls"

    def text_before(self, tool_format: Format) -> str:
        """Any text, which in the format of Hermes may come before a call as well as instead."""
        if tool_format == "hermes":
            return f"{self._anything_without(CALL[0], 'TEXT')} calls?"
        self._rules.append("TEXT: /[^{](?s:.*)/")
        return "TEXT"

    def _mark(self, mark: str) -> str:
        return mark if self._tokenizer.is_added(mark) else json.dumps(mark)

    def _anything_without(self, mark: str, name: str) -> str:
        unless = "" if self._tokenizer.is_added(mark) else f" & ~/(?s:.*){mark.replace('/', '[/]')}(?s:.*)/"
        self._rules.append(f"{name}: /(?s:.+)/{unless}")
        return name
