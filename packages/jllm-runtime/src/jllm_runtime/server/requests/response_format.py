"""What an answer must be, by ``response_format`` and ``tool_choice``, as a grammar around the model's own marks."""

import json
from dataclasses import dataclass
from typing import Any

from jllm_runtime.grammar import Grammar
from jllm_runtime.server.errors import ApiError
from jllm_runtime.server.parsing.tool_calls import Format
from jllm_runtime.server.schemas.chat import ChatRequest, JSONObjectFormat, JSONSchemaFormat
from jllm_runtime.server.schemas.chat_messages import Function, NamedTool, Tool
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
    if tools and tool_format is not None:
        functions = [tool.function for tool in tools]
        if isinstance(body.tool_choice, NamedTool):
            functions = [f for f in functions if f.name == body.tool_choice.function.name]
        or_text = not forced and schema is None
        answers.append(writer.calls(functions, tool_format, body.parallel_tool_calls, or_text))
    return writer.grammar(answers, thinking)


def _schema(body: ChatRequest) -> dict[str, Any] | None:
    if isinstance(body.response_format, JSONSchemaFormat):
        return body.response_format.json_schema.json_schema
    return {"type": "object"} if isinstance(body.response_format, JSONObjectFormat) else None


class _Writer:
    """Writes rules in Lark's notation, as llguidance reads it: a mark that is a token of its own has no quotes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._rules: list[str] = []

    def grammar(self, answers: list[str], thinking: Thinking) -> Grammar:
        """One of these rules, with room for thoughts."""
        answer = f"({' | '.join(answers)})"
        start = f"start: {answer}"
        if thinking.allowed:
            opened = "" if thinking.begun else self._mark(THINKING[0])
            self._rules.append(f"thought: {opened} {self._up_to(THINKING[1], 'thinking')} /\\n{{0,2}}/")
            start = f"start: {'thought' if thinking.begun else 'thought?'} {answer}"
        return Grammar.lark("\n".join([start, *self._rules]))

    def json(self, schema: dict[str, Any]) -> str:
        """The name of a rule for JSON of this schema."""
        name = f"json_{len(self._rules)}"
        self._rules.append(f"{name}: %json {json.dumps({'x-guidance': JSON_STYLE, **schema})}")
        return name

    def calls(self, functions: list[Function], tool_format: Format, parallel: bool, or_text: bool) -> str:
        """The name of a rule for calls of these functions, one or more; or for any text as well."""
        key = "arguments" if tool_format == "hermes" else "parameters"
        each = []
        for function in functions:
            head = json.dumps(f'{{"name": {json.dumps(function.name)}, "{key}": ')
            # A function without parameters takes none.
            arguments = '"{}"' if function.parameters is None else self.json(function.parameters)
            each.append(f'{head} {arguments} "}}"')
        self._rules.append(f"object: {' | '.join(each)}")
        more = "" if not parallel else ' ("\\n" call)*' if tool_format == "hermes" else ' ("; " object)*'
        if tool_format == "llama3":
            self._rules.append(f"calls: {'/[^{](?s:.*)/ | ' if or_text else ''}object{more}")
            return "calls"
        opened, closed = map(self._mark, CALL)
        self._rules += [f'rest: "\\n" object "\\n" {closed}', f"call: {opened} rest"]
        if or_text:  # which may also come before calls
            self._rules.append(f"calls: {self._text()} | {self._up_to(CALL[0], 'before')} rest{more}")
        else:
            self._rules.append(f"calls: call{more}")
        return "calls"

    def _mark(self, mark: str) -> str:
        return mark if self._tokenizer.is_added(mark) else json.dumps(mark)

    def _up_to(self, mark: str, name: str) -> str:
        """The name of a rule for any text that ends with its first mark."""
        if self._tokenizer.is_added(mark):
            self._rules.append(f"{name}: /(?s:.*)/ {mark}")
        else:
            self._rules.append(f"{name}[suffix={json.dumps(mark)}]: /(?s:.*)/")
        return name

    def _text(self) -> str:
        """The name of a rule for any text without a call."""
        but = "" if self._tokenizer.is_added(CALL[0]) else f" & ~/(?s:.*){CALL[0]}(?s:.*)/"
        self._rules.append(f"TEXT: /(?s:.+)/{but}")
        return "TEXT"
