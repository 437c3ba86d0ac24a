"""The calls of tools in a model's text, in the formats that models are trained on."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, Protocol

from jllm_runtime.server.parsing.json_scanner import ObjectScanner, skip_white
from jllm_runtime.server.parsing.special_markers import WHITE, settled

Format = Literal["hermes", "llama3"]

OPEN, CLOSE = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
CALL_KEYS = frozenset({"name", "arguments", "parameters", "id", "type"})


@dataclass(frozen=True)
class Call:
    """A call that is whole and well-formed.

    Attributes:
        name: of the tool.
        arguments: a JSON object, as the model wrote it.
    """

    name: str
    arguments: str


class CallParser(Protocol):
    """Finds the calls in a text. What is none, broken calls included, comes back as text."""

    def feed(self, text: str) -> list[str | Call]:
        """What is certain now."""

    def finish(self) -> list[str | Call]:
        """What was held back, now that nothing follows."""


def detect_format(chat_template: str) -> Format | None:
    """The format in which a chat template asks for calls, None where it is neither or knows no tools."""
    if OPEN in chat_template and "arguments" in chat_template:
        # The same marks around XML.
        return None if "<function=" in chat_template or "<arg_key>" in chat_template else "hermes"
    if "<|start_header_id|>" in chat_template and '"parameters":' in chat_template:
        return "llama3"
    return None


class _HeldText:
    """Text that is held back until it is known what it is: what both formats do alike."""

    def __init__(self) -> None:
        self._held = ""
        self._object: ObjectScanner | None = None
        self._after_call = False

    def feed(self, text: str) -> list[str | Call]:
        self._held += text
        return list(self._take(final=False))

    def finish(self) -> list[str | Call]:
        return list(self._take(final=True))

    def _take(self, final: bool) -> Iterator[str | Call]:
        raise NotImplementedError

    def _let_go(self, count: int, final: bool) -> Iterator[str]:
        """So much of what is held, as text. White space that ends an answer belongs to the call before it."""
        text, self._held = self._held[:count], self._held[count:]
        if text and not (final and self._after_call and not text.strip(WHITE)):
            self._after_call = False
            yield text


class HermesCalls(_HeldText):
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, anywhere in the text; also what Qwen writes.

    A mark is followed by a call, or it is text like any other. The closing mark may be cut off by the end. White space
    before a call, and behind the last, belongs to the marks.
    """

    def _take(self, final: bool) -> Iterator[str | Call]:
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
            self._after_call = isinstance(found, Call)
            self._object = None

    def _text(self, final: bool) -> Iterator[str]:
        """The text up to the next mark, behind which an object is then looked for."""
        at = self._held.find(OPEN)
        if at < 0:
            count = len(self._held) if final else settled(self._held, OPEN)
        else:
            count = len(self._held[:at].rstrip(WHITE))
        yield from self._let_go(count, final)
        if at >= 0:
            self._object = ObjectScanner(self._mark_end(), CALL_KEYS)

    def _mark_end(self) -> int:
        return self._held.index(OPEN) + len(OPEN)

    def _call(self, final: bool) -> Call | str | None:
        """The call, taken from what is held, or the mark that turns out to begin none; None while nobody knows."""
        scanned, call = self._object, None
        if scanned is not None and scanned.end is not None:
            rest = self._held[scanned.end :].lstrip(WHITE)
            closed = rest.startswith(CLOSE)
            if CLOSE.startswith(rest) and not closed and not final:
                return None
            if closed or (final and CLOSE.startswith(rest)):
                call = read_call(self._held[scanned.start : scanned.end])
            if call is not None:
                self._held = rest[len(CLOSE) :]
                return call
        elif scanned is not None and not scanned.broken and not final:
            return None
        mark, self._held = self._held[: self._mark_end()], self._held[self._mark_end() :]
        return mark


class Llama3Calls(_HeldText):
    """``{"name": ..., "parameters": {...}}``, several with semicolons between, at the beginning of the text.

    ``<|python_tag|>`` may stand before a call; as a special token it rarely shows in text. From where something else
    begins, all is text.
    """

    def __init__(self) -> None:
        super().__init__()
        self._only_text = False

    def _take(self, final: bool) -> Iterator[str | Call]:
        while self._held and not self._only_text:
            start = self._object_start()
            if self._object is None and start is not None:
                self._object = ObjectScanner(start, CALL_KEYS)
            if self._object is not None:
                self._object.scan(self._held)
            scanned = self._object
            if scanned is not None and scanned.end is not None:
                call = read_call(self._held[scanned.start : scanned.end], needs_arguments=True)
                self._only_text = call is None
                if call is not None:
                    self._held, self._object, self._after_call = self._held[scanned.end :], None, True
                    yield call
            elif final or (scanned is not None and scanned.broken):
                self._only_text = True
            else:
                return
        yield from self._let_go(len(self._held), final)

    def _object_start(self) -> int | None:
        """Where an object must begin, marks and separators skipped; None while that may be open."""
        at = skip_white(self._held, 0)
        if self._after_call and self._held.startswith(";", at):
            at = skip_white(self._held, at + 1)
        if self._held.startswith(PYTHON_TAG, at):
            return at + len(PYTHON_TAG)
        return None if PYTHON_TAG.startswith(self._held[at:]) else at


def read_call(text: str, needs_arguments: bool = False) -> Call | None:
    """The call that a JSON object describes, or None where it describes none.

    Args:
        text: the object. Line breaks in its strings are forgiven.
        needs_arguments: where a mark says that this is a call, it may have none.
    """
    try:
        if not isinstance(_DECODER.decode(text), dict):
            return None
        members = _members(text)
        name, _ = members.get("name", (None, ""))
        given = [members[key] for key in ("arguments", "parameters") if key in members]
        if not isinstance(name, str) or not name or not name.isprintable() or not members.keys() <= CALL_KEYS:
            return None
        if len(given) > 1 or (needs_arguments and not given):
            return None
        arguments = _arguments(*given[0]) if given else "{}"
    except (ValueError, RecursionError):  # not JSON, or nested a thousand times
        return None
    return None if arguments is None else Call(name, arguments)


def _arguments(value: Any, text: str) -> str | None:
    """The arguments as the text of an object, from what was given for them."""
    if value is None:
        return "{}"
    if isinstance(value, str):  # an object written out once more
        value = _DECODER.decode(value)
        return json.dumps(value) if isinstance(value, dict) else None
    if not isinstance(value, dict):
        return None
    try:
        json.loads(text)
    except ValueError:  # line breaks in strings
        return json.dumps(value)
    return text


def _members(text: str) -> dict[str, tuple[Any, str]]:
    """Each member of a valid object, and its text."""
    members: dict[str, tuple[Any, str]] = {}
    at = skip_white(text, skip_white(text, 0) + 1)
    while text[at] != "}":
        key, at = _DECODER.raw_decode(text, at)
        start = skip_white(text, skip_white(text, at) + 1)
        value, at = _DECODER.raw_decode(text, start)
        members[key] = (value, text[start:at])
        at = skip_white(text, at)
        at = skip_white(text, at + 1) if text[at] == "," else at
    return members


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(strict=False, parse_constant=_refuse_constant)
