"""Text embeddings: pooled hidden states, a vector a text."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from jllm_runtime.cache.contiguous import PREFILL_CHUNK, cache_capacity
from jllm_runtime.errors import NonfiniteError, RequestError
from jllm_runtime.model import Model
from jllm_runtime.outputs import Prompt, Prompts, prompt_list, prompt_token_ids
from jllm_runtime.programs import scoring

Pooling = Literal["mean", "last"]

MIN_CAPACITY = 16

TOKENS_AT_A_TIME, ROWS_AT_A_TIME = 4096, 16
"""Tokens and texts that an accelerator is given at a time, blank ones included."""

CPU_SHAPES = {16: ((64, 1), (8, 8), (1, 16)), 32: ((8, 32), (1, 32)), 64: ((8, 64), (1, 64))}
"""By the capacity of short texts: how many a CPU is given at a time, and tokens of each in a step.

Of 64 texts it is one token of each: as many steps as the longest has tokens, so that a batch of texts of about the same
length computes next to nothing in vain. Kernels attend to longer texts otherwise token by token than as a whole, which
would change bits.
"""


def embed(model: Model, prompts: Prompts, pooling: Pooling = "mean", normalize: bool = True) -> np.ndarray:
    """A vector for each text, from the model's hidden states after the last norm.

    Short texts are computed many at a time, in batches of about the same length (``batches``). A text's vector has the
    same bits alone and beside others: on an accelerator, where the shapes of what is computed follow from its own
    length, and with the CPU kernels of jllm-core, in layers without experts. Elsewhere on a CPU, XLA may round a batch
    otherwise than a text alone, by about 1e-5 of the vector's largest number. How useful the vectors are is up to the
    model: one that was trained for it names its pooling.

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
    for batch in batches(model, [len(text) for text in texts]):
        made[batch.numbers] = _pooled(model, [texts[number] for number in batch.numbers], batch, pooling)
    for number, vector in enumerate(made):
        if not np.isfinite(vector).all():
            raise NonfiniteError(f"the hidden states of prompt {number}")
    if normalize:
        for vector in made:
            vector /= np.linalg.norm(vector) or 1
    return made


@dataclass(frozen=True)
class Batch:
    """Texts that are computed at a time.

    Attributes:
        numbers: which of the texts.
        rows: as many as there are numbers, or more, which are blank.
        chunk: tokens of each that are taken in a step; there are as many steps as the longest needs.
        capacity: tokens that there is room for in each row, a multiple of ``chunk``.
    """

    numbers: list[int]
    rows: int
    chunk: int
    capacity: int


def batches(model: Model, lengths: Sequence[int]) -> Iterator[Batch]:
    """The batches of texts of these lengths. Those of each are neighbours in length."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for capacity, alike in itertools.groupby(order, lambda number: _capacity(model, lengths[number])):
        numbers, shapes = list(alike), _shapes(model, capacity)
        while numbers:
            rows, chunk = next((shape for shape in shapes if shape[0] <= len(numbers)), shapes[-1])
            yield Batch(numbers[:rows], rows, min(chunk, capacity), capacity)
            numbers = numbers[rows:]


def _ids(model: Model, prompt: Prompt, number: int) -> list[int]:
    try:
        return prompt_token_ids(model, prompt)
    except RequestError as error:
        raise RequestError(f"prompt {number}: {error}") from error


def _capacity(model: Model, length: int) -> int:
    """The length that a text is filled up to: few different ones, so that few programs are compiled."""
    if length > PREFILL_CHUNK:
        return cache_capacity(length, model.config.context_length)
    return max(MIN_CAPACITY, 1 << (length - 1).bit_length())


def _shapes(model: Model, capacity: int) -> tuple[tuple[int, int], ...]:
    """How many texts may be computed side by side, most first, and how many tokens of each in a step."""
    if next(iter(model.mesh.devices.flat)).platform == "cpu":
        # A longer text keeps a CPU busy by itself.
        return CPU_SHAPES.get(capacity, ((1, PREFILL_CHUNK),))
    # Always as many, so that a text has the same bits in any company. A blank row costs little there.
    return ((max(1, min(ROWS_AT_A_TIME, TOKENS_AT_A_TIME // capacity)), PREFILL_CHUNK),)


def _pooled(model: Model, texts: list[list[int]], batch: Batch, pooling: Pooling) -> np.ndarray:
    tokens, lengths = np.zeros((batch.rows, batch.capacity), np.int32), np.zeros(batch.rows, np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
        lengths[row] = len(text)
    mean, last = scoring.pooled_states(model.weights, tokens, lengths, batch.chunk, model.config, model.backend)
    return np.asarray(mean if pooling == "mean" else last)[: len(texts)]
