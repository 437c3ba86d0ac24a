"""Tool call objects: the JSON that a model writes for a call, whole or cut off."""

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from jllm_runtime.server.parsing.json_scanner import skip_whitespace

ARGUMENT_KEYS = ("arguments", "parameters")
CALL_KEYS = frozenset({"name", *ARGUMENT_KEYS, "id", "type"})
"""Fields of a call in all formats. "id" and "type" come from models that were trained on OpenAI's objects."""


@dataclass(frozen=True)
class ParsedCall:
    """A well-formed tool call.

    Attributes:
        name: the tool's name.
        arguments: a JSON object, as the model wrote it; of a call that a limit has cut off, its beginning.
    """

    name: str
    arguments: str


def read_call(text: str, needs_arguments: bool = False) -> ParsedCall | None:
    """The call that a JSON object describes, None where it describes none.

    Args:
        text: the object. Line breaks in its strings are forgiven.
        needs_arguments: an object without arguments is no call. Needed where no marker says that it is one.
    """
    try:
        if not isinstance(_DECODER.decode(text), dict):
            return None
        members, _, _ = _members(text)
        return _described_call(members, needs_arguments, begun=None, absent="{}")
    except (ValueError, RecursionError):  # not JSON, or nested a thousand times
        return None


def read_cut_call(text: str, needs_arguments: bool = False) -> ParsedCall | None:
    """The call that the beginning of a JSON object describes, None where its name is not known.

    Args:
        text: the beginning; the object has not ended. The arguments are what it has of them.
        needs_arguments: as for ``read_call``.
    """
    try:
        members, key, rest = _members(text)
        return _described_call(members, needs_arguments, begun=rest if key in ARGUMENT_KEYS else None, absent="")
    except (ValueError, RecursionError):
        return None


def _described_call(
    members: dict[str, tuple[Any, str]], needs_arguments: bool, begun: str | None, absent: str
) -> ParsedCall | None:
    """The call of an object with these members, None where it is none.

    Args:
        members: those that are complete, from ``_members``.
        needs_arguments: as for ``read_call``.
        begun: the beginning of arguments, where the object ends in them.
        absent: the arguments where the object has none.
    """
    name, _ = members.get("name", (None, ""))
    if not isinstance(name, str) or not name or not name.isprintable() or not members.keys() <= CALL_KEYS:
        return None
    found = [_arguments(*members[key]) for key in ARGUMENT_KEYS if key in members]
    found += [] if begun is None else [_begun_arguments(begun)]
    # Two sets of arguments are ambiguous; do not guess.
    if len(found) > 1 or (needs_arguments and not found):
        return None
    arguments = found[0] if found else absent
    return None if arguments is None else ParsedCall(name, arguments)


def _begun_arguments(text: str) -> str | None:
    """The beginning of arguments; None for the beginning of another value."""
    if text.startswith('"'):
        # JSON inside of a JSON string. An escape may be cut off at its end: the longest has six characters.
        for length in range(len(text), max(len(text) - 6, 0), -1):
            try:
                text = _DECODER.decode(f'{text[:length]}"').encode(errors="ignore").decode()
                break
            except ValueError:
                continue
    return text if text.startswith("{") else "" if "null".startswith(text) else None


def _arguments(value: Any, text: str) -> str | None:
    """The arguments as JSON text of an object, None for another value.

    Args:
        value: as parsed.
        text: as the model wrote it, which is kept where it is valid JSON.
    """
    if value is None:
        return "{}"
    if isinstance(value, str):  # JSON inside of a JSON string, as OpenAI's API has it
        value = _DECODER.decode(value)
        return json.dumps(value) if isinstance(value, dict) else None
    if not isinstance(value, dict):
        return None
    try:
        json.loads(text)
    except ValueError:  # line breaks in strings, which strict=False forgives
        return json.dumps(value)
    return text


def _members(text: str) -> tuple[dict[str, tuple[Any, str]], str | None, str]:
    """The members of an object that is valid as far as it goes, each with its value and its text.

    Returns:
        The members that are complete, the key of one that is not, and the text of that one's value.
    """
    members: dict[str, tuple[Any, str]] = {}
    key: str | None = None
    at, start = skip_whitespace(text, skip_whitespace(text, 0) + 1), len(text)
    try:
        while text[at] != "}":
            key, at = _DECODER.raw_decode(text, at)
            if not isinstance(key, str):  # no object, as the rest of the text would have shown
                return {}, None, ""
            start = skip_whitespace(text, skip_whitespace(text, at) + 1)
            # The text of each value is kept: json.dumps would change numbers such as 1.0e3, and the spelling of texts.
            value, at = _DECODER.raw_decode(text, start)
            members[key], key = (value, text[start:at]), None
            at = skip_whitespace(text, at)
            at = skip_whitespace(text, at + 1) if text[at] == "," else at
    except (ValueError, IndexError):  # the text ends here
        pass
    return members, key, text[start:]


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(strict=False, parse_constant=_refuse_constant)
