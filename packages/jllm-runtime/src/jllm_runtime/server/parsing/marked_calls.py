"""Parsers of tool calls between ``<tool_call>`` and ``</tool_call>``: in JSON, and in XML."""

import re
from collections.abc import Iterator

from jllm_runtime.server.parsing.buffered_parser import BufferedParser, CallScanner
from jllm_runtime.server.parsing.call_object import ParsedCall
from jllm_runtime.server.parsing.xml_call import FUNCTION_START, Schemas, XMLCallScanner, read_xml_call
from jllm_runtime.special_markers import TOOL_CALL_END, TOOL_CALL_START, WHITESPACE


class HermesToolCallParser(BufferedParser):
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, anywhere in the text; also what Qwen writes.

    A marker without a call behind it is text. The closing marker may be missing at the end. White space before a call,
    and behind the last one, is dropped with the markers.
    """

    def __init__(self, schemas: Schemas) -> None:
        super().__init__(schemas)
        self._markers = self._opening_markers()
        self._opening = re.compile("|".join(map(re.escape, self._markers)))
        self._marker = ""

    def _opening_markers(self) -> list[str]:
        return [TOOL_CALL_START]

    def _take(self, final: bool) -> Iterator[str | ParsedCall]:
        while self._held:
            if self._object is None:
                yield from self._text(final)
            if self._object is None:
                return
            self._object.scan(self._held)
            found = self._call(final)
            if found is None:
                return
            yield found
            self._after_call = isinstance(found, ParsedCall)
            self._object = None

    def _text(self, final: bool) -> Iterator[str]:
        """The text up to the next opening marker; behind the marker a scanner then looks for an object."""
        found = self._opening.search(self._held)
        count = found.start() if found else len(self._held)
        # What may be the beginning of a marker waits. Only there do markers have this character.
        if not found and not final and (begun := self._held.rfind("<")) >= 0:
            rest = self._held[begun:]
            count = begun if any(marker.startswith(rest) for marker in self._markers) else count
        # So does white space, which is dropped before a marker.
        count = count if final and not found else len(self._held[:count].rstrip(WHITESPACE))
        yield from self._let_go(count, final)
        if found:
            self._marker = found[0]
            self._object = self._scanner(self._marker_end())

    def _marker_end(self) -> int:
        return self._held.index(self._marker) + len(self._marker)

    def _call(self, final: bool) -> ParsedCall | str | None:
        """The call, or the text up to the end of its opening marker where there is no call; None while it is open.

        What is returned is taken out of the held text.
        """
        scanned, call = self._object, None
        if scanned is not None and scanned.end is not None:
            rest = self._held[scanned.end :].lstrip(WHITESPACE)
            closed, unfinished = rest.startswith(TOOL_CALL_END), TOOL_CALL_END.startswith(rest)
            # The closing marker has not come, or not all of it.
            if unfinished and not closed and not final:
                return None
            # Some models end their output without it.
            if closed or unfinished or self._is_whole(scanned):
                call = self._read(scanned)
            if call is not None:
                self._held = rest[len(TOOL_CALL_END) :] if closed or unfinished else self._held[scanned.end :]
                return call
        elif scanned is not None and not scanned.broken and not final:
            return None
        if (call := self._cut_call()) is not None:
            return call
        marker, self._held = self._held[: self._marker_end()], self._held[self._marker_end() :]
        return marker

    def _is_whole(self, scanned: CallScanner) -> bool:
        """Whether it is sure that there is a call, though the closing marker is missing in the middle of a text."""
        return False


class XMLToolCallParser(HermesToolCallParser):
    """``<tool_call><function=name><parameter=key>value</parameter></function></tool_call>``: Qwen3-Coder and Qwen3.5.

    Around the markers all is as in the format of Hermes. Qwen3-Coder often leaves the opening one out
    (https://github.com/QwenLM/Qwen3-Coder/issues/475). That a function of the request begins and ends is as good.
    """

    def _opening_markers(self) -> list[str]:
        return [*super()._opening_markers(), *(f"{FUNCTION_START}{name}>" for name in self._schemas)]

    def _scanner(self, at: int) -> CallScanner:
        return XMLCallScanner(at if self._marker == TOOL_CALL_START else at - len(self._marker))

    def _read(self, scanned: CallScanner) -> ParsedCall | None:
        return read_xml_call(self._held, scanned, self._schemas) if isinstance(scanned, XMLCallScanner) else None

    _read_cut = _read

    def _is_whole(self, scanned: CallScanner) -> bool:
        return isinstance(scanned, XMLCallScanner) and scanned.name in self._schemas
