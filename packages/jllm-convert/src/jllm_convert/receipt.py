"""The quality receipt: what quantising did to a model's predictions, measured and written down.

The model and its quantised self read the same text, layer by layer side by side, so that no more than one layer of each
is in memory beside the embedding.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jllm_core.config import ModelConfig

Read = Callable[[str], np.ndarray]
"""Gives an array of the model by its dotted name."""

TEXT = "receipt.txt"
MOST_TOKENS = 512
POSITIONS_AT_ONCE = 64


@dataclass(frozen=True)
class Receipt:
    """How far a quantised model's predictions are from those of the model it was made from.

    Attributes:
        kl_nats: Kullback-Leibler divergence of the next token's distribution from the reference's, mean over positions.
        top1_agreement: share of the positions at which both would choose the same next token.
        tokens: positions that were compared.
        text: the text that was read, by name and the start of its SHA-256.
        reference: what was compared with.
    """

    kl_nats: float
    top1_agreement: float
    tokens: int
    text: str
    reference: str

    def as_dict(self) -> dict[str, Any]:
        """The receipt as it is kept in a manifest."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"mean KL {self.kl_nats:.4f} nats, top-1 agreement {self.top1_agreement:.1%} "
            f"over {self.tokens} tokens of {self.text}, against {self.reference}"
        )


def receipt_text() -> str:
    """The text that every receipt is measured on: prose, dialogue, arithmetic, code, JSON, three languages."""
    return (resources.files("jllm_convert") / "data" / TEXT).read_text(encoding="utf-8")


def measure(config: ModelConfig, folder: Path, infos: Any, reference: Read, quantized: Read) -> Receipt | None:
    """Compare the two models on the shipped text.

    Args:
        config: the architecture of both.
        folder: where tokenizer.json is.
        infos: the description of the quantised weights.
        reference: gives the arrays of the model as it was.
        quantized: gives the parts of the quantised one.

    Returns:
        The receipt; None where there is no tokenizer to read a text with.
    """
    import jax
    import jax.numpy as jnp
    from jllm_core.array_info import path_name
    from jllm_core.cache import NoCache
    from jllm_core.model import block, unembed
    from jllm_core.ops.norm import rms_norm
    from jllm_core.ops.rope import rope_angles
    from jllm_core.quantized import QuantizedArray
    from jllm_core.weights import Weights

    if not (folder / "tokenizer.json").is_file():
        return None
    from tokenizers import Tokenizer

    text = receipt_text()
    ids = (
        Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids[: min(MOST_TOKENS, config.context_length)]
    )

    def branch(part: Any, prefix: str, read: Read, plain: bool) -> Any:
        """The arrays of a part of the tree; ``plain`` reads a quantised one as the matrix that it was."""

        def load(path: tuple[Any, ...], leaf: Any) -> Any:
            name = ".".join(word for word in (prefix, path_name(path)) if word)
            if isinstance(leaf, QuantizedArray) and not plain:
                return jax.tree_util.tree_map_with_path(
                    lambda own, _: jnp.asarray(read(f"{name}.{path_name(own)}")), leaf
                )
            return jnp.asarray(read(name), jnp.float32)

        return jax.tree_util.tree_map_with_path(load, part, is_leaf=lambda leaf: isinstance(leaf, QuantizedArray))

    positions = jnp.arange(len(ids))[None]
    rotation = rope_angles(positions, config)
    embedding = jnp.asarray(reference("embedding"), jnp.float32)
    streams = [embedding[jnp.asarray([ids])]] * 2
    for number, layer in enumerate(infos.layers):
        for which, (read, plain) in enumerate(((reference, True), (quantized, False))):
            weights = branch(layer, f"layers.{number}", read, plain)
            streams[which], _ = block(streams[which], weights, config, rotation, positions, NoCache(), number)
    gamma = jnp.asarray(reference("gamma_final"), jnp.float32)
    heads = [
        None if infos.lm_head is None else branch(infos.lm_head, "lm_head", read, plain)
        for read, plain in ((reference, True), (quantized, False))
    ]
    divergence, agreed = 0.0, 0
    for start in range(0, len(ids), POSITIONS_AT_ONCE):
        exact, rounded = (
            jax.nn.log_softmax(
                unembed(
                    rms_norm(stream[0, start : start + POSITIONS_AT_ONCE], gamma, config.rms_norm_eps),
                    Weights([], embedding, gamma, head),
                )
            )
            for stream, head in zip(streams, heads, strict=True)
        )
        divergence += float(jnp.sum(jnp.exp(exact) * (exact - rounded)))
        agreed += int(jnp.sum(jnp.argmax(exact, -1) == jnp.argmax(rounded, -1)))
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return Receipt(
        kl_nats=max(divergence / len(ids), 0.0),
        top1_agreement=agreed / len(ids),
        tokens=len(ids),
        text=f"{TEXT} ({digest})",
        reference="the source's weights in float32",
    )
