"""Base of the tool call parsers: text that is held back until it is clear what it is."""

from collections.abc import Iterator
from typing import Protocol

from jllm_runtime.server.parsing.call_object import CALL_KEYS, ParsedCall, read_call, read_cut_call
from jllm_runtime.server.parsing.json_scanner import JSONObjectScanner
from jllm_runtime.server.parsing.xml_call import Schemas
from jllm_runtime.special_markers import WHITESPACE


class CallScanner(Protocol):
    """Search for the end of a call in a growing text.

    Attributes:
        start: where the call begins.
        end: position behind it; None until it is found.
        broken: there is no such call.
    """

    start: int
    end: int | None
    broken: bool

    def scan(self, text: str) -> None:
        """Go on with the text, which begins with what earlier calls have seen."""


class BufferedParser:
    """Base of the parsers: the text that is held back until it is clear what it is.

    Args:
        schemas: of the arguments of the tools that may be called. Only formats need them whose values are bare texts.
    """

    def __init__(self, schemas: Schemas) -> None:
        self._schemas = schemas
        self._held = ""
        self._object: CallScanner | None = None
        self._after_call = False
        self._cut = False

    def feed(self, text: str) -> list[str | ParsedCall]:
        self._held += text
        return list(self._take(final=False))

    def finish(self, cut: bool = False) -> list[str | ParsedCall]:
        self._cut = cut
        return list(self._take(final=True))

    def _take(self, final: bool) -> Iterator[str | ParsedCall]:
        raise NotImplementedError

    def _scanner(self, at: int) -> CallScanner:
        """A scanner for the call that begins at this place of the held text."""
        return JSONObjectScanner(at, CALL_KEYS)

    def _read(self, scanned: CallScanner) -> ParsedCall | None:
        """The call that was scanned, None where it is none."""
        return read_call(self._held[scanned.start : scanned.end])

    def _read_cut(self, scanned: CallScanner) -> ParsedCall | None:
        """The same of one that has not ended."""
        return read_cut_call(self._held[scanned.start :])

    def _cut_call(self) -> ParsedCall | None:
        """The call that a limit has cut off, where there is one. It is taken out of the held text."""
        scanned, call = self._object, None
        if self._cut and scanned is not None and scanned.end is None and not scanned.broken:
            call = self._read_cut(scanned)
        self._held = self._held if call is None else ""
        return call

    def _let_go(self, count: int, final: bool) -> Iterator[str]:
        """Release so many characters as text. White space between the last call and the end of the text is dropped."""
        text, self._held = self._held[:count], self._held[count:]
        if text and not (final and self._after_call and not text.strip(WHITESPACE)):
            self._after_call = False
            yield text
