"""The header of a GGUF file: metadata and the list of tensors, without their data.

Read by itself because it still tells what a file holds whose data are cut short or whose architecture is unknown, and
because a vocabulary of 150,000 words takes the ``gguf`` package's reader seconds.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jllm_convert.errors import ConversionError

_STRING, _ARRAY = 8, 9
# struct's letters for the other types of value, by their numbers in the format.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor as the header has it.

    Attributes:
        name: its name, such as ``blk.0.attn_q.weight``.
        shape: slowest axis first, the reverse of the file's order.
        stored: the name of its type (``F32``, ``Q4_1``).
        nbytes: the bytes of its data.
    """

    name: str
    shape: tuple[int, ...]
    stored: str
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """What stands before the data of a GGUF file.

    Attributes:
        metadata: the values by their full names, arrays as lists.
        tensors: the tensors in the file's order.
    """

    metadata: dict[str, Any]
    tensors: tuple[GGUFTensor, ...]


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read the header of a GGUF file of version 2 or 3, of either byte order.

    Raises:
        ConversionError: it is no GGUF file, or the header itself is damaged or cut short.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(data).header()
    except (OSError, ValueError, struct.error) as error:
        raise ConversionError(
            f"{path} cannot be read as a GGUF file ({error}); it may be cut short or of another format, download it "
            "again"
        ) from error


class _Cursor:
    """A place in the file that moves on with each value that is read."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0
        self._order = "<"

    def header(self) -> GGUFHeader:
        if self._data[:4] != b"GGUF":
            raise ValueError(f"it starts with {self._data[:4]!r}, not with b'GGUF'")
        self._at = 4
        version = self._number("I")
        if version & 0xFFFF == 0:  # a small number the wrong way round
            self._order, self._at = ">", 4
            version = self._number("I")
        if version not in (2, 3):
            raise ValueError(f"its format version is {version}, 2 and 3 are known")
        tensors, values = self._number("Q"), self._number("Q")
        metadata = {}
        for _ in range(values):
            name = self._string()
            metadata[name] = self._value(self._number("I"))
        return GGUFHeader(metadata, tuple(self._tensor() for _ in range(tensors)))

    def _tensor(self) -> GGUFTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self._string()
        lengths = self._numbers("Q", self._number("I"))
        number, _ = self._number("I"), self._number("Q")
        known = {kind.value: kind for kind in GGMLQuantizationType}
        if number not in known:
            raise ValueError(f"tensor {name!r} is of type {number}, which this version of the gguf package lacks")
        block, block_bytes = GGML_QUANT_SIZES[known[number]]
        nbytes = math.prod(lengths) // block * block_bytes
        return GGUFTensor(name, tuple(reversed(lengths)), known[number].name, nbytes)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"a value is of type {kind}, which is not known")
        inner, count = self._number("I"), self._number("Q")
        if inner == _STRING:
            return [self._string() for _ in range(count)]
        if inner not in _SCALARS:
            raise ValueError(f"an array holds values of type {inner}, which is not known")
        return list(self._numbers(_SCALARS[inner], count))

    def _string(self) -> str:
        length = self._number("Q")
        return self._bytes(length).decode("utf-8", errors="replace")

    def _number(self, letter: str) -> Any:
        return self._numbers(letter, 1)[0]

    def _numbers(self, letter: str, count: int) -> tuple[Any, ...]:
        data = self._bytes(count * struct.calcsize(self._order + letter))
        return struct.unpack(f"{self._order}{count}{letter}", data)

    def _bytes(self, count: int) -> bytes:
        start, size = self._at, len(self._data)
        if count > size - start:  # asked first: a slice would copy all that there is
            raise ValueError(f"byte {start:,} announces {count:,} more bytes of header, the file has {size:,}")
        self._at += count
        return self._data[start : self._at]
