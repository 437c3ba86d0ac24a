"""Schema of the sampling parameters that chats and completions share."""

from dataclasses import replace
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from jllm_runtime.grammar import Grammar
from jllm_runtime.sampling import MAX_ANSWERS, MAX_LOGPROBS, MAX_SEED, PUBLISHABLE, SamplingParams
from jllm_runtime.server.errors import ApiError
from jllm_runtime.server.schemas.base import NoEffectFields, StreamOptions, Whole
from jllm_runtime.server.schemas.structured_outputs import StructuredOutputFields

MAX_STOPS = 256
MAX_STOP_LENGTH = 1024
MAX_STOP_TOKEN_IDS = 64
LogitBias = Annotated[float, Field(ge=-100, le=100)]
StopText = Annotated[str, Field(max_length=MAX_STOP_LENGTH)]
MIN_SEED = -(2**63)
DEFAULT = "By default the publisher's, which GET /v1/models shows."


def _check_seed(value: int) -> int:
    # Pydantic's own limits are told as floats, which round these.
    if not MIN_SEED <= value <= MAX_SEED:
        raise ValueError(f"should be from {MIN_SEED} to {MAX_SEED}")
    return value


Seed = Annotated[
    Whole, AfterValidator(_check_seed), Field(json_schema_extra={"minimum": MIN_SEED, "maximum": MAX_SEED})
]
LogprobsCount = Annotated[Whole, Field(ge=0, le=MAX_LOGPROBS)]


NO_LIMIT = -1
"""Value of ``max_tokens`` that asks for as much as the context has room for."""

DRAWN_SEED = -1
"""Value of ``seed`` that asks for a seed to be drawn, as in vLLM and llama.cpp."""


class SamplingFields(NoEffectFields, StructuredOutputFields):
    """OpenAI's parameters, and from ``top_k`` on JLLM's. A new one goes here and into ``params``."""

    model: str = Field(description="A name that GET /v1/models lists.")
    temperature: float | None = Field(None, ge=0, le=100, description=f"0 always takes the likeliest token. {DEFAULT}")
    top_p: float | None = Field(
        None, ge=0, le=1, description=f"Keep the fewest tokens that reach this much probability, 1 or more. {DEFAULT}"
    )
    n: Whole = Field(1, ge=1, le=MAX_ANSWERS, description="Outputs for each prompt.")
    max_tokens: Whole | None = Field(
        None, ge=NO_LIMIT, description="Most tokens of an output; -1 is no limit. By default what GET /v1/models shows."
    )
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True)] = Field(
        [], description="Texts that end the output; an empty one ends nothing."
    )
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, description=f"Subtracted from the logits of tokens in the output. {DEFAULT}"
    )
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description=f"The same, for each time that they occur. {DEFAULT}"
    )
    logit_bias: dict[str, LogitBias] = Field({}, description="Added to the logits of these token ids.")
    seed: Seed | None = Field(None, description="64 bits; the same seed gives the same text; -1 draws one.")
    stream: bool = Field(False, description="Respond with server-sent events.")
    stream_options: StreamOptions | None = None
    top_k: Whole | None = Field(None, ge=-1, description=f"Keep the k likeliest tokens; 0 or -1 keeps all. {DEFAULT}")
    min_p: float | None = Field(
        None, ge=0, le=1, description=f"Keep tokens at least this probable, relative to the best. {DEFAULT}"
    )
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=100, description=f"On tokens of prompt and output; 1 is off. {DEFAULT}"
    )
    do_sample: bool | None = Field(
        None, description="false is temperature 0, whatever is given; true needs another one, by default 1."
    )
    min_tokens: Whole = Field(0, ge=0, description="Do not end before so many tokens.")
    ignore_eos: bool = Field(False, description="Go on after an EOS token.")
    stop_token_ids: list[Whole] = Field(
        [], max_length=MAX_STOP_TOKEN_IDS, fail_fast=True, description="More token ids that end the output."
    )
    skip_special_tokens: bool = Field(
        True, description="Leave special tokens out of the text; the one that ends it is left out anyway."
    )

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
            ApiError: keys of ``logit_bias`` that are no token ids, or ``do_sample`` with ``temperature: 0``.
            RequestError: parameters that contradict each other.
        """
        given = {name: getattr(self, name) for name in PUBLISHABLE}
        given["temperature"] = self._temperature(defaults)
        # vLLM's spelling of "all". SamplingParams has one spelling for each thing.
        given["top_k"] = 0 if self.top_k == -1 else self.top_k
        return replace(
            defaults,
            **{name: value for name, value in given.items() if value is not None},
            # A negative seed is the same 64 bits without a sign.
            seed=None if self.seed in (None, DRAWN_SEED) else self.seed % (MAX_SEED + 1),
            max_tokens=max_tokens,
            stop=[text for text in ([self.stop] if isinstance(self.stop, str) else self.stop) if text],
            ignore_eos=self.ignore_eos,
            stop_token_ids=self.stop_token_ids,
            min_tokens=self.min_tokens,
            logit_bias=self._bias(),
            n=self.n,
            grammar=grammar,
            skip_special_tokens=self.skip_special_tokens,
            **fields,
        )

    def _temperature(self, defaults: SamplingParams) -> float | None:
        # As in transformers: do_sample comes before the temperature, which is 1 where none is given.
        if not self.do_sample:
            return self.temperature if self.do_sample is None else 0.0
        if self.temperature == 0:
            message = "do_sample: true and temperature: 0 contradict each other; leave one of them out"
            raise ApiError(400, message, "invalid_value", "do_sample")
        return self.temperature or defaults.temperature or 1.0

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
