"""Word wrap of a text that comes in pieces."""

from collections.abc import Callable

from prompt_toolkit.utils import get_cwidth

FENCE = "```"
"""The mark at the beginning of a line that opens and closes a block of code, which is shown as it comes."""


class WordWrap:
    """Line breaks between words, where the next word would go over the edge.

    A word is held back until it is whole, so a text is at most one word behind. What has no room in a line of its own
    is left to the terminal. Blocks of code keep their lines: a break would be copied with them.

    Args:
        width: columns of the terminal now; it may be resized while an answer comes.
    """

    def __init__(self, width: Callable[[], int]) -> None:
        self._width = width
        self._column = 0
        self._gap = ""
        self._word = ""
        # Whether a line may end before the word: not inside one whose first part has been shown.
        self._can_break = False
        # The beginning of the line, to know a fence by.
        self._line = ""
        self._in_code = False

    def feed(self, text: str) -> str:
        """Add a piece; what can be shown now."""
        return "".join(map(self._add, text))

    def finish(self) -> str:
        """Give out what was held back."""
        return self._end_word() + self._end_gap()

    def _add(self, char: str) -> str:
        if char == "\n":
            shown = self._end_word() + char
            self._in_code ^= self._line.lstrip(" ").startswith(FENCE)
            self._column, self._gap, self._line = 0, "", ""
            return shown
        self._line += char if len(self._line) < 20 else ""
        if self._in_code:
            return char
        if char in " \t":
            shown = self._end_word()
            self._gap += char
            self._can_break = True
            return shown
        # Chinese and Japanese have no spaces: a line may end before and behind each of their characters.
        is_wide = get_cwidth(char) > 1
        shown = self._end_word() if is_wide else ""
        self._can_break |= is_wide
        self._word += char
        if is_wide or get_cwidth(self._word) >= self._width():
            shown += self._end_word()
            self._can_break = is_wide
        return shown

    def _end_word(self) -> str:
        word, self._word = self._word, ""
        if not word:
            return ""
        wide, width = get_cwidth(word), self._width()
        if self._can_break and self._column and self._column + len(self._gap) + wide > width:
            self._column, self._gap, word = 0, "", "\n" + word
        shown = self._end_gap() + word
        # What is wider than the terminal goes on in its next line.
        self._column = (self._column + wide - 1) % width + 1
        return shown

    def _end_gap(self) -> str:
        gap, self._gap = self._gap, ""
        self._column += len(gap)
        return gap
