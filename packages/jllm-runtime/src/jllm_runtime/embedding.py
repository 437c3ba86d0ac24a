"""Text embeddings: pooled hidden states, a vector a text."""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from jllm_runtime.cache.contiguous import PREFILL_CHUNK, cache_capacity
from jllm_runtime.errors import RequestError
from jllm_runtime.model import Model
from jllm_runtime.outputs import Prompt, Prompts, prompt_list, prompt_token_ids
from jllm_runtime.programs import contiguous_batch

Pooling = Literal["mean", "last"]

MIN_CAPACITY = 16

TOKENS_AT_A_TIME, ROWS_AT_A_TIME = 4096, 16
"""Tokens and texts that an accelerator is given at a time; a CPU is busy with one text."""


def embed(model: Model, prompts: Prompts, pooling: Pooling = "mean", normalize: bool = True) -> np.ndarray:
    """A vector for each text, from the model's hidden states after the last norm.

    A text's vector has the same bits alone and beside others: the shapes of what is computed follow from its own
    length. How useful the vectors are is up to the model: one that was trained for it names its pooling.

    Args:
        model: from ``load_model``.
        prompts: texts (encoded with the model's special tokens, without a chat template) or lists of token ids.
        pooling: ``"mean"`` of the states of all tokens, or the state of the ``"last"``.
        normalize: to length 1.

    Returns:
        float32 ``[B, D]``, in the order of the prompts.

    Raises:
        RequestError: an unknown pooling; or a prompt that is empty, longer than the context or outside the vocabulary,
            or a text for a model without a tokenizer.
    """
    return vectors(model, checked_texts(model, prompts, pooling), pooling, normalize)


def checked_texts(model: Model, prompts: Prompts, pooling: str) -> list[list[int]]:
    """The token ids of each text.

    Raises:
        RequestError: as ``embed``.
    """
    if pooling not in get_args(Pooling):
        raise RequestError(f"pooling must be one of {', '.join(get_args(Pooling))}, got {pooling!r}")
    return [_ids(model, prompt, number) for number, prompt in enumerate(prompt_list(prompts))]


def vectors(model: Model, texts: Sequence[list[int]], pooling: Pooling, normalize: bool) -> np.ndarray:
    """``embed``, of texts that have been checked."""
    made = np.zeros((len(texts), model.config.hidden_size), np.float32)
    for capacity in sorted({_capacity(model, text) for text in texts}):
        alike = [number for number, text in enumerate(texts) if _capacity(model, text) == capacity]
        rows = _rows(model, capacity)
        for first in range(0, len(alike), rows):
            some = alike[first : first + rows]
            made[some] = _pooled(model, [texts[number] for number in some], rows, capacity, pooling)
    if normalize:
        for vector in made:
            vector /= np.linalg.norm(vector) or 1
    return made


def _ids(model: Model, prompt: Prompt, number: int) -> list[int]:
    try:
        return prompt_token_ids(model, prompt)
    except RequestError as error:
        raise RequestError(f"prompt {number}: {error}") from error


def _capacity(model: Model, text: Sequence[int]) -> int:
    """The length that a text is filled up to: few different ones, so that few programs are compiled."""
    if len(text) > PREFILL_CHUNK:
        return cache_capacity(len(text), model.config.context_length)
    return max(MIN_CAPACITY, 1 << (len(text) - 1).bit_length())


def _rows(model: Model, capacity: int) -> int:
    """How many texts are computed side by side, blank ones included: for a capacity, always as many."""
    if next(iter(model.mesh.devices.flat)).platform == "cpu":
        return 1
    return max(1, min(ROWS_AT_A_TIME, TOKENS_AT_A_TIME // capacity))


def _pooled(model: Model, texts: list[list[int]], rows: int, capacity: int, pooling: Pooling) -> np.ndarray:
    tokens, lengths = np.zeros((rows, capacity), np.int32), np.zeros(rows, np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
        lengths[row] = len(text)
    chunk = min(capacity, PREFILL_CHUNK)
    mean, last = contiguous_batch.pooled_states(model.weights, tokens, lengths, chunk, model.config, model.backend)
    return np.asarray(mean if pooling == "mean" else last)[: len(texts)]
