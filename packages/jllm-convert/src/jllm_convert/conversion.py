"""Conversion of a model to a JLLM checkpoint: ``convert`` and its result.

The steps: open the source, match its tensors to the model's arrays, stream them to a folder beside the destination,
and rename that folder when it is complete.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from jllm_core import checkpoint
from jllm_core.config import ModelConfig
from jllm_core.errors import JLLMError
from rich.filesize import decimal

from jllm_convert.__about__ import __version__
from jllm_convert.errors import ConversionError
from jllm_convert.files.model_folder import UNREAD_TEMPLATE_FILE
from jllm_convert.files.paths import checked_path
from jllm_convert.files.tokenizer_ids import ids_beyond
from jllm_convert.hub.downloading import local_path
from jllm_convert.progress_bar import reporting
from jllm_convert.quality.receipt import Receipt, measure, text_ids
from jllm_convert.shards.hub_source import open_hub_source
from jllm_convert.shards.streamed_writing import HUB_FOLDER, ShardByShard
from jllm_convert.sources.base import NONFINITE
from jllm_convert.sources.checkpoint import CheckpointSource
from jllm_convert.sources.left_out import in_words
from jllm_convert.sources.opening import open_source
from jllm_convert.sources.peft_adapter import ADAPTER, AdapterSource
from jllm_convert.writing import partial_checkpoint
from jllm_convert.writing.delivery import Delivery, LocalDelivery
from jllm_convert.writing.destination import check_destination
from jllm_convert.writing.memory_budget import DEFAULT_MEMORY, check_memory
from jllm_convert.writing.nonfinite_numbers import NonfiniteNumbers
from jllm_convert.writing.plan import ConversionPlan, plan_conversion
from jllm_convert.writing.progress import Progress, byte_progress
from jllm_convert.writing.provenance import FINGERPRINT, described_source
from jllm_convert.writing.writer import ArrayWriter


@dataclass(frozen=True)
class Conversion:
    """Result of a conversion.

    Attributes:
        path: the checkpoint.
        config: the model's architecture.
        manifest: the arrays that were written, and where they come from.
        warnings: what a user should know though it is no error, such as a missing tokenizer.
        receipt: the quality receipt, of what quantising (or float16) did to the model's predictions; None where nothing
            was quantised or measured.
        is_new: whether this call made it; False where ``exist_ok`` found it.
    """

    path: Path
    config: ModelConfig
    manifest: checkpoint.Manifest
    warnings: tuple[str, ...]
    receipt: Receipt | None = None
    is_new: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of the stored arrays."""
        entries = self.manifest.arrays.values()
        return sum(math.prod(each["shape"]) * checkpoint.dtype_named(each["dtype"]).itemsize for each in entries)

    @property
    def stored_as(self) -> str:
        """The type of the weights: ``bfloat16``, or ``int4-g32 and bfloat16`` where the matrices are quantised."""
        grid = self.manifest.quantization
        return self.manifest.dtype if grid is None else f"{grid.name} and {self.manifest.dtype}"

    def __str__(self) -> str:
        arrays = len(self.manifest.arrays)
        return f"{self.path}: {arrays} arrays, {self.stored_as}, {self.config.model_type}, {decimal(self.nbytes)}"

    def __repr__(self) -> str:
        # Not the generated one: the manifest lists every array, the config every field.
        return f"<Conversion {self}>"


