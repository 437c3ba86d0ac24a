"""Safetensors header parser for untrusted files: entry by entry, in bounded memory.

Format (https://huggingface.co/docs/safetensors): 8 bytes of length, little-endian; a JSON object of that length,
``{"NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {"format": "pt"}}``, which may be
padded with spaces; the data, in which the tensors lie without holes. ``data_offsets`` count from the data's start.
"""

import itertools
import json
import math
import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jllm_core.errors import reason

from jllm_convert.files.model_folder import unique_names
from jllm_convert.files.regular_file import RegularFile, read_into

MAX_HEADER = 16 << 20
"""The largest header that is read, in bytes: 72,000 tensors, a mixture of 235B parameters in one file, take 11 MB."""
_LENGTH_BYTES = 8
_MAX_NAME = 1_000
# The most characters of one tensor's entry: no more than this is parsed into objects at a time.
_MAX_ENTRY_BYTES = 4_096
# The limits of numpy.
_MAX_AXES = 64
_MAX_BYTES = 2**63 - 1
# The most wrong tensors of one file to report: the first hundred of a million say enough.
_MAX_PROBLEMS = 100
_FIELDS = ("dtype", "shape", "data_offsets")
_METADATA = "__metadata__"

_SPACE = re.compile(r"[ \t\n\r]*")
_DTYPE = re.compile(r"[A-Z][A-Z0-9_]{0,15}")
# Possessive quantifiers (++, *+): on a string that never ends, others would backtrack exponentially.
_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+"')


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a header. The caller, who knows the dtype, checks that ``nbytes`` fits shape and dtype.

    Attributes:
        name: the tensor's name, printable.
        dtype: the element type by safetensors' name, as written in the file.
        shape: the shape; small enough for numpy with elements of 8 bytes.
        start: the first byte of the data in the file.
        nbytes: the bytes of the data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_safetensors_header(file: RegularFile, problems: list[str]) -> list[Entry]:
    """Read the tensors of a file, in the header's order. Wrong ones are added to ``problems`` instead.

    Without problems, the tensors lie within the file and do not overlap.
    """
    try:
        text, data = _header_text(file)
        entries, wrong = _entries(text, data, file.name)
        problems += wrong
        if not wrong:
            problems += itertools.islice(_layout_problems(entries, data, file), _MAX_PROBLEMS)
        return entries
    except OSError as error:
        problems.append(f"{file.name}: cannot be read: {reason(error)}")
    except ValueError as error:
        problems.append(_damaged(file, str(error)))
    return []


def shown(value: Any) -> str:
    """Format a value from a file for a message, shortened whatever it is."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    short.maxlevel, short.maxlist = 2, 8
    return short.repr(value)


def _damaged(file: RegularFile, what: str) -> str:
    return (
        f"{file.name}: not a whole safetensors file ({what}; {file.size:,} bytes on disk); it may be cut short or of "
        "another format, download it again"
    )


def _header_text(file: RegularFile) -> tuple[str, int]:
    """Read the header; return it and the first byte of the data.

    Raises:
        ValueError: the file cannot hold such a header, or it is not UTF-8.
    """
    if file.size < _LENGTH_BYTES:
        raise ValueError(f"it is too small for the header's length, which takes {_LENGTH_BYTES} bytes")
    prefix = bytearray(_LENGTH_BYTES)
    with file.open() as descriptor:
        read_into(descriptor, memoryview(prefix), 0)
        # Checked before the buffer is allocated.
        length = int.from_bytes(prefix, "little")
        most = min(MAX_HEADER, file.size - _LENGTH_BYTES)
        if length > most:
            raise ValueError(f"its header is said to have {length:,} bytes, at most {most:,} are possible")
        header = bytearray(length)
        read_into(descriptor, memoryview(header), _LENGTH_BYTES)
    return header.decode("utf-8"), _LENGTH_BYTES + length


class _Cursor:
    """Position in a JSON text that moves forward as tokens are taken."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def skip(self) -> None:
        self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]  # matches nothing at least

    def takes(self, mark: str) -> bool:
        """Skip a punctuation mark, and the space before it, if it is next."""
        self.skip()
        if not self.text.startswith(mark, self.at):
            return False
        self.at += len(mark)
        return True

    def take(self, mark: str) -> None:
        """Skip a punctuation mark that must be next."""
        if not self.takes(mark):
            raise ValueError(f"its header has no {mark!r} at character {self.at:,}")

    def string(self) -> str:
        """Skip a string. Returns it as written, with quotes and escapes."""
        self.skip()
        match = _STRING.match(self.text, self.at)
        if match is None:
            raise ValueError(f"its header has no string at character {self.at:,}")
        self.at = match.end()
        return match.group()

    def value(self) -> Any:
        """Skip a value of at most _MAX_ENTRY_BYTES characters. Returns it parsed."""
        self.skip()
        # A slice: the decoder sees no more than one entry can have, so a hostile one cannot nest without end.
        decoder = json.JSONDecoder(object_pairs_hook=unique_names)
        try:
            value, length = decoder.raw_decode(self.text[self.at : self.at + _MAX_ENTRY_BYTES])
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"its header has no value of at most {_MAX_ENTRY_BYTES:,} characters at character {self.at:,}: {error}"
            ) from error
        self.at += length
        return value

    def members(self) -> Iterator[str]:
        """Iterate over the names of an object's members, as written. The caller skips each value before the next."""
        self.take("{")
        if self.takes("}"):
            return
        while True:
            name = self.string()
            self.take(":")
            yield name
            if self.takes("}"):
                return
            self.take(",")


