"""Checkpoint manifest, and the other small files of a checkpoint: architecture, ids that end a text."""

import dataclasses
import json
import os
import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from jllm_core.config import ModelConfig
from jllm_core.errors import JLLMError, reason
from jllm_core.quantization.arrays import Quantization, QuantizationError

FORMAT = "jllm-checkpoint"
FORMAT_VERSION = 1

MANIFEST_FILE = "manifest.json"
MODEL_FILE = "model.json"
GENERATION_FILE = "generation_config.json"
WEIGHTS_FOLDER = "weights"

# A manifest of 10,000 arrays has 3 MB. The limits keep a damaged or hostile file from taking all memory.
_MAX_FILE_BYTES = 16 << 20
_MAX_AXES = 8

Dtype = Literal["float32", "bfloat16", "float16"]
"""An element type that weights are stored in."""

DTYPES: tuple[Dtype, ...] = get_args(Dtype)


class CheckpointError(JLLMError):
    """A folder that is no checkpoint, is of another format version, or whose contents do not fit its manifest."""


@dataclass(frozen=True)
class Manifest:
    """The contents of ``manifest.json``.

    Attributes:
        dtype: element type of the weights that are not quantised, such as ``"float32"``.
        arrays: by dotted name (``layers.0.attn.q``), each array's ``shape``, ``dtype`` and ``sha256`` of its
            little-endian bytes in C order.
        source: where the weights came from, as the converter knows it.
        quantization: how the weight matrices are stored; None if they are not quantised.
        receipt: how far quantising moved the model's predictions, as the converter measured it; None if not measured.
        created_by: the package and version that wrote it.
    """

    dtype: str
    arrays: dict[str, dict[str, Any]]
    source: dict[str, Any] = field(default_factory=dict)
    quantization: Quantization | None = None
    receipt: dict[str, Any] | None = None
    created_by: str = ""
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    def __repr__(self) -> str:
        # Not the generated one: it would list every array.
        grid = "" if self.quantization is None else f"{self.quantization.name} and "
        return f"<Manifest {len(self.arrays)} arrays, {grid}{self.dtype}, source {reprlib.repr(self.source)}>"

    def write(self, folder: Path) -> None:
        """Write it into the checkpoint's folder."""
        (folder / MANIFEST_FILE).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder looks like a checkpoint; it may still be damaged."""
    return (folder / MANIFEST_FILE).is_file() and (folder / MODEL_FILE).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
        CheckpointError: there is none, it cannot be read, or its format or version is not this package's.
    """
    path = folder / MANIFEST_FILE
    try:
        fields = json.loads(_read_text(path))
    except (FileNotFoundError, NotADirectoryError):
        if not folder.exists():
            raise CheckpointError(f"there is nothing at {folder}; expected a JLLM checkpoint") from None
        why = f"it has no {MANIFEST_FILE}" if folder.is_dir() else "it is a file"
        raise CheckpointError(
            f"{folder} is not a JLLM checkpoint: {why}. "
            "Convert a Hugging Face folder or a GGUF file first: jllm-convert convert SRC DST"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the manifest of a JLLM checkpoint (expected format {FORMAT!r})")
    if fields.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {fields.get('format_version')}, this jllm-core reads {FORMAT_VERSION}; "
            "convert the model again, or install the version of jllm-core that matches"
        )
    try:
        if fields.get("quantization") is not None:
            fields["quantization"] = Quantization(**fields["quantization"])
        manifest = Manifest(**fields)
    except (TypeError, QuantizationError) as error:
        raise CheckpointError(f"{path} does not have the fields of a manifest: {error}") from error
    if manifest.dtype not in DTYPES:
        raise CheckpointError(f"{path}: dtype is {manifest.dtype!r}, expected one of {', '.join(DTYPES)}")
    if not isinstance(manifest.source, dict):
        raise CheckpointError(f"{path}: source must be an object, got {reprlib.repr(manifest.source)}")
    if not isinstance(manifest.receipt, dict | None):
        raise CheckpointError(f"{path}: receipt must be an object or null, got {reprlib.repr(manifest.receipt)}")
    # Checked here, so that nobody else has to ask whether an entry is what it should be.
    arrays = manifest.arrays if isinstance(manifest.arrays, dict) else {"arrays": None}
    for name, entry in arrays.items():
        if not isinstance(entry, dict) or not _is_shape(entry.get("shape")) or not isinstance(entry.get("dtype"), str):
            raise CheckpointError(f"{path}: {name} must have a shape and a dtype, got {reprlib.repr(entry)}")
    return manifest


def _is_shape(value: object) -> bool:
    if not isinstance(value, list) or len(value) > _MAX_AXES:
        return False
    # type(), not isinstance: true and false are ints to isinstance. Sizes beyond int64 overflow in numpy.
    return all(type(size) is int and 0 <= size < 2**63 for size in value)


def _read_text(path: Path) -> str:
    """Read a small text file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, or not UTF-8.
    """
    with path.open("rb") as file:
        # Of the open file, so that it is the size of what is read.
        size = os.fstat(file.fileno()).st_size
        if size > _MAX_FILE_BYTES:
            raise ValueError(f"it has {size:,} bytes; at most {_MAX_FILE_BYTES:,} are read of such a file")
        content = file.read(size)
    return content.decode("utf-8")


def read_config(folder: Path) -> ModelConfig:
    """Read a checkpoint's architecture.

    Raises:
        CheckpointError: there is none, or it cannot be read as text.
        ConfigError: it is not a valid ModelConfig.
    """
    try:
        text = _read_text(folder / MODEL_FILE)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / MODEL_FILE} cannot be read: {reason(error)}") from error
    return ModelConfig.from_json(text)


def read_generation_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's ``generation_config.json``: the publisher's sampling settings; empty where there is none.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / GENERATION_FILE
    if not path.is_file():
        return {}
    try:
        settings = json.loads(_read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} cannot be read: expected a JSON object, got {type(settings).__name__}")
    return settings


def read_eos_ids(folder: Path) -> tuple[int, ...]:
    """The ids that end a text, from the checkpoint's ``generation_config.json``; none if it names none or is missing.

    Raises:
        CheckpointError: the file is damaged.
    """
    ids = read_generation_config(folder).get("eos_token_id")
    try:
        return tuple(int(token) for token in ([ids] if isinstance(ids, int) else ids or ()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / GENERATION_FILE} cannot be read: eos_token_id: {error}") from error
