"""Chat prompts: messages and tools of a request, rendered by the model's chat template."""

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from jllm_runtime.chat_template import find_variables, settable_variables
from jllm_runtime.errors import RequestError
from jllm_runtime.named_templates import TOOL_VARIABLES
from jllm_runtime.reasoning import closes_thinking, room_for_thinking
from jllm_runtime.server.errors import ApiError
from jllm_runtime.server.parsing.output_parser import detect_format, detect_thinking
from jllm_runtime.server.requests.ignored_fields import IgnoredFields
from jllm_runtime.server.requests.message_history import (
    CallStyle,
    Message,
    calls_as_text,
    find_call_style,
    single_call_turns,
    template_messages,
)
from jllm_runtime.server.requests.response_format import Thinking
from jllm_runtime.server.schemas.chat_messages import ChatMessage, Tool
from jllm_runtime.server.template_processes import TemplateProcesses
from jllm_runtime.tokenizer import Tokenizer

Result = TypeVar("Result")

_NO_PARAMETERS = {"type": "object", "properties": {}}
_PROBE_TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": _NO_PARAMETERS}}


class ChatPromptRenderer:
    """The model's chat templates, for requests.

    Attributes:
        has_template: whether the model has one.
        takes_tools: whether a template reads tools. One that does not would leave them out without a word.
        tool_format: how the model writes tool calls. None where the template has no tools, or an unknown format.
        thinks: whether the model may think before it answers.

    Args:
        tokenizer: the model's.
        processes: run the template.
        variables: of the template, for requests that do not set them.

    Raises:
        RequestError: the template has not such variables.
    """

    def __init__(
        self, tokenizer: Tokenizer, processes: TemplateProcesses, variables: Mapping[str, Any] | None = None
    ) -> None:
        template, tool_template = tokenizer.templates.choose(), tokenizer.templates.choose(tools=True)
        self._defaults = dict(variables or {})
        tokenizer.check_variables(self._defaults)
        self._tokenizer = tokenizer
        self._processes = processes
        self.has_template = template is not None
        self.takes_tools = tool_template is not None and bool(find_variables(tool_template) & set(TOOL_VARIABLES))
        self.tool_format = detect_format(tool_template) if tool_template is not None and self.takes_tools else None
        self.thinks = any(source is not None and detect_thinking(source) for source in (template, tool_template))
        self._call_styles: dict[str, CallStyle] = {}
        self._taken: dict[tuple[str | None, str], bool] = {}
        self._thinks_by_default: bool | None = None

    def variables(self, tools: bool) -> frozenset[str]:
        """Names of the variables that the template reads, with or without tools."""
        template = self._tokenizer.templates.choose(tools)
        return frozenset() if template is None else find_variables(template)

    async def on_thread(self, work: Callable[[], Result]) -> Result:
        """Call what runs the template, such as ``render``, on a thread for that. It ends with its request."""
        return await self._processes.on_thread(work)

    def render(
        self,
        messages: list[ChatMessage],
        tools: list[Tool],
        variables: dict[str, Any],
        continued: bool = False,
        opened: bool = True,
        ignored: IgnoredFields | None = None,
        strict: bool = False,
    ) -> str:
        """The text of a conversation, up to where the assistant's message begins.

        Args:
            messages: the conversation.
            tools: the tools that the model may call.
            variables: ``chat_template_kwargs``.
            continued: the text ends with the last message's content instead.
            opened: the text ends with the opening of the assistant's message.
            ignored: is told of what is left out of the messages.
            strict: refuse that.

        Raises:
            ApiError: no template, or one without the variables or tools that are asked for, or that takes too long.
            RequestError: the template refuses the messages.
        """
        if not self.has_template:
            message = "the model has no chat template, so it holds no conversations; use /v1/completions"
            raise ApiError(400, message, "no_chat_template")
        try:
            self._tokenizer.templates.check_variables(variables, tools=bool(tools))
        except RequestError as error:
            raise ApiError(400, str(error), "unknown_parameter", "chat_template_kwargs") from error
        if tools and not self.takes_tools:
            raise ApiError(400, "the model's chat template knows no tools", "unsupported", "tools")
        if tools and self.tool_format is None:
            message = "the model writes tool calls in a format that this server cannot read; it reads those of Hermes"
            raise ApiError(400, f"{message} (also Qwen's), Llama 3 and Qwen3-Coder", "unsupported", "tools")
        # No variable at all without tools: templates test "tools" in several ways, such as "is defined".
        given: dict[str, Any] = {"tools": [_template_tool(tool) for tool in tools]} if tools else {}
        given |= self._defaults | variables
        if continued:
            given["continue_final_message"] = True
        elif not opened:
            given["add_generation_prompt"] = False
        plain = template_messages(messages, ignored or IgnoredFields(), strict)
        plain = self._with_readable_calls(plain, bool(tools))
        try:
            return self._rendered(plain, **given)
        except RequestError:
            # A tool may be a name alone, but templates such as Hermes' read a description and parameters of each.
            whole = [_whole_tool(tool) for tool in given.get("tools", [])]
            if whole == given.get("tools", []):
                raise
            return self._rendered(plain, **{**given, "tools": whole})

    def thinking(self, text: str, continued: str | None = None) -> Thinking:
        """The room for thinking behind a rendered text.

        Args:
            text: from ``render``.
            continued: the content that it ends with, where the answer goes on from that.
        """
        allowed, opened = room_for_thinking(text, continued)
        return Thinking(allowed=self.thinks and allowed, opened=self.thinks and opened)

    def _with_readable_calls(self, messages: list[Message], tools: bool) -> list[Message]:
        """Messages whose tool calls the template writes into the prompt, all of them."""
        source = self._tokenizer.templates.choose(tools)
        if source is None or not any(message.get("tool_calls") for message in messages):
            return messages
        if source not in self._call_styles:
            given = self._defaults | ({"tools": [_PROBE_TOOL]} if tools else {})
            style = find_call_style(source, lambda probe: self._rendered(probe, **given))
            self._call_styles[source] = style
        style = self._call_styles[source]
        if style == "text":
            return calls_as_text(messages, self.tool_format or "hermes")
        return single_call_turns(messages) if style == "single" else messages

    def takes(self, tools: bool, variables: dict[str, Any]) -> bool:
        """Whether the template renders a question with these variables, too, if it does without them."""
        # The values are few, so that what is kept stays small.
        key = (self._tokenizer.templates.choose(tools), json.dumps(variables, sort_keys=True))
        if key not in self._taken:
            self._taken[key] = self._asks(tools, variables) or not self._asks(tools, {})
        return self._taken[key]

    def _asks(self, tools: bool, variables: dict[str, Any]) -> bool:
        """Whether a question can be rendered with these variables."""
        given = {"tools": [_PROBE_TOOL]} if tools else {}
        try:
            self._rendered([{"role": "user", "content": "?"}], **given, **self._defaults | variables)
        except RequestError:
            return False
        return True

    def thinks_by_default(self) -> bool:
        """Whether the model may think where a request does not say whether."""
        if self._thinks_by_default is None and self.thinks:
            try:
                text = self._rendered([{"role": "user", "content": "?"}], **self._defaults)
            except (ApiError, RequestError):  # it wants other messages, and has not said
                return True
            self._thinks_by_default = not closes_thinking(text)
        return bool(self._thinks_by_default)

    def settable_variables(self) -> list[str]:
        """Names that ``chat_template_kwargs`` may set."""
        template = self._tokenizer.chat_template
        return [] if template is None else settable_variables(template)

    def _rendered(self, messages: list[Message], **variables: Any) -> str:
        return self._processes.render(self._tokenizer.templates, messages, variables)


def _whole_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool with the fields that it leaves out, which then say nothing."""
    function = tool["function"]
    parameters = {**_NO_PARAMETERS, **function.get("parameters", {})}
    return {**tool, "function": {"description": "", **function, "parameters": parameters}}


def _template_tool(tool: Tool) -> dict[str, Any]:
    # Without "strict": the server's grammar honours it, and models were not trained on it.
    return tool.model_dump(exclude_unset=True, exclude={"cache_control": True, "function": {"strict", "cache_control"}})
