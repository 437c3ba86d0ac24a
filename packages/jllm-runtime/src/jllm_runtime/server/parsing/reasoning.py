"""The thinking of a model, apart from its answer."""

from jllm_runtime.server.parsing.special_markers import WHITE, settled

OPEN, CLOSE = "<think>", "</think>"


def detect_thinking(chat_template: str) -> bool:
    """Whether a model with this chat template thinks before it answers."""
    return CLOSE in chat_template


def opens_thinking(prompt: str) -> bool:
    """Whether a rendered conversation ends inside of the thinking, so that the answer begins there."""
    return prompt.rstrip(WHITE).endswith(OPEN)


class ReasoningSplitter:
    """Splits ``<think>...</think>`` off the beginning of a text. White space next to the marks belongs to them.

    A text that begins otherwise is content from its first character; thinking that never ends is all there is.

    Args:
        inside: the prompt ends with ``<think>``; a model that says it once more is forgiven.
    """

    def __init__(self, inside: bool = False) -> None:
        self._inside = inside
        self._held = ""
        self._take = self._begin

    def feed(self, text: str) -> tuple[str, str]:
        """What is certain now: more of the thinking, more of the content."""
        self._held += text
        return self._take(False)

    def finish(self) -> tuple[str, str]:
        """What was held back, now that nothing follows."""
        return self._take(True)

    def _begin(self, final: bool) -> tuple[str, str]:
        text = self._held.lstrip(WHITE)
        if OPEN.startswith(text) and not final:
            return "", ""
        if text.startswith(OPEN):
            self._held = text.removeprefix(OPEN)
        elif not self._inside:
            self._take = self._pass_on
            return self._take(final)
        self._take = self._begin_thinking
        return self._take(final)

    def _begin_thinking(self, final: bool) -> tuple[str, str]:
        self._held = self._held.lstrip(WHITE)
        if not self._held:
            return "", ""
        self._take = self._think
        return self._take(final)

    def _think(self, final: bool) -> tuple[str, str]:
        at = self._held.find(CLOSE)
        if at >= 0:
            reasoning, self._held = self._held[:at].rstrip(WHITE), self._held[at + len(CLOSE) :]
            self._take = self._end
            return reasoning, self._end(final)[1]
        count = len(self._held) if final else settled(self._held, CLOSE)
        reasoning, self._held = self._held[:count], self._held[count:]
        return reasoning, ""

    def _end(self, final: bool) -> tuple[str, str]:
        self._held = self._held.lstrip(WHITE)
        if not self._held:
            return "", ""
        self._take = self._pass_on
        return self._take(final)

    def _pass_on(self, final: bool) -> tuple[str, str]:
        content, self._held = self._held, ""
        return "", content
