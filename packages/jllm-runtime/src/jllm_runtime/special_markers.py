"""Special markers in a model's output, such as ``<think>``, and texts that may be cut inside of one."""

THINK_START, THINK_END = "<think>", "</think>"
TOOL_CALL_START, TOOL_CALL_END = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"

WHITESPACE = " \t\r\n"
"""JSON's white space. Only this is dropped next to a marker."""


def length_before_marker(text: str, marker: str) -> int:
    """Length of the part of a growing text that no coming marker can change.

    Held back are white space at the end, which is dropped before a marker, and a beginning of the marker.

    Args:
        text: a text without the whole marker.
        marker: what may follow.
    """
    # The longest beginning of the marker that the text ends with, 0 where there is none.
    begun = next((n for n in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:n])), 0)
    return len(text[: len(text) - begun].rstrip(WHITESPACE))
