"""Reasoning parser: the thinking between ``<think>`` and ``</think>``."""

from jllm_runtime.special_markers import THINK_END, THINK_START, WHITESPACE, length_before_marker


def detect_thinking(chat_template: str) -> bool:
    """Whether a model with this chat template thinks before it answers."""
    return THINK_END in chat_template


def opens_thinking(prompt: str) -> bool:
    """Whether a rendered prompt ends with the opening marker, so that the output begins inside of the thinking."""
    return prompt.rstrip(WHITESPACE).endswith(THINK_START)


def closes_thinking(prompt: str) -> bool:
    """Whether a rendered prompt ends with the closing marker: the thinking is turned off, and the answer comes next."""
    return prompt.rstrip(WHITESPACE).endswith(THINK_END)


def room_for_thinking(prompt: str, continued: str | None = None) -> tuple[bool, bool]:
    """Whether the output may begin with thinking, and whether it begins inside of it.

    Args:
        prompt: the rendered prompt of a model that thinks.
        continued: the text that the prompt ends with, where the output goes on from it.
    """
    if continued and not continued.isspace():
        inside = continued.rfind(THINK_START) > continued.rfind(THINK_END)
        return inside, inside
    return not closes_thinking(prompt), opens_thinking(prompt)


class ReasoningParser:
    """Separation of thinking and content, at the beginning of a text that comes in pieces.

    White space next to the markers is dropped with them. A text that begins with something else is content from its
    first character. Thinking without an end is the whole text.

    Args:
        inside: the prompt ends with ``<think>``. A model that writes it once more is forgiven.

    Attributes:
        closed: the thinking has ended by its closing marker.
    """

    def __init__(self, inside: bool = False) -> None:
        self.closed = False
        self._inside = inside
        self._held = ""
        # A state machine: the state is the method that takes what is held.
        self._take = self._begin

    def feed(self, text: str) -> tuple[str, str]:
        """Add a piece; the thinking and the content that are certain now."""
        self._held += text
        return self._take(False)

    def finish(self) -> tuple[str, str]:
        """End the text; the thinking and the content that were held back."""
        return self._take(True)

    def _begin(self, final: bool) -> tuple[str, str]:
        text = self._held.lstrip(WHITESPACE)
        # Undecided while what has come is a beginning of the marker (or nothing).
        if THINK_START.startswith(text) and not final:
            return "", ""
        if text.startswith(THINK_START):
            self._held = text.removeprefix(THINK_START)
        # No marker: the white space before the text is content, too.
        elif not self._inside:
            self._take = self._pass_on
            return self._take(final)
        self._take = self._begin_thinking
        return self._take(final)

    def _begin_thinking(self, final: bool) -> tuple[str, str]:
        self._held = self._held.lstrip(WHITESPACE)
        if not self._held:
            return "", ""
        self._take = self._think
        return self._take(final)

    def _think(self, final: bool) -> tuple[str, str]:
        at = self._held.find(THINK_END)
        # Thinking is trimmed at both ends, the content after it only at its beginning.
        if at >= 0:
            reasoning, self._held = self._held[:at].rstrip(WHITESPACE), self._held[at + len(THINK_END) :]
            self.closed = True
            self._take = self._end
            return reasoning, self._end(final)[1]
        # White space and a beginning of the closing marker wait for what follows.
        count = len(self._held) if final else length_before_marker(self._held, THINK_END)
        reasoning, self._held = self._held[:count], self._held[count:]
        return reasoning, ""

    def _end(self, final: bool) -> tuple[str, str]:
        self._held = self._held.lstrip(WHITESPACE)
        if not self._held:
            return "", ""
        self._take = self._pass_on
        return self._take(final)

    def _pass_on(self, final: bool) -> tuple[str, str]:
        content, self._held = self._held, ""
        return "", content
