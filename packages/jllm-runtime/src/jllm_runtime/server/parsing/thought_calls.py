"""Tool calls in thinking that never ends.

Qwen3.5 at times calls a tool without an end of its thinking (https://github.com/vllm-project/vllm/pull/35687). It also
writes calls that it only thinks about, and then ends the thinking (https://github.com/PrimeIntellect-ai/renderers/pull/80).
"""

from collections.abc import Collection

from jllm_runtime.server.parsing.call_object import ParsedCall
from jllm_runtime.server.parsing.tool_calls import ToolCallParser
from jllm_runtime.special_markers import WHITESPACE


class ThoughtCallFinder:
    """Search for calls that end a text of thinking. They count where the thinking has no end of its own.

    From the first call on the text is held back until it is known which of the two it is.

    Args:
        parser: of the model's format.
        names: of the tools of the request. A call of another is none.
    """

    def __init__(self, parser: ToolCallParser, names: Collection[str]) -> None:
        self._parser = parser
        self._names = names
        self._held = ""
        self._found: list[str | ParsedCall] = []

    def feed(self, text: str) -> str:
        """Add a piece of the thinking; what of it is certain now."""
        self._held += text
        count = 0
        for part in self._parser.feed(text):
            # Up to the first call a parser gives a text as it is.
            if isinstance(part, str) and not self._found:
                count += len(part)
            else:
                self._found.append(part)
        return self._let_go(count)

    def close(self) -> str:
        """End the thinking by its own marker; what was held back of it."""
        return self._let_go(len(self._held))

    def finish(self, cut: bool) -> tuple[str, list[ParsedCall]]:
        """End a text whose thinking has not ended; what was held back of it, and the calls.

        Args:
            cut: the text would go on, but for a limit: the model may still have ended its thinking.
        """
        found = [*self._found, *self._parser.finish()]
        calls = [part for part in found if isinstance(part, ParsedCall)]
        first = next((at for at, part in enumerate(found) if isinstance(part, ParsedCall)), len(found))
        behind = "".join(part for part in found[first:] if isinstance(part, str))
        if cut or behind.strip(WHITESPACE) or any(call.name not in self._names for call in calls):
            return self.close(), []
        return "".join(part for part in found[:first] if isinstance(part, str)), calls

    def _let_go(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text
