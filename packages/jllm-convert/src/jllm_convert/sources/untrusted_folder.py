"""A folder of files from a stranger: links that lead out of it, pipes, and JSON without bounds are refused."""

import json
import os
from pathlib import Path
from typing import Any

from jllm_convert.errors import ConversionError
from jllm_convert.sources.regular_file import RegularFile, read_into, reason
from jllm_convert.sources.unique_names import unique_names

# The largest config or index that is read; that of a model of 235B parameters in FP8 has 7 MB.
_MAX_JSON = 16 << 20
# The lists and objects it may hold: an empty one takes 2 bytes in the file and 60 in memory.
_MAX_CONTAINERS = 100_000
# The largest file that is copied; a tokenizer.json of 250,000 tokens has 33 MB.
_MAX_COPIED = 256 << 20
_SLAB = 1 << 20


class ModelFolder:
    """A folder, and the files directly in it.

    A file may be a link if it leads to a file in the same folder. In the cache of ``huggingface_hub``, where the folder
    is ``models--NAME/snapshots/REVISION``, it may also lead to a file in the model's own ``models--NAME/blobs``.
    """

    def __init__(self, path: Path) -> None:
        """Take the folder at ``path``.

        Raises:
            ConversionError: there is no folder, or it cannot be looked into.
        """
        self.path = path
        try:
            self._real = Path(os.path.realpath(path, strict=True))
            self.names: frozenset[str] = frozenset(os.listdir(path))
        except OSError as error:
            raise ConversionError(f"{path} cannot be opened as a folder: {reason(error)}") from error

    def file(self, name: str) -> RegularFile | None:
        """The file of that name, a plain one; None where there is nothing.

        Raises:
            ConversionError: there is something that is not a regular file, or a link that leads elsewhere.
        """
        path = self.path / name
        if not os.path.lexists(path):
            return None
        try:
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
        self, name: str, most_bytes: int = _MAX_JSON, most_containers: int = _MAX_CONTAINERS
    ) -> dict[str, Any] | None:
        """The JSON object in a file; None where there is no file.

        Args:
            name: the file.
            most_bytes: the largest file that is read.
            most_containers: the lists and objects it may hold.

        Raises:
            ConversionError: the file cannot be read, is too large, or holds anything but one object without two values
                for one name.
        """
        file = self.file(name)
        if file is None:
            return None
        try:
            text = file.read(most_bytes).decode("utf-8")
            if text.count("[") + text.count("{") > most_containers:
                raise ValueError(f"it holds more than {most_containers:,} lists and objects")
            fields = json.loads(text, object_pairs_hook=unique_names)
        except OSError as error:
            raise ConversionError(f"{self.path / name} cannot be read: {reason(error)}") from error
        except (ValueError, RecursionError) as error:
            raise ConversionError(f"{self.path / name} cannot be read as JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ConversionError(f"{self.path / name} must hold a JSON object, got {type(fields).__name__}")
        return fields

    def copy(self, name: str, target: Path) -> None:
        """Write the bytes of a file that is there to ``target``.

        Raises:
            ConversionError: it cannot be read, or is larger than any tokenizer.
            OSError: ``target`` cannot be written.
        """
        file = self.file(name)
        if file is None:
            raise ConversionError(f"{name}: the file is missing from {self.path}; download it again")
        if file.size > _MAX_COPIED:
            raise ConversionError(f"{name}: {file.size:,} bytes; at most {_MAX_COPIED:,} are copied")
        with target.open("wb") as copied:
            for start in range(0, file.size, _SLAB):
                copied.write(_part(file, start, min(_SLAB, file.size - start)))

    def _holds(self, real: Path) -> bool:
        if real.is_relative_to(self._real):
            return True
        snapshots, model = self._real.parent, self._real.parent.parent
        is_cache = snapshots.name == "snapshots" and model.name.startswith("models--")
        return is_cache and real.parent == model / "blobs"


def _part(file: RegularFile, start: int, size: int) -> bytearray:
    part = bytearray(size)
    try:
        with file.open() as descriptor:
            read_into(descriptor, memoryview(part), start)
    except OSError as error:
        raise ConversionError(f"{file.name}: cannot be read: {reason(error)}") from error
    return part
