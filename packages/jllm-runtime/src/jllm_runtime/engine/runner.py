"""The steps on this process's devices, by orders of numbers and arrays alone. The one owner of the pages."""

from typing import Any

import jax
import numpy as np

from jllm_runtime.cache.paged import pages_info
from jllm_runtime.embedding import Pooling, vectors
from jllm_runtime.engine.config import EngineConfig
from jllm_runtime.engine.protocol import rows_of
from jllm_runtime.errors import EngineError
from jllm_runtime.loading import Model
from jllm_runtime.logits_processors import Logprobs
from jllm_runtime.programs import paged_batch


class Runner:
    """Does what it is told. With several processes each has one, and all are told the same in the same order.

    Nothing is on the devices before the first ``reset``.

    Args:
        model: what is run.
        config: its sizes; those of ``orders.sizes_of`` matter.
        pages: pages of the cache.
    """

    def __init__(self, model: Model, config: EngineConfig, pages: int) -> None:
        self._model = model
        self._config = config
        self._page_count = pages
        self._hidden: jax.Array | None = None
        self._orders = {
            order.__name__: order
            for order in (self.reset, self.start, self.prefill, self.prompt_logprobs, self.decode, self.embed)
        }

    def perform(self, name: str, /, **values: Any) -> Any:
        """Do what an order says: call the method of this name.

        Raises:
            EngineError: there is no such order.
        """
        order: Any = self._orders.get(name)
        if order is None:
            raise EngineError(f"there is no order {name!r:.40}; known: {', '.join(self._orders)}")
        return order(**values)

    def reset(self) -> None:
        """Begin with empty pages, also when a step has failed and taken the old ones with it."""
        model, config = self._model, self._model.config
        dtype = self._config.cache_dtype(model)
        info = pages_info(config, self._page_count, self._config.page_size, dtype, model.placement)
        self._pages = paged_batch.empty_pages(info.shape, info.dtype, config.num_layers, model.backend)
        self._state = paged_batch.empty_state(self._config.max_batch, config.vocab_size, model.placement)

    def start(self, slot: int, prompted: np.ndarray, bias: np.ndarray) -> None:
        """Begin a slot anew.

        Args:
            slot: which.
            prompted: bool ``[V]``, the tokens of the prompt.
            bias: float32 ``[V]``, what is added to the logits.
        """
        self._state = paged_batch.set_slot(self._state, np.int32(slot), prompted, bias)

    def prefill(self, tokens: np.ndarray, start: int, length: int, table: np.ndarray) -> None:
        """Take a page of a prompt into the cache.

        Args:
            tokens: int32 ``[1, C]``, filled up with anything.
            start: where in the prompt they stand.
            length: tokens of the whole prompt.
            table: int32 ``[1, n]``, the pages of the text.
        """
        model = self._model
        self._pages, self._hidden = paged_batch.prefill_page(
            model.weights, self._pages, tokens, np.int32(start), np.int32(length), table, model.config
        )

    def prompt_logprobs(self, following: np.ndarray) -> Logprobs:
        """How probable the tokens after those of the last prefill are, int32 ``[C]``; in numpy's arrays."""
        if self._hidden is None:
            raise EngineError("no prompt has been taken in whose probabilities could be told")
        found = paged_batch.prompt_logprobs(self._model.weights, self._hidden, following, self._model.placement)
        return _on_host(found)

    def decode(self, steps: int, **rows: np.ndarray) -> tuple[np.ndarray, Logprobs | None]:
        """Generate up to ``steps`` tokens for each row, given as ``flat_rows``.

        Returns:
            The tokens int32 ``[B, L]``, -1 behind the last, and their log-probabilities, where a row asks for them.
        """
        self._pages, self._state, made, logprobs = paged_batch.decode_rows(
            self._model.weights, self._pages, self._state, rows_of(rows), np.int32(steps), self._model.config
        )
        wanted = bool(rows["logprobs"].any())
        return np.asarray(made), _on_host(logprobs) if wanted else None

    def embed(self, tokens: np.ndarray, lengths: np.ndarray, pooling: Pooling, normalize: bool) -> np.ndarray:
        """Vectors of texts, float32 ``[B, D]``.

        Args:
            tokens: int32, one text behind the other.
            lengths: int32 ``[B]``.
            pooling, normalize: as ``jllm_runtime.embed`` has them.
        """
        texts = [text.tolist() for text in np.split(tokens, np.cumsum(lengths)[:-1])]
        return vectors(self._model, texts, pooling, normalize)


def _on_host(logprobs: Logprobs) -> Logprobs:
    found: Logprobs = jax.tree.map(np.asarray, logprobs)
    return found
