"""Texts to token ids and back."""

from typing import Any

from pydantic import BaseModel, Field

from jllm_runtime.server.schemas.chat_messages import Message, Tool
from jllm_runtime.server.schemas.base import Schema


class TokenizeRequest(Schema):
    """A text, or a conversation up to where the model answers."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = Field(None, description="Those around a text, such as BOS; true by default.")
    messages: list[Message] | None = Field(None, min_length=1, fail_fast=True)
    tools: list[Tool] = Field([], max_length=128, fail_fast=True)
    chat_template_kwargs: dict[str, Any] = Field({}, description="More variables of the model's chat template.")


class TokenizeReply(BaseModel):
    """The token ids. ``token_strs`` are their texts."""

    tokens: list[int]
    token_strs: list[str]
    count: int
    max_model_len: int


class DetokenizeRequest(Schema):
    """Token ids."""

    model: str | None = None
    tokens: list[int] = Field(fail_fast=True)


class DetokenizeReply(BaseModel):
    """Their text, special tokens included."""

    prompt: str
