"""Sequence: one answer of a request, as the engine makes it."""

import dataclasses
import time

from jllm_core.config import ModelConfig

from jllm_runtime.engine.grammar_masks import Matcher
from jllm_runtime.engine.request import Request
from jllm_runtime.engine.scheduler import PagedSequence
from jllm_runtime.outputs import GenerationOutput, OutputStream, Piece, Timings, TokenLogprob
from jllm_runtime.sampling import MAX_SEED, SamplingParams


def is_private(config: ModelConfig, prompt_length: int) -> bool:
    """Whether a prompt's pages serve no other prompt, because its keys depend on its length."""
    if (scaling := config.rope_scaling) is None or scaling.kind != "dynamic":
        return False
    return prompt_length > (scaling.original_context_length or 0)


class Sequence(PagedSequence):
    """One answer of a request: its text and its grammar, beside the tokens and pages that the scheduler sees.

    The caller's thread makes it; from then on only the engine's thread touches it.

    Args:
        request: the caller's handle, which gets the pieces.
        index: number of the answer among the request's, from 0.
        params: the request's; answer ``index`` draws with the seed ``seed + index``.
        stream: its tokens and text.
        matcher: the state of its grammar; None where it has none.
        private: no other sequence may use its pages (``is_private``).

    Attributes:
        params: with this sequence's own seed.
        logprobs: of the tokens so far.
        prompt_logprobs: of the prompt's tokens, as far as they are known; None for the first.
        submitted: when its wait began, by ``time.perf_counter``.
    """

    def __init__(
        self,
        request: Request,
        index: int,
        params: SamplingParams,
        stream: OutputStream,
        matcher: Matcher | None = None,
        private: bool = False,
    ) -> None:
        super().__init__(
            stream.prompt_ids,
            stream.limit + 1,
            needs_host=matcher is not None,
            computes_all=params.prompt_logprobs is not None,
            private=private,
            # The same list, not a copy: what the stream accepts, the scheduler sees.
            token_ids=stream.token_ids,
        )
        seed = int(params.seed or 0)
        self.request = request
        self.index = index
        self.params = dataclasses.replace(params, seed=(seed + index) % (MAX_SEED + 1))
        self.stream = stream
        self.matcher = matcher
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob | None] = [None]
        self._given = 0
        # It is made at submission.
        self.submitted = time.perf_counter()
        self._started: float | None = None
        self._first_token: float | None = None

    def note_start(self) -> None:
        """Note the time of the first admission; later ones, after preemptions, do not count."""
        self._started = self._started or time.perf_counter()

    def accept(self, token_id: int, logprob: TokenLogprob | None) -> None:
        """Append a new token.

        Raises:
            RequestError: the grammar has failed.
            NonfiniteError: the logits are not numbers.
        """
        self._first_token = self._first_token or time.perf_counter()
        if logprob is not None:
            self.logprobs.append(dataclasses.replace(logprob, offset=self.stream.text_length))
        # The stream first: where the token ends the text, that is the reason, and not the end of the grammar.
        self.stream.accept(token_id)
        if self.matcher is not None and self.stream.finish_reason is None:
            self.matcher.accept([token_id])
            if self.matcher.ended:
                self.stream.finish("stop")

    def piece(self) -> Piece:
        """Return what has come since the last piece, with the whole output once the answer has ended."""
        # By numbers of tokens and not by text: some tokens have no text yet, and their ids must not be given twice.
        new, self._given = self.token_ids[self._given :], len(self.token_ids)
        output = self._output() if self.stream.finish_reason else None
        logprobs = None if self.params.logprobs is None else self.logprobs[self._given - len(new) : self._given]
        return Piece(self.stream.take_text(), new, output, self.index, logprobs)

    def _output(self) -> GenerationOutput:
        prompt = None if self.params.prompt_logprobs is None else list(self.prompt_logprobs)
        return dataclasses.replace(
            self.stream.output(self._timings()),
            index=self.index,
            logprobs=None if self.params.logprobs is None else list(self.logprobs),
            prompt_logprobs=prompt,
            reused_tokens=self.reused,
        )

    def _timings(self) -> Timings:
        now = time.perf_counter()
        # A sequence that was cancelled early may not have started, or have no token.
        started = self._started or now
        first = self._first_token or now
        decoded, decode_s, prefill_s = max(len(self.token_ids) - 1, 0), now - first, first - started
        return Timings(
            queue_s=started - self.submitted,
            prefill_s=prefill_s,
            decode_s=decode_s,
            prefill_tokens_per_s=len(self.prompt_ids) / prefill_s if prefill_s else 0.0,
            decode_tokens_per_s=decoded / decode_s if decode_s else 0.0,
        )
