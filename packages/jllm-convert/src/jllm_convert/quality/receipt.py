"""Quality receipt: the effect of quantising (or of float16) on a model's predictions, measured on a shipped text.

The model and its quantised self read the same text, layer by layer side by side, and slab by slab of each matrix: what
is in memory of either is a window and never a layer.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jllm_core.config import ModelConfig
from jllm_core.ops.linear import linear
from jllm_core.quantization.arrays import QuantizedArray
from jllm_core.quantization.grids import quantize, restore
from jllm_core.weight_specs import abstract_weights
from jllm_core.weights import Weights

from jllm_convert.errors import ConversionError
from jllm_convert.quality.largest_activation import FLOAT16_MAX, NEAR, LargestActivation
from jllm_convert.quality.streamed_matrix import Read, on_device
from jllm_convert.quality.streamed_model import StreamedModel
from jllm_convert.writing.memory_budget import DEFAULT_MEMORY
from jllm_convert.writing.progress import Progress, ProgressCounter

TEXT = "receipt.txt"
MAX_TEXT_TOKENS = 512
LOGITS_AT_ONCE = 6
"""Arrays of a slab's logits in memory while two of them are compared."""


@dataclass(frozen=True)
class Receipt:
    """Quality receipt: the distance of a quantised model's predictions from those of its source.

    Attributes:
        kl_nats: Kullback-Leibler divergence of the next token's distribution from the reference's, mean over positions.
        top1_agreement: share of the positions at which both would choose the same next token.
        tokens: positions that were compared.
        text: the text that was read, by name and the start of its SHA-256.
        reference: what was compared with.
        largest_activation: the largest magnitude in the residual stream, and before and behind each matrix, where the
            activations are to be float16; else None. The receipt itself computes in float32.
        largest_at: where that was, in words.
    """

    kl_nats: float
    top1_agreement: float
    tokens: int
    text: str
    reference: str
    largest_activation: float | None = None
    largest_at: str | None = None

    @property
    def overflows(self) -> bool:
        """Whether activations are to be float16 and float16 cannot hold them."""
        return self.largest_activation is not None and not self.largest_activation <= FLOAT16_MAX

    @property
    def nearly_overflows(self) -> bool:
        """Whether they are so large on this text that they may overflow on others."""
        return self.largest_activation is not None and not self.largest_activation <= NEAR

    @property
    def largest_words(self) -> str:
        """The largest activation, as part of a sentence."""
        return f"{self.largest_at} reaches {self.largest_activation:,.4g} on the shipped text, float16 ends at 65,504"

    def as_dict(self) -> dict[str, Any]:
        """The receipt as it is kept in a manifest."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        largest = "" if self.largest_activation is None else f"; {self.largest_words}"
        return (
            f"mean KL {self.kl_nats:.4f} nats, top-1 agreement {self.top1_agreement:.1%} "
            f"over {self.tokens} tokens of {self.text}, against {self.reference}{largest}"
        )


def receipt_text() -> str:
    """The text that every receipt is measured on: prose, dialogue, arithmetic, code, JSON, three languages."""
    return (resources.files("jllm_convert") / "data" / TEXT).read_text(encoding="utf-8")


def text_ids(tokenizer: Path, config: ModelConfig) -> np.ndarray | None:
    """The shipped text as token ids, [T], at most ``MAX_TEXT_TOKENS`` and what the model has room for.

    Args:
        tokenizer: the file tokenizer.json.
        config: the architecture of the model that is to read them.

    Returns:
        None where there is no such file, or it makes no tokens of the text.

    Raises:
        ConversionError: it is no tokenizer, or not this model's.
    """
    if not tokenizer.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        encoded = Tokenizer.from_file(str(tokenizer)).encode(receipt_text()).ids
    except Exception as error:  # tokenizers raises nothing more definite
        raise ConversionError(
            f"{tokenizer.name} cannot be used to measure what quantising does: {error}; download it again, or remove "
            "it to convert without a receipt"
        ) from error
    ids = np.asarray(encoded[: min(MAX_TEXT_TOKENS, config.context_length)], np.int64)
    if ids.size and ids.max() >= config.vocab_size:
        raise ConversionError(
            f"{tokenizer.name} is not of this model: it has a token {ids.max()}, the model knows {config.vocab_size:,}"
        )
    return ids if ids.size else None


def measure(
    config: ModelConfig,
    ids: np.ndarray,
    infos: Weights,
    reference: Read,
    quantized: Read,
    memory: int = DEFAULT_MEMORY,
    on_progress: Callable[[Progress], None] | None = None,
) -> Receipt:
    """Compare the two models on the shipped text.

    Args:
        config: the architecture of both.
        ids: the text's token ids (``text_ids``), [T].
        infos: the description of the quantised weights. Where what is not quantised is float16, activations are to be
            float16 too, and the largest is looked for.
        reference: ``reference(name, box)`` gives a box, or all, of an array of the model as it was.
        quantized: gives the same of an array of the quantised one as it is stored, or of a part of it
            (``layers.0.attn.q.values``), by the part's own axes.
        memory: bytes that what is read stays within; what the text itself needs comes on top (``StreamedModel``).
        on_progress: called after each layer, and after each slab of the vocabulary, with the stored bytes read so far.
    """
    largest = LargestActivation() if infos.dtype == np.float16 else None
    models = (
        StreamedModel(config, abstract_weights(config), reference, len(ids), memory),
        StreamedModel(config, infos, quantized, len(ids), memory, None if largest is None else largest.see),
    )
    comparison = Comparison(len(ids))
    head = _stored_bytes(infos.embedding if infos.lm_head is None else infos.lm_head)
    layers = [_stored_bytes(layer) for layer in infos.layers]
    counter = ProgressCounter(len(layers), sum(layers) + head, on_progress, "measuring the quality")
    with on_processor():
        states = hidden_states(*models, ids, lambda layer: counter.add(layers[layer], arrays=1))
        done = 0
        for exact, rounded in logits(*models, *states):
            comparison.add(exact, rounded)
            # Rounded from the sum, so that all slabs together are the whole head.
            before, done = done, done + exact.shape[1]
            counter.add(head * done // config.vocab_size - head * before // config.vocab_size)
    digest = hashlib.sha256(receipt_text().encode()).hexdigest()[:12]
    return Receipt(
        kl_nats=comparison.kl_nats(),
        top1_agreement=comparison.top1_agreement(),
        tokens=len(ids),
        text=f"{TEXT} ({digest})",
        reference="the source's weights in float32",
        largest_activation=None if largest is None else largest.size,
        largest_at=None if largest is None else largest.where,
    )


def on_processor() -> AbstractContextManager[Any]:
    """JAX on the processor even where there is an accelerator: the weights come from the disk, and each is used once.

    An accelerator's memory is left to whoever has a use for it.
    """
    try:
        processor = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX has been told to do without one (JAX_PLATFORMS)
        return nullcontext()
    on_it: AbstractContextManager[Any] = jax.default_device(processor)
    return on_it


def _stored_bytes(infos: Any) -> int:
    """Bytes of the stored arrays that a tree describes."""
    return sum(int(info.nbytes) for info in jax.tree.leaves(infos))


def hidden_states(
    reference: StreamedModel,
    quantized: StreamedModel,
    ids: np.ndarray,
    layer_done: Callable[[int], None] = lambda number: None,
) -> tuple[np.ndarray, np.ndarray]:
    """The last hidden states of both models, ``[T, D]``, computed side by side.

    Both embed by the reference's rows, which are cheap to find in a source and not in the chunks of a checkpoint; the
    quantised model's are rounded to what is stored of them.
    """
    exact = reference.embed(ids)
    rounded = on_device(as_stored(np.asarray(exact[0]), quantized.infos.embedding)[None])
    for number in range(reference.config.num_layers):
        exact, rounded = reference.layer(exact, number), quantized.layer(rounded, number)
        layer_done(number)
    return np.asarray(reference.final_norm(exact))[0], np.asarray(quantized.final_norm(rounded))[0]


def logits(
    reference: StreamedModel, quantized: StreamedModel, exact: np.ndarray, rounded: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The logits of both models for one slab of the vocabulary after the other, from their hidden states."""
    (plain, axis), (stored, _) = reference.head(), quantized.head()
    tied, embedding = quantized.infos.lm_head is None, quantized.infos.embedding
    rounds_rows = tied and not isinstance(embedding, QuantizedArray)
    for piece in stored.pieces(axis):
        numbers, stored_numbers = plain.load({axis: piece}), stored.load({axis: piece})
        for own in stored.cuts(axis, piece, extra=LOGITS_AT_ONCE * 4 * len(exact)):
            slab = numbers({axis: own})
            # Where nothing else is done to them, the rows of the source need not be read a second time.
            other = as_stored(slab, embedding) if rounds_rows else stored_numbers({axis: own})
            yield _logits(exact, slab, tied), _logits(rounded, other, tied)


