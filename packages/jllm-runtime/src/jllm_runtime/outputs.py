"""Outputs of generation: tokens, text, stop strings, timings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from jllm_runtime.errors import NonfiniteError, RequestError
from jllm_runtime.model import Model, check_token_ids
from jllm_runtime.sampling import NO_NUMBERS, SamplingParams
from jllm_runtime.tokenizer import ChatPrompt

if TYPE_CHECKING:
    from jllm_runtime.detokenizer import Detokenizer

Prompt = str | Sequence[int]
"""A text, or token ids."""

Prompts = str | Sequence[int | Prompt]
"""One prompt or several. With one ``Sequence`` in it, type checkers understand a list of texts and lists of ids."""

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Timings:
    """Timings of a batch, in seconds.

    Attributes:
        compile_s: compilation of programs, or their loading from the cache on disk.
        prefill_s: from the prompts to the first token of each.
        decode_s: all further tokens.
        prefill_tokens_per_s: prompt tokens of the whole batch over ``prefill_s``.
        decode_tokens_per_s: tokens of the whole batch but each row's first, over ``decode_s``; 0 where there are none.
        queue_s: waiting in the Engine's queue. From the Engine, the other times are the sequence's own, and include
            compilation.
    """

    compile_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    queue_s: float = 0.0


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a token, and of the most probable ones in its place. Natural logarithms.

    Attributes:
        token_id: the token.
        logprob: its log-probability.
        top: the most probable tokens and their log-probabilities, best first, as many as were asked for.
        offset: where in the answer's text the token begins; behind its end, where a stop has cut the text there.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]
    offset: int = 0


@dataclass(frozen=True)
class GenerationOutput:
    """The answer to one prompt.

    Attributes:
        text: the answer, up to a stop string or end-of-text token. Bytes that are no character are U+FFFD, also those
            of one that the end cuts off in the middle.
        token_ids: the generated ids, the end-of-text token included.
        prompt_token_ids: the prompt, as the model was given it.
        finish_reason: ``"stop"`` (end of text, a stop, or the end of the grammar), ``"length"`` (max_tokens, or a full
            context), or from the Engine ``"cancelled"``.
        timings: of the batch that the prompt was part of; from the Engine, of the request.
        index: number of the answer among the request's ``n``, from 0.
        logprobs: of each of ``token_ids``, where they were asked for.
        prompt_logprobs: of each prompt token, None for the first, where they were asked for.
        reused_tokens: prompt tokens whose keys and values came from the prefix cache.
    """

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: FinishReason
    timings: Timings
    index: int = 0
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    reused_tokens: int = 0


@dataclass(frozen=True)
class Piece:
    """Increment of a streamed answer.

    Attributes:
        text: new text, whole characters; the pieces together are the output's text.
        token_ids: new ids; their text may come with a later piece.
        output: the whole answer, with the last piece; None before.
        index: number of the answer among the request's ``n``, from 0.
        logprobs: of each of ``token_ids``, where they were asked for.
    """

    text: str
    token_ids: list[int]
    output: GenerationOutput | None = None
    index: int = 0
    logprobs: list[TokenLogprob] | None = None


class OutputStream:
    """Output of one prompt as it grows: its tokens, the text that may be shown already, and the reason of its end.

    Args:
        model: for its tokenizer, end-of-text ids and context length.
        prompt: a text or token ids.
        params: of the request.

    Attributes:
        params: as given.
        prompt_ids: the prompt's token ids.
        eos_ids: ids that end the answer.
        limit: last position that may hold a token.
        token_ids: the tokens so far, the one that ended the answer included.
        finish_reason: None until the answer has ended.

    Raises:
        RequestError: the prompt, or a parameter that depends on the model, cannot be honoured.
    """

    def __init__(self, model: Model, prompt: Prompt, params: SamplingParams) -> None:
        self.params = params
        self.prompt_ids = prompt_token_ids(model, prompt)
        if params.stop and model.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and the model has none")
        check_token_ids([*params.stop_token_ids, *params.logit_bias], model.config)
        # The text does not show special tokens, so a stop that has one ends the answer by the token's id.
        self._special_stops = model.tokenizer.special_stops(params.stop) if model.tokenizer else {}
        self.eos_ids = (*(() if params.ignore_eos else model.eos_ids), *params.stop_token_ids, *self._special_stops)
        self.limit = min(len(self.prompt_ids) + params.max_tokens, model.config.context_length) - 1
        self.token_ids: list[int] = []
        # A prompt that fills the context leaves no position for an answer.
        self.finish_reason: FinishReason | None = "length" if self.limit < len(self.prompt_ids) else None
        self._detokenizer: Detokenizer | None = None
        if model.tokenizer is not None:
            behind = () if isinstance(self.prompt_ids, ChatPrompt) else self.prompt_ids
            # A special token that ends the text is none of it, even where special tokens are shown.
            hidden = None if params.skip_special_tokens else self.eos_ids
            self._detokenizer = model.tokenizer.detokenizer(behind, hidden)
        self._text = ""
        # The end of the text, while it may be the beginning of a stop string: shown only when it is known not to be.
        self._held = ""
        self._taken = 0

    @property
    def text_length(self) -> int:
        """Length of the text so far, with what is held back."""
        return len(self._text) + len(self._held)

    def accept(self, token_id: int) -> None:
        """Append a new token, and set ``finish_reason`` where it is the last.

        Raises:
            NonfiniteError: there is none, for the logits are not numbers.
        """
        if token_id == NO_NUMBERS:
            raise NonfiniteError(f"the logits of token {len(self.token_ids) + 1} of the answer")
        self.token_ids.append(token_id)
        if self._detokenizer is not None:
            self._held += self._detokenizer.add(token_id)
        # Before `min_tokens` a stop string is ordinary text.
        stops = self.params.stop if len(self.token_ids) >= self.params.min_tokens else ()
        ends = [at for at in (self._held.find(stop) for stop in stops) if at >= 0]
        # The stop's text before its special token is no part of the answer either.
        before = [text for text in self._special_stops.get(token_id, ()) if self._held.endswith(text)]
        ends += [len(self._held) - len(text) for text in before]
        # A stop string is looked for first: the token that ends the text may complete one as well, and is then no part
        # of the text.
        if ends:
            self._text += self._held[: min(ends)]
            self.finish_reason = "stop"
        elif token_id in self.eos_ids or len(self.prompt_ids) + len(self.token_ids) > self.limit:
            self.finish("stop" if token_id in self.eos_ids else "length")
        else:
            # What may be the beginning of a stop string is held back until the next tokens decide.
            keep = _could_begin(self._held, stops)
            self._text += self._held[: len(self._held) - keep]
            self._held = self._held[len(self._held) - keep :]

    def finish(self, reason: FinishReason) -> None:
        """End the answer here. What was held back is text after all."""
        self._text += self._held + (self._detokenizer.finish() if self._detokenizer else "")
        self._held = ""
        self.finish_reason = reason

    def take_text(self) -> str:
        """Return the text that is new since the last call."""
        new, self._taken = self._text[self._taken :], len(self._text)
        return new

    def output(self, timings: Timings) -> GenerationOutput:
        """Return the whole answer, once it has ended.

        Raises:
            RuntimeError: it has not ended.
        """
        if self.finish_reason is None:
            raise RuntimeError("the request has not ended yet")
        return GenerationOutput(self._text, list(self.token_ids), list(self.prompt_ids), self.finish_reason, timings)


def prompt_token_ids(model: Model, prompt: Prompt) -> list[int]:
    """Encode a prompt, or check one that is token ids already.

    Raises:
        RequestError: it is empty, longer than the context or outside the vocabulary, or a text for a model without a
            tokenizer.
    """
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise RequestError("the model has no tokenizer; give the prompt as a list of token ids")
        ids = model.tokenizer.encode(prompt)
    else:
        ids = checked_ids(prompt)
    if not ids:
        raise RequestError("the prompt is empty: it has no tokens")
    if len(ids) > model.config.context_length:
        raise RequestError(
            f"the prompt has {len(ids)} tokens, the context of the model is {model.config.context_length}"
        )
    check_token_ids(ids, model.config)
    return ids


def prompt_list(prompts: Prompts) -> list[Prompt]:
    """Make a list of prompts, also from a single one (a text, or a list of ids)."""
    if isinstance(prompts, str):
        return [prompts]
    items: list[object] = list(prompts)
    # Whole numbers alone are one prompt of token ids. Tokenizers and arrays give numpy's integers as well as Python's.
    if items and all(isinstance(item, int | np.integer) for item in items):
        return [prompts]  # type: ignore[list-item]
    return items  # type: ignore[return-value]


def params_of_each(
    model: Model, params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    """Make a list of parameters, one for each of ``count`` prompts; the publisher's where there are none.

    Raises:
        RequestError: ``params`` is a list of another length.
        ModelError: the publisher's are impossible.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams.of(model)] * count
    if len(params) != count:
        raise RequestError(f"{count} prompts need one SamplingParams or {count}, got {len(params)}")
    return list(params)


def checked_ids(prompt: object) -> list[int]:
    """Token ids as Python's whole numbers, or a RequestError."""
    tokens = list(prompt) if isinstance(prompt, Sequence | np.ndarray) else None
    if tokens is None or not all(isinstance(token, int | np.integer) for token in tokens):
        raise RequestError(f"a prompt is a text or a list of token ids (whole numbers), got {prompt!r:.80}")
    return (ChatPrompt if isinstance(prompt, ChatPrompt) else list)(int(token) for token in tokens)


def _could_begin(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that may be the beginning of a stop string."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    # The whole stop string is no beginning: `accept` has looked for that.
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
