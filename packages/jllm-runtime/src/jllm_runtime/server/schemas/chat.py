"""Schemas of chat completions: request, response, chunks."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, ModelWrapValidatorHandler, PrivateAttr, model_validator

from jllm_runtime.sampling import MAX_LOGPROBS
from jllm_runtime.server.schemas.base import CompletionUsage, OmittedIfNone, RequestModel, Whole
from jllm_runtime.server.schemas.chat_messages import MAX_TOOLS, ChatMessage, LastTurnFields, Tool, ToolChoice
from jllm_runtime.server.schemas.sampling import NO_LIMIT, SamplingFields

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ResponseFormatText(RequestModel):
    """Free text."""

    type: Literal["text"]


class ResponseFormatJSONObject(RequestModel):
    """Any JSON object, or JSON of a schema, in the spelling of llama.cpp, Fireworks and Together, or of TGI (value)."""

    type: Literal["json_object", "json"]
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    value: dict[str, Any] | None = None

    @property
    def place(self) -> str:
        """The field of the request that has the schema."""
        return "response_format.schema" if self.json_schema is not None else "response_format.value"


class ResponseFormatRegex(RequestModel):
    """Text that matches a regular expression, in the spelling of TGI."""

    type: Literal["regex"]
    value: str = Field(min_length=1)


class JSONSchema(RequestModel):
    """A JSON schema with a name. With ``strict: false`` the output follows what of it can be enforced."""

    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool = True


class ResponseFormatJSONSchema(RequestModel):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: JSONSchema
    _place: str = PrivateAttr("response_format.json_schema.schema")

    @model_validator(mode="wrap")
    @classmethod
    def _with_schema_inside(cls, fields: Any, make: ModelWrapValidatorHandler[Self]) -> Self:
        # Together and llama.cpp leave the object around the schema out.
        if not isinstance(fields, dict) or "schema" not in fields or fields.get("json_schema") is not None:
            return make(fields)
        rest = {name: value for name, value in fields.items() if name != "schema"}
        made = make({**rest, "json_schema": {"schema": fields["schema"]}})
        made._place = "response_format.schema"
        return made

    @property
    def place(self) -> str:
        """The field of the request that has the schema."""
        return self._place


class Reasoning(RequestModel):
    """Thinking, in the spelling of OpenRouter and Ollama."""

    effort: Effort | None = None
    enabled: bool | None = None


class ThinkingSwitch(RequestModel):
    """Thinking, in the spelling of DeepSeek and Z.ai."""

    type: Literal["enabled", "disabled"]


ResponseFormat = Annotated[
    ResponseFormatText | ResponseFormatJSONObject | ResponseFormatJSONSchema | ResponseFormatRegex,
    Field(discriminator="type"),
]


class ChatCompletionRequest(SamplingFields, LastTurnFields):
    """A conversation, for the assistant's next message."""

    messages: list[ChatMessage] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: Whole | None = Field(None, ge=NO_LIMIT, description="The newer name of max_tokens.")
    logprobs: bool = Field(False, description="Give each token's log-probability.")
    top_logprobs: Whole | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="And those of so many of the likeliest tokens."
    )
    response_format: ResponseFormat | None = None
    tools: list[Tool] = Field([], max_length=MAX_TOOLS, fail_fast=True)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = Field(True, description="Whether an output may have more than one tool call.")
    modalities: list[Literal["text"]] = Field(["text"], min_length=1)
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="More variables of the model's chat template, such as enable_thinking."
    )
    reasoning_effort: Effort | None = Field(None, description="none turns thinking off, any other turns it on.")
    enable_thinking: bool | None = Field(None, description="Whether the model thinks before it answers.")
    reasoning: Reasoning | None = Field(None, description="The same two, as an object.")
    thinking: ThinkingSwitch | None = Field(None, description="Another name of enable_thinking.")

    def _spellings(self) -> list[tuple[str, str, Any]]:
        regex = self.response_format.value if isinstance(self.response_format, ResponseFormatRegex) else None
        return [*super()._spellings(), ("response_format", "regex", regex)]


class ChoiceDeltaFunction(BaseModel):
    """A piece of a tool call: first the function's name, then pieces of its arguments."""

    name: OmittedIfNone[str] = None
    arguments: str = ""


class ChoiceDeltaToolCall(BaseModel):
    """A piece of the tool call with this index."""

    index: int
    id: OmittedIfNone[str] = None
    type: OmittedIfNone[Literal["function"]] = None
    function: ChoiceDeltaFunction


class ChoiceDelta(BaseModel):
    """A piece of a message."""

    role: OmittedIfNone[Literal["assistant"]] = None
    content: OmittedIfNone[str] = None
    reasoning_content: OmittedIfNone[str] = None
    tool_calls: OmittedIfNone[list[ChoiceDeltaToolCall]] = None


class TopLogprob(BaseModel):
    """A token and its log-probability. ``bytes`` are the token's own, which need not be whole characters."""

    token: str
    logprob: float
    bytes: list[int]


class ChatCompletionTokenLogprob(TopLogprob):
    """A token of the output, and the likeliest tokens in its place."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    """Log-probabilities of all tokens of the output, thinking, tool calls and the token that ends it included."""

    content: list[ChatCompletionTokenLogprob]
    refusal: None = None


FinishReason = Literal["stop", "length", "tool_calls"]


class ChatCompletionChunkChoice(BaseModel):
    """A piece of one choice."""

    index: int
    delta: ChoiceDelta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatCompletionChunk(BaseModel):
    """An event of a streamed response."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatCompletionChunkChoice]
    usage: OmittedIfNone[CompletionUsage] = None


class ChatCompletionMessageFunction(BaseModel):
    """The function of a tool call, with its arguments: a JSON object as text."""

    name: str
    arguments: str


class ChatCompletionMessageToolCall(BaseModel):
    """A tool call."""

    id: str
    type: Literal["function"] = "function"
    function: ChatCompletionMessageFunction


class ChatCompletionMessage(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: OmittedIfNone[str] = None
    tool_calls: OmittedIfNone[list[ChatCompletionMessageToolCall]] = None


class ChatCompletionChoice(BaseModel):
    """One of the ``n`` outputs."""

    index: int
    message: ChatCompletionMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """The response with all choices."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatCompletionChoice]
    usage: CompletionUsage
