"""Spelling suggestions for unknown names."""

import difflib
from collections.abc import Iterable

LISTED = "`jllm plan --list` lists all that are known"


def suggest(name: str, known: Iterable[str]) -> str:
    """``did you mean ...?`` with the names that are spelt alike, if there are any, and how to list all names."""
    # Compared in lower case and without owners, shown as they are written.
    folded = {_short(candidate): candidate for candidate in known}
    close = difflib.get_close_matches(_short(name), folded, n=3, cutoff=0.6)
    return f"did you mean {', '.join(folded[match] for match in close)}? {LISTED}" if close else LISTED


def _short(name: str) -> str:
    return name.lower().rpartition("/")[2]
