"""Schemas of chat messages and tools."""

from typing import Annotated, Any, Literal

from pydantic import Field

from jllm_runtime.server.errors import ApiError
from jllm_runtime.server.schemas.base import RequestModel

MAX_TOOLS = 128


class Marked(RequestModel):
    """Base of parts, calls and messages: marks of other programs on them, which no prompt has."""

    cache_control: Any = None
    prompt_cache_breakpoint: Any = None
    provider_specific_fields: Any = None
    extra_content: Any = None
    annotations: Any = None


class ContentPartText(Marked):
    """A text part of a message. Parts of other types are refused, because the models read text only."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class ContentPartRefusal(Marked):
    """A part of an earlier answer in which the model has refused."""

    type: Literal["refusal"]
    refusal: str


class ContentPartThinking(Marked):
    """A part of an earlier answer that is the model's thinking, in the forms of Anthropic, Mistral and Vercel's SDK."""

    type: Literal["thinking", "reasoning"]
    thinking: str | Annotated[list[ContentPartText], Field(fail_fast=True)] | None = None
    reasoning: str | None = None
    text: str | None = None
    # Signs and numbers of the service that has made it.
    id: Any = None
    signature: Any = None
    closed: Any = None
    summary: Any = None
    encrypted_content: Any = None
    providerOptions: Any = None
    providerMetadata: Any = None


class ContentPartHiddenThinking(Marked):
    """Thinking that only the service can read that has made it: it is left out."""

    type: Literal["redacted_thinking"]
    data: Any = None


Content = str | Annotated[list[ContentPartText], Field(fail_fast=True)]
AssistantContentPart = Annotated[
    ContentPartText | ContentPartRefusal | ContentPartThinking | ContentPartHiddenThinking, Field(discriminator="type")
]
AssistantContent = str | Annotated[list[AssistantContentPart], Field(fail_fast=True)]


class Message(Marked):
    """Base of all messages: what programs keep with a message, and no prompt has."""

    id: Any = None
    type: Any = None
    timestamp: Any = None
    metadata: Any = None
    # Of the response that it came in, as programs flatten it.
    object: Any = None
    created: Any = None
    created_at: Any = None
    createdAt: Any = None
    model: Any = None
    index: Any = None
    status: Any = None
    finish_reason: Any = None
    stop_reason: Any = None
    stop_sequence: Any = None
    logprobs: Any = None
    usage: Any = None
    system_fingerprint: Any = None
    service_tier: Any = None
    # LangChain's and Vercel's names.
    response_metadata: Any = None
    usage_metadata: Any = None
    providerOptions: Any = None
    providerMetadata: Any = None


class SystemMessage(Message):
    """Instructions before the conversation. ``developer`` is OpenAI's newer name of the role."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Message):
    """A message of the user."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class FunctionCall(Marked):
    """The function of a tool call, with its arguments: a JSON object, or the text of one."""

    name: str
    arguments: str | dict[str, Any] = ""
    description: Any = None
    parsed_arguments: Any = Field(None, description="The arguments once more, which OpenAI's client adds.")


class ToolCall(Marked):
    """A tool call of an earlier message. ``index`` is its number, which streams have."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class AssistantMessage(Message):
    """An earlier message of the model. It has all fields of a response, so that one can be sent back as it came."""

    role: Literal["assistant"]
    content: AssistantContent | None = None
    refusal: str | None = Field(None, description="Stands for the content where there is none.")
    reasoning_content: str | None = Field(None, description="Its thinking; most templates leave it out.")
    reasoning: str | list[Any] | dict[str, Any] | None = Field(
        None, description="Another name of reasoning_content. One that is no text is left out."
    )
    thinking: str | None = Field(None, description="Another name of reasoning_content.")
    tool_calls: list[ToolCall] = Field([], fail_fast=True, description="Its tool calls.")
    function_call: FunctionCall | None = Field(None, description="The older form of one tool call.")
    name: str | None = None
    prefix: bool = Field(False, description="Of the last message: the answer goes on from it.")
    partial: bool = Field(False, description="Another name of prefix.")
    # The same once more, in the forms of other APIs and of OpenAI's client.
    thinking_blocks: Any = None
    reasoning_details: Any = None
    parsed: Any = None

    @property
    def continued_by(self) -> str | None:
        """The field that says that the answer goes on from this message."""
        return "prefix" if self.prefix else "partial" if self.partial else None


class ToolMessage(Message):
    """The result of a tool call."""

    role: Literal["tool"]
    content: Content | None = None
    tool_call_id: str | None = None
    name: str | None = None
    tool_name: str | None = Field(None, description="Another name of name.")
    is_error: bool = Field(False, description="Whether the tool has failed. Only the content tells the model so.")


class FunctionMessage(Message):
    """The result of a function call, in the older form."""

    role: Literal["function"]
    content: Content | None = None
    name: str | None = None


ChatMessage = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage | FunctionMessage,
    Field(discriminator="role"),
]


class LastTurnFields(RequestModel):
    """Fields that say how the prompt ends."""

    add_generation_prompt: bool = Field(True, description="End the prompt with the opening of an answer.")
    continue_final_message: bool = Field(
        False, description="End the prompt with the last message's content, so that the answer goes on from it."
    )

    def continues(self, messages: list[ChatMessage]) -> bool:
        """Whether the answer goes on from the last message.

        Raises:
            ApiError: it cannot, or the fields contradict each other.
        """
        for number, message in enumerate(messages[:-1]):
            if isinstance(message, AssistantMessage) and (field := message.continued_by):
                param = f"messages[{number}].{field}"
                raise ApiError(400, "only the last message can be continued", "invalid_value", param)
        last = messages[-1]
        field = last.continued_by if isinstance(last, AssistantMessage) else None
        if not self.continue_final_message and field is None:
            return False
        param = "continue_final_message" if self.continue_final_message else f"messages[{len(messages) - 1}].{field}"
        # As in vLLM, but the default gives way: who wants the one cannot have meant the other.
        if self.add_generation_prompt and "add_generation_prompt" in self.model_fields_set:
            raise ApiError(400, f"{param} and add_generation_prompt exclude each other", "invalid_value", param)
        if isinstance(last, AssistantMessage) and (last.tool_calls or last.function_call):
            raise ApiError(400, "the last message has tool calls, so it cannot be continued", "invalid_value", param)
        return True


class FunctionDefinition(RequestModel):
    """A function that the model may call."""

    cache_control: Any = None
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema of the arguments.")
    strict: bool = Field(False, description="Make the arguments follow the schema.")


class Tool(RequestModel):
    """A tool that the model may call. ``cache_control`` is a mark of other programs, which no prompt has."""

    cache_control: Any = None
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
