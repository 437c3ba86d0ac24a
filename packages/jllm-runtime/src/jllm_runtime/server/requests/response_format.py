"""Output grammar of a chat request, from ``response_format``, ``tools`` and ``tool_choice``."""

import json
import re
from dataclasses import dataclass
from typing import Any

from jllm_runtime.grammar import Grammar
from jllm_runtime.server.errors import ApiError
from jllm_runtime.server.parsing.tool_calls import ToolCallFormat
from jllm_runtime.server.parsing.xml_call import FUNCTION_START
from jllm_runtime.server.requests.ignored_fields import IgnoredFields
from jllm_runtime.server.requests.tool_schemas import (
    NO_ARGUMENTS,
    arguments_schema,
    check_own_grammar,
    check_schema,
    leave_out,
    relax,
)
from jllm_runtime.server.requests.xml_grammar import XMLFunctionWriter
from jllm_runtime.server.schemas.chat import ChatCompletionRequest, ResponseFormatJSONObject, ResponseFormatJSONSchema
from jllm_runtime.server.schemas.chat_messages import FunctionDefinition, NamedToolChoice, Tool
from jllm_runtime.special_markers import THINK_END, THINK_START, TOOL_CALL_END, TOOL_CALL_START
from jllm_runtime.tokenizer import Tokenizer

# With free white space a small model may write it without end, which is valid JSON. These separators are Python's
# default, and those of the training data.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Thinking:
    """Room for thinking before what the grammar describes.

    Attributes:
        allowed: the model may think.
        opened: the prompt ends with the opening marker, so the output begins inside of the thinking.
    """

    allowed: bool = False
    opened: bool = False


def available_tools(body: ChatCompletionRequest) -> list[Tool]:
    """The tools that the model may call; none with ``tool_choice: "none"``.

    Raises:
        ApiError: a choice of a tool that is not in ``tools``.
    """
    choice = body.tool_choice
    # "auto" and "none" say of no tools what happens anyway; many clients always send one of them.
    if not body.tools and choice not in (None, "none", "auto"):
        raise ApiError(400, "tool_choice needs tools", "invalid_value", "tool_choice")
    if isinstance(choice, NamedToolChoice) and choice.function.name not in [tool.function.name for tool in body.tools]:
        message = f"tool_choice names {choice.function.name!r:.80}, which is none of the tools"
        raise ApiError(400, message, "invalid_value", "tool_choice")
    return [] if choice == "none" else body.tools


def forces_call(body: ChatCompletionRequest) -> bool:
    """Whether the output is tool calls and nothing else, apart from thinking."""
    return body.tool_choice == "required" or isinstance(body.tool_choice, NamedToolChoice)


def output_grammar(
    body: ChatCompletionRequest,
    tools: list[Tool],
    tool_format: ToolCallFormat | None,
    tokenizer: Tokenizer,
    thinking: Thinking,
    ignored: IgnoredFields,
) -> Grammar | None:
    """The grammar of the output, None where it is free.

    Args:
        body: the request.
        tools: from ``available_tools``.
        tool_format: how the model writes tool calls.
        tokenizer: tells which special markers are tokens of their own.
        thinking: what may come before the answer.
        ignored: is told of parts of the tools' schemas that cannot be enforced.

    Raises:
        ApiError: fields that exclude each other, or a strict tool with a schema that cannot be enforced.
    """
    own, schema = body.own_grammar(), _json_schema(body, ignored)
    if own is not None:
        if schema is not None or (tools and not own.is_json):
            other = "response_format" if schema is not None else "tools"
            raise ApiError(400, f"{own.field} and {other} exclude each other", "invalid_value", other)
        check_own_grammar(own)
        if not own.is_json:
            return own.grammar
        schema = json.loads(own.grammar.text)
    forced = forces_call(body)
    strict = any(tool.function.strict for tool in tools)
    if schema is None and not forced and not strict:
        return None
    # The plain case, which needs no rules around the schema.
    if not tools and not thinking.allowed and schema is not None:
        return Grammar.json_schema(schema)
    writer = _LarkWriter(tokenizer, body.tools, ignored)
    alternatives = []
    if schema is not None and not forced:
        alternatives.append(writer.json(schema))
    if tools and tool_format is not None:
        functions = [tool.function for tool in tools]
        if isinstance(body.tool_choice, NamedToolChoice):
            functions = [f for f in functions if f.name == body.tool_choice.function.name]
        # With a schema, the alternative to a call is JSON and not text.
        or_text = not forced and schema is None
        alternatives.append(writer.calls(functions, tool_format, parallel=body.parallel_tool_calls, or_text=or_text))
    return writer.grammar(alternatives, thinking)


def _json_schema(body: ChatCompletionRequest, ignored: IgnoredFields) -> dict[str, Any] | bool | None:
    """The schema of ``response_format``, None where it asks for text."""
    if isinstance(body.response_format, ResponseFormatJSONSchema):
        given = body.response_format.json_schema
        place = body.response_format.place
        if given.strict:
            check_schema(given.json_schema, place, "leave it out, or send strict: false")
            return given.json_schema
        schema, left_out = relax(given.json_schema)
        for path in left_out:
            ignored.add(f"{place}.{path}")
        return schema
    if isinstance(body.response_format, ResponseFormatJSONObject):
        given_schema = body.response_format.json_schema or body.response_format.value
        if given_schema is None:
            return {"type": "object"}
        check_schema(given_schema, body.response_format.place)
        return given_schema
    return None


