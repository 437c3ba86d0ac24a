"""GGUF file as a source: architecture and tokenizer from its metadata, tensors dequantised when they are read."""

import hashlib
import json
import reprlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jllm_core.config import ModelConfig

from jllm_convert.errors import ConversionError
from jllm_convert.families import FAMILIES
from jllm_convert.families.table import Family
from jllm_convert.sources.base import SourceTensor
from jllm_convert.sources.gguf.config import prediction_tensors, read_gguf_config
from jllm_convert.sources.gguf.dequantization import can_dequantise, dtype_of, read_box
from jllm_convert.sources.gguf.header import GGUFHeader, find_gguf_file, read_gguf_header
from jllm_convert.sources.gguf.tokenizer import tokenizer_files
from jllm_convert.sources.gguf.vocabulary import NO_ID

SAMPLING_KEYS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
"""Metadata of the sampling parameters, and their names in a ``generation_config.json``."""


class GGUFSource:
    """An open GGUF file. Its header is read and checked, its data are not.

    Args:
        path: its path.
        ignored: metadata that this version does not know, and that change nothing, as the user says.

    Raises (on opening):
        ConversionError: not a GGUF file, cut short, split in parts, or of an architecture that is not supported.

    Attributes:
        metadata: the file's metadata: key -> str, int, float, bool, or a list of them.
    """

    naming = "gguf"

    def __init__(self, path: Path, ignored: Sequence[str] = ()) -> None:
        self.path = path
        self._ignored = ignored
        self._file = find_gguf_file(path)
        header = read_gguf_header(self._file)
        self._digest = header.digest
        self.metadata: Mapping[str, Any] = header.metadata
        self._check_whole()
        self.architecture, self._family = self._known_family()
        tensors = self._tensors(header)
        guesses = prediction_tensors(self.metadata, tensors, self.architecture)
        self.left_out: Mapping[str, int] = {"tensors of multi-token prediction": len(guesses)} if guesses else {}
        self.tensors: Mapping[str, SourceTensor] = {
            name: tensor for name, tensor in tensors.items() if name not in guesses
        }

    def _check_whole(self) -> None:
        parts = self.metadata.get("split.count", 1)
        if type(parts) is not int:
            raise ConversionError(
                f"{self.path.name}: metadata split.count must be a whole number, got {reprlib.repr(parts)}"
            )
        if parts > 1:
            # A part has only some of the tensors.
            raise ConversionError(f"{self.path} is one of {parts} parts; join them first: llama-gguf-split --merge")

    def _known_family(self) -> tuple[str, Family]:
        """The architecture, and the family that it stands for."""
        architecture = self.metadata.get("general.architecture")
        known = {family.gguf_architecture: family for family in FAMILIES.values() if family.gguf_architecture}
        if not isinstance(architecture, str) or architecture not in known:
            raise ConversionError(
                f"{self.path.name}: architecture {reprlib.repr(architecture)} is not supported; "
                f"supported: {', '.join(sorted(known))}"
            )
        return architecture, known[architecture]

    def _tensors(self, header: GGUFHeader) -> dict[str, SourceTensor]:
        # A type is tried once, on any of its tensors.
        examples = {tensor.kind: tensor for tensor in header.tensors}
        unreadable = {kind for kind, tensor in examples.items() if not can_dequantise(tensor)}
        problems = [
            f"{self.path.name}: tensor {tensor.name!r} is of type {tensor.kind.name}, which holds no weights or cannot "
            "be dequantised; download a file of another type"
            for tensor in header.tensors
            if tensor.kind in unreadable
        ]
        if problems:
            raise ConversionError(problems)
        return {
            tensor.name: SourceTensor(
                tensor.name,
                tensor.shape,
                dtype_of(tensor),
                self.path,
                partial(read_box, self._file, tensor),
                tensor.kind.name,
            )
            for tensor in header.tensors
        }

    def config(self) -> ModelConfig:
        """Read the normalised architecture."""
        return read_gguf_config(self.metadata, self.tensors, self._family, self.path.name, self._ignored)

    def generation_config(self) -> dict[str, object]:
        """Read the ids that end a text, and the publisher's sampling parameters.

        Raises:
            ConversionError: one of the ids is no token id, or one of the parameters no number.
        """
        # End of sequence, of turn, of message: chat models stop at any of them.
        keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
        found = {key: self.metadata[key] for key in keys if self.metadata.get(key, NO_ID) != NO_ID}
        problems = [
            f"{self.path.name}: metadata {key} must be a token id, got {reprlib.repr(value)}"
            for key, value in found.items()
            if type(value) is not int or value < 0
        ]
        # llama.cpp's converter copies them from generation_config.json, whose names they get back here.
        settings = {name: self.metadata[key] for key, name in SAMPLING_KEYS.items() if key in self.metadata}
        problems += [
            f"{self.path.name}: metadata {key} must be a number, got {reprlib.repr(self.metadata[key])}"
            for key, name in SAMPLING_KEYS.items()
            if name in settings and type(settings[name]) not in (int, float)
        ]
        if problems:
            raise ConversionError(problems)
        return {"eos_token_id": sorted(set(found.values()))} | {
            name: _shortest(value) for name, value in settings.items()
        }

    def write_tokenizer(self, folder: Path) -> list[str]:
        """Rebuild the tokenizer from the metadata and write its files; return their names."""
        files = tokenizer_files(self.metadata) or {}
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        return list(files)

    def fingerprint(self) -> str:
        """Hash (SHA-256, in hex) the file's name, size, time of change and header."""
        parts = [self.path.name, self._file.size, self._file.mtime_ns, self._digest]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _shortest(value: float) -> float:
    """0.95 of the float32 that is nearest to it, which is 0.949999988."""
    return value if isinstance(value, int) else float(str(np.float32(value)))
