"""Base classes and shared objects of all schemas."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

T = TypeVar("T")
OmittedIfNone = Annotated[T | None, Field(exclude_if=lambda value: value is None)]
"""A field of a response that is left out where it is None."""


def _as_whole(value: Any) -> Any:
    # JSON has one kind of number, and some languages write all of them with a point.
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_as_whole)]
"""A whole number of a request: 40, and 40.0, which is the same number."""


def _as_wholes(values: Any) -> Any:
    # One look at all of them in C, since a prompt may have 100,000.
    if isinstance(values, list) and float in set(map(type, values)):
        return [_as_whole(value) for value in values]
    return values


AS_WHOLES = BeforeValidator(_as_wholes)
"""Annotation of a ``list[int]`` of a request, behind its limits: the same as a list of ``Whole``, for long ones."""


class RequestModel(BaseModel):
    """Base of all objects that a client sends: an unknown field is an error, null is the same as no field."""

    # Strict: "1" is no number and 1 no text. What would be converted silently may be a mistake of the client.
    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        # Some clients send every field they know, with null for those that are not set.
        return {n: value for n, value in fields.items() if value is not None} if isinstance(fields, dict) else fields


class NoEffectFields(RequestModel):
    """OpenAI's fields that are accepted and have no effect, also with ``--strict``.

    They tell OpenAI who the user is, what to store, and which prompts to send to the same machine. Here nothing is
    stored, and there is one prefix cache for all prompts.
    """

    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] = Field({}, max_length=16)
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] = "auto"
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class StreamOptions(RequestModel):
    """Options of a streamed response."""

    include_usage: bool = Field(False, description="End with a chunk that has the usage.")
    include_obfuscation: Literal[False] = False


class PromptTokensDetails(BaseModel):
    """Breakdown of the prompt's tokens."""

    cached_tokens: int = Field(description="Tokens found in the prefix cache.")


class CompletionUsage(BaseModel):
    """Numbers of tokens. Those of the output include the one that ended it."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, prompt: int, completion: int, cached: int) -> "CompletionUsage":
        """The usage of these numbers of tokens."""
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        )


class ErrorObject(BaseModel):
    """An error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every response with a status of 400 or above."""

    error: ErrorObject
