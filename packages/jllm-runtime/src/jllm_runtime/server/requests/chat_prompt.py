"""Chat prompts: messages and tools of a request, rendered by the model's chat template."""

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import anyio
import anyio.to_thread

from jllm_runtime.chat_template import settable_variables
from jllm_runtime.errors import RequestError
from jllm_runtime.reasoning import closes_thinking
from jllm_runtime.server.errors import ApiError
from jllm_runtime.server.parsing.output_parser import detect_format, detect_thinking
from jllm_runtime.server.schemas.chat_messages import AssistantMessage, ChatMessage, Content, SystemMessage, Tool
from jllm_runtime.server.template_processes import TemplateProcesses
from jllm_runtime.tokenizer import Tokenizer


class ChatPromptRenderer:
    """The model's chat template, for requests.

    Attributes:
        has_template: whether the model has one.
        variables: what the template reads.
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
        template = tokenizer.chat_template
        self._defaults = dict(variables or {})
        tokenizer.check_variables(self._defaults)
        self._tokenizer = tokenizer
        self._processes = processes
        self.has_template = template is not None
        self.variables = tokenizer.chat_variables()
        # A template that never reads "tools" would leave them out without a word.
        self.tool_format = detect_format(template) if template is not None and "tools" in self.variables else None
        self.thinks = template is not None and detect_thinking(template)
        self._thinks_by_default: bool | None = None

    async def render(self, messages: list[ChatMessage], tools: list[Tool], variables: dict[str, Any]) -> str:
        """The text of a conversation, up to where the assistant's message begins.

        Args:
            messages: the conversation.
            tools: the tools that the model may call.
            variables: ``chat_template_kwargs``.

        Raises:
            ApiError: no template, or one without the variables or tools that are asked for, or that takes too long.
            RequestError: the template refuses the messages.
        """
        if not self.has_template:
            message = "the model has no chat template, so it holds no conversations; use /v1/completions"
            raise ApiError(400, message, "no_chat_template")
        try:
            self._tokenizer.check_variables(variables)
        except RequestError as error:
            raise ApiError(400, str(error), "unknown_parameter", "chat_template_kwargs") from error
        if tools and self.tool_format is None:
            raise ApiError(400, "the model's chat template knows no tools", "unsupported", "tools")
        # No variable at all without tools: templates test "tools" in several ways, such as "is defined".
        given: dict[str, Any] = {"tools": [_template_tool(tool) for tool in tools]} if tools else {}
        given |= self._defaults | variables
        return await self._run([_template_message(message) for message in messages], **given)

    async def thinks_by_default(self) -> bool:
        """Whether the model may think where a request does not say whether."""
        if self._thinks_by_default is None and self.thinks:
            try:
                text = await self._run([{"role": "user", "content": "?"}], **self._defaults)
            except (ApiError, RequestError):  # it wants other messages, and has not said
                return True
            self._thinks_by_default = not closes_thinking(text)
        return bool(self._thinks_by_default)

    def settable_variables(self) -> list[str]:
        """Names that ``chat_template_kwargs`` may set."""
        template = self._tokenizer.chat_template
        return [] if template is None else settable_variables(template)

    async def _run(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        rendering = partial(self._processes.render, self._tokenizer.templates, messages, variables)
        # Nobody waits for the rendering of a request that has ended; the processes have a timeout of their own.
        return await anyio.to_thread.run_sync(rendering, limiter=self._processes.threads, abandon_on_cancel=True)


def _template_message(message: ChatMessage) -> dict[str, Any]:
    """A message in the form that templates are written for: content is a string, a call's arguments are an object."""
    fields = message.model_dump(exclude_unset=True, exclude={"content", "tool_calls", "annotations"})
    fields["content"] = _text(message.content)
    # Templates know no "developer", which is OpenAI's newer name of the role.
    if isinstance(message, SystemMessage):
        fields["role"] = "system"
    if isinstance(message, AssistantMessage) and message.tool_calls:
        calls = [call.model_dump() for call in message.tool_calls]
        for call in calls:
            call["function"]["arguments"] = _arguments(call["function"]["arguments"])
        fields["tool_calls"] = calls
    return fields


def _text(content: Content | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    # vLLM and others join text parts by line breaks, too.
    return "\n".join(part.text for part in content)


def _arguments(text: str) -> Any:
    """The object that the text holds. The text itself where a model wrote no object, so that it stays in the prompt."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _template_tool(tool: Tool) -> dict[str, Any]:
    # Without "strict": the server's grammar honours it, and models were not trained on it.
    return tool.model_dump(exclude_unset=True, exclude={"function": {"strict"}})