def convert(
    src: str | Path,
    dst: str | Path,
    dtype: Literal["keep"] | checkpoint.Dtype | None = None,
    quantize: Literal["int8", "int4"] | None = None,
    overwrite: bool = False,
    *,
    adapter: str | Path | None = None,
    exist_ok: bool = False,
    group: Literal[32, 64, 128] | None = None,
    offsets: bool = False,
    embedding: Literal["keep", "int8"] | None = None,
    receipt: bool = True,
    revision: str | None = None,
    ignore_fields: Sequence[str] = (),
    allow_nonfinite: bool = False,
    memory: int = DEFAULT_MEMORY,
    stream_from_hub: bool = False,
    progress: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Conversion:
    """Convert a Hugging Face folder, a GGUF file or another checkpoint to a JLLM checkpoint, without torch.

    The checkpoint is written beside ``dst`` under another name and renamed when it is complete, so ``dst`` holds the
    old checkpoint, the new one or none, whatever happens. The next call with the same arguments resumes a conversion
    that was interrupted. Arrays pass through memory within a budget, however large the model is.

    Args:
        src: a folder with config.json and safetensors, a ``.gguf`` file, a checkpoint to quantise or to store in
            another element type, or a model's name on the Hugging Face hub, which is downloaded first.
        dst: the folder to create.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or None (or ``"keep"``) for the source's own: bfloat16
            stays, everything else, quantised weights included, becomes float32. float16 is for GPUs without bfloat16
            (T4); a model whose weights or activations it cannot hold is refused.
        quantize: ``"int8"`` or ``"int4"`` for the weight matrices; the norms, a mixture's router and, unless
            ``embedding`` says otherwise, the embedding stay ``dtype``. The manifest then has a quality receipt: what
            quantising did to the model's predictions.
        overwrite: replace a checkpoint that is at ``dst``. Nothing but a checkpoint is ever replaced.
        adapter: a folder of PEFT (adapter_config.json, adapter_model.safetensors) with a LoRA of this model, which is
            merged into the weights: in float32, rounded once to the type that they are stored in.
        exist_ok: do nothing where ``dst`` is this conversion already: of the same files (names, sizes, times of change,
            headers) or the same commit of the hub, stored in the same types. Where another process is converting to
            ``dst``, wait for it. Anything else that is at ``dst`` is an error, unless ``overwrite`` is given too.
        group: how many inputs share a scale: 32, 64 or 128; None is a whole channel for int8 and 32 for int4, or what
            the source has already (``quantization.choose_grid``).
        offsets: give each group of int4 an offset besides its scale.
        embedding: with ``quantize``, ``"int8"`` stores the embedding, which is the output head too where it is tied, in
            8 bits with a scale a row; None (or ``"keep"``) leaves it as it is.
        receipt: whether to measure the quality receipt of a model that is quantised or stored in float16, which takes
            longer than the conversion.
        revision: branch, tag or commit of a model on the hub; its main branch when None.
        ignore_fields: fields of config.json, or keys of a GGUF file's metadata, that this version does not know and
            would refuse, and that do not change the model's output, as you say. The manifest records them.
        allow_nonfinite: take weights that are NaN or infinite, or become so in ``dtype``, and activations that become
            so in float16, which are an error otherwise: such a model gives no answers in most cases.
        memory: bytes of weights to hold in memory at a time, from 64 MiB on; the libraries take 150 to 350 MiB besides.
        stream_from_hub: convert a model on the hub while it is downloaded, and delete each of its files as soon as
            nothing more is needed of it: the disk holds the checkpoint and a file or two, and nothing goes to the hub's
            cache. A GGUF file, and a model in one safetensors file, are one such file. With a receipt that is
            interrupted, the files that it had read are downloaded again.
        progress: draw a bar on standard error, or in a notebook's cell, and print the result at the end.
        on_progress: called as bytes are downloaded, as arrays are written and as the receipt is measured, from one
            thread at a time; ``Progress.step`` says which.

    Raises:
        ConversionError: everything that is wrong with the source or the destination.
        CheckpointError: the source is a damaged checkpoint.
    """
    dst = checked_path(dst)
    if dtype not in (None, "keep", *checkpoint.DTYPES):
        raise ConversionError(f"dtype must be one of {', '.join(checkpoint.DTYPES)} or keep, got {dtype!r}")
    check_memory(memory)
    # Asked again under the lock; here, so that nobody waits for a download in vain.
    if not exist_ok:
        check_destination(dst, overwrite)
    arguments = _Arguments(
        dst=dst,
        dtype=dtype,
        quantize=quantize,
        group=group,
        offsets=offsets,
        embedding=embedding,
        overwrite=overwrite,
        exist_ok=exist_ok,
        receipt=receipt,
        ignore_fields=tuple(ignore_fields),
        allow_nonfinite=allow_nonfinite,
        memory=memory,
        adapter=None if adapter is None else AdapterSource(checked_path(adapter)),
    )
    with reporting("converting", progress, on_progress) as report:
        if stream_from_hub:
            # Locked from the start: the source's files are beside the checkpoint's, and one process may write them.
            hub = partial_checkpoint.partial_folder(dst) / HUB_FOLDER
            with (
                partial_checkpoint.locked(dst, wait=exist_ok),
                open_hub_source(str(src), revision, hub, ignore_fields, lambda nbytes: None) as source,
            ):
                made = _convert(arguments, source.path, ShardByShard(source), report)
        else:
            src = local_path(src, revision, byte_progress(report))
            made = _convert(arguments, src, LocalDelivery(open_source(src, ignore_fields)), report)
    if progress:
        print(made, file=sys.stderr)
    return made


@dataclass(frozen=True)
class _Arguments:
    """What ``convert`` was asked for."""

    dst: Path
    dtype: str | None
    quantize: str | None
    group: int | None
    offsets: bool
    embedding: str | None
    overwrite: bool
    exist_ok: bool
    receipt: bool
    ignore_fields: tuple[str, ...]
    allow_nonfinite: bool
    memory: int
    adapter: AdapterSource | None


def _convert(
    arguments: _Arguments, src: Path, delivery: Delivery, report: Callable[[Progress], None] | None
) -> Conversion:
    """Convert an open source, which is at ``src``."""
    dst, source, allow_nonfinite = arguments.dst, delivery.source, arguments.allow_nonfinite
    same = arguments.dtype in (None, "keep") and arguments.quantize is None and arguments.adapter is None
    if isinstance(source, CheckpointSource) and same:
        raise ConversionError(
            f"{src} is a JLLM checkpoint already; say what to make of it (dtype, quantize or adapter)"
        )
    # Everything that can be refused is refused here, before a byte is written.
    nonfinite = NonfiniteNumbers()
    how = (arguments.dtype, arguments.quantize, arguments.group, arguments.offsets, arguments.embedding)
    plan = plan_conversion(source, *how, nonfinite, arguments.adapter)
    described = described_source(src, source, plan, arguments.ignore_fields)
    # Without the lock first: what is there already may be where nothing can be written.
    made = _existing(dst, described, plan, allow_nonfinite) if arguments.exist_ok else None
    if made is not None:
        return made
    with delivery.locked(dst, wait=arguments.exist_ok):
        made = _existing(dst, described, plan, allow_nonfinite) if arguments.exist_ok else None
        if made is None:
            check_destination(dst, arguments.overwrite, arguments.exist_ok)
            delivery.check_space(dst, plan, _is_measured(arguments, plan))
            made = _write(arguments, delivery, plan, described, nonfinite, report)
            made = replace(made, warnings=made.warnings + _taken_as_asked(arguments.ignore_fields, nonfinite))
    return made


def _is_measured(arguments: _Arguments, plan: ConversionPlan) -> bool:
    """Whether there is something for a receipt to measure, and it is wanted."""
    return arguments.receipt and (plan.grid is not None or plan.dtype == np.float16)


def _write(
    arguments: _Arguments,
    delivery: Delivery,
    plan: ConversionPlan,
    described: dict[str, object],
    nonfinite: NonfiniteNumbers,
    report: Callable[[Progress], None] | None,
) -> Conversion:
    """Write a planned conversion to its place, which is locked; fail on ``nonfinite`` numbers that are not allowed."""
    dst, memory, allow_nonfinite = arguments.dst, arguments.memory, arguments.allow_nonfinite
    source = delivery.source

    def check_numbers() -> None:
        if (numbers := nonfinite.description()) and not allow_nonfinite:
            raise ConversionError(f"{numbers}. {nonfinite.advice}")

    with partial_checkpoint.begin(dst, plan.fingerprint(source), delivery.kept) as made, delivery.handed_over():
        folder = made.folder
        (folder / checkpoint.MODEL_FILE).write_text(plan.config.to_json(), encoding="utf-8")
        generation = json.dumps(source.generation_config(), indent=2)
        (folder / checkpoint.GENERATION_FILE).write_text(generation + "\n", encoding="utf-8")
        tokenizer = source.write_tokenizer(folder)
        unread = (source.path / UNREAD_TEMPLATE_FILE).is_file()  # asked while the source is there
        half, measured = plan.dtype == np.float16, _is_measured(arguments, plan)
        # Before the weights: a tokenizer that cannot be used would otherwise cost the whole conversion.
        ids = text_ids(folder / "tokenizer.json", plan.config) if measured else None
        writer = ArrayWriter(made, plan.jobs, memory, nonfinite, allow_nonfinite)
        delivery.start(writer, plan, ids is not None, report, check_numbers)
        receipt = None
        if ids is not None:
            receipt = _receipt(plan, ids, folder, memory, delivery.receipt_report(report), delivery.ready)
        delivery.finish()
        numbers = nonfinite.description()
        if receipt is not None and receipt.overflows and not allow_nonfinite:
            raise ConversionError(_overflow(receipt))
        manifest = checkpoint.Manifest(
            dtype=plan.dtype.name,
            arrays=writer.entries,
            source={**described, **({NONFINITE: numbers} if numbers else {})},
            quantization=plan.grid,
            receipt=None if receipt is None else receipt.as_dict(),
            created_by=f"jllm-convert {__version__}",
        )
        # Last: a folder with a manifest is taken for a checkpoint.
        manifest.write(folder)
    warnings: tuple[str, ...] = ()
    # Not the path's: of a model on the hub that is a commit.
    name = described["name"]
    if source.left_out:
        warnings += (f"{name}: left out {in_words(source.left_out)}",)
    if not tokenizer:
        warnings += (f"{name} has no tokenizer.json: the model will take token ids only",)
    elif unread:
        warnings += (
            f"{name}/{UNREAD_TEMPLATE_FILE} is not read: it is for processors of images and sound, and a "
            "tokenizer's chat template is in chat_template.jinja or tokenizer_config.json. Where those have none, put "
            "its text into chat_template.jinja and convert again",
        )
    if measured and receipt is None:
        what = "quantising" if plan.grid is not None else "float16"
        warnings += (f"without a tokenizer nothing was read to measure what {what} did: there is no receipt",)
    if half and receipt is None:
        warnings += ("whether the activations fit into float16 was not measured",)
    elif receipt is not None and receipt.nearly_overflows:
        warnings += (f"{receipt.largest_words}; other texts may have larger ones: bfloat16 has no such limit",)
    if beyond := ids_beyond(dst, plan.config.vocab_size):
        warnings += (beyond,)
    return Conversion(dst, plan.config, manifest, warnings, receipt)


def _overflow(receipt: Receipt) -> str:
    """The error of a model whose activations overflow."""
    return (
        f"the model's activations overflow in float16: {receipt.largest_words}. Store it in another type (--dtype "
        "bfloat16 or float32), or take it as it is with --allow-nonfinite (allow_nonfinite)"
    )


def _taken_as_asked(ignored: Sequence[str], nonfinite: NonfiniteNumbers) -> tuple[str, ...]:
    """Warnings of what would be an error if the user had not asked to take it."""
    warnings = [
        f"{name} was ignored, as asked: this version does not know whether it changes the output" for name in ignored
    ]
    numbers = nonfinite.description()
    return (*warnings, *([f"{numbers}; they were taken as they are, as asked"] if numbers else []))


def _existing(
    dst: Path, described: dict[str, object], plan: ConversionPlan, allow_nonfinite: bool
) -> Conversion | None:
    """The conversion that is at ``dst``, if it is one of this source by this plan.

    Raises:
        ConversionError: it is, and has numbers that this conversion would refuse.
    """
    if not checkpoint.is_checkpoint(dst):
        return None
    try:
        manifest, config = checkpoint.read_manifest(dst), checkpoint.read_config(dst)
        receipt = None if manifest.receipt is None else Receipt(**manifest.receipt)
    except (JLLMError, TypeError):  # damaged, or of another version: not this one
        return None
    # A commit says more than the times of a download's files. A repository may have several GGUF files.
    same = (ADAPTER, *(("repo", "revision", "file") if "revision" in described else (FINGERPRINT,)))
    if any(manifest.source.get(name) != described.get(name) for name in same):
        return None
    if (manifest.dtype, manifest.quantization, config) != (plan.dtype.name, plan.grid, plan.config):
        return None
    if (numbers := manifest.source.get(NONFINITE)) and not allow_nonfinite:
        raise ConversionError(
            f"{dst} is this conversion, made with --allow-nonfinite: {numbers}. Take it as it is with "
            "--allow-nonfinite (allow_nonfinite), or remove it and convert other files"
        )
    if receipt is not None and receipt.overflows and not allow_nonfinite:
        raise ConversionError(f"{dst} is this conversion, made with --allow-nonfinite: {_overflow(receipt)}")
    return Conversion(dst, config, manifest, (), receipt, is_new=False)


def _receipt(
    plan: ConversionPlan,
    ids: np.ndarray,
    folder: Path,
    memory: int,
    report: Callable[[Progress], None] | None,
    before: Callable[[str], None],
) -> Receipt:
    """Measure the receipt of the arrays in ``folder`` on token ids ``[T]``; ``before`` is called before each read."""
    by_name = {match.array: match for match in plan.matches}
    stores: dict[str, checkpoint.ArrayStore] = {}

    def reference(name: str, box: checkpoint.Box | None = None) -> np.ndarray:
        before(name)
        return by_name[name].read(box)

    # Stores stay open: the receipt reads each array slab by slab.
    def quantized(name: str, box: checkpoint.Box | None = None) -> np.ndarray:
        before(name)
        if name not in stores:
            stores[name] = checkpoint.ArrayStore.open(folder / checkpoint.WEIGHTS_FOLDER, name)
        return stores[name].read(box)

    return measure(plan.config, ids, plan.infos, reference, quantized, memory, report)
