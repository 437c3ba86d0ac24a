"""Tensors that a source leaves out: those of a model's other parts, counted so that nobody misses them silently."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from jllm_convert.families.table import Family

LEFT_OUT = "left_out"
"""The key of a manifest's source: how many tensors were left out, by what they are."""


def left_out_names(names: Iterable[str], family: Family | None) -> dict[str, str]:
    """What each of the names of a Hugging Face folder's tensors that are left out is."""
    patterns = [(each.what, re.compile(each.pattern)) for each in (() if family is None else family.left_out)]
    return {name: what for name in names for what, pattern in patterns if pattern.fullmatch(name)}


def counted(left_out: Mapping[str, str]) -> dict[str, int]:
    """How many tensors there are of each kind."""
    return dict(Counter(left_out.values()))


def in_words(counts: Mapping[str, int]) -> str:
    """The counts in words; empty where nothing is left out."""
    return ", ".join(f"{count:,} {what}" for what, count in counts.items())


def recorded(source: Mapping[str, object]) -> dict[str, int]:
    """The counts that a manifest's source has; those of another form are none."""
    counts = source.get(LEFT_OUT)
    if not isinstance(counts, dict):
        return {}
    return {what: count for what, count in counts.items() if isinstance(what, str) and type(count) is int}
