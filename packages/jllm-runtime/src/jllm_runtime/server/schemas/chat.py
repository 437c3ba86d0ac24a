"""Chat completions: what is asked, what is answered, and the chunks of a stream."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from jllm_runtime.sampling import MAX_LOGPROBS
from jllm_runtime.server.schemas.chat_messages import Message, Tool, ToolChoice
from jllm_runtime.server.schemas.sampling import SamplingFields
from jllm_runtime.server.schemas.base import Schema, Sparse, Usage


class TextFormat(Schema):
    """Any text."""

    type: Literal["text"]


class JSONObjectFormat(Schema):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(Schema):
    """A JSON schema with a name. It holds whether it is called strict or not."""

    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool = True


class JSONSchemaFormat(Schema):
    """JSON of this schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JSONObjectFormat | JSONSchemaFormat, Field(discriminator="type")]


class ChatRequest(SamplingFields):
    """A conversation that the model is to go on with."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1, description="The newer name of max_tokens.")
    logprobs: bool = Field(False, description="Give each token's log-probability.")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="And of so many of the likeliest.")
    response_format: ResponseFormat | None = None
    tools: list[Tool] = Field([], max_length=128, fail_fast=True)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = Field(True, description="Whether an answer may have more than one call.")
    modalities: list[Literal["text"]] = Field(["text"], min_length=1)
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="More variables of the model's chat template, such as enable_thinking."
    )


class FunctionDelta(BaseModel):
    """Some of a call: its name first, then pieces of its arguments."""

    name: Sparse[str] = None
    arguments: str = ""


class ToolCallDelta(BaseModel):
    """Some of the call with this index."""

    index: int
    id: Sparse[str] = None
    type: Sparse[Literal["function"]] = None
    function: FunctionDelta


class Delta(BaseModel):
    """Some more of a message."""

    role: Sparse[Literal["assistant"]] = None
    content: Sparse[str] = None
    reasoning_content: Sparse[str] = None
    tool_calls: Sparse[list[ToolCallDelta]] = None


class TopLogprob(BaseModel):
    """A token and its log-probability. ``bytes`` are the token's own, also where they are no whole characters."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobs(TopLogprob):
    """The same of a token that was taken, and of the likeliest in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of each token of the answer, thoughts and calls included, but for the one that ends the text."""

    content: list[TokenLogprobs]
    refusal: None = None


FinishReason = Literal["stop", "length", "tool_calls"]


class ChunkChoice(BaseModel):
    """Some more of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """An event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Sparse[Usage] = None


class AnsweredFunction(BaseModel):
    """A function that the model calls, and its arguments as text."""

    name: str
    arguments: str


class AnsweredCall(BaseModel):
    """A call that the model makes."""

    id: str
    type: Literal["function"] = "function"
    function: AnsweredFunction


class AnsweredMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: Sparse[str] = None
    tool_calls: Sparse[list[AnsweredCall]] = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnsweredMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatReply(BaseModel):
    """All answers."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
