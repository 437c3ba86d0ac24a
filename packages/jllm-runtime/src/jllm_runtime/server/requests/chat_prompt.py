"""From the messages of a request to the text that the model is given, by the model's own chat template."""

import json
from typing import Any

from jllm_runtime.server.errors import ApiError
from jllm_runtime.server.parsing.output_parser import detect_format, detect_thinking
from jllm_runtime.server.schemas.chat_messages import AssistantMessage, Content, Message, SystemMessage, Tool
from jllm_runtime.tokenizer import Tokenizer

OURS = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "unk_token", "pad_token"}
)
"""Variables of templates that requests have other fields for, or none."""


class ChatTemplate:
    """What the model's chat template can do.

    Attributes:
        exists: whether there is one.
        variables: what it reads besides the messages.
        tool_format: how the model writes calls; None where the template knows no tools, or a format that we do not.
        thinks: whether the model may think first.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        template = tokenizer.chat_template
        self._tokenizer = tokenizer
        self.exists = template is not None
        self.variables = tokenizer.chat_variables()
        self.tool_format = detect_format(template) if template is not None and "tools" in self.variables else None
        self.thinks = template is not None and detect_thinking(template)

    def render(self, messages: list[Message], tools: list[Tool], variables: dict[str, Any]) -> str:
        """The text of a conversation, up to where the assistant answers.

        Raises:
            ApiError: the template cannot honour what is asked.
            RequestError: the template does not take these messages.
        """
        if not self.exists:
            message = "the model has no chat template, so it holds no conversations; use /v1/completions"
            raise ApiError(400, message, "no_chat_template")
        for name in variables:
            self._check_variable(name)
        if tools and self.tool_format is None:
            raise ApiError(400, "the model's chat template knows no tools", "unsupported", "tools")
        given = {"tools": [_tool(tool) for tool in tools]} if tools else {}
        return self._tokenizer.render_chat([_message(message) for message in messages], **variables, **given)

    def known_variables(self) -> list[str]:
        """Those that a request may set."""
        return sorted(self.variables - OURS)

    def _check_variable(self, name: str) -> None:
        known = self.known_variables()
        if name not in known:
            message = f"the model's chat template has no variable {name!r:.80}; it has {', '.join(known) or 'none'}"
            raise ApiError(400, message, "unknown_parameter", "chat_template_kwargs")


def _message(message: Message) -> dict[str, Any]:
    """A message as templates know it: texts are strings, and arguments are objects."""
    fields = message.model_dump(exclude_unset=True, exclude={"content", "tool_calls", "annotations"})
    fields["content"] = _text(message.content)
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
    return "\n".join(part.text for part in content)


def _arguments(text: str) -> Any:
    """The object that the text describes, or the text where a model has written none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _tool(tool: Tool) -> dict[str, Any]:
    # What is strict is the server's affair.
    return tool.model_dump(exclude_unset=True, exclude={"function": {"strict"}})
