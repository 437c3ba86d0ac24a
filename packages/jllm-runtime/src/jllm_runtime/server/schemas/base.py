"""What all objects of the API have in common."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

T = TypeVar("T")
Sparse = Annotated[T | None, Field(exclude_if=lambda value: value is None)]
"""A field of an answer that is left out where it has no value."""


class Schema(BaseModel):
    """An object that a client sends. A field that it does not have is an error; a null says as much as nothing."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        return {n: value for n, value in fields.items() if value is not None} if isinstance(fields, dict) else fields


class NoEffect(Schema):
    """Fields of OpenAI's that change nothing about an answer: whoever sends them gets the answer all the same.

    They tell OpenAI who is asking, what to keep, and which prompts to compute side by side. Here nothing is kept, and
    every prompt finds what earlier ones have left.
    """

    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] = Field({}, max_length=16)
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] = "auto"
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class StreamOptions(Schema):
    """What a stream holds besides the answer."""

    include_usage: bool = Field(False, description="End with a chunk that has the usage.")
    include_obfuscation: Literal[False] = False


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens."""

    cached_tokens: int = Field(description="Tokens whose keys and values an earlier prompt had left.")


class Usage(BaseModel):
    """Tokens, counted exactly: those of the answer with the one that ended it."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, prompt: int, completion: int, cached: int) -> "Usage":
        """From the numbers of tokens."""
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        )


class ErrorObject(BaseModel):
    """Why a request was not answered."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """The body of every answer whose status is 400 or above."""

    error: ErrorObject
