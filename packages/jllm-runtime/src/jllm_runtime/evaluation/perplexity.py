"""Perplexity of a text: how well a model predicts each token from those before it."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jllm_runtime.cache.contiguous import cache_capacity, largest_chunk
from jllm_runtime.errors import NonfiniteError, RequestError
from jllm_runtime.model import Model, check_token_ids
from jllm_runtime.outputs import checked_ids
from jllm_runtime.programs import scoring

DEFAULT_CONTEXT = 2048
"""Most tokens of a window where nobody says, and the model takes as many."""

ROWS_AT_A_TIME, MAX_LOGITS = 8, 1 << 28
"""Windows that an accelerator takes side by side, and numbers of logits (1 GiB) that a step makes at most."""


@dataclass(frozen=True)
class Perplexity:
    """A text's perplexity and what it was computed from.

    Attributes:
        tokens: how many tokens were predicted.
        nbytes: bytes (UTF-8) of their text; None where token ids were given.
        loss: mean negative log-probability of a token, in nats.
        context: most tokens that a prediction was made from.
        stride: tokens from one window's start to the next one's.
        windows: how many windows the text was cut into.
        seconds: the time of computing, without compilation.
    """

    tokens: int
    nbytes: int | None
    loss: float
    context: int
    stride: int
    windows: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """``exp(loss)``: among so many equally likely tokens the model would have to choose."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits that the text would be compressed to, a byte; unlike perplexity it compares models of other tokens."""
        return None if not self.nbytes else self.loss * self.tokens / math.log(2) / self.nbytes

    @property
    def tokens_per_s(self) -> float:
        """Predicted tokens a second."""
        return self.tokens / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "perplexity": self.perplexity,
            "loss": self.loss,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.nbytes,
            "context": self.context,
            "stride": self.stride,
            "windows": self.windows,
            "seconds": self.seconds,
            "tokens_per_s": self.tokens_per_s,
        }

    def __str__(self) -> str:
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits a byte"
        stride = "" if self.stride == self.context else f", {self.stride} tokens apart"
        windows = f"{self.windows} window{'s' if self.windows > 1 else ''} of {self.context}{stride}"
        return (
            f"perplexity {self.perplexity:.3f} (loss {self.loss:.4f}{bits}) of {self.tokens:,} tokens in {windows}; "
            f"{self.tokens_per_s:,.0f} tokens/s"
        )


