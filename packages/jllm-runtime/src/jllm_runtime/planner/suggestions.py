"""Spelling suggestions for unknown names."""

import difflib
from collections.abc import Iterable


def suggest(name: str, known: Iterable[str]) -> str:
    """``did you mean ...?`` with the names that are spelt alike, or the list of all known names where none is."""
    # Compared in lower case, shown as they are written.
    folded = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.5)
    if close:
        return f"did you mean {', '.join(folded[match] for match in close)}?"
    return f"known: {', '.join(folded.values())}"
