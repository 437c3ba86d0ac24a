"""Schemas of /tokenize and /detokenize."""

from typing import Annotated, Any

from pydantic import BaseModel, Field

from jllm_runtime.server.schemas.base import AS_WHOLES, RequestModel
from jllm_runtime.server.schemas.chat_messages import MAX_TOOLS, ChatMessage, LastTurnFields, Tool


class TokenizeRequest(LastTurnFields):
    """A text, or a conversation up to where the assistant's message begins."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = Field(None, description="Add those around a text, such as BOS; true by default.")
    messages: list[ChatMessage] | None = Field(None, min_length=1, fail_fast=True)
    tools: list[Tool] = Field([], max_length=MAX_TOOLS, fail_fast=True)
    chat_template_kwargs: dict[str, Any] = Field({}, description="More variables of the model's chat template.")


class TokenizeResponse(BaseModel):
    """Token ids, and their texts in ``token_strs``."""

    tokens: list[int]
    token_strs: list[str]
    count: int
    max_model_len: int


class DetokenizeRequest(RequestModel):
    """Token ids."""

    model: str | None = None
    tokens: Annotated[list[int], Field(fail_fast=True), AS_WHOLES]


class DetokenizeResponse(BaseModel):
    """The text, special tokens included."""

    prompt: str
