"""Inspection report: a model's values, JSON and text."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from jllm_core.config import ModelConfig
from jllm_core.quantization.arrays import Quantization
from rich.filesize import decimal

from jllm_convert.families import family_of
from jllm_convert.inspection.layer_summary import LayerSummary, summarise
from jllm_convert.inspection.stored_tensors import ShardSummary, StoredTensor
from jllm_convert.inspection.text import file_rows, layer_rows, named_values, printable, problem_list, table
from jllm_convert.inspection.tokenizer_summary import TokenizerSummary
from jllm_convert.sources.left_out import in_words

Kind = Literal["hf", "gguf", "checkpoint"]
# The prefixes of the names of a layer's tensors: in Hugging Face folders, alone and beside a vision encoder.
_HF_STACKS = ("model.layers", "model.language_model.layers", "language_model.model.layers", "layers")
_STACKS: dict[Kind, tuple[str, ...]] = {"hf": _HF_STACKS, "gguf": ("blk",), "checkpoint": ("layers",)}
_KINDS: dict[Kind, str] = {"hf": "Hugging Face folder", "gguf": "GGUF file", "checkpoint": "JLLM checkpoint"}
# The keys of the JSON, in order. Each is the name of an attribute, but for ``bytes``.
_KEYS = (
    *("path", "kind", "family", "supported", "ok", "problems", "source", "config", "parameters", "bytes"),
    *("bytes_on_disk", "dtypes", "shards", "layers", "outside_layers", "tensors", "tokenizer"),
    *("quantization", "receipt", "left_out"),
)


@dataclass(frozen=True)
class StoredType:
    """Totals of the tensors of one element type."""

    dtype: str
    tensors: int
    parameters: int
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """Report on a model, made without reading its weights.

    Attributes:
        path: the folder or file.
        kind: ``hf`` for a Hugging Face folder, ``gguf`` for a GGUF file, ``checkpoint`` for a JLLM checkpoint.
        family: its ``model_type``, or for a GGUF file of an unknown kind its architecture; None where no file says it.
        config: its architecture; None where it cannot be read, for which ``problems`` give the reason.
        tensors: its tensors, file by file and in each file's order.
        shards: the files that hold them.
        tokenizer: its tokenizer.
        source: the origin of the weights, as far as it is recorded: ``name``, ``revision``, and for a checkpoint the
            other fields of its manifest.
        problems: everything that prevents a conversion, or the loading of a checkpoint.
        quantization: the quantisation of a checkpoint's matrices; None where they are not quantised.
        receipt: the quality receipt of a checkpoint; None where nothing was measured.
        left_out: how many tensors a conversion leaves out, or has left out, by what they are.
    """

    path: Path
    kind: Kind
    family: str | None
    config: ModelConfig | None
    tensors: tuple[StoredTensor, ...]
    shards: tuple[ShardSummary, ...]
    tokenizer: TokenizerSummary
    source: dict[str, Any]
    problems: tuple[str, ...]
    quantization: Quantization | None = None
    receipt: dict[str, Any] | None = None
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether no problems are known."""
        return not self.problems

    @property
    def supported(self) -> bool:
        """Whether models of this family can be converted."""
        return family_of(self.family) is not None

    @property
    def parameters(self) -> int:
        """The number of values in all tensors, without scales."""
        return sum(tensor.parameters for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        """Total bytes of the tensors' data."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bytes_on_disk(self) -> int:
        """Total bytes of the files that hold the tensors, with headers and padding."""
        return sum(shard.nbytes or 0 for shard in self.shards)

    @property
    def layers(self) -> tuple[LayerSummary, ...]:
        """Totals of the tensors of each layer."""
        return self._sums[0]

    @property
    def outside_layers(self) -> LayerSummary:
        """Totals of the tensors that are in no layer: embedding, last norm, output head."""
        return self._sums[1]

    # Cached: ``layers`` and ``outside_layers`` share one pass over all tensors.
    @cached_property
    def _sums(self) -> tuple[tuple[LayerSummary, ...], LayerSummary]:
        return summarise(self.tensors, self.config, _STACKS[self.kind])

    @property
    def dtypes(self) -> tuple[StoredType, ...]:
        """Totals by element type, the one with most bytes first."""
        types: dict[str, list[StoredTensor]] = {}
        for tensor in self.tensors:
            types.setdefault(tensor.dtype, []).append(tensor)
        sums = (
            StoredType(dtype, len(group), sum(each.parameters for each in group), sum(each.nbytes for each in group))
            for dtype, group in types.items()
        )
        return tuple(sorted(sums, key=lambda each: (-each.nbytes, each.dtype)))

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values. Keys are the attributes' names, with ``bytes`` for ``nbytes``.

        ``path, kind, family, supported, ok, problems, source, config, parameters, bytes, bytes_on_disk, dtypes, shards,
        layers, outside_layers, tensors, tokenizer, quantization, receipt, left_out``; sizes are whole numbers of bytes.
        """
        return {key: _plain(getattr(self, "nbytes" if key == "bytes" else key)) for key in _KEYS}

    def text(self, tensors: bool = False) -> str:
        """Render everything as tables for a terminal, identical layers in one row.

        Args:
            tensors: whether to add a row for each tensor.

        Returns:
            The text, without a newline at its end.
        """
        layers = ("layers", "tensors each>", "parameters each>", "size each>", "attention", "feed-forward")
        rows = [(t.name, "x".join(map(str, t.shape)) or "scalar", t.dtype, decimal(t.nbytes)) for t in self.tensors]
        parts = [
            f"{printable(self.path.absolute().name)} ({_KINDS[self.kind]})\n{table(('', ''), self._facts())}",
            table(
                ("stored as", "tensors>", "parameters>", "size>"),
                [(t.dtype, f"{t.tensors:,}", f"{t.parameters:,}", decimal(t.nbytes)) for t in self.dtypes],
            ),
            table(("file", "tensors>", "size>"), file_rows(self.shards)),
            table(layers, layer_rows(self.layers, self.outside_layers)),
            table(("tensor", "shape", "stored as", "size>"), rows if tensors else ()),
            problem_list(self.problems) if self.problems else self._verdict(),
        ]
        return "\n\n".join(part for part in parts if part)

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        # Not the generated one: it would list every tensor.
        verdict = "ok" if self.ok else f"{len(self.problems)} problems"
        numbers = f"{len(self.tensors):,} tensors, {self.parameters:,} parameters, {decimal(self.bytes_on_disk)}"
        return f"<Inspection {self.path}: {_KINDS[self.kind]}, {self.family}, {numbers}, {verdict}>"

    def _facts(self) -> Iterator[tuple[str, str]]:
        """The rows of the first table: what the model is as a whole."""
        supported = "supported" if self.supported else "not supported"
        yield "family", "unknown" if self.family is None else f"{self.family} ({supported})"
        # The hash says nothing to a reader.
        yield from named_values("source", {key: each for key, each in self.source.items() if key != "fingerprint"})
        config = self.config
        if config is not None:
            tied = ", output head tied to the embedding" if config.tie_embeddings else ""
            yield (
                "model",
                f"{config.num_layers} layers, {config.hidden_size:,} wide, {config.vocab_size:,} tokens, "
                f"context {config.context_length:,}{tied}",
            )
        yield "parameters", f"{self.parameters:,}"
        yield "size", decimal(self.bytes_on_disk)
        tokenizer = self.tokenizer
        tokens = f"{'?' if tokenizer.vocabulary is None else f'{tokenizer.vocabulary:,}'} tokens"
        template = "chat template" if tokenizer.chat_template else "no chat template"
        yield "tokenizer", f"{tokens if tokenizer.present else 'none'}, {template}"
        if self.quantization is not None:
            yield "quantized", self.quantization.name
        yield from named_values("receipt", self.receipt or {})
        if self.left_out:
            yield "left out", in_words(self.left_out)

    def _verdict(self) -> str:
        converted = "No problems: it can be converted."
        checked = "No problems in its manifest and config; verify checks the arrays."
        return checked if self.kind == "checkpoint" else converted


def _plain(value: Any) -> Any:
    """Convert dataclasses, tuples and paths to JSON values."""
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"bytes" if name == "nbytes" else name: _plain(each) for name, each in fields.items()}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return {name: _plain(each) for name, each in value.items()} if isinstance(value, dict) else value