def _entries(text: str, data: int, where: str) -> tuple[list[Entry], list[str]]:
    """Parse the tensors of a header; return them and the problems of single ones.

    Raises:
        ValueError: the header as a whole is malformed.
    """
    if not text.startswith("{"):
        raise ValueError("its header does not start with '{'")
    cursor = _Cursor(text)
    seen: set[str] = set()
    entries: list[Entry] = []
    problems: list[str] = []
    for written in cursor.members():
        name = _name(written)
        # The header is not parsed as one object, so ``unique_names`` does not see these names.
        if name in seen:
            raise ValueError(f"its header names {shown(name)} twice")
        seen.add(name)
        if name == _METADATA:
            _skip_metadata(cursor)
            continue
        found = _entry(name, cursor.value(), data)
        if isinstance(found, Entry):
            entries.append(found)
            continue
        problems.append(f"{where}: tensor {shown(name)}: {found}")
        if len(problems) == _MAX_PROBLEMS:
            problems.append(f"{where}: and more: what follows these {_MAX_PROBLEMS} is not looked at")
            return entries, problems
    cursor.skip()
    if cursor.at != len(text):
        raise ValueError(f"its header goes on after its end, at character {cursor.at:,}")
    return entries, problems


def _name(written: str) -> str:
    # An escaped character (\uXXXX) takes 6. Longer names are refused without parsing them.
    name = json.loads(written) if len(written) <= 6 * _MAX_NAME + 2 else written
    if len(name) > _MAX_NAME:
        raise ValueError(f"its header has a tensor name of more than {_MAX_NAME:,} characters: {shown(name)}")
    if not name.isprintable():
        raise ValueError(f"its header has a tensor name with characters that cannot be printed: {shown(name)}")
    return str(name)


def _skip_metadata(cursor: _Cursor) -> None:
    """Skip ``__metadata__``, an object of strings that says nothing about the weights."""
    for _ in cursor.members():
        cursor.string()


def _entry(name: str, fields: Any, data: int) -> Entry | str:
    """Check one tensor's entry; return it, or its problem."""
    if not isinstance(fields, dict) or set(fields) != set(_FIELDS):
        got = sorted(fields) if isinstance(fields, dict) else fields
        return f"expected an object of {', '.join(_FIELDS)}, got {shown(got)}"
    dtype, shape, offsets = (fields[field] for field in _FIELDS)
    if not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype):
        return f"dtype must be a name such as 'F32', got {shown(dtype)}"
    if not _are_sizes(shape) or len(shape) > _MAX_AXES:
        return f"shape must be a list of at most {_MAX_AXES} whole numbers of at least 0, got {shown(shape)}"
    if math.prod(max(size, 1) for size in shape) > _MAX_BYTES // 8:
        return f"shape {shown(shape)} is of more elements than any array can have"
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"data_offsets must be two whole numbers, start and end, got {shown(offsets)}"
    return Entry(name, dtype, tuple(shape), data + offsets[0], offsets[1] - offsets[0])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= _MAX_BYTES for size in value)


def _layout_problems(entries: list[Entry], data: int, file: RegularFile) -> Iterator[str]:
    """Problems of the data's order: the tensors must follow each other without holes to the end of the file."""
    # Holes and overlaps could hide data from other readers, and safetensors itself refuses them.
    end, last = data, "the header"
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.nbytes)):
        if entry.start != end:
            kind = "overlaps" if entry.start < end else "leaves a hole after"
            yield (
                f"{file.name}: tensor {shown(entry.name)} {kind} {last}: its data start at byte {entry.start:,} of the "
                f"file, expected {end:,}"
            )
        if entry.start + entry.nbytes > end:
            end, last = entry.start + entry.nbytes, f"tensor {shown(entry.name)}"
    if end > file.size:
        yield _damaged(file, f"the data of {last} end at byte {end:,}")
    elif end < file.size:
        yield (
            f"{file.name}: the data of {last} end at byte {end:,}, the file has {file.size:,}; a safetensors file has "
            "nothing after its data, download it again"
        )
