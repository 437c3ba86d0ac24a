"""A conversation, and the tools that the model may call."""

from typing import Annotated, Any, Literal

from pydantic import Field

from jllm_runtime.server.schemas.base import Schema


class TextPart(Schema):
    """A piece of a message. Others than text are refused: the models read nothing else."""

    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Field(fail_fast=True)]


class SystemMessage(Schema):
    """What the model is told before the conversation; ``developer`` is OpenAI's newer word for it."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Schema):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class FunctionCall(Schema):
    """A function and its arguments, which are a JSON object as text."""

    name: str
    arguments: str


class ToolCall(Schema):
    """A call that the model has made."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class AssistantMessage(Schema):
    """What the model has said, in the form that answers have, so that they can be sent back as they came."""

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = Field(None, description="What it thought; most templates leave it out.")
    tool_calls: list[ToolCall] = Field([], fail_fast=True, description="What it has called.")
    name: str | None = None
    annotations: list[Any] = Field([], max_length=0)


class ToolMessage(Schema):
    """What a tool has answered."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage,
    Field(discriminator="role"),
]


class Function(Schema):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema of the arguments.")
    strict: bool = Field(False, description="Let the arguments be what the schema says.")


class Tool(Schema):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class FunctionName(Schema):
    """The name of a function."""

    name: str


class NamedTool(Schema):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedTool
