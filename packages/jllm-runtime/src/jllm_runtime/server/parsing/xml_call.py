"""XML tool calls: ``<function=name>`` with a ``<parameter=key>`` for each argument, whole or cut off."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from jllm_runtime.server.parsing.argument_types import alternatives, begun_value, kinds_of, read_value
from jllm_runtime.server.parsing.call_object import ParsedCall
from jllm_runtime.server.parsing.json_scanner import skip_whitespace
from jllm_runtime.special_markers import TOOL_CALL_END, length_before_marker

FUNCTION_START, FUNCTION_END = "<function=", "</function>"
PARAMETER_START, PARAMETER_END = "<parameter=", "</parameter>"

Schemas = Mapping[str, Mapping[str, Any]]
"""JSON schemas of the arguments of tools, by the tools' names."""

MAX_NAME = 256
"""Most characters of a name: what goes on without an end is none."""

_VALUE_END = re.compile(f"{PARAMETER_END}|{FUNCTION_END}")


class XMLCallScanner:
    """Search for the end of a call in a growing text.

    It looks at each character once, however the text is cut. A value ends at a closing tag behind which the call goes
    on or ends, and not at one that stands in a text or in code. A last value without its own closing tag is forgiven.

    Args:
        at: where the call begins, or white space before it.

    Attributes:
        start: that place.
        end: position behind the function's closing tag; None until it is found.
        broken: there is no such call.
        name: the function's; None until it is known.
        values: the arguments that are complete: key, and where the text of the value begins and ends.
        open_value: key and beginning of the argument that has not ended, if any.
        closing: where the tag begins that may end it, if that has come.
    """

    def __init__(self, at: int) -> None:
        self.start = at
        self.end: int | None = None
        self.broken = False
        self.name: str | None = None
        self.values: list[tuple[str, int, int]] = []
        self.open_value: tuple[str, int] | None = None
        self.closing: int | None = None
        self._at = at
        # A state machine: the state is the method that looks at what comes next, and says whether it has moved on.
        self._look: Callable[[str], bool] = self._function

    def scan(self, text: str) -> None:
        """Go on with the text, which begins with what earlier calls have seen."""
        while self.end is None and not self.broken and self._look(text):
            pass

    def _next(self, text: str, *tags: str) -> str | None:
        """Which of these comes next, behind white space; "" for none of them, None while that is open."""
        self._at = skip_whitespace(text, self._at)
        rest = text[self._at : self._at + max(map(len, tags))]
        found = next((tag for tag in tags if rest.startswith(tag)), "")
        return None if not found and any(tag.startswith(rest) for tag in tags) else found

    def _word(self, text: str) -> str | None:
        """The name up to the end of its tag; None while it has not come, or where there is none."""
        word, closed, _ = text[self._at : self._at + MAX_NAME + 1].partition(">")
        self.broken = "<" in word or not word.isprintable() or len(word) > MAX_NAME or bool(closed and not word)
        if self.broken or not closed:
            return None
        self._at += len(word) + 1
        return word

    def _function(self, text: str) -> bool:
        tag = self._next(text, FUNCTION_START)
        self.broken = tag == ""
        if tag:
            self._at += len(tag)
            self._look = self._function_name
        return bool(tag)

    def _function_name(self, text: str) -> bool:
        self.name = self._word(text)
        self._look = self._inside if self.name is not None else self._look
        return self.name is not None

    def _inside(self, text: str) -> bool:
        tag = self._next(text, PARAMETER_START, FUNCTION_END)
        self.broken = tag == ""
        if tag:
            self._at += len(tag)
            self.end = self._at if tag == FUNCTION_END else None
            self._look = self._parameter_name
        return bool(tag)

    def _parameter_name(self, text: str) -> bool:
        key = self._word(text)
        if key is not None:
            self.open_value = (key, self._at)
            self._look = self._value
        return key is not None

    def _value(self, text: str) -> bool:
        found = _VALUE_END.search(text, self._at)
        if found is None:
            # All but what may be the beginning of a tag.
            self._at = max(self._at, len(text) - len(PARAMETER_END) + 1)
            return False
        self.closing, self._at = found.start(), found.end()
        self._look = self._behind_value if found[0] == PARAMETER_END else self._behind_function
        return True

    def _behind_value(self, text: str) -> bool:
        tag = self._next(text, PARAMETER_START, FUNCTION_END)
        return tag is not None and self._end_value(ended=bool(tag))

    def _behind_function(self, text: str) -> bool:
        behind = self._at
        tag = self._next(text, TOOL_CALL_END)
        if tag is not None and self._end_value(ended=bool(tag)) and tag:
            self.end = behind
        return tag is not None

    def _end_value(self, ended: bool) -> bool:
        """End the value at the closing tag, or go on with it where that tag is a part of it."""
        if self.open_value is not None and self.closing is not None and ended:
            self.values.append((*self.open_value, self.closing))
            self.open_value = None
        self.closing = None
        self._look = self._inside if ended else self._value
        return True


def read_xml_call(text: str, scanned: XMLCallScanner, schemas: Schemas) -> ParsedCall | None:
    """The call that a scanner has found in a text, as far as it goes; None where its name is not known.

    Args:
        text: what was scanned.
        scanned: where the call's parts are.
        schemas: say which values are texts.
    """
    if scanned.name is None:
        return None
    schema = schemas.get(scanned.name, {})
    values = list(scanned.values)
    open_value, begun = scanned.open_value, None
    if open_value is not None and scanned.closing is not None:
        values, open_value = [*values, (*open_value, scanned.closing)], None
    # Of a name that is given twice, the last counts, as in JSON.
    read = {key: read_value(_trimmed(text[at:end]), _kinds(schema, key)) for key, at, end in values}
    arguments = {key: value for key, value in read.items() if value is not None}
    if open_value is not None:
        key, at = open_value
        begun = begun_value(_begun(text[at:]), _kinds(schema, key))
        arguments |= {} if begun is None else {key: begun}
    members = ", ".join(f"{_text(key)}: {value}" for key, value in arguments.items())
    if scanned.end is not None:
        return ParsedCall(scanned.name, f"{{{members}}}")
    return ParsedCall(scanned.name, f"{{{members}" if arguments else "")


def write_xml_call(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as a model writes it, between the markers of a call."""
    texts = {key: value if isinstance(value, str) else _text(value) for key, value in arguments.items()}
    parameters = (f"{PARAMETER_START}{key}>\n{value}\n{PARAMETER_END}\n" for key, value in texts.items())
    return f"{FUNCTION_START}{name}>\n{''.join(parameters)}{FUNCTION_END}"


def parameter_schema(schema: Mapping[str, Any], key: str) -> Any:
    """The schema of one argument, by the schema of all."""
    properties, others = schema.get("properties"), schema.get("additionalProperties", True)
    return properties[key] if isinstance(properties, dict) and key in properties else others


def _kinds(schema: Mapping[str, Any], key: str) -> frozenset[str]:
    return kinds_of({"anyOf": [parameter_schema(each, key) for each in alternatives(schema, schema)]}, schema)


def _trimmed(text: str) -> str:
    """A value without the line breaks that part it from its tags."""
    return text.removeprefix("\n").removesuffix("\n")


def _begun(text: str) -> str:
    """The beginning of a value, without what may become its closing tag."""
    return text[: length_before_marker(text, PARAMETER_END)].removeprefix("\n")


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
