"""Runner: compiled programs on this process's devices, called by orders of numbers and arrays."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jllm_runtime.cache.paged import pages_info
from jllm_runtime.embedding import Pooling, vectors
from jllm_runtime.engine.config import EngineConfig
from jllm_runtime.errors import EngineError
from jllm_runtime.logits_processors import Logprobs, Rows
from jllm_runtime.model import Model
from jllm_runtime.programs import paged_batch

RESET, START, RESTORE, PREFILL, KEEP, PROMPT_LOGPROBS, DECODE, EMBED = ORDERS = (
    *("reset", "start", "restore", "prefill"),
    *("keep", "prompt_logprobs", "decode", "embed"),
)
"""The orders: names of a Runner's methods, and of messages between processes."""


class Runner:
    """Owner of the pages and of all states on the devices. Each process of a run has one, and all get the same orders.

    Nothing is on the devices before the first ``reset``.

    Args:
        model: the model.
        config: sizes; only those in ``protocol.runner_sizes`` matter.
        pages: number of pages of the cache.
    """

    def __init__(self, model: Model, config: EngineConfig, pages: int) -> None:
        self._model = model
        self._config = config
        self._page_count = pages
        self._pages: Any = None
        self._state: Any = None
        self._snapshots: Any = None
        # The last prefill's hidden states stay on the device; most prompts want no log-probabilities of them.
        self._hidden: jax.Array | None = None

    def run(self, order: str, /, **values: Any) -> Any:
        """Do an order: call the method of this name.

        Raises:
            EngineError: there is no such order.
        """
        # An order may come from another process. Only these names are looked up, so that it can call nothing else.
        if order not in ORDERS:
            raise EngineError(f"there is no order {order!r:.40}; known: {', '.join(ORDERS)}")
        return getattr(self, order)(**values)

    def reset(self) -> None:
        """Begin with empty pages, also after a failed order has taken the donated ones with it."""
        model, config = self._model, self._model.config
        # The old ones first: there may be no room for both.
        self.release()
        dtype = self._config.cache_dtype(model)
        info = pages_info(config, self._page_count, self._config.page_size, dtype, model.placement)
        state_rows = self._config.max_batch
        self._pages = paged_batch.empty_pages(info.shape, info.dtype, config, model.backend, state_rows)
        self._state = paged_batch.empty_state(state_rows, config.vocab_size, model.placement)
        self._snapshots = paged_batch.empty_snapshots(config, self._config.snapshots or 0, model.backend)

    def release(self) -> None:
        """Give the memory of pages and state back. A closed engine may be named for long, as in a notebook."""
        self._pages = self._state = self._snapshots = self._hidden = None

    def start(self, state_row: int, prompted: np.ndarray, bias: np.ndarray) -> None:
        """Set the TokenState of a state row for a new sequence.

        Args:
            state_row: index of the state row.
            prompted: bool ``[V]``, the tokens of the prompt.
            bias: float32 ``[V]``, added to the logits.
        """
        self._state = paged_batch.set_state_row(self._state, np.int32(state_row), prompted, bias, self._model.placement)

    def restore(self, state_row: int, snapshot: int) -> None:
        """Copy a snapshot to the states of a state row: its text goes on behind the pages of another."""
        states, to, at = self._pages.states, np.int32(state_row), np.int32(snapshot)
        states = paged_batch.copy_states(states, to, self._snapshots, at, self._model.placement)
        self._pages = replace(self._pages, states=states)

    def keep(self, state_row: int, snapshot: int) -> None:
        """Copy the states of a state row to a snapshot."""
        states, row, to = self._pages.states, np.int32(state_row), np.int32(snapshot)
        self._snapshots = paged_batch.copy_states(self._snapshots, to, states, row, self._model.placement)

    def prefill(
        self, tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, tables: np.ndarray, state_rows: np.ndarray
    ) -> None:
        """Compute the keys and values of pages of prompts, and the states behind them.

        Args:
            tokens: int32 ``[M, C]``, padded with anything.
            starts: int32 ``[M]``, the position of the first of each row.
            lengths: int32 ``[M]``, tokens of the whole prompts.
            tables: int32 ``[M, n]``, the pages of the texts.
            state_rows: int32 ``[M]``, the state rows of the texts.
        """
        model = self._model
        # The pages are donated: the program writes into them, and when it fails they are gone. `reset` makes new ones.
        self._pages, self._hidden = paged_batch.prefill_pages(
            model.weights, self._pages, tokens, starts, lengths, tables, state_rows, model.config
        )

    def wait(self) -> None:
        """Wait for the last prefill. It is no order: each process waits for its own devices."""
        jax.block_until_ready(self._hidden)

    def prompt_logprobs(self, row: int, following: np.ndarray) -> Logprobs:
        """Log-probabilities of the tokens that follow each of a row of the last prefill.

        Args:
            row: number of the row.
            following: int32 ``[C]``.

        Returns:
            Numpy arrays of ``C`` rows.

        Raises:
            EngineError: there has been no prefill.
        """
        if self._hidden is None:
            raise EngineError("no prompt has been taken in whose probabilities could be told")
        model = self._model
        found = paged_batch.prompt_logprobs(model.weights, self._hidden, np.int32(row), following, model.placement)
        return _on_host(found)

    def decode(self, steps: int, **rows: np.ndarray) -> tuple[np.ndarray, Logprobs | None]:
        """Generate up to ``steps`` tokens for each row.

        Args:
            steps: at most L, the width of ``known``.
            rows: the arrays of a Rows, by their names.

        Returns:
            The tokens int32 ``[B, L]``, -1 behind the last, and their log-probabilities where a row asks for them.
        """
        self._pages, self._state, tokens, logprobs = paged_batch.decode_rows(
            self._model.weights, self._pages, self._state, Rows.from_arrays(rows), np.int32(steps), self._model.config
        )
        # The 20 best of each token are fetched from the device only where somebody wants them.
        wanted = bool(rows["logprobs"].any())
        # `np.asarray` waits for the device: errors of the program are raised here, within the order.
        return np.asarray(tokens), _on_host(logprobs) if wanted else None

    def embed(self, tokens: np.ndarray, lengths: np.ndarray, pooling: Pooling, normalize: bool) -> np.ndarray:
        """Embeddings of texts, float32 ``[B, D]``.

        Args:
            tokens: int32, one text after the other.
            lengths: int32 ``[B]``, tokens of each.
            pooling, normalize: as ``jllm_runtime.embed`` has them.
        """
        # A message has no lists of arrays, so the texts come as one array and are cut here.
        texts = [text.tolist() for text in np.split(tokens, np.cumsum(lengths)[:-1])]
        return vectors(self._model, texts, pooling, normalize)


def _on_host(logprobs: Logprobs) -> Logprobs:
    found: Logprobs = jax.tree.map(np.asarray, logprobs)
    return found
