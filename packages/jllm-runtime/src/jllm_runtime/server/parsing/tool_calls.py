"""Tool call parsers, one for each format that models are trained on.

A new format is a parser here or in ``marked_calls.py``, its name in ``ToolCallFormat`` and ``PARSERS``, a test in
``detect_format``, and its grammar in ``requests/response_format.py``.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

from jllm_runtime.server.parsing.buffered_parser import BufferedParser, CallScanner
from jllm_runtime.server.parsing.call_object import ParsedCall, read_call, read_cut_call
from jllm_runtime.server.parsing.json_scanner import skip_whitespace
from jllm_runtime.server.parsing.marked_calls import HermesToolCallParser, XMLToolCallParser
from jllm_runtime.server.parsing.xml_call import FUNCTION_START, PARAMETER_START, Schemas, write_xml_call
from jllm_runtime.special_markers import PYTHON_TAG, TOOL_CALL_END, TOOL_CALL_START

ToolCallFormat = Literal["hermes", "llama3", "xml"]


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


class Llama3ToolCallParser(BufferedParser):
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
