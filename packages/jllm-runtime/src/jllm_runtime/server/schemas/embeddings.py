"""Embeddings: what is asked, and what is answered."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from jllm_runtime.server.schemas.completions import TokenIds
from jllm_runtime.server.schemas.base import NoEffect

MAX_INPUTS = 2048
Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
TokenLists = Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]


class EmbeddingRequest(NoEffect):
    """Texts to be turned into vectors of length 1."""

    model: str = Field(description="A name that GET /v1/models lists.")
    input: str | Texts | TokenIds | TokenLists = Field(description="A text, some, token ids, or some lists of them.")
    encoding_format: Literal["float", "base64"] = Field("float", description="base64 is of float32, lowest byte first.")
    pooling: Literal["mean", "last"] = Field("mean", description="Of all tokens, or the last one alone.")


class Embedding(BaseModel):
    """The vector of one text."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens of all texts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingReply(BaseModel):
    """The vectors, in the order of the texts."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
