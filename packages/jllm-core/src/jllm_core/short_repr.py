"""Short representation of weights and what is captured: types and shapes of arrays, and not their numbers."""

import textwrap
from collections import Counter
from dataclasses import fields
from typing import Any

from jllm_core.weights import ShortRepr

MAX_LINE = 100
"""Longest representation that stays on one line."""


def short_repr(value: Any) -> str:
    """``float32[64, 256]`` for an array or its description, a tree for weights; the own repr of anything else."""
    if isinstance(value, ShortRepr):
        parts = [(field.name, getattr(value, field.name)) for field in fields(value)]  # type: ignore[arg-type]
        texts = [f"{name}={short_repr(part)}" for name, part in parts if part is not None]
        line = f"{type(value).__name__}({', '.join(texts)})"
        if len(line) <= MAX_LINE and "\n" not in line:
            return line
        lines = ",\n".join(texts)
        return f"{type(value).__name__}(\n{textwrap.indent(lines, '  ')}\n)"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, list):  # layers, of which most are alike
        alike = Counter(map(short_repr, value))
        return f"[{', '.join(f'{count} x {text}' for text, count in alike.items())}]"
    if isinstance(value, dict):  # what was captured, by the numbers of the layers
        return f"layers {list(value)}: {short_repr(list(value.values()))}" if value else "{}"
    return repr(value)
