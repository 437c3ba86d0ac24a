"""Schemas of embeddings: request and response."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from jllm_runtime.server.schemas.base import NoEffectFields
from jllm_runtime.server.schemas.completions import TokenIds

MAX_INPUTS = 2048
Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
TokenLists = Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]


class EmbeddingRequest(NoEffectFields):
    """Texts to turn into vectors."""

    model: str = Field(description="A name that GET /v1/models lists.")
    input: str | Texts | TokenIds | TokenLists = Field(description="A text, token ids, or a list of either.")
    encoding_format: Literal["float", "base64"] = Field("float", description="base64 is of little-endian float32.")
    pooling: Literal["mean", "last"] = Field(
        "mean", description="The mean of all tokens' hidden states, or the last token's."
    )
    normalize: bool = Field(True, description="Give the vectors the length 1.")


class Embedding(BaseModel):
    """The vector of one text."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Number of tokens of all texts."""

    prompt_tokens: int
    total_tokens: int


class CreateEmbeddingResponse(BaseModel):
    """The vectors, in the order of the texts."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
