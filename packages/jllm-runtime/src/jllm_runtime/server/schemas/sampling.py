"""Schema of the sampling parameters that chats and completions share."""

from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from jllm_runtime.grammar import Grammar
from jllm_runtime.sampling import MAX_ANSWERS, MAX_LOGPROBS, MAX_SEED, PUBLISHABLE, SamplingParams
from jllm_runtime.server.errors import ApiError
from jllm_runtime.server.schemas.base import NoEffectFields, StreamOptions

MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
MAX_STOP_TOKEN_IDS = 64
LogitBias = Annotated[float, Field(ge=-100, le=100)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
DEFAULT = "By default the publisher's, which GET /v1/models shows."
LogprobsCount = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


class SamplingFields(NoEffectFields):
    """OpenAI's parameters, and from ``top_k`` on JLLM's. A new one goes here and into ``params``."""

    model: str = Field(description="A name that GET /v1/models lists.")
    temperature: float | None = Field(None, ge=0, le=100, description=f"0 always takes the likeliest token. {DEFAULT}")
    top_p: float | None = Field(
        None, gt=0, le=1, description=f"Keep the fewest tokens that reach this much probability. {DEFAULT}"
    )
    n: int = Field(1, ge=1, le=MAX_ANSWERS, description="Outputs for each prompt.")
    max_tokens: int | None = Field(
        None, ge=0, description="Most tokens of an output. By default what GET /v1/models shows."
    )
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True)] = Field(
        [], description="Texts that end the output."
    )
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, description=f"Subtracted from the logits of tokens in the output. {DEFAULT}"
    )
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description=f"The same, for each time that they occur. {DEFAULT}"
    )
    logit_bias: dict[str, LogitBias] = Field({}, description="Added to the logits of these token ids.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="The same seed gives the same text.")
    stream: bool = Field(False, description="Respond with server-sent events.")
    stream_options: StreamOptions | None = None
    top_k: int | None = Field(None, ge=0, description=f"Keep the k likeliest tokens; 0 keeps all. {DEFAULT}")
    min_p: float | None = Field(
        None, ge=0, le=1, description=f"Keep tokens at least this probable, relative to the best. {DEFAULT}"
    )
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=100, description=f"On tokens of prompt and output; 1 is off. {DEFAULT}"
    )
    min_tokens: int = Field(0, ge=0, description="Do not end before so many tokens.")
    ignore_eos: bool = Field(False, description="Go on after an EOS token.")
    stop_token_ids: list[int] = Field(
        [], max_length=MAX_STOP_TOKEN_IDS, fail_fast=True, description="More token ids that end the output."
    )
    regex: str | None = Field(None, min_length=1, description="The output matches this regular expression.")
    choice: list[str] | None = Field(
        None, min_length=1, fail_fast=True, description="The output is one of these texts."
    )
    grammar: str | None = Field(None, min_length=1, description="The output is a text of this Lark grammar.")

    def params(
        self, defaults: SamplingParams, max_tokens: int, grammar: Grammar | None = None, **fields: Any
    ) -> SamplingParams:
        """The engine's parameters.

        Args:
            defaults: for the fields that a publisher recommends, where the request does not give them.
            max_tokens: most tokens of an output, at least 1.
            grammar: from ``own_grammar``, or from other fields of the request.
            fields: further fields of SamplingParams.

        Raises:
            ApiError: keys of ``logit_bias`` that are no token ids.
            RequestError: parameters that contradict each other.
        """
        given = {name: getattr(self, name) for name in PUBLISHABLE}
        return replace(
            defaults,
            **{name: value for name, value in given.items() if value is not None},
            seed=self.seed,
            max_tokens=max_tokens,
            stop=[self.stop] if isinstance(self.stop, str) else self.stop,
            ignore_eos=self.ignore_eos,
            stop_token_ids=self.stop_token_ids,
            min_tokens=self.min_tokens,
            logit_bias=self._bias(),
            n=self.n,
            grammar=grammar,
            **fields,
        )

    def own_grammar(self) -> Grammar | None:
        """The grammar of ``regex``, ``choice`` or ``grammar``, None without one.

        Raises:
            ApiError: more than one is given.
            RequestError: a choice without texts.
        """
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
        """Whether a stream ends with a chunk that has the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check_stream(self) -> None:
        """Raise an ApiError for ``stream_options`` without ``stream``."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream: true", "invalid_value", "stream_options")

    def _bias(self) -> dict[int, float]:
        # JSON keys are texts. At most ten digits: longer ones are no ids, and int() of thousands is refused.
        for token in self.logit_bias:
            if not token.isascii() or not token.isdecimal() or len(token) > 10:
                message = f"logit_bias must have token ids as its keys, got {token!r:.80}"
                raise ApiError(400, message, "invalid_value", "logit_bias")
        return {int(token): value for token, value in self.logit_bias.items()}
