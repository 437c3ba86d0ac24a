"""JLLM checkpoint as a source, to store it in another element type or to quantise it."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from jllm_core import checkpoint
from jllm_core.checkpoint import Box
from jllm_core.config import ModelConfig

from jllm_convert.errors import ConversionError
from jllm_convert.files.model_folder import tokenizer_file_names
from jllm_convert.sources.base import SourceTensor
from jllm_convert.sources.left_out import recorded


class CheckpointSource:
    """An open checkpoint. Its manifest is read and checked, its arrays are not.

    Raises (on opening):
        ConversionError: its matrices are quantised.
        CheckpointError: it is damaged, or does not match its manifest.
    """

    naming = "jllm"

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self._manifest = checkpoint.read_manifest(folder)
        self._config = checkpoint.read_config(folder)
        if self._manifest.quantization is not None:
            raise ConversionError(
                f"{folder} is quantised already ({self._manifest.quantization.name}), and a second rounding would add "
                "to the first; convert what it was made from"
            )
        # Sizes and types by the config, so that a damaged manifest is found before arrays are read.
        infos = checkpoint.check_against_config(folder, self._config, self._manifest)
        weights = folder / checkpoint.WEIGHTS_FOLDER
        self.left_out: Mapping[str, int] = recorded(self._manifest.source)
        self.tensors: Mapping[str, SourceTensor] = {
            name: SourceTensor(name, info.shape, info.dtype, weights, partial(_read, weights, name), info.dtype.name)
            for name, info in infos.items()
        }

    def config(self) -> ModelConfig:
        """Return the architecture."""
        return self._config

    def fingerprint(self) -> str:
        """Hash the manifest, which holds the hashes of all arrays."""
        return hashlib.sha256((self.path / checkpoint.MANIFEST_FILE).read_bytes()).hexdigest()

    @property
    def source(self) -> Mapping[str, object]:
        """What its manifest says of the source that it was made from."""
        return self._manifest.source

    def generation_config(self) -> dict[str, object]:
        """Read the publisher's settings, as far as the checkpoint has them."""
        checkpoint.read_eos_ids(self.path)  # its errors name the problem of the file
        path = self.path / checkpoint.GENERATION_FILE
        settings: dict[str, object] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return settings

    def write_tokenizer(self, folder: Path) -> list[str]:
        """Copy the tokenizer files that exist; return their names."""
        names = [name for name in tokenizer_file_names(self.path) if (self.path / name).is_file()]
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)  # that of named templates
            shutil.copyfile(self.path / name, folder / name)
        # The other files mean nothing without it.
        return names if "tokenizer.json" in names else []


def _read(weights: Path, name: str, box: Box) -> np.ndarray:
    return checkpoint.ArrayStore.open(weights, name).read(box)
