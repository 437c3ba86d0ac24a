"""Schemas of chat messages and tools."""

from typing import Annotated, Any, Literal

from pydantic import Field

from jllm_runtime.server.schemas.base import RequestModel

MAX_TOOLS = 128


class ContentPartText(RequestModel):
    """A text part of a message. Parts of other types are refused, because the models read text only."""

    type: Literal["text"]
    text: str


Content = str | Annotated[list[ContentPartText], Field(fail_fast=True)]


class SystemMessage(RequestModel):
    """Instructions before the conversation. ``developer`` is OpenAI's newer name of the role."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(RequestModel):
    """A message of the user."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class FunctionCall(RequestModel):
    """The function of a tool call, with its arguments: a JSON object as text."""

    name: str
    arguments: str


class ToolCall(RequestModel):
    """A tool call of an earlier message."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class AssistantMessage(RequestModel):
    """An earlier message of the model. It has all fields of a response, so that one can be sent back as it came."""

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = Field(None, description="Its thinking; most templates leave it out.")
    tool_calls: list[ToolCall] = Field([], fail_fast=True, description="Its tool calls.")
    name: str | None = None
    annotations: list[Any] = Field([], max_length=0)


class ToolMessage(RequestModel):
    """The result of a tool call."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


ChatMessage = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage,
    Field(discriminator="role"),
]


class FunctionDefinition(RequestModel):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema of the arguments.")
    strict: bool = Field(False, description="Make the arguments follow the schema.")


class Tool(RequestModel):
    """A tool that the model may call."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(RequestModel):
    """The name of a function."""

    name: str


class NamedToolChoice(RequestModel):
    """A choice of the tool that must be called."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice
