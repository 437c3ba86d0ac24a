"""Cursor over the header of a GGUF file, with every length checked against the bytes that are left."""

import hashlib
import struct
from collections.abc import Container
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from jllm_convert.errors import ConversionError
from jllm_convert.files.regular_file import read_into

# The vocabulary of Llama or Qwen takes about 10 MiB. As Python objects a header can take 8 times its bytes.
MAX_HEADER_BYTES = 64 << 20
_READ_AHEAD = 1 << 20


class GGUFCursor:
    """A position in the header that moves forward. The bytes read are kept until the header is whole.

    Args:
        path: the file, for error messages.
        size: its size in bytes.
        descriptor: the file, open for reading.
    """

    def __init__(self, path: Path, size: int, descriptor: int) -> None:
        self.path, self._size, self._descriptor = path, size, descriptor
        self._limit = min(size, MAX_HEADER_BYTES)
        self._buffer = bytearray()
        self._at = 0

    @property
    def at(self) -> int:
        """The position: bytes from the start of the file."""
        return self._at

    @property
    def left(self) -> int:
        """The bytes that the header may still have."""
        return self._limit - self._at

    def fail(self, what: str, at: int | None = None) -> NoReturn:
        """Raise a ConversionError for a problem at a byte, by default at the position."""
        place = self._at if at is None else at
        raise ConversionError(
            f"{self.path} cannot be read as a GGUF file (at byte {place:,}: {what}); it may be cut short or of another "
            "format, download it again"
        )

    def need(self, count: int, smallest: int, what: str) -> None:
        """Raise a ConversionError unless ``count`` items of at least ``smallest`` bytes fit into what is left."""
        if count * smallest > self.left:
            # The smaller of two limits applies: say which.
            rest = "the file has" if self._limit == self._size else f"a header of at most {MAX_HEADER_BYTES:,} has"
            self.fail(f"{what} takes {count * smallest:,} bytes or more, {rest} {self.left:,} left")

    def number(self, code: str, what: str) -> Any:
        """Read one number, by its format letter of the struct module."""
        size = struct.calcsize(f"<{code}")
        self._load(size, what)
        (value,) = struct.unpack_from(f"<{code}", self._buffer, self._at)
        self._at += size
        return value

    def numbers(self, code: str, count: int, what: str) -> list[Any]:
        """Read ``count`` numbers, by their format letter of the struct module."""
        dtype = np.dtype(f"<{code}")
        self._load(count * dtype.itemsize, what)
        values: list[Any] = np.frombuffer(self._buffer, dtype, count, self._at).tolist()
        self._at += count * dtype.itemsize
        return values

    def string(self, what: str) -> str:
        """Read a string: its length in 8 bytes, then UTF-8."""
        return self.strings(1, what)[0]

    def name(self, what: str, max_bytes: int, taken: Container[str]) -> str:
        """Read a name: a string that is not empty, not too long, printable, and not in ``taken``."""
        at = self._at
        name = self.string(what)
        size = self._at - at - 8  # in bytes, without the length
        if not 0 < size <= max_bytes:
            self.fail(f"{what} has {size:,} bytes, expected 1 to {max_bytes:,}", at)
        if not name.isprintable():
            self.fail(f"{what} has control characters", at)
        if name in taken:
            self.fail(f"{what} was there before: {name!r}", at)
        return name

    def strings(self, count: int, what: str) -> list[str]:
        """Read ``count`` strings. A vocabulary has 150,000, so this loop is written for speed."""
        buffer, at, loaded = self._buffer, self._at, len(self._buffer)
        length_at = struct.Struct("<Q").unpack_from
        values: list[str] = []
        try:
            for _ in range(count):
                if at + 8 > loaded:
                    loaded = self._load_from(at, 8, what)
                end = at + 8 + length_at(buffer, at)[0]
                if end > loaded:
                    loaded = self._load_from(at, end - at, what)
                values.append(buffer[at + 8 : end].decode())
                at = end
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8", at)
        self._at = at
        return values

    def digest(self) -> str:
        """SHA-256 of the bytes before the position, in hex."""
        return hashlib.sha256(memoryview(self._buffer)[: self._at]).hexdigest()

    def _load_from(self, at: int, count: int, what: str) -> int:
        self._at = at
        self._load(count, what)
        return len(self._buffer)

    def _load(self, count: int, what: str) -> None:
        """Load the file until the next ``count`` bytes are in the buffer."""
        self.need(count, 1, what)
        missing = self._at + count - len(self._buffer)
        if missing > 0:
            # Read ahead, in few calls; but never past the limit, whatever the file promises.
            wanted = min(max(missing, _READ_AHEAD), self._limit - len(self._buffer))
            more = bytearray(wanted)
            read_into(self._descriptor, memoryview(more), len(self._buffer))
            self._buffer += more
