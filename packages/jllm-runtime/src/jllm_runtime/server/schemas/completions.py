"""Schemas of completions: request, response, chunks; and prompts."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from jllm_runtime.server.schemas.base import AS_WHOLES, CompletionUsage, OmittedIfNone, Whole
from jllm_runtime.server.schemas.sampling import NO_LIMIT, LogprobsCount, SamplingFields

MAX_PROMPTS = 128
TokenIds = Annotated[list[int], Field(min_length=1, fail_fast=True), AS_WHOLES]
Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
TokenLists = Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]


def prompt_list(prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]) -> list[str | list[int]]:
    """The prompts of a field that takes a text, token ids, or a list of either."""
    if isinstance(prompt, str):
        return [prompt]
    # The schema has made sure that a list holds one kind only.
    ids = [one for one in prompt if isinstance(one, int)]
    return [ids] if ids else [one if isinstance(one, str) else list(one) for one in prompt if not isinstance(one, int)]


class CompletionRequest(SamplingFields):
    """Prompts to continue as they are, without a chat template."""

    prompt: str | Texts | TokenIds | TokenLists = Field(description="A text, token ids, or a list of either.")
    max_tokens: Whole | None = Field(
        16, ge=NO_LIMIT, description="Most tokens of an output; 0 needs echo, -1 is no limit."
    )
    suffix: str | None = Field(None, description="Text behind the output, for models that fill in the middle.")
    echo: bool = Field(False, description="Put the prompt before the output.")
    logprobs: LogprobsCount | None = Field(
        None, description="Give log-probabilities of each token and of so many others."
    )


class CompletionLogprobs(BaseModel):
    """Lists with one value for each token, the one that ends the output included.

    ``text_offset`` is the character of the choice's text at which a token begins; the text's end, where a stop has cut
    it off. In a stream it counts from the beginning of the whole text.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One of the outputs; in a stream, a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Completion(BaseModel):
    """The response with all choices; in a stream, an event."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: OmittedIfNone[CompletionUsage] = None
