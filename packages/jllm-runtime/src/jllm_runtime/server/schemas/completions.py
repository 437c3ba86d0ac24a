"""Completions: what is asked, what is answered, and the chunks of a stream."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from jllm_runtime.server.schemas.sampling import LogprobsCount, SamplingFields
from jllm_runtime.server.schemas.base import Sparse, Usage

MAX_PROMPTS = 128
TokenIds = Annotated[list[int], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
TokenLists = Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]


class CompletionRequest(SamplingFields):
    """Texts that the model is to go on with, as they are: without a chat template."""

    prompt: str | Texts | TokenIds | TokenLists = Field(description="A text, some, token ids, or some lists of them.")
    max_tokens: int | None = Field(16, ge=0, description="Most tokens of an answer; 0 needs echo.")
    echo: bool = Field(False, description="Give the prompt back before the answer.")
    logprobs: LogprobsCount | None = Field(None, description="Log-probabilities of each token and so many others.")


class CompletionLogprobs(BaseModel):
    """Of each token: its text, its log-probability, those of the likeliest, and where in the text it begins."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """An answer, or in a stream some more of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class CompletionReply(BaseModel):
    """All answers, or an event of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Sparse[Usage] = None
