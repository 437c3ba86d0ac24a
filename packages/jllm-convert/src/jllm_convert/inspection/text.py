"""Text tables of an inspection, for a terminal."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.filesize import decimal

from jllm_convert.inspection.layer_summary import Attention, DeltaNet, FeedForward, LayerSummary
from jllm_convert.inspection.stored_tensors import ShardSummary

_MAX_SHARDS, _MAX_PROBLEMS = 8, 20
_MAX_CELL, _MAX_PROBLEM = 200, 1000


def named_values(label: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Format a row of texts and numbers by name; no row where there are none."""
    known = {name: value for name, value in values.items() if isinstance(value, str | int | float)}
    if known:
        parts = (
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in known.items()
        )
        yield label, ", ".join(parts)


def file_rows(shards: Sequence[ShardSummary]) -> Iterator[tuple[str, str, str]]:
    """Format a row for each file; where there are many, one for all good ones and one for each bad one."""
    bad = [shard for shard in shards if shard.tensors is None]
    whole = [shard for shard in shards if shard.tensors is not None]
    if len(whole) > _MAX_SHARDS:
        tensors, nbytes = (sum(getattr(shard, name) or 0 for shard in whole) for name in ("tensors", "nbytes"))
        yield f"{len(whole)} files", f"{tensors:,}", decimal(nbytes)
        shards = bad
    for shard in shards[:_MAX_PROBLEMS]:
        if shard.nbytes is None:
            yield shard.name, "", "missing"
        else:
            yield shard.name, "unreadable" if shard.tensors is None else f"{shard.tensors:,}", decimal(shard.nbytes)
    if len(shards) > _MAX_PROBLEMS:
        yield f"and {len(shards) - _MAX_PROBLEMS:,} more", "", ""


def layer_rows(layers: Sequence[LayerSummary], outside: LayerSummary) -> Iterator[tuple[str, ...]]:
    """Format a row for each run of identical layers."""
    several = len({layer.stack for layer in layers}) > 1

    def run_key(entry: tuple[int, LayerSummary]) -> Any:
        # Layer numbers that follow each other have the same difference to the index.
        index, layer = entry
        first = (layer.layer or 0) - index
        return first, layer.stack, layer.tensors, layer.parameters, layer.nbytes, layer.attention, layer.ffw

    def figures(layer: LayerSummary) -> tuple[str, str, str]:
        return f"{layer.tensors:,}", f"{layer.parameters:,}", decimal(layer.nbytes)

    for _, run in groupby(enumerate(layers), key=run_key):
        group = [layer for _, layer in run]
        first, last = group[0], group[-1]
        numbers = str(first.layer) if len(group) == 1 else f"{first.layer}-{last.layer}"
        name = f"{first.stack}.{numbers}" if several else numbers
        yield name, *figures(first), _attention(first.attention), _feed_forward(first.ffw)
    if outside.tensors:
        yield "outside", *figures(outside), "", ""


def _attention(attention: Attention | DeltaNet | None) -> str:
    if attention is None:
        return "?"
    if isinstance(attention, DeltaNet):
        keys, values = f"{attention.key_heads} key heads of {attention.key_head_dim}", attention.value_heads
        return f"delta net, {keys}, {values} value heads of {attention.value_head_dim}"
    window = "" if attention.window is None else f", window {attention.window:,}"
    rope = "" if attention.rope else ", no rope"
    return f"{attention.heads} heads, {attention.kv_heads} kv heads of {attention.head_dim}{window}{rope}"


def _feed_forward(ffw: FeedForward | None) -> str:
    if ffw is None or ffw.experts is None:
        return "?" if ffw is None else f"mlp {ffw.width:,}"
    shared = "" if ffw.shared is None else f", one of {ffw.shared:,} for all"
    return f"moe {ffw.experts} experts of {ffw.width:,}, {ffw.experts_per_token} a token{shared}"


def problem_list(problems: Sequence[str]) -> str:
    """Format problems as a numbered list, below a line that counts them."""
    lines = [
        f"{number:>3}. {printable(problem, _MAX_PROBLEM)}"
        for number, problem in enumerate(problems[:_MAX_PROBLEMS], start=1)
    ]
    lines += [f"     and {len(problems) - len(lines):,} more"] * (len(problems) > len(lines))
    return "\n".join([f"{len(problems):,} problem{'s' if len(problems) > 1 else ''}:", *lines])


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table. Columns whose names end in ``>`` are aligned to the right. Empty where there are no rows."""
    cells = [[printable(cell) for cell in row] for row in rows]
    lines = [[name.rstrip(">") for name in header]] * any(header) + cells
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = (
        [
            cell.rjust(width) if name.endswith(">") else cell.ljust(width)
            for name, cell, width in zip(header, line, widths, strict=True)
        ]
        for line in lines
    )
    return "\n".join("  ".join(line).rstrip() for line in aligned) if cells else ""


def printable(text: str, max_length: int = _MAX_CELL) -> str:
    """Make text safe for a terminal: names come from untrusted files, so control characters and length are limited."""
    short = text if len(text) <= max_length else f"{text[: max_length - 1]}\N{HORIZONTAL ELLIPSIS}"
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in short)
