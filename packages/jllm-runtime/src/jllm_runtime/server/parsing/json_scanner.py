"""JSON scanner: the end of an object in a text that still grows."""

import re
from collections.abc import Collection

from jllm_runtime.special_markers import WHITESPACE

_STRING_SPECIAL = re.compile(r'["\\]')
_NOT_WHITESPACE = re.compile(rf"[^{WHITESPACE}]|\Z")
# What valid JSON has outside of strings and brackets: separators, numbers, true, false, null.
_BARE = frozenset(WHITESPACE + ",:0123456789+-.eE" + "truefalsn")


def skip_whitespace(text: str, at: int) -> int:
    """Position of the next character that is no white space, or of the end."""
    found = _NOT_WHITESPACE.search(text, at)
    return found.start() if found else len(text)


class JSONObjectScanner:
    """Search for the end of a JSON object in a growing text.

    It looks at each character once, however the text is cut. It does not validate: it only gives up early, at a
    character that JSON cannot have outside of strings and at an unexpected first key.

    Args:
        at: where the object begins, or white space before it.
        first_keys: allowed names of its first field.

    Attributes:
        start: position of the opening brace.
        end: position behind the closing brace; None until it is found.
        broken: there is no such object.
    """

    def __init__(self, at: int, first_keys: Collection[str]) -> None:
        self.start = at
        self.end: int | None = None
        self.broken = False
        self._at = at
        self._first_keys = first_keys
        self._depth = 0
        self._string: int | None = None
        self._has_key = False

    def scan(self, text: str) -> None:
        """Go on with the text, which begins with what earlier calls have seen."""
        while self._at < len(text) and self.end is None and not self.broken:
            before = self._at
            # Strings are searched by a regular expression, because arguments may be long texts.
            if self._string is not None:
                self._scan_string(text)
            elif self._depth:
                self._scan_bare(text[self._at])
            else:
                self._scan_start(text)
            # No progress: a backslash at the end, whose escaped character has not come yet.
            if self._at == before:
                return

    def _scan_start(self, text: str) -> None:
        self.start = self._at = skip_whitespace(text, self._at)
        if self._at < len(text):
            self.broken = text[self._at] != "{"
            self._depth = 1
            self._at += 1

    def _scan_bare(self, letter: str) -> None:
        self._at += 1
        if letter == '"':
            self._string = self._at
        elif letter in "{[":
            self._depth += 1
        elif letter in "}]":
            self._depth -= 1
            self.end = None if self._depth else self._at
        else:
            self.broken = letter not in _BARE

    def _scan_string(self, text: str) -> None:
        found = _STRING_SPECIAL.search(text, self._at)
        if found is None:
            self._at = len(text)
        elif found[0] == "\\":
            # Skip the escaped character; \uXXXX has no quotes or backslashes in its digits.
            self._at = found.start() if found.end() == len(text) else found.end() + 1
        else:
            self._at = found.end()
            # The first string of an object is its first key.
            self.broken = not self._has_key and text[self._string : found.start()] not in self._first_keys
            self._has_key, self._string = True, None
