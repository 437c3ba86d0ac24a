"""Message history: earlier messages of a request in the form that chat templates are written for.

Every field that reaches a template is named here. What a client keeps with its messages besides never does.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jllm_runtime.errors import RequestError, check_text
from jllm_runtime.server.errors import ApiError
from jllm_runtime.server.parsing.tool_calls import ToolCallFormat, write_calls
from jllm_runtime.server.requests.ignored_fields import IgnoredFields
from jllm_runtime.server.schemas.chat_messages import (
    AssistantContent,
    AssistantMessage,
    ChatMessage,
    Content,
    ContentPartText,
    ContentPartThinking,
    ToolCall,
    ToolMessage,
)

Message = dict[str, Any]

CallStyle = Literal["several", "single", "text"]
"""Tool calls of one turn, as a template takes them: any number, one at most, or none but in the content."""

# Calls of a conversation by which a template shows its style. The ids are of the only form that Mistral's take.
_PROBE_CALLS = {"firstcall": "first_call_of_a_turn", "othercall": "other_call_of_a_turn"}


def template_messages(messages: Sequence[ChatMessage], ignored: IgnoredFields, strict: bool = False) -> list[Message]:
    """Messages in the form of templates: texts as contents, objects as arguments, results by call and with its name.

    Args:
        messages: of a request.
        ignored: is told of what is left out, such as arguments that are no JSON.
        strict: refuse that.

    Raises:
        ApiError: arguments that are no object, or that cannot be read.
    """
    reader = _Reader(ignored, strict)
    plain = [_template_message(message, f"messages[{number}]", reader) for number, message in enumerate(messages)]
    turns: list[Message] = []
    for message, results in _with_results(plain):
        calls = message.get("tool_calls", [])
        *matched, others = _match(calls, results)
        for call, own in zip(calls, matched, strict=True):
            for result in own:
                # The API names the tool in the call alone. Hermes' templates want it with the result, too.
                result.setdefault("name", call["function"]["name"])
        # The API pairs results with calls by ids, in any order. Most templates (Qwen's, GLM's) do by order.
        turns += [message, *itertools.chain(*matched), *others]
    return turns


def text_of(content: Content | AssistantContent | None) -> str:
    """The text of a message's content."""
    if content is None or isinstance(content, str):
        return content or ""
    # vLLM and others join text parts by line breaks, too.
    texts = (part.text if isinstance(part, ContentPartText) else getattr(part, "refusal", None) for part in content)
    return "\n".join(text for text in texts if text is not None)


def _thinking_of(message: AssistantMessage) -> str | None:
    """The thinking of an earlier answer, None without one."""
    named = (message.reasoning_content, message.thinking, message.reasoning)
    parts = message.content if isinstance(message.content, list) else []
    inside = [_thinking_part(part) for part in parts if isinstance(part, ContentPartThinking)]
    return next((each for each in named if isinstance(each, str)), "\n".join(inside) if inside else None)


def _thinking_part(part: ContentPartThinking) -> str:
    given = next((each for each in (part.thinking, part.reasoning, part.text) if each is not None), "")
    return text_of(given)


def find_call_style(source: str, render: Callable[[list[Message]], str]) -> CallStyle:
    """How a template takes several calls of one turn, by what it makes of two.

    Args:
        source: the template.
        render: renders messages with it; a RequestError says that it takes them not.
    """
    calls = [
        {"id": id, "type": "function", "function": {"name": name, "arguments": {}}} for id, name in _PROBE_CALLS.items()
    ]
    results = [
        {"role": "tool", "content": "done", "tool_call_id": id, "name": name} for id, name in _PROBE_CALLS.items()
    ]
    turns: list[Message] = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        *results,
    ]

    def shows_all(messages: list[Message]) -> bool:
        try:
            text = render(messages)
        except RequestError:
            return False
        return all(name in text for name in _PROBE_CALLS.values())

    if shows_all(turns):
        return "several"
    if shows_all(single_call_turns(turns)):
        return "single"
    # A template that reads calls and shows none here wants something else of a conversation: it says what.
    return "several" if "tool_calls" in source else "text"


def single_call_turns(messages: Sequence[Message]) -> list[Message]:
    """The same calls in turns of one each, every call with its result behind it."""
    turns: list[Message] = []
    for message, results in _with_results(messages):
        calls = message.get("tool_calls", [])
        if len(calls) < 2:
            turns += [message, *results]
            continue
        *matched, others = _match(calls, results)
        for number, (call, own) in enumerate(zip(calls, matched, strict=True)):
            # What was said stands before the first call.
            said = message if number == 0 else {"role": "assistant", "content": ""}
            turns += [{**said, "tool_calls": [call]}, *own]
        turns += others
    return turns


def _with_results(messages: Sequence[Message]) -> Iterator[tuple[Message, list[Message]]]:
    """Each message that is no result, with the results of its calls, which follow it."""
    at = 0
    while at < len(messages):
        end = at + 1
        while "tool_calls" in messages[at] and end < len(messages) and messages[end]["role"] == "tool":
            end += 1
        yield messages[at], list(messages[at + 1 : end])
        at = end


