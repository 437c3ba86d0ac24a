"""What the converter asks of a source: a config, named tensors that are read part by part, and a tokenizer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from jllm_core.checkpoint import Box, whole
from jllm_core.config import ModelConfig


@dataclass(frozen=True)
class SourceTensor:
    """One tensor as it stands in a source, not read yet.

    Attributes:
        name: the name the source gives it, such as ``model.layers.0.mlp.up_proj.weight``.
        shape: its shape, slowest axis first (numpy and torch order).
        dtype: the element type that ``read`` returns.
        where: the file that holds it, for error messages.
        read_box: loads a part; nothing is held before the call, and nothing but the part after it.
        stored: how the source stores it, by the source's own name (``BF16``, ``Q4_1``).
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    where: Path
    read_box: Callable[[Box], np.ndarray]
    stored: str = ""

    def read(self, box: Box | None = None) -> np.ndarray:
        """A part of the tensor, or all of it."""
        return self.read_box(whole(self.shape) if box is None else box)


class Source(Protocol):
    """A model to convert. Reading the header is cheap; a tensor's data is read when asked for."""

    path: Path
    naming: str
    """Which column of the family tables its tensor names follow: ``"hf"``, ``"gguf"``, or ``"jllm"``: our own."""
    tensors: Mapping[str, SourceTensor]

    def config(self) -> ModelConfig:
        """The normalised architecture. Raises ConversionError, naming each field that cannot be honoured."""
        ...

    def generation_config(self) -> dict[str, object]:
        """What the publisher says of generation (``eos_token_id`` and sampling defaults); may be empty."""
        ...

    def write_tokenizer(self, folder: Path) -> list[str]:
        """Write ``tokenizer.json`` and ``tokenizer_config.json`` into ``folder``; return the file names written."""
        ...

    def fingerprint(self) -> str:
        """What tells this state of the source from another, as hex digits: a hash over its files, cheaply.

        It goes by the names, sizes and times of change of all files that a conversion reads (weights, index, config and
        tokenizer), not by where they are, and reads none of them. A conversion that was stopped goes on only if the
        fingerprint is still the same.

        Raises:
            ConversionError: one of the files cannot be looked at any more.
        """
        ...
