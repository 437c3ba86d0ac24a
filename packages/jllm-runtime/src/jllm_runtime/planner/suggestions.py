"""Spelling suggestions for unknown names."""

import difflib
from collections.abc import Iterable

LISTED = "`jllm plan --list` lists all that are known"


def suggest(name: str, known: Iterable[str]) -> str:
    """``did you mean ...?`` with the names that are spelt alike, if there are any, and how to list all names."""
    close = near_names(name, known, cutoff=0.6)
    return f"did you mean {', '.join(close)}? {LISTED}" if close else LISTED


def near_names(name: str, known: Iterable[str], cutoff: float) -> list[str]:
    """Up to three names that are spelt alike, the most alike first. Compared in lower case and without owners.

    Args:
        name: the name that is not known.
        known: those that are.
        cutoff: how much alike, from 0 to 1.
    """
    folded = {short_name(candidate): candidate for candidate in known}
    return [folded[match] for match in difflib.get_close_matches(short_name(name), folded, n=3, cutoff=cutoff)]


def short_name(name: str) -> str:
    """A name as it is compared."""
    return name.lower().rpartition("/")[2]
