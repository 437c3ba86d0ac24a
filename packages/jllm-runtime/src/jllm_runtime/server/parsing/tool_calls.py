"""Tool call parsers, one for each format that models are trained on.

A new format is a parser here, its name in ``ToolCallFormat`` and ``PARSERS``, a test in ``detect_format``, and its
grammar in ``requests/response_format.py``.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

from jllm_runtime.server.parsing.call_object import CALL_KEYS, ParsedCall, read_call, read_cut_call
from jllm_runtime.server.parsing.json_scanner import JSONObjectScanner, skip_whitespace
from jllm_runtime.server.parsing.xml_call import (
    FUNCTION_START,
    PARAMETER_START,
    Schemas,
    XMLCallScanner,
    read_xml_call,
    write_xml_call,
)
from jllm_runtime.special_markers import (
    PYTHON_TAG,
    TOOL_CALL_END,
    TOOL_CALL_START,
    WHITESPACE,
    length_before_marker,
)

ToolCallFormat = Literal["hermes", "llama3", "xml"]


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


class ToolCallParser(Protocol):
    """Parser of a text that comes in pieces. Text comes back as text, and so do broken calls."""

    def feed(self, text: str) -> list[str | ParsedCall]:
        """Add a piece; the texts and calls that are certain now."""

    def finish(self, cut: bool = False) -> list[str | ParsedCall]:
        """End the text; the texts and calls that were held back.

        Args:
            cut: the text would go on, but for a limit. A call in it that has a name is a call as far as it goes.
        """


def detect_format(chat_template: str) -> ToolCallFormat | None:
    """The format that a chat template describes to the model. None for an unknown one, or a template without tools."""
    # Templates show the model the format in an example, which is what is looked for.
    if TOOL_CALL_START in chat_template and "arguments" in chat_template:
        # Others put XML between the same markers; that of GLM is not read.
        if FUNCTION_START in chat_template or "<arg_key>" in chat_template:
            return "xml" if PARAMETER_START in chat_template else None
        return "hermes"
    if "<|start_header_id|>" in chat_template and '"parameters":' in chat_template:
        return "llama3"
    return None


def write_calls(format: ToolCallFormat, calls: Sequence[tuple[str, Any]]) -> str:
    """Tool calls as a model writes them, of which the format's parser makes the same calls.

    Args:
        format: the model's.
        calls: names and arguments.
    """
    if format == "xml":
        written = [write_xml_call(name, arguments) for name, arguments in calls]
    else:
        key = "arguments" if format == "hermes" else "parameters"
        written = [json.dumps({"name": name, key: arguments}, ensure_ascii=False) for name, arguments in calls]
    if format == "llama3":
        return "; ".join(written)
    return "\n".join(f"{TOOL_CALL_START}\n{each}\n{TOOL_CALL_END}" for each in written)


class _BufferedParser:
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


class HermesToolCallParser(_BufferedParser):
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, anywhere in the text; also what Qwen writes.

    A marker without a call behind it is text. The closing marker may be missing at the end. White space before a call,
    and behind the last one, is dropped with the markers.
    """

    def __init__(self, schemas: Schemas) -> None:
        super().__init__(schemas)
        self._markers = [TOOL_CALL_START]
        self._marker = ""

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
        found = re.search("|".join(map(re.escape, self._markers)), self._held)
        if found:
            count = len(self._held[: found.start()].rstrip(WHITESPACE))
        else:
            count = len(self._held) if final else min(length_before_marker(self._held, each) for each in self._markers)
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

    def __init__(self, schemas: Schemas) -> None:
        super().__init__(schemas)
        self._markers += [f"{FUNCTION_START}{name}>" for name in schemas]

    def _scanner(self, at: int) -> CallScanner:
        return XMLCallScanner(at if self._marker == TOOL_CALL_START else at - len(self._marker))

    def _read(self, scanned: CallScanner) -> ParsedCall | None:
        return read_xml_call(self._held, scanned, self._schemas) if isinstance(scanned, XMLCallScanner) else None

    _read_cut = _read

    def _is_whole(self, scanned: CallScanner) -> bool:
        return isinstance(scanned, XMLCallScanner) and scanned.name in self._schemas


class Llama3ToolCallParser(_BufferedParser):
    """``{"name": ..., "parameters": {...}}`` at the beginning of the text, several with semicolons between.

    ``<|python_tag|>`` may stand before a call; as a special token it rarely shows in text. From the first other
    character on, everything is text.
    """

    def __init__(self, schemas: Schemas) -> None:
        super().__init__(schemas)
        self._only_text = False

    def _take(self, final: bool) -> Iterator[str | ParsedCall]:
        while self._held and not self._only_text:
            start = self._object_start()
            if self._object is None and start is not None:
                self._object = self._scanner(start)
            if self._object is not None:
                self._object.scan(self._held)
            scanned = self._object
            if scanned is not None and scanned.end is not None:
                call = self._read(scanned)
                self._only_text = call is None
                if call is not None:
                    self._held, self._object, self._after_call = self._held[scanned.end :], None, True
                    yield call
            elif (call := self._cut_call()) is not None:
                yield call
            elif final or (scanned is not None and scanned.broken):
                self._only_text = True
            else:
                return
        yield from self._let_go(len(self._held), final)

    # Without markers, JSON with a name alone is more likely an answer than a call.
    def _read(self, scanned: CallScanner) -> ParsedCall | None:
        return read_call(self._held[scanned.start : scanned.end], needs_arguments=True)

    def _read_cut(self, scanned: CallScanner) -> ParsedCall | None:
        return read_cut_call(self._held[scanned.start :], needs_arguments=True)

    def _object_start(self) -> int | None:
        """Position at which an object must begin, behind markers and separators; None while it is open."""
        at = skip_whitespace(self._held, 0)
        if self._after_call and self._held.startswith(";", at):
            at = skip_whitespace(self._held, at + 1)
        if self._held.startswith(PYTHON_TAG, at):
            return at + len(PYTHON_TAG)
        return None if PYTHON_TAG.startswith(self._held[at:]) else at


PARSERS: dict[ToolCallFormat, type[HermesToolCallParser] | type[Llama3ToolCallParser]] = {
    "hermes": HermesToolCallParser,
    "llama3": Llama3ToolCallParser,
    "xml": XMLToolCallParser,
}
