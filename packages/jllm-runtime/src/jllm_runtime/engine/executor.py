"""Executor: from scheduled sequences to the arrays of an order, and from its results back to tokens."""

import dataclasses
from collections import abc

import numpy as np

from jllm_runtime.cache.paged import page_tables, shortest_table, table_width
from jllm_runtime.distributed.peers import Peers
from jllm_runtime.embedding import Pooling, checked_texts, vectors
from jllm_runtime.engine.config import EngineConfig
from jllm_runtime.engine.grammar_masks import mask_words
from jllm_runtime.engine.protocol import Leader, model_traits, runner_sizes
from jllm_runtime.engine.runner import (
    DECODE,
    EMBED,
    KEEP,
    PREFILL,
    PROMPT_LOGPROBS,
    RESET,
    RESTORE,
    START,
    Runner,
)
from jllm_runtime.engine.scheduler import PromptPage, in_chunks
from jllm_runtime.engine.sequence import Sequence
from jllm_runtime.logits_processors import Logprobs, Rows
from jllm_runtime.model import Model
from jllm_runtime.outputs import Prompts, TokenLogprob
from jllm_runtime.sampling import SamplingArrays, SamplingParams

MIN_EOS_IDS = 8
"""Least width of the array of end-of-text ids, so that a few stop ids of a request need no program of their own."""