def perplexity(
    model: Model,
    text: str | Sequence[int],
    context: int | None = None,
    stride: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """The perplexity of a text. Each of its tokens but the first is predicted once.

    The text is cut into windows, for a context is limited. Window ``k`` begins at token ``k * stride``, and of each
    window those tokens count that no window before it has predicted. With the default the windows lie side by side, so
    that the first tokens of each are predicted from few; a smaller stride gives each at least ``context - stride`` and
    takes as many times longer.

    Reference: https://huggingface.co/docs/transformers/perplexity; windows that lie side by side are those of
    ``loglikelihood_rolling`` of lm-eval.

    Args:
        model: from ``load_model``.
        text: a text, encoded with the special tokens that the model wants in front of it (such as BOS) and no chat
            template; or token ids.
        context: tokens of a window; at most 2048 by default.
        stride: from 1 to ``context``, which is the default.
        on_progress: called with the windows that are done, and how many there are.

    Raises:
        RequestError: a text of fewer than two tokens, ids outside the vocabulary, a text for a model without a
            tokenizer, or an impossible context or stride.
        NonfiniteError: log-probabilities that are NaN or infinite.
    """
    limit = model.config.context_length
    for name, size in (("context", context), ("stride", stride)):
        if size is not None and (isinstance(size, bool) or not isinstance(size, int)):
            raise RequestError(f"the {name} is a whole number of tokens, got {size!r}")
    context = min(limit, DEFAULT_CONTEXT) if context is None else context
    if not 1 <= context <= limit:
        raise RequestError(f"the context must be 1 to {limit} tokens, which is the model's, got {context}")
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise RequestError(f"the stride must be 1 to {context} tokens, which is the context, got {stride}")
    ids, nbytes = token_ids_of(model, text)
    starts = _starts(len(ids) - 1, context, stride)
    # A text that is shorter than a window takes no room for one.
    capacity = cache_capacity(min(context, len(ids) - 1), limit)
    rows = _rows(model, len(starts))
    chunk = _chunk(model, rows, capacity)

    def losses(begins: list[int]) -> tuple[np.ndarray, np.ndarray]:
        tokens, targets, lengths = _windows(ids, begins, context, capacity, rows)
        found = scoring.token_losses(model.weights, tokens, targets, lengths, chunk, model.config, model.backend)
        return np.asarray(found, np.float64), lengths

    losses([])  # compiles, and computes nothing
    began = time.perf_counter()
    total, scored = 0.0, 0
    for first in range(0, len(starts), rows):
        begins = starts[first : first + rows]
        found, lengths = losses(begins)
        for row, start in enumerate(begins):
            # Those up to ``scored`` were predicted in the window before, from more.
            own = found[row, scored - start : lengths[row]]
            total, scored = total + float(own.sum()), scored + len(own)
        if on_progress is not None:
            on_progress(min(first + rows, len(starts)), len(starts))
    seconds = time.perf_counter() - began
    if not math.isfinite(total):
        raise NonfiniteError("the log-probabilities of the text")
    return Perplexity(scored, nbytes, total / scored, context, stride, len(starts), seconds)


def token_ids_of(model: Model, text: str | Sequence[int]) -> tuple[list[int], int | None]:
    """The ids of a text, without what a tokenizer puts behind one, and the bytes of what all but the first stand for.

    Of token ids, themselves and None.

    Raises:
        RequestError: fewer than two, ids outside the vocabulary, or a text for a model without a tokenizer.
    """
    nbytes: int | None = None
    if isinstance(text, str):
        if model.tokenizer is None:
            raise RequestError(f"{model.path or 'the model'} has no tokenizer, so it takes token ids only")
        found = model.tokenizer.encoding(text)
        ids, around = list(found.ids), list(found.special_tokens_mask)
        while around and around[-1]:
            ids, around = ids[:-1], around[:-1]
        content = text.encode()
        # BOS is no part of the text. The space that SentencePiece puts before a text is none either.
        first = b"" if not ids or around[0] else model.tokenizer.token_bytes(ids[0])
        nbytes = len(content) - len(first if content.startswith(first) else first.removeprefix(b" "))
    else:
        ids = checked_ids(text)
        check_token_ids(ids, model.config)
    if len(ids) < 2:
        raise RequestError(f"a text of at least two tokens is needed, to predict the second; got {len(ids)}")
    return ids, nbytes


def _starts(targets: int, context: int, stride: int) -> list[int]:
    """Where the windows begin; the last is the first that reaches the end of so many targets."""
    return list(range(0, max(targets - context, 0) + stride, stride))


def _rows(model: Model, windows: int) -> int:
    """Windows side by side. One keeps a CPU busy by itself."""
    if next(iter(model.mesh.devices.flat)).platform == "cpu":
        return 1
    return min(ROWS_AT_A_TIME, windows)


def _chunk(model: Model, rows: int, capacity: int) -> int:
    """Tokens of each window in a step: as many as a backend likes, in few enough logits."""
    fitting = max(MAX_LOGITS // (model.config.vocab_size * rows), 1)
    chunk = math.gcd(capacity, largest_chunk(rows, model.backend))
    while chunk > fitting and chunk % 2 == 0:
        chunk //= 2
    return chunk


def _windows(
    ids: list[int], begins: list[int], context: int, capacity: int, rows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs and targets ``[rows, capacity]`` of the windows that begin there, and tokens of each; other rows have
    none."""
    tokens, targets = np.zeros((rows, capacity), np.int32), np.zeros((rows, capacity), np.int32)
    lengths = np.zeros(rows, np.int32)
    for row, start in enumerate(begins):
        given = ids[start : start + context + 1]
        lengths[row] = len(given) - 1
        tokens[row, : len(given) - 1], targets[row, : len(given) - 1] = given[:-1], given[1:]
    return tokens, targets, lengths