class _LarkWriter:
    """Writer of a grammar in llguidance's dialect of Lark.

    There a quoted string matches text, and a bare ``<name>`` the special token of that name. A special marker is
    written bare where it is a token of its own: quoted, it would forbid that very token.
    """

    def __init__(self, tokenizer: Tokenizer, tools: list[Tool], ignored: IgnoredFields) -> None:
        self._tokenizer = tokenizer
        self._places = {tool.function.name: f"tools[{number}].function" for number, tool in enumerate(tools)}
        self._ignored = ignored
        self._rules: list[str] = []

    def grammar(self, alternatives: list[str], thinking: Thinking) -> Grammar:
        """The grammar: thinking where it is allowed, then one of these rules."""
        answer = f"({' | '.join(alternatives)})"
        start = f"start: {answer}"
        if thinking.allowed:
            opening = "" if thinking.opened else self._marker(THINK_START)
            self._rules.append(f"thought: {opening} {self._up_to(THINK_END, 'thinking')} /\\n{{0,2}}/")
            # Thinking that the prompt has opened must be closed; otherwise the model may leave it out.
            start = f"start: {'thought' if thinking.opened else 'thought?'} {answer}"
        return Grammar.lark("\n".join([start, *self._rules]))

    def json(self, schema: dict[str, Any] | bool) -> str:
        """Add a rule for JSON of this schema; its name."""
        name = f"json_{len(self._rules)}"
        styled = schema if isinstance(schema, bool) else {"x-guidance": JSON_STYLE, **schema}
        self._rules.append(f"{name}: %json {json.dumps(styled)}")
        return name

    def calls(
        self, functions: list[FunctionDefinition], tool_format: ToolCallFormat, parallel: bool, or_text: bool
    ) -> str:
        """Add a rule for calls of these functions; its name.

        Args:
            functions: those that may be called.
            tool_format: how the model writes calls.
            parallel: more than one call may come.
            or_text: text without a call is valid, too.
        """
        self._rules.append(f"object: {' | '.join(self._call(function, tool_format) for function in functions)}")
        more = "" if not parallel else ' ("; " object)*' if tool_format == "llama3" else ' ("\\n" call)*'
        if tool_format == "llama3":
            # These calls have no marker: text is what does not begin with a brace.
            self._rules.append(f"calls: {'/[^{](?s:.*)/ | ' if or_text else ''}object{more}")
            return "calls"
        opening, closing = self._marker(TOOL_CALL_START), self._marker(TOOL_CALL_END)
        self._rules += [f'rest: "\\n" object "\\n" {closing}', f"call: {opening} rest"]
        if or_text:
            # Without an opening marker the parser finds a function that begins, too: it must not begin as a text.
            names = "|".join(re.escape(function.name) for function in functions)
            but = f" & ~/(?s:.*){FUNCTION_START}({names})>(?s:.*)/" if tool_format == "xml" else ""
            # Text alone, or text up to the first call's opening marker and then that call.
            self._rules.append(f"calls: {self._text(but)} | {self._up_to(TOOL_CALL_START, 'before', but)} rest{more}")
        else:
            self._rules.append(f"calls: call{more}")
        return "calls"

    def _call(self, function: FunctionDefinition, tool_format: ToolCallFormat) -> str:
        """The body of a rule for a call of this function."""
        place = f"{self._places[function.name]}.parameters"
        # OpenAI: a function without "parameters" has an empty parameter list.
        schema = None if function.parameters is None else arguments_schema(function, place, self._ignored)
        if tool_format == "xml":
            writer = XMLFunctionWriter(NO_ARGUMENTS if schema is None else schema, self._rule, self.json)
            body = writer.call(function.name)
            leave_out(function, writer.left_out, place, self._ignored)
            return body
        # Name and arguments in one alternative, because each function has a schema of its own.
        key = "arguments" if tool_format == "hermes" else "parameters"
        head = json.dumps(f'{{"name": {json.dumps(function.name)}, "{key}": ')
        return f'{head} {self.json(schema) if schema is not None else json.dumps("{}")} "}}"'

    def _rule(self, beginning: str, body: str) -> str:
        """Add a rule with a name of its own; the name.

        Args:
            beginning: of the name, with the rule's options behind it.
            body: what it matches.
        """
        kind, options, rest = beginning.partition("[")
        name = f"{kind}_{len(self._rules)}"
        self._rules.append(f"{name}{options}{rest}: {body}")
        return name

    def _marker(self, marker: str) -> str:
        return marker if self._tokenizer.is_added(marker) else json.dumps(marker)

    def _up_to(self, marker: str, name: str, but: str = "") -> str:
        """Add a rule for any text that ends with the first of this marker; its name.

        Args:
            marker: ends the text.
            name: of the rule.
            but: what the text must not be, as a part of a terminal.
        """
        text = self._rule("ANY", f"/(?s:.*)/{but}")
        if self._tokenizer.is_added(marker):
            self._rules.append(f"{name}: {text} {marker}")
        else:
            self._rules.append(f"{name}[suffix={json.dumps(marker)}]: {text}")
        return name

    def _text(self, but: str) -> str:
        """Add a rule for any text without a call; its name. The argument is as for ``_up_to``."""
        # Where the marker is a token of its own, /./ does not match it anyway.
        if not self._tokenizer.is_added(TOOL_CALL_START):
            but += f" & ~/(?s:.*){TOOL_CALL_START}(?s:.*)/"
        return self._rule("TEXT", f"/(?s:.+)/{but}")