def _logits(x: np.ndarray, slab: np.ndarray, tied: bool) -> np.ndarray:
    return np.asarray(linear("TD,VD->TV" if tied else "TD,DV->TV", on_device(x), on_device(slab)))


def as_stored(rows: np.ndarray, embedding: Any) -> np.ndarray:
    """What a checkpoint keeps of rows of the embedding, in float32.

    Args:
        rows: float32.
        embedding: the description of what is stored: an ArrayInfo, or a QuantizedArray with a scale a row.
    """
    if isinstance(embedding, QuantizedArray):
        return restore(quantize(rows, embedding.quantization, batch=1))
    return rows.astype(embedding.dtype, copy=False).astype(np.float32, copy=False)


class Comparison:
    """Two next-token distributions for each of T positions, of which the logits come in slabs of the vocabulary.

    With p the softmax of the logits a, and b the others: KL = sum p (a - b) - log sum e^a + log sum e^b. Each sum is
    kept relative to the largest logit so far.
    """

    def __init__(self, positions: int) -> None:
        self._exact, self._rounded = (_Softmax(positions) for _ in range(2))
        self._difference = np.zeros(positions)

    def add(self, exact: np.ndarray, rounded: np.ndarray) -> None:
        """Go on with the logits of further tokens, ``[T, some of V]`` of each model."""
        shrunk, weights = self._exact.add(exact)
        self._difference = self._difference * shrunk + np.einsum("TV,TV->T", weights, exact - rounded)
        self._rounded.add(rounded)

    def kl_nats(self) -> float:
        """The divergence of the second from the first, mean over positions; never below zero, as rounding may be."""
        kl = self._difference / self._exact.total - self._exact.log_total() + self._rounded.log_total()
        return max(float(np.mean(kl)), 0.0)

    def top1_agreement(self) -> float:
        """The share of positions where both have the same token on top."""
        return float(np.mean(self._exact.best == self._rounded.best))


class _Softmax:
    """The denominator and the largest logit of each position, online."""

    def __init__(self, positions: int) -> None:
        self.largest, self.total = np.full(positions, -np.inf, np.float32), np.zeros(positions)
        self.best, self._seen = np.zeros(positions, np.int64), 0

    def add(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Go on; gives what sums so far shrink by, ``[T]``, and ``e^(logits - largest)``."""
        token = logits.argmax(axis=-1)
        new = logits[np.arange(len(logits)), token]
        self.best = np.where(new > self.largest, token + self._seen, self.best)
        largest = np.maximum(self.largest, new)
        shrunk = np.exp(self.largest - largest, dtype=np.float64)
        weights = np.exp(logits - largest[:, None])
        self.total = self.total * shrunk + weights.sum(axis=-1, dtype=np.float64)
        self.largest, self._seen = largest, self._seen + logits.shape[1]
        return shrunk, weights

    def log_total(self) -> np.ndarray:
        return self.largest + np.log(self.total)
