"""Events of an output parser in the form that tests compare."""

import json
from collections.abc import Iterable
from typing import Any

from jllm_runtime.server.parsing.output_parser import Content, Event, ToolCallArguments, ToolCallStart


def as_plain(events: Iterable[Event]) -> list[str | tuple[str, Any]]:
    """Texts, and the calls with their arguments."""
    plain: list[str | tuple[str, Any]] = []
    for event in events:
        match event:
            case Content(text):
                plain.append(text)
            case ToolCallStart(_, _, name):
                plain.append((name, None))
            case ToolCallArguments(_, text):
                plain[-1] = (plain[-1][0], json.loads(text))
    return plain
