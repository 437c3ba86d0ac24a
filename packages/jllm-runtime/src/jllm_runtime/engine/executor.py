"""From sequences to the orders that a Runner takes, and back."""

from collections.abc import Sequence

import numpy as np

from jllm_runtime.cache.paged import page_tables, table_width
from jllm_runtime.distributed.peers import Companions
from jllm_runtime.embedding import Pooling, checked_texts, vectors
from jllm_runtime.engine.config import EngineConfig
from jllm_runtime.engine.leader import Leader
from jllm_runtime.engine.protocol import RESET, flat_rows, sizes_of, traits
from jllm_runtime.engine.request import Candidate
from jllm_runtime.engine.runner import Runner
from jllm_runtime.engine.scheduler import Chunk
from jllm_runtime.engine.structured import mask_words
from jllm_runtime.loading import Model
from jllm_runtime.logits_processors import Logprobs, Rows
from jllm_runtime.outputs import Prompt, TokenLogprob
from jllm_runtime.sampling import SamplingArrays, SamplingParams

MIN_EOS_IDS = 8


class Executor:
    """Has steps run on the devices, of this process or of several.

    Args:
        model: what is run.
        config: its sizes.
        pages: pages of the cache.
        companions: lines to the other processes that the model lies on; None where there are none.

    Raises:
        DistributedError: another process has another model or mesh.
    """

    def __init__(self, model: Model, config: EngineConfig, pages: int, companions: Companions | None = None) -> None:
        self._model = model
        self._config = config
        self._page_count = pages
        self._sizes = config.sizes(model)
        self._runner = Runner(model, config, pages)
        self._leader = None if companions is None else Leader(self._runner, companions)
        self._perform = self._runner.perform if self._leader is None else self._leader.perform
        if self._leader is not None:
            self._leader.begin(sizes_of(config, pages), traits(model))
        self.reset()

    def close(self) -> None:
        """Let go of other processes. Nothing more can be done."""
        if self._leader is not None:
            self._leader.end()

    def reset(self) -> None:
        """Begin with empty pages, also when a step has failed and taken the old ones with it."""
        self._perform(RESET)

    def start(self, candidate: Candidate) -> None:
        """A candidate has got a slot: set what the device must know of it."""
        slot = candidate.job.slot
        if slot is None or not _is_adjusted(candidate.params):
            return
        vocabulary = self._model.config.vocab_size
        prompted, bias = np.zeros(vocabulary, bool), np.zeros(vocabulary, np.float32)
        prompted[candidate.job.prompt_ids] = True
        for token, value in candidate.params.logit_bias.items():
            bias[token] = value
        self._perform("start", slot=slot, prompted=prompted, bias=bias)

    def prefill(self, chunk: Chunk) -> None:
        """Compute a chunk of a prompt."""
        size = self._config.page_size
        tokens = np.zeros((1, size), np.int32)
        tokens[0, : chunk.stop - chunk.start] = chunk.job.prompt_ids[chunk.start : chunk.stop]
        filled = chunk.start // size + 1
        table = page_tables([chunk.job.pages[:filled]], 1, table_width(filled), self._page_count)
        self._perform("prefill", tokens=tokens, start=chunk.start, length=len(chunk.job.prompt_ids), table=table)

    def prompt_logprobs(self, chunk: Chunk, top: int) -> list[TokenLogprob]:
        """How probable the tokens were that follow those of the chunk, which is the last one computed."""
        following = np.zeros(self._config.page_size, np.int32)
        count = chunk.stop - chunk.start
        following[:count] = chunk.job.prompt_ids[chunk.start + 1 : chunk.stop + 1]
        found = self._perform("prompt_logprobs", following=following)
        return token_logprobs(found, following[:count], top)

    def decode(self, candidates: Sequence[Candidate], steps: int) -> tuple[np.ndarray, Logprobs | None]:
        """Up to ``steps`` more tokens for each candidate.

        Returns:
            The tokens in order, -1 behind the last, ``[B, L]``, those that were known already included; and
            their log-probabilities, when somebody wants them.
        """
        made: tuple[np.ndarray, Logprobs | None]
        made = self._perform("decode", steps=steps, **flat_rows(self._rows(candidates, steps)))
        return made

    def embed(self, prompts: Prompt | Sequence[Prompt], pooling: Pooling, normalize: bool) -> np.ndarray:
        """As ``jllm_runtime.embed``. Any thread may call; steps of several processes wait meanwhile."""
        texts = checked_texts(self._model, prompts, pooling)
        if self._leader is None or not texts:
            return vectors(self._model, texts, pooling, normalize)
        tokens, lengths = np.concatenate(texts, dtype=np.int32), np.array([*map(len, texts)], np.int32)
        made: np.ndarray
        made = self._perform("embed", tokens=tokens, lengths=lengths, pooling=pooling, normalize=normalize)
        return made

    def _rows(self, candidates: Sequence[Candidate], steps: int) -> Rows:
        jobs, params = [c.job for c in candidates], [c.params for c in candidates]
        size = next(size for size in self._sizes if size >= len(jobs))
        blank = size - len(jobs)
        # Only as many pages as the longest of them has filled when the step ends.
        reach = max(min(job.computed + steps, job.end - 1) for job in jobs)
        width = table_width(-(-reach // self._config.page_size))
        longest_known = self._config.decode_steps
        newest = [job.known(job.computed, job.computed + 1)[0] for job in jobs]
        known = [job.known(job.computed + 1, job.computed + 1 + longest_known) for job in jobs]
        constrained = [c.matcher is not None and not ahead for c, ahead in zip(candidates, known, strict=True)]
        allowed = np.zeros((size, mask_words(self._model.config.vocab_size)), np.int32)
        for mask, candidate, held in zip(allowed, candidates, constrained, strict=False):
            if held and candidate.matcher is not None:
                mask[:] = candidate.matcher.allowed()

        def row(values: list[float] | list[int] | list[bool], rest: float, dtype: type) -> np.ndarray:
            return np.array([*values, *[rest] * blank], dtype)

        widest_eos = max(MIN_EOS_IDS, *(len(c.answer.eos_ids) for c in candidates))
        eos_ids = [list(c.answer.eos_ids) for c in candidates]
        return Rows(
            tables=page_tables([job.pages for job in jobs], size, width, self._page_count),
            tokens=row(newest, 0, np.int32),
            positions=row([job.computed for job in jobs], 0, np.int32),
            done=row([False] * len(jobs), True, bool),
            limits=row([job.end - 1 for job in jobs], 0, np.int32),
            eos_ids=page_tables(eos_ids, size, 1 << (widest_eos - 1).bit_length(), -1),
            known=page_tables(known, size, longest_known, -1),
            sampling=SamplingArrays.of([*params, *[SamplingParams(seed=0)] * blank]),
            slots=row([job.slot if job.slot is not None else -1 for job in jobs], self._config.max_batch, np.int32),
            adjusted=row([_is_adjusted(p) for p in params], False, bool),
            repetition=row([p.repetition_penalty for p in params], 1, np.float32),
            presence=row([p.presence_penalty for p in params], 0, np.float32),
            frequency=row([p.frequency_penalty for p in params], 0, np.float32),
            earliest_end=row(
                [min(len(c.job.prompt_ids) + c.params.min_tokens, c.job.end) for c in candidates], 0, np.int32
            ),
            constrained=row(constrained, False, bool),
            allowed=allowed,
            logprobs=row([p.logprobs is not None for p in params], False, bool),
        )


def token_logprobs(found: Logprobs, tokens: Sequence[int] | np.ndarray, top: int) -> list[TokenLogprob]:
    """The first of these log-probabilities, one for each of the tokens, with so many alternatives."""
    return [
        TokenLogprob(
            int(token),
            float(found.token[at]),
            [(int(i), float(p)) for i, p in zip(found.top_ids[at, :top], found.top[at, :top], strict=True)],
        )
        for at, token in enumerate(tokens)
    ]


def _is_adjusted(params: SamplingParams) -> bool:
    penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    return penalties != (1, 0, 0) or bool(params.logit_bias)
