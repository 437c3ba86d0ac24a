"""An inspection as tables for a terminal."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from jllm_core.config import ModelConfig

from jllm_convert.inspection.layers import Attention, FeedForward, LayerSummary
from jllm_convert.inspection.report import Inspection
from jllm_convert.inspection.stored import Shard
from jllm_convert.inspection.tokenizer import TokenizerSummary

_KINDS = {"hf": "Hugging Face folder", "gguf": "GGUF file", "checkpoint": "JLLM checkpoint"}
_MOST_SHARDS = 8
_MOST_PROBLEMS = 20
_GAP = "  "


def render(inspection: Inspection, tensors: bool = False) -> str:
    """The whole text, without a newline at its end; ``tensors`` adds a row for each tensor."""
    sums = [
        (each.dtype, f"{each.tensors:,}", f"{each.parameters:,}", size_text(each.nbytes)) for each in inspection.dtypes
    ]
    parts = [
        f"{_printable(inspection.path.absolute().name)} ({_KINDS[inspection.kind]})\n{_table((), _facts(inspection))}",
        _table(("stored as", "tensors>", "parameters>", "size>"), sums),
        _table(("file", "tensors>", "size>"), _shards(inspection.shards)),
        _table(
            ("layers", "tensors each>", "parameters each>", "size each>", "attention", "feed-forward"),
            _layers(inspection.layers, inspection.outside_layers),
        ),
    ]
    if tensors:
        rows = [
            (each.name, "x".join(map(str, each.shape)) or "scalar", each.dtype, size_text(each.nbytes))
            for each in inspection.tensors
        ]
        parts.append(_table(("tensor", "shape", "stored as", "size>"), rows))
    parts.append(_problems(inspection))
    return "\n\n".join(part for part in parts if part)


def size_text(nbytes: int) -> str:
    """Bytes as MiB, or as GiB from one on, with one decimal."""
    mebibytes = f"{nbytes / 2**20:.1f}"
    return f"{mebibytes} MiB" if float(mebibytes) < 1024 else f"{nbytes / 2**30:.1f} GiB"


def _facts(inspection: Inspection) -> Iterator[tuple[str, str]]:
    supported = "supported" if inspection.supported else "not supported"
    yield "family", "unknown" if inspection.family is None else f"{inspection.family} ({supported})"
    known = {name: value for name, value in inspection.source.items() if _is_plain(value)}
    if known:
        yield "source", ", ".join(f"{value}" if name == "name" else f"{name} {value}" for name, value in known.items())
    if inspection.config is not None:
        yield "model", _model(inspection.config)
    yield "parameters", f"{inspection.parameters:,}"
    if inspection.kind == "checkpoint":
        yield "size", size_text(inspection.bytes_on_disk)
    else:
        count = len(inspection.shards)
        yield "size", f"{size_text(inspection.bytes_on_disk)} in {count} {'file' if count == 1 else 'files'}"
    yield "tokenizer", _tokenizer(inspection.tokenizer)
    if inspection.quantization is not None:
        yield "quantized", inspection.quantization.name
    if inspection.receipt:
        figures = ((name, value) for name, value in inspection.receipt.items() if _is_plain(value))
        yield (
            "receipt",
            ", ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures
            ),
        )


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float)


def _model(config: ModelConfig) -> str:
    tied = ", output head tied to the embedding" if config.tie_embeddings else ""
    return (
        f"{config.num_layers} layers, {config.hidden_size:,} wide, {config.vocab_size:,} tokens, "
        f"context {config.context_length:,}{tied}"
    )


def _tokenizer(tokenizer: TokenizerSummary) -> str:
    template = "chat template" if tokenizer.chat_template else "no chat template"
    if not tokenizer.present:
        return f"none, {template}" if tokenizer.chat_template else "none"
    return f"{'?' if tokenizer.vocabulary is None else f'{tokenizer.vocabulary:,}'} tokens, {template}"


def _shards(shards: Sequence[Shard]) -> Iterator[tuple[str, str, str]]:
    """A row for each file; one for all whole ones together where there are many."""
    whole = [(shard.tensors, shard.nbytes) for shard in shards if shard.tensors is not None]
    together = len(whole) > _MOST_SHARDS
    if together:
        yield (
            f"{len(whole)} files",
            f"{sum(tensors for tensors, _ in whole):,}",
            size_text(sum(nbytes or 0 for _, nbytes in whole)),
        )
    for shard in shards:
        if shard.tensors is None or not together:
            tensors = "unreadable" if shard.tensors is None else f"{shard.tensors:,}"
            missing = shard.nbytes is None
            yield shard.name, "" if missing else tensors, "missing" if shard.nbytes is None else size_text(shard.nbytes)


def _layers(layers: Sequence[LayerSummary], outside: LayerSummary) -> Iterator[tuple[str, ...]]:
    """A row for each run of layers that are alike."""
    several = len({layer.stack for layer in layers}) > 1

    def alike(place: tuple[int, LayerSummary]) -> Any:
        # A number less its place is the same for all that follow one another.
        index, layer = place
        first = (layer.layer or 0) - index
        return first, layer.stack, layer.tensors, layer.parameters, layer.nbytes, layer.attention, layer.ffw

    for _, run in groupby(enumerate(layers), key=alike):
        group = [layer for _, layer in run]
        first, last = group[0], group[-1]
        numbers = str(first.layer) if len(group) == 1 else f"{first.layer}-{last.layer}"
        yield (
            f"{first.stack}.{numbers}" if several else numbers,
            *_figures(first),
            _attention(first.attention),
            _feed_forward(first.ffw),
        )
    if outside.tensors:
        yield "outside", *_figures(outside), "", ""


def _figures(layer: LayerSummary) -> tuple[str, str, str]:
    return f"{layer.tensors:,}", f"{layer.parameters:,}", size_text(layer.nbytes)


def _attention(attention: Attention | None) -> str:
    if attention is None:
        return "?"
    window = "" if attention.window is None else f", window {attention.window:,}"
    rope = "" if attention.rope else ", no rope"
    return f"{attention.heads} heads, {attention.kv_heads} kv heads of {attention.head_dim}{window}{rope}"


def _feed_forward(ffw: FeedForward | None) -> str:
    if ffw is None:
        return "?"
    if ffw.kind == "mlp":
        return f"mlp {ffw.width:,}"
    return f"moe {ffw.experts} experts of {ffw.width:,}, {ffw.experts_per_token} a token"


def _problems(inspection: Inspection) -> str:
    problems = inspection.problems
    if not problems and inspection.kind == "checkpoint":
        return "No problems in its manifest and config; verify checks the arrays."
    if not problems:
        return "No problems: it can be converted."
    lines = [f"{number:>3}. {_printable(problem)}" for number, problem in enumerate(problems[:_MOST_PROBLEMS], start=1)]
    more = len(problems) - len(lines)
    lines += [f"     and {more:,} more"] if more else []
    return "\n".join([f"{len(problems):,} problem{'s' if len(problems) > 1 else ''}:", *lines])


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns under their names, those whose names end in ``>`` aligned to the right; nothing where no rows are."""
    cells = [[_printable(cell) for cell in row] for row in rows]
    if not cells:
        return ""
    right = [name.endswith(">") for name in header] or [False] * len(cells[0])
    lines = [[name.rstrip(">") for name in header], *cells] if header else cells
    widths = [max(len(line[column]) for line in lines) for column in range(len(right))]
    return "\n".join(
        _GAP.join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def _printable(text: str) -> str:
    """Text that moves no cursor: names come from files that anybody may have written."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
