"""Where a JSON object ends, in a text that is still coming."""

import re
from collections.abc import Collection

from jllm_runtime.server.parsing.special_markers import WHITE

_STRING_MARK = re.compile(r'["\\]')
_NOT_WHITE = re.compile(rf"[^{WHITE}]|\Z")
_BARE = frozenset(WHITE + ",:0123456789+-.eE" + "truefalsn")


def skip_white(text: str, at: int) -> int:
    """Where the next character stands that is not white space, or the text ends."""
    found = _NOT_WHITE.search(text, at)
    return found.start() if found else len(text)


class ObjectScanner:
    """Finds the end of a JSON object in a text that grows, or that there can be none.

    It looks at each character once, and gives up early: at what is not JSON outside of strings, and at a first key
    that is not expected.

    Args:
        at: where the object begins, or white space before it.
        first_keys: what its first key may be.

    Attributes:
        start: where the object begins.
        end: behind its last brace.
        broken: there is none.
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
        """Look at what has come."""
        while self._at < len(text) and self.end is None and not self.broken:
            before = self._at
            if self._string is not None:
                self._inside(text)
            elif self._depth:
                self._between(text[self._at])
            else:
                self._begin(text)
            if self._at == before:
                return

    def _begin(self, text: str) -> None:
        self.start = self._at = skip_white(text, self._at)
        if self._at < len(text):
            self.broken = text[self._at] != "{"
            self._depth = 1
            self._at += 1

    def _between(self, letter: str) -> None:
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

    def _inside(self, text: str) -> None:
        found = _STRING_MARK.search(text, self._at)
        if found is None:
            self._at = len(text)
        elif found[0] == "\\":
            self._at = found.start() if found.end() == len(text) else found.end() + 1
        else:
            self._at = found.end()
            self.broken = not self._has_key and text[self._string : found.start()] not in self._first_keys
            self._has_key, self._string = True, None