class Executor:
    """Runs the scheduler's decisions on the devices of this process, or of several.

    Args:
        model: the model.
        config: sizes.
        pages: number of pages of the cache.
        peers: the other processes that the model lies on; None where there are none.

    Attributes:
        chunk_pages: pages of prompts that one program takes.

    Raises:
        DistributedError: another process has another model or mesh.
    """

    def __init__(self, model: Model, config: EngineConfig, pages: int, peers: Peers | None = None) -> None:
        self._model = model
        self._config = config
        self._page_count = pages
        self._batch_sizes = config.sizes(model)
        self.chunk_pages = config.chunk_pages(model)
        self._shortest_table = shortest_table(model.backend, model.config, config.page_size)
        self._runner = Runner(model, config, pages)
        self._leader = None if peers is None else Leader(self._runner, peers)
        self._run = self._runner.run if self._leader is None else self._leader.run
        if self._leader is not None:
            self._leader.begin(runner_sizes(config, pages), model_traits(model))
        self.reset()
        if config.warms_up(model):
            self.warm_up()

    def close(self) -> None:
        """Let the other processes go, and the devices' memory. Nothing can be run afterwards."""
        if self._leader is not None:
            self._leader.end()
        self._runner.release()

    def reset(self) -> None:
        """Begin with empty pages, also after a failed order has taken the old ones with it."""
        self._run(RESET)

    def warm_up(self) -> None:
        """Run every program once, on rows without a request: what they need is taken before anybody waits for it."""
        self.prefill([])
        if self._config.snapshots:
            # Of a state row and a snapshot that nobody has yet.
            self._run(KEEP, state_row=0, snapshot=0)
            self._run(RESTORE, state_row=0, snapshot=0)
        for size in self._batch_sizes:
            self._run(DECODE, steps=1, **self._rows([], 1, size).to_arrays())

    def start(self, sequence: Sequence) -> None:
        """Set the state row that a sequence has got, where its logits are penalized."""
        state_row = sequence.state_row
        if state_row is None or not sequence.params.is_penalized:
            return
        vocabulary = self._model.config.vocab_size
        prompted, bias = np.zeros(vocabulary, bool), np.zeros(vocabulary, np.float32)
        prompted[sequence.prompt_ids] = True
        for token, value in sequence.params.logit_bias.items():
            bias[token] = value
        self._run(START, state_row=state_row, prompted=prompted, bias=bias)

    def restore(self, restores: abc.Sequence[tuple[Sequence, int]]) -> None:
        """Give each sequence the states of its snapshot."""
        for sequence, snapshot in restores:
            self._run(RESTORE, state_row=sequence.state_row, snapshot=snapshot)

    def keep(self, sequence: Sequence, snapshot: int | None) -> None:
        """Copy the states of a sequence to a snapshot, if there is one for them."""
        if snapshot is not None:
            self._run(KEEP, state_row=sequence.state_row, snapshot=snapshot)

    def chunks(self, pages: abc.Sequence[PromptPage[Sequence]]) -> list[list[PromptPage[Sequence]]]:
        """Cut the pages of a step into chunks, in the order in which they are to be computed."""
        # A state goes through the pages of a prompt one after another; keys and values do not.
        return in_chunks(pages, self.chunk_pages, in_turn=self._model.config.delta_net is not None)

    def prefill(self, pages: abc.Sequence[PromptPage[Sequence]]) -> None:
        """Compute a chunk: at most ``chunk_pages`` pages of prompts, by one program."""
        size = self._config.page_size
        tokens = np.zeros((self.chunk_pages, size), np.int32)
        # Rows of padding write nowhere.
        starts, lengths = np.zeros(self.chunk_pages, np.int32), np.ones(self.chunk_pages, np.int32)
        for row, page in enumerate(pages):
            tokens[row, : page.stop - page.start] = page.sequence.prompt_ids[page.start : page.stop]
            starts[row], lengths[row] = page.start, len(page.sequence.prompt_ids)
        # With a page a chunk, the width of the table follows from its position alone: the same tokens get the same
        # program and the same bits, however long the prompt is.
        filled = [page.sequence.pages[: page.start // size + 1] for page in pages]
        width = table_width(max(map(len, filled), default=1), self._shortest_table)
        tables = page_tables(filled, self.chunk_pages, width, self._page_count)
        state_rows = self._state_rows([page.sequence for page in pages], self.chunk_pages)
        self._run(PREFILL, tokens=tokens, starts=starts, lengths=lengths, tables=tables, state_rows=state_rows)

    def prompt_logprobs(self, row: int, page: PromptPage[Sequence], top: int) -> list[TokenLogprob]:
        """Log-probabilities of the tokens that follow each of a page of the last chunk.

        Args:
            row: its number in the chunk.
            page: the page.
            top: number of alternatives for each token.
        """
        following = np.zeros(self._config.page_size, np.int32)
        count = page.stop - page.start
        following[:count] = page.sequence.prompt_ids[page.start + 1 : page.stop + 1]
        found = self._run(PROMPT_LOGPROBS, row=row, following=following)
        return token_logprobs(found, following[:count], top)

    def decode(self, sequences: abc.Sequence[Sequence], decode_steps: int) -> tuple[np.ndarray, Logprobs | None]:
        """Generate up to ``decode_steps`` more tokens for each sequence.

        Returns:
            The tokens in order, -1 behind the last, ``[B, L]``, those that were known already included; and their
            log-probabilities, where somebody wants them.
        """
        arrays = self._rows(sequences, decode_steps).to_arrays()
        size = len(arrays["tokens"])
        places = self._places(sequences, size)
        # The blank rows go where no sequence is.
        order = np.argsort([*places, *np.setdiff1d(np.arange(size), places)])
        tokens, logprobs = self._run(
            DECODE, steps=decode_steps, **{name: array[order] for name, array in arrays.items()}
        )
        if logprobs is not None:
            logprobs = Logprobs(**{name: array[places] for name, array in vars(logprobs).items()})
        return tokens[places], logprobs

    def wait(self) -> None:
        """Wait until the devices of this process have done what they were given."""
        self._runner.wait()

    def embed(self, prompts: Prompts, pooling: Pooling, normalize: bool) -> np.ndarray:
        """As ``jllm_runtime.embed``. Any thread may call; over several processes the engine's steps wait meanwhile."""
        texts = checked_texts(self._model, prompts, pooling)
        # In one process it needs neither the pages nor the order of the steps, so it runs beside them.
        if self._leader is None or not texts:
            return vectors(self._model, texts, pooling, normalize)
        tokens, lengths = np.concatenate(texts, dtype=np.int32), np.array([*map(len, texts)], np.int32)
        result: np.ndarray
        result = self._run(EMBED, tokens=tokens, lengths=lengths, pooling=pooling, normalize=normalize)
        return result

    def _places(self, sequences: abc.Sequence[Sequence], size: int) -> np.ndarray:
        """The row of each sequence in a program of ``size`` rows: its state row where there are as many of them, so
        that its states are changed where they lie; else the next."""
        if size != self._config.max_batch:
            return np.arange(len(sequences))
        return self._state_rows(sequences, len(sequences))

    def _state_rows(self, sequences: abc.Sequence[Sequence], size: int) -> np.ndarray:
        """The state row of each sequence, and of the blank rows up to ``size`` one that there is none of."""
        # Beyond the last, so that what would be written there is dropped.
        state_rows = np.full(size, self._config.max_batch, np.int32)
        for row, sequence in enumerate(sequences):
            if sequence.state_row is not None:
                state_rows[row] = sequence.state_row
        return state_rows

    def _rows(self, sequences: abc.Sequence[Sequence], decode_steps: int, size: int = 0) -> Rows:
        """A row for each sequence, and blank ones up to the next size that programs are compiled for, or this one."""
        params = [sequence.params for sequence in sequences]
        # The fewest that hold all of them: each size is a program of its own.
        size = next(each for each in self._batch_sizes if each >= max(len(sequences), size))
        blank = size - len(sequences)
        # Only as many pages as the longest text has filled when the step ends.
        reach = max((min(sequence.computed + decode_steps, sequence.end - 1) for sequence in sequences), default=1)
        width = table_width(-(-reach // self._config.page_size), self._shortest_table)
        # Of one width, however many steps are taken: it is a shape of the program.
        longest_known = self._config.decode_steps
        newest = [sequence.known(sequence.computed, sequence.computed + 1)[0] for sequence in sequences]
        # After a preemption, tokens behind the newest are known as well.
        known = [sequence.known(sequence.computed + 1, sequence.computed + 1 + longest_known) for sequence in sequences]
        # The matcher stands behind all known tokens, so its mask is for the first token that is not known.
        constrained = [
            sequence.matcher is not None and not ahead for sequence, ahead in zip(sequences, known, strict=True)
        ]
        # Rows without a grammar keep their zeros, which nobody looks at and a message leaves out.
        allowed = np.zeros((size, mask_words(self._model.config.vocab_size)), np.int32)
        for mask, sequence, held in zip(allowed, sequences, constrained, strict=False):
            if held and sequence.matcher is not None:
                mask[:] = sequence.matcher.allowed()

        def row(values: list[float] | list[int] | list[bool], rest: float, dtype: type) -> np.ndarray:
            return np.array([*values, *[rest] * blank], dtype)

        eos_ids = [list(sequence.stream.eos_ids) for sequence in sequences]
        widest_eos = max([MIN_EOS_IDS, *map(len, eos_ids)])
        # `min_tokens` may be larger than an int32; no position is beyond `end`.
        earliest_ends = [
            min(len(sequence.prompt_ids) + sequence.params.min_tokens, sequence.end) for sequence in sequences
        ]
        return Rows(
            tables=page_tables([sequence.pages for sequence in sequences], size, width, self._page_count),
            tokens=row(newest, 0, np.int32),
            positions=row([sequence.computed for sequence in sequences], 0, np.int32),
            done=row([False] * len(sequences), True, bool),
            limits=row([sequence.end - 1 for sequence in sequences], 0, np.int32),
            eos_ids=page_tables(eos_ids, size, 1 << (widest_eos - 1).bit_length(), -1),
            known=page_tables(known, size, longest_known, -1),
            sampling=SamplingArrays.of([*params, *[SamplingParams(seed=0)] * blank]),
            state_rows=self._state_rows(sequences, size),
            penalized=row([p.is_penalized for p in params], False, bool),
            repetition=row([p.repetition_penalty for p in params], 1, np.float32),
            presence=row([p.presence_penalty for p in params], 0, np.float32),
            frequency=row([p.frequency_penalty for p in params], 0, np.float32),
            earliest_end=row(earliest_ends, 0, np.int32),
            constrained=row(constrained, False, bool),
            allowed=allowed,
            logprobs=row([p.logprobs is not None for p in params], False, bool),
        )


def accept_tokens(sequence: Sequence, row: int, tokens: np.ndarray, logprobs: Logprobs | None) -> None:
    """Give a sequence the tokens that decode has made for it, up to the end of its answer.

    Args:
        sequence: the sequence.
        row: its row.
        tokens: of all rows, ``[B, L]``.
        logprobs: of these, where somebody wants them.

    Raises:
        RequestError: its grammar has failed.
        NonfiniteError: its logits are not numbers.
    """
    top = None if logprobs is None else sequence.params.logprobs
    for column, token in enumerate(tokens[row].tolist()):
        sequence.computed += 1
        if sequence.computed < len(sequence.prompt_ids) + len(sequence.token_ids):
            continue  # after a preemption: the token is known
        found = None if top is None or logprobs is None else decoded_logprob(logprobs, row, column, token, top)
        sequence.accept(token, found)
        # The device knows of end-of-text ids and limits, but not of stop strings and grammars: it may have made tokens
        # behind the end.
        if sequence.stream.finish_reason:
            break


def decoded_logprob(found: Logprobs, row: int, column: int, token: int, top: int) -> TokenLogprob:
    """The log-probability of a token that ``Executor.decode`` has made, and of ``top`` alternatives."""
    here = slice(column, column + 1)
    one = dataclasses.replace(
        found, token=found.token[row, here], top_ids=found.top_ids[row, here], top=found.top[row, here]
    )
    return token_logprobs(one, [token], top)[0]


def token_logprobs(found: Logprobs, tokens: abc.Sequence[int] | np.ndarray, top: int) -> list[TokenLogprob]:
    """Convert the first ``len(tokens)`` rows of log-probabilities.

    Args:
        found: numpy arrays, a row for each token.
        tokens: the tokens.
        top: number of alternatives for each of them.
    """
    return [
        TokenLogprob(
            int(token),
            float(found.token[at]),
            [(int(i), float(p)) for i, p in zip(found.top_ids[at, :top], found.top[at, :top], strict=True)],
        )
        for at, token in enumerate(tokens)
    ]
