"""Marks such as ``</think>`` in a text that comes in pieces, cut anywhere."""

WHITE = " \t\r\n"
"""White space as JSON has it: what is dropped next to a mark, and nothing else."""


def settled(text: str, mark: str) -> int:
    """How much of the text is certain to stand before no mark: all but white space and the beginning of a mark.

    Args:
        text: without a whole mark.
        mark: what may come.
    """
    begun = next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
    return len(text[: len(text) - begun].rstrip(WHITE))
