"""The parameters that say how tokens are chosen, the same for chats and completions."""

from typing import Annotated, Any

from pydantic import Field

from jllm_runtime.grammar import Grammar
from jllm_runtime.sampling import MAX_ANSWERS, MAX_LOGPROBS, MAX_SEED, SamplingParams
from jllm_runtime.server.errors import ApiError
from jllm_runtime.server.schemas.base import NoEffect, StreamOptions

MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
Bias = Annotated[float, Field(ge=-100, le=100)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
LogprobsCount = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


class SamplingFields(NoEffect):
    """OpenAI's parameters, and those of JLLM from ``top_k`` on."""

    model: str = Field(description="A name that GET /v1/models lists.")
    temperature: float = Field(1.0, ge=0, le=100, description="0 takes the most probable token, always.")
    top_p: float = Field(1.0, gt=0, le=1, description="Keep the fewest tokens that reach this much probability.")
    n: int = Field(1, ge=1, le=MAX_ANSWERS, description="Answers to each prompt.")
    max_tokens: int | None = Field(None, ge=0, description="Most tokens of an answer.")
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] = Field(
        [], description="Texts that end it."
    )
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="Off tokens that are in the answer.")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="The same, for each time that they are.")
    logit_bias: dict[str, Bias] = Field({}, description="Added to the logits of these token ids.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="The same seed gives the same text.")
    stream: bool = Field(False, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = None
    top_k: int = Field(0, ge=0, description="Keep the k most probable tokens; 0 keeps all.")
    min_p: float = Field(0.0, ge=0, le=1, description="Keep tokens at least so probable, beside the most probable.")
    repetition_penalty: float = Field(1.0, ge=0.01, le=100, description="On tokens of prompt and answer; 1 is off.")
    min_tokens: int = Field(0, ge=0, description="Do not end before so many.")
    ignore_eos: bool = Field(False, description="Go on after the end of the text.")
    stop_token_ids: list[int] = Field([], max_length=64, fail_fast=True, description="More ids that end the answer.")
    regex: str | None = Field(None, min_length=1, description="The answer matches this regular expression.")
    choice: list[str] | None = Field(
        None, min_length=1, fail_fast=True, description="The answer is one of these texts."
    )
    grammar: str | None = Field(None, min_length=1, description="The answer is a text of this Lark grammar.")

    def params(self, max_tokens: int, grammar: Grammar | None = None, **fields: Any) -> SamplingParams:
        """The engine's parameters.

        Args:
            max_tokens: most tokens of an answer, at least 1.
            grammar: from ``own_grammar``, or what the answer must be for other reasons.
            fields: further ones.

        Raises:
            ApiError: token ids of the bias that are none.
            RequestError: parameters that contradict each other.
        """
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            max_tokens=max_tokens,
            stop=[self.stop] if isinstance(self.stop, str) else self.stop,
            ignore_eos=self.ignore_eos,
            stop_token_ids=self.stop_token_ids,
            min_tokens=self.min_tokens,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self._bias(),
            n=self.n,
            grammar=grammar,
            **fields,
        )

    def own_grammar(self) -> Grammar | None:
        """What ``regex``, ``choice`` or ``grammar`` say, of which at most one may be given."""
        given = [name for name in ("regex", "choice", "grammar") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ApiError(400, f"{given[0]} and {given[1]} exclude each other", "invalid_value", given[1])
        if self.regex is not None:
            return Grammar.regex(self.regex)
        if self.choice is not None:
            return Grammar.choice(self.choice)
        return None if self.grammar is None else Grammar.lark(self.grammar)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check_stream(self) -> None:
        """Raise an ApiError for options of a stream where none is asked for."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream: true", "invalid_value", "stream_options")

    def _bias(self) -> dict[int, float]:
        for token in self.logit_bias:
            if not token.isascii() or not token.isdecimal() or len(token) > 10:
                message = f"logit_bias must have token ids as its keys, got {token!r:.80}"
                raise ApiError(400, message, "invalid_value", "logit_bias")
        return {int(token): value for token, value in self.logit_bias.items()}
