"""GGUF header parser for untrusted files.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.

Every length is checked against the bytes that are left before anything is allocated for it. So a damaged or hostile
file costs at most the memory of a header of ``cursor.MAX_HEADER_BYTES``.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jllm_core.errors import reason

from jllm_convert.errors import ConversionError
from jllm_convert.files.regular_file import RegularFile
from jllm_convert.sources.gguf.cursor import GGUFCursor
from jllm_convert.sources.gguf.tensors import MIN_TENSOR, GGUFTensor, position_problems, read_tensors

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_PAIRS, _MAX_TENSORS = 1 << 16, 1 << 17
_MAX_KEY_BYTES = 65535  # by the specification
_MAX_NESTING = 4  # arrays in arrays; published models have none
_ALIGNMENTS = tuple(1 << bits for bits in range(3, 21))
# The metadata types by their numbers in the format; for numbers, the format letters of struct and numpy.
_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
# The fewest bytes of a value: a string has its length, an array its type and length.
_MIN_VALUE_BYTES = {kind: struct.calcsize(f"<{code}") for kind, code in _NUMBERS.items()} | {
    _BOOL: 1,
    _STRING: 8,
    _ARRAY: 12,
}
_MIN_PAIR = 8 + 1 + 4 + 1
_ALIGNMENT = "general.alignment"
_MAX_PROBLEMS = 20


@dataclass(frozen=True)
class GGUFHeader:
    """Header of a GGUF file.

    Attributes:
        metadata: key -> str, int, float, bool, or a list of them.
        tensors: in the order of the file.
        digest: SHA-256 of the header's bytes, in hex.
    """

    metadata: dict[str, Any]
    tensors: tuple[GGUFTensor, ...]
    digest: str


def find_gguf_file(path: Path) -> RegularFile:
    """Find the GGUF file at ``path``, following links, for ``read_gguf_header``.

    Raises:
        ConversionError: there is none, or it is no regular file.
    """
    try:
        return RegularFile.at(Path(os.path.realpath(path, strict=True)), str(path))
    except OSError as error:
        raise ConversionError(f"{path}: its header cannot be read ({reason(error)})") from error


def read_gguf_header(file: RegularFile) -> GGUFHeader:
    """Read and check the header of a GGUF file. All tensors lie within the file and do not overlap.

    Raises:
        ConversionError: not a GGUF file of a known version, cut short, or with numbers that contradict each other; or
            every tensor that is wrong.
    """
    path = Path(file.name)
    with file.reading("its header") as descriptor:
        cursor = GGUFCursor(path, file.size, descriptor)
        tensor_count, pair_count = _preamble(cursor)
        metadata, alignment = _metadata(cursor, pair_count)
        problems: list[str] = []
        tensors = read_tensors(cursor, tensor_count, alignment, problems)
        digest = cursor.digest()
    problems += position_problems(path, file.size, tensors, alignment)
    if problems:
        raise _limited(problems)
    return GGUFHeader(metadata, tuple(tensors), digest)


def gguf_header_end(path: Path) -> int:
    """The first byte of a GGUF file's tensors, which is where its header has ended.

    Raises:
        ConversionError: it has no header, or not all of it.
    """
    return min((tensor.offset for tensor in read_gguf_header(find_gguf_file(path)).tensors), default=0)


def _preamble(cursor: GGUFCursor) -> tuple[int, int]:
    """Read the preamble; return the numbers of tensors and of metadata pairs."""
    magic = cursor.number("4s", "the magic number")
    if magic != _MAGIC:
        cursor.fail(f"expected the bytes {_MAGIC!r}, got {magic!r}", 0)
    version = cursor.number("I", "the version")
    # A small number with its bytes swapped.
    if version and not version & 0xFFFF:
        raise ConversionError(
            f"{cursor.path} is a big-endian GGUF file, which is not supported; download the little-endian one"
        )
    if version not in _VERSIONS:
        cursor.fail(f"version {version}, supported: {', '.join(map(str, _VERSIONS))}", 4)
    tensors, pairs = cursor.number("Q", "the number of tensors"), cursor.number("Q", "the number of metadata pairs")
    for count, most, smallest, what in (
        (tensors, _MAX_TENSORS, MIN_TENSOR, "tensors"),
        (pairs, _MAX_PAIRS, _MIN_PAIR, "metadata pairs"),
    ):
        if count > most:
            cursor.fail(f"{count:,} {what}, at most {most:,} are supported")
        cursor.need(count, smallest, f"a list of {count:,} {what}")
    return tensors, pairs


def _metadata(cursor: GGUFCursor, count: int) -> tuple[dict[str, Any], int]:
    """Read the metadata; return it and the alignment of the tensors."""
    metadata: dict[str, Any] = {}
    alignment = 32
    for _ in range(count):
        at = cursor.at
        key = cursor.name("a metadata key", _MAX_KEY_BYTES, metadata)
        kind = cursor.number("I", f"the type of {key!r}")
        metadata[key] = _value(cursor, kind, f"the value of {key!r}")
        # Needed for the tensors' offsets, and a number that shifts them must not be absurd.
        if key == _ALIGNMENT:
            alignment = metadata[key]
            if kind != _UINT32 or alignment not in _ALIGNMENTS:
                bounds = f"a power of two from {_ALIGNMENTS[0]} to {_ALIGNMENTS[-1]:,} as a 32 bit number"
                cursor.fail(f"expected {_ALIGNMENT} to be {bounds}, got another value or type", at)
    return metadata, alignment


def _value(cursor: GGUFCursor, kind: int, what: str, nesting: int = 0) -> Any:
    if kind in _NUMBERS:
        return cursor.number(_NUMBERS[kind], what)
    if kind == _BOOL:
        return _flags(cursor, 1, what)[0]
    if kind == _STRING:
        return cursor.string(what)
    if kind != _ARRAY:
        cursor.fail(f"{what} is of the unknown type {kind}")
    # Each level is a call of this function.
    if nesting == _MAX_NESTING:
        cursor.fail(f"{what} is an array nested more than {_MAX_NESTING} deep")
    item, count = cursor.number("I", what), cursor.number("Q", what)
    if item not in _MIN_VALUE_BYTES:
        cursor.fail(f"{what} is an array of the unknown type {item}")
    cursor.need(count, _MIN_VALUE_BYTES[item], what)
    if item in _NUMBERS:
        return cursor.numbers(_NUMBERS[item], count, what)
    if item == _BOOL:
        return _flags(cursor, count, what)
    if item == _STRING:
        return cursor.strings(count, what)
    return [_value(cursor, item, what, nesting + 1) for _ in range(count)]


def _flags(cursor: GGUFCursor, count: int, what: str) -> list[bool]:
    values = cursor.numbers("B", count, what)
    if count and max(values) > 1:
        cursor.fail(f"{what} is a truth value other than 0 and 1: {max(values)}")
    return list(map(bool, values))


def _limited(problems: list[str]) -> ConversionError:
    """The error of the first problems: a damaged header can have a hundred thousand."""
    more = len(problems) - _MAX_PROBLEMS
    return ConversionError(problems[:_MAX_PROBLEMS] + [f"and {more:,} more like these"] * (more > 0))