def _match(calls: Sequence[dict[str, Any]], results: Sequence[Message]) -> list[list[Message]]:
    """The results of each call, and at the end those of no call."""
    matched: list[list[Message]] = [[] for _ in calls]
    nameless: list[Message] = []
    for result in results:
        # Only where there are ids at all: calls and results may both be without.
        named = (n for n, call in enumerate(calls) if "id" in call and call["id"] == result.get("tool_call_id"))
        number = next(named, None)
        (nameless if number is None else matched[number]).append(result)
    # The others are in the order of the calls.
    free = [own for own in matched if not own]
    for own, result in zip(free, nameless, strict=False):
        own.append(result)
    return [*matched, nameless[len(free) :]]


def calls_as_text(messages: Sequence[Message], format: ToolCallFormat) -> list[Message]:
    """Messages with their calls in the content, as the model has written them."""
    return [_with_text_calls(message, format) if message.get("tool_calls") else message for message in messages]


def _with_text_calls(message: Message, format: ToolCallFormat) -> Message:
    fields = {name: value for name, value in message.items() if name != "tool_calls"}
    functions = [call["function"] for call in message["tool_calls"]]
    written = write_calls(format, [(each["name"], each["arguments"]) for each in functions])
    return {**fields, "content": f"{message['content']}\n{written}" if message["content"] else written}


def _template_message(message: ChatMessage, where: str, reader: "_Reader") -> Message:
    # Templates know neither "developer", OpenAI's newer name of the role, nor "function", its older one.
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    fields: Message = {"role": role, "content": text_of(message.content)}
    if message.name is not None:
        fields["name"] = message.name
    if isinstance(message, ToolMessage):
        fields |= {"tool_call_id": message.tool_call_id, "name": message.name or message.tool_name}
        # LangChain says it in the status.
        if message.is_error or message.status == "error":
            field = "is_error" if message.is_error else "status"
            reason = "this is for no template: say in the content that the tool has failed"
            reader.leave_out(f"{where}.{field}", reason)
    if isinstance(message, AssistantMessage):
        fields["content"] = fields["content"] or message.refusal or ""
        fields["reasoning_content"] = _thinking_of(message)
        # No empty list: some templates ask only whether there is one.
        if message.tool_calls:
            calls = enumerate(message.tool_calls)
            fields["tool_calls"] = [
                _template_call(call, f"{where}.tool_calls[{number}]", reader) for number, call in calls
            ]
        if (function := message.function_call) is not None:
            if message.tool_calls:
                param = f"{where}.function_call"
                raise ApiError(400, f"{param} and tool_calls are two forms of one thing", "invalid_value", param)
            arguments = reader.read(function.arguments, f"{where}.function_call.arguments")
            fields["tool_calls"] = [{"type": "function", "function": {"name": function.name, "arguments": arguments}}]
    return {name: value for name, value in fields.items() if value is not None}


def _template_call(call: ToolCall, where: str, reader: "_Reader") -> dict[str, Any]:
    arguments = reader.read(call.function.arguments, f"{where}.function.arguments")
    function = {"name": call.function.name, "arguments": arguments}
    return {**({} if call.id is None else {"id": call.id}), "type": call.type, "function": function}


@dataclass(frozen=True)
class _Reader:
    """Reader of what templates need in another form, or do not take.

    Attributes:
        ignored: is told of what is left out.
        strict: refuse that.
    """

    ignored: IgnoredFields
    strict: bool

    def leave_out(self, where: str, reason: str) -> None:
        """Leave out what is at this place, or refuse it for this reason."""
        if self.strict:
            raise ApiError(400, f"{where}: {reason}", "invalid_value", where)
        self.ignored.add(where)

    def read(self, given: str | dict[str, Any], where: str) -> dict[str, Any]:
        """The object that the arguments of a call are.

        What is no JSON is an empty one, as in vLLM: a call that was cut off, or that a model has written wrongly.
        """
        if isinstance(given, dict):
            return given
        # Nothing is how some clients say that there are no arguments; it loses nothing.
        if given.strip() in ("", "null"):
            return {}
        try:
            value = json.loads(given)
            # The escapes of this JSON may spell what those of the body must not.
            check_text(json.dumps(value, ensure_ascii=False), where)
        except json.JSONDecodeError as error:
            self.leave_out(where, f"this is no JSON: {error}")
            return {}
        except RequestError as error:
            raise ApiError(400, str(error), "invalid_value", where) from error
        except RecursionError:
            raise ApiError(400, f"{where} nests too deep", "invalid_value", where) from None
        except ValueError as error:  # a number of more digits than Python reads
            raise ApiError(400, f"{where} cannot be read: {error}", "invalid_value", where) from error
        if not isinstance(value, dict):
            raise ApiError(400, f"{where} must be a JSON object, got {given!r:.80}", "invalid_value", where)
        return value
