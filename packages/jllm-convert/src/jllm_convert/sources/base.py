"""Source protocol: a config, named tensors that are read in boxes, and a tokenizer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from jllm_core.checkpoint import Box, whole
from jllm_core.config import ModelConfig

IGNORED_FIELDS = "ignored_fields"
"""The key of a manifest's source: fields of the config that were not known, and ignored because the user said so."""

NONFINITE = "nonfinite_numbers"
"""The key of a manifest's source: the sentence that names tensors with NaN or infinity, taken as the user said."""


@dataclass(frozen=True)
class SourceTensor:
    """A tensor in a source, not read yet.

    Attributes:
        name: the name the source gives it, such as ``model.layers.0.mlp.up_proj.weight``.
        shape: its shape, slowest axis first (numpy and torch order).
        dtype: the element type that ``read`` returns.
        where: the file that holds it, for error messages.
        read_box: reads a box; keeps nothing in memory but the result.
        stored: the element type in the source, by the source's own name (``BF16``, ``Q4_1``).
        also: other files that a read needs, such as that of a matrix's scales.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    where: Path
    read_box: Callable[[Box], np.ndarray]
    stored: str = ""
    also: tuple[Path, ...] = ()

    def read(self, box: Box | None = None) -> np.ndarray:
        """Read a box of the tensor, or all of it.

        Raises:
            ConversionError: the file cannot be read.
        """
        return self.read_box(whole(self.shape) if box is None else box)


class Source(Protocol):
    """A model to convert. Opening it reads headers; a tensor's data is read on request."""

    path: Path
    naming: str
    """The column of the family tables that its tensor names follow: ``"hf"``, ``"gguf"``, or ``"jllm"`` for our own."""
    tensors: Mapping[str, SourceTensor]
    left_out: Mapping[str, int]
    """How many tensors besides were left out, by what they are."""

    def config(self) -> ModelConfig:
        """Read the normalised architecture.

        Raises:
            ConversionError: every field that cannot be honoured.
        """
        ...

    def generation_config(self) -> dict[str, object]:
        """Read the publisher's settings of generation (``eos_token_id`` and sampling defaults); may be empty."""
        ...

    def write_tokenizer(self, folder: Path) -> list[str]:
        """Write ``tokenizer.json`` and ``tokenizer_config.json`` into ``folder``; return the file names written."""
        ...

    def fingerprint(self) -> str:
        """Hash the state of the source, as hex digits. A conversion is resumed only if it is still the same.

        The hash is over the names, sizes and times of change of all files that a conversion reads (weights, index,
        config and tokenizer). It reads none of them, and does not depend on the folder that they are in.

        Raises:
            ConversionError: one of the files is not accessible any more.
        """
        ...
