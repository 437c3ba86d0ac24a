"""Untrusted model folders: files by name, and JSON within bounds.

Links that lead out of the folder, pipes and devices are refused.
"""

import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from jllm_core.errors import reason

from jllm_convert.errors import ConversionError
from jllm_convert.files.regular_file import RegularFile, read_into

# The names that transformers gives to the files of a model.
CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
TEMPLATE_FOLDER = "additional_chat_templates"
"""Folder of named chat templates, ``NAME.jinja`` each, beside the file of the default one."""
UNREAD_TEMPLATE_FILE = "chat_template.json"
"""File with the chat template of a processor, for images and sound; tokenizers do not read it."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Endings of weight files that can run code when they are loaded."""

# The largest config or index that is read; that of a model of 235B parameters in FP8 has 7 MB.
_MAX_JSON_BYTES = 16 << 20
# The lists and objects it may hold: an empty one takes 2 bytes in the file and 60 in memory.
_MAX_CONTAINERS = 100_000
# The largest file that is copied; a tokenizer.json of 250,000 tokens has 33 MB.
_MAX_COPIED_BYTES = 256 << 20
_COPIED_AT_ONCE = 1 << 20


class ModelFolder:
    """A folder, and the files directly in it.

    A file may be a link if it leads to a file in the same folder. In the cache of ``huggingface_hub``, where the folder
    is ``models--NAME/snapshots/REVISION``, it may also lead to a file in the model's own ``models--NAME/blobs``.

    Attributes:
        path: the folder.
        names: the names of everything in it, when it was opened.
    """

    def __init__(self, path: Path) -> None:
        """Open the folder at ``path``.

        Raises:
            ConversionError: there is no folder, or it cannot be listed.
        """
        self.path = path
        try:
            self._real = Path(os.path.realpath(path, strict=True))
            self.names: frozenset[str] = frozenset(os.listdir(path))
        except OSError as error:
            raise ConversionError(f"{path} cannot be opened as a folder: {reason(error)}") from error

    def file(self, name: str) -> RegularFile | None:
        """Find a regular file by its name; None where there is nothing.

        Raises:
            ConversionError: there is something that is not a regular file, or a link that leads elsewhere.
        """
        path = self.path / name
        if not os.path.lexists(path):
            return None
        try:
            # From here on only the real path is used, so a link that changes later leads nowhere else.
            real = Path(os.path.realpath(path, strict=True))
            if not self._holds(real):
                raise ConversionError(
                    f"{name}: a link that leads out of the folder, to {real}; a model's files must be in its folder. "
                    "If you trust it, put the file itself in the link's place"
                )
            return RegularFile.at(real, name)
        except FileNotFoundError as error:
            raise ConversionError(f"{name}: a link to a file that is not there; download it again") from error
        except OSError as error:
            raise ConversionError(f"{name}: cannot be used: {reason(error)}") from error

    def read_json(
        self, name: str, max_bytes: int = _MAX_JSON_BYTES, max_containers: int = _MAX_CONTAINERS
    ) -> dict[str, Any] | None:
        """Read the JSON object in a file; None where there is no file.

        Args:
            name: the file.
            max_bytes: the largest file that is read.
            max_containers: the lists and objects it may hold.

        Raises:
            ConversionError: the file cannot be read, is too large, or holds anything but one object without two values
                for one name.
        """
        file = self.file(name)
        if file is None:
            return None
        try:
            text = file.read(max_bytes).decode("utf-8")
            # Counted in the text, before json makes objects of them. Brackets in strings count too, which is harmless.
            if text.count("[") + text.count("{") > max_containers:
                raise ValueError(f"it holds more than {max_containers:,} lists and objects")
            fields = json.loads(text, object_pairs_hook=unique_names)
        except OSError as error:
            raise ConversionError(f"{self.path / name} cannot be read: {reason(error)}") from error
        except (ValueError, RecursionError) as error:
            raise ConversionError(f"{self.path / name} cannot be read as JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ConversionError(f"{self.path / name} must hold a JSON object, got {type(fields).__name__}")
        return fields

    def copy(self, name: str, target: Path) -> None:
        """Copy a file's bytes to ``target``.

        Raises:
            ConversionError: it is missing, cannot be read, or is larger than any tokenizer.
            OSError: ``target`` cannot be written.
        """
        file = self.file(name)
        if file is None:
            raise ConversionError(f"{name}: the file is missing from {self.path}; download it again")
        # Copied, not linked: the checkpoint must not depend on the source.
        if file.size > _MAX_COPIED_BYTES:
            raise ConversionError(f"{name}: {file.size:,} bytes; at most {_MAX_COPIED_BYTES:,} are copied")
        target.parent.mkdir(exist_ok=True)  # that of named templates
        with target.open("wb") as copied:
            for start in range(0, file.size, _COPIED_AT_ONCE):
                copied.write(_part(file, start, min(_COPIED_AT_ONCE, file.size - start)))

    def _holds(self, real: Path) -> bool:
        """Whether a real path is in this folder, or among the blobs of the same model in the hub's cache."""
        if real.is_relative_to(self._real):
            return True
        snapshots, model = self._real.parent, self._real.parent.parent
        is_cache = snapshots.name == "snapshots" and model.name.startswith("models--")
        return is_cache and real.parent == model / "blobs"


def tokenizer_file_names(folder: Path) -> tuple[str, ...]:
    """The names of the tokenizer files that a model's folder may have, with slashes; some may be missing."""
    return (
        *TOKENIZER_FILES,
        *sorted(f"{TEMPLATE_FOLDER}/{path.name}" for path in (folder / TEMPLATE_FOLDER).glob("*.jinja")),
    )


def is_named_template(name: str) -> bool:
    """Whether a path in a repository is that of a named chat template."""
    folder, _, file = name.partition("/")
    return folder == TEMPLATE_FOLDER and "/" not in file and file.endswith(".jinja")


def files_without_index(names: Collection[str]) -> list[str]:
    """The weight files of a folder that has no index: one file, or shards, whose names say how many there are.

    Returns:
        All shards, whether they are there or not; none where there is neither, or where the shards are of several sets.
    """
    if SINGLE_FILE in names:
        return [SINGLE_FILE]
    counts = {match[2] for name in names if (match := _SHARD.fullmatch(name))}
    if len(counts) != 1:
        return []
    [count] = counts
    return [f"model-{number:05}-of-{count}.safetensors" for number in range(1, int(count) + 1)]


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object whose names differ: an ``object_pairs_hook`` for ``json``.

    Raises:
        ValueError: a name occurs twice. Python's json would take the last value, other readers the first.
    """
    # The common case costs one comparison; only a bad object is searched for the name.
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the name {name[:100]!r} stands twice in one object")
            seen.add(name)
    return fields


def _part(file: RegularFile, start: int, size: int) -> bytearray:
    part = bytearray(size)
    try:
        with file.open() as descriptor:
            read_into(descriptor, memoryview(part), start)
    except OSError as error:
        raise ConversionError(f"{file.name}: cannot be read: {reason(error)}") from error
    return part
