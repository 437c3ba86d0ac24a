"""Conversion of a model to a JLLM checkpoint: ``convert`` and its result.

The steps: open the source, match its tensors to the model's arrays, stream them to a folder beside the destination,
and rename that folder when it is complete.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jllm_core import checkpoint
from jllm_core.config import ModelConfig

from jllm_convert.__about__ import __version__
from jllm_convert.errors import ConversionError
from jllm_convert.files.disk_space import free_space
from jllm_convert.hub.downloading import local_path, origin
from jllm_convert.quality.receipt import Receipt, measure, text_ids
from jllm_convert.sources.base import Source
from jllm_convert.sources.checkpoint import CheckpointSource
from jllm_convert.sources.opening import open_source
from jllm_convert.writing import partial_checkpoint
from jllm_convert.writing.atomic_rename import recover
from jllm_convert.writing.memory_budget import DEFAULT_MEMORY, check_memory
from jllm_convert.writing.plan import ConversionPlan, plan_conversion
from jllm_convert.writing.progress import Progress, byte_progress
from jllm_convert.writing.tensor_jobs import TensorJob, stored_nbytes
from jllm_convert.writing.writer import write_arrays


@dataclass(frozen=True)
class Conversion:
    """Result of a conversion.

    Attributes:
        path: the checkpoint.
        config: the model's architecture.
        manifest: the arrays that were written, and where they come from.
        warnings: what a user should know though it is no error, such as a missing tokenizer.
        receipt: the quality receipt, of what quantising did to the model's predictions; None where nothing was
            quantised or measured.
    """

    path: Path
    config: ModelConfig
    manifest: checkpoint.Manifest
    warnings: tuple[str, ...]
    receipt: Receipt | None = None


def convert(
    src: str | Path,
    dst: str | Path,
    dtype: str | None = None,
    quantize: str | None = None,
    overwrite: bool = False,
    *,
    group: int | None = None,
    offsets: bool = False,
    embedding: str | None = None,
    revision: str | None = None,
    memory: int = DEFAULT_MEMORY,
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
        dtype: ``"float32"``, ``"bfloat16"``, or None (or ``"keep"``) for the source's own: bfloat16 stays, everything
            else, quantised weights included, becomes float32.
        quantize: ``"int8"`` or ``"int4"`` for the weight matrices; the norms, a mixture's router and, unless
            ``embedding`` says otherwise, the embedding stay ``dtype``. The manifest then has a quality receipt: what
            quantising did to the model's predictions.
        overwrite: replace a checkpoint that is at ``dst``. Nothing but a checkpoint is ever replaced.
        group: how many inputs share a scale: 32, 64 or 128; None is a whole channel for int8 and 32 for int4, or what
            the source has already (``quantization.choose_grid``).
        offsets: give each group of int4 an offset besides its scale.
        embedding: with ``quantize``, ``"int8"`` stores the embedding, which is the output head too where it is tied, in
            8 bits with a scale a row; None (or ``"keep"``) leaves it as it is.
        revision: branch, tag or commit of a model on the hub; its main branch when None.
        memory: bytes of weights to hold in memory at a time, at least 64 MiB; the libraries take 200 MiB besides.
        on_progress: called as bytes are downloaded and then as arrays are written, from one thread at a time.

    Raises:
        ConversionError: everything that is wrong with the source or the destination.
        CheckpointError: the source is a damaged checkpoint.
    """
    dst = Path(dst)
    if dtype not in (None, "keep", *checkpoint.DTYPES):
        raise ConversionError(f"dtype must be one of {', '.join(checkpoint.DTYPES)} or keep, got {dtype!r}")
    check_memory(memory)
    # First: after a kill in a replacement, the old checkpoint has another name, and ``dst`` would look free.
    recover(dst)
    _check_destination(dst, overwrite)
    src = local_path(src, revision, byte_progress(on_progress))
    source = open_source(src)
    if isinstance(source, CheckpointSource) and dtype in (None, "keep") and quantize is None:
        raise ConversionError(f"{src} is a JLLM checkpoint already; say what to make of it (dtype or quantize)")
    # Everything that can be refused is refused here, before a byte is written.
    plan = plan_conversion(source, dtype, quantize, group, offsets, embedding)
    _check_space(dst, plan.jobs)
    with partial_checkpoint.begin(dst, plan.fingerprint(source)) as made:
        folder = made.folder
        (folder / checkpoint.MODEL_FILE).write_text(plan.config.to_json(), encoding="utf-8")
        generation = json.dumps(source.generation_config(), indent=2)
        (folder / checkpoint.GENERATION_FILE).write_text(generation + "\n", encoding="utf-8")
        tokenizer = source.write_tokenizer(folder)
        # Before the weights: a tokenizer that cannot be used would otherwise cost the whole conversion.
        ids = None if plan.grid is None else text_ids(folder / "tokenizer.json", plan.config)
        entries = write_arrays(made, plan.jobs, memory, on_progress)
        receipt = None if ids is None else _receipt(plan, ids, folder, memory)
        manifest = checkpoint.Manifest(
            dtype=plan.dtype.name,
            arrays=entries,
            source=_described_source(src, source),
            quantization=plan.grid,
            receipt=None if receipt is None else receipt.as_dict(),
            created_by=f"jllm-convert {__version__}",
        )
        # Last: a folder with a manifest is taken for a checkpoint.
        manifest.write(folder)
    warnings: tuple[str, ...] = ()
    if not tokenizer:
        warnings += (f"{src.name} has no tokenizer.json: the model will take token ids only",)
    if plan.grid is not None and receipt is None:
        warnings += ("without a tokenizer nothing was read to measure what quantising did: there is no receipt",)
    return Conversion(dst, plan.config, manifest, warnings, receipt)


def _described_source(src: Path, source: Source) -> dict[str, object]:
    """The manifest's entry of a source: name, kind, element type if there is one plain one, repository and commit."""
    described: dict[str, object] = {"name": src.resolve().name, "kind": source.naming}
    # Export returns to this type. Of quantised or mixed types it could not restore the bits, so none is recorded.
    stored = {tensor.stored for tensor in source.tensors.values()}
    if len(stored) == 1 and stored <= {"F32", "F16", "BF16"}:
        described["dtype"] = next(iter(source.tensors.values())).dtype.name
    # A folder in the hub's cache is named by a commit, so the repository's name is the better one.
    published = origin(src)
    return described if published is None else {**described, "name": published["repo"], **published}


def _check_destination(dst: Path, overwrite: bool) -> None:
    """Refuse to replace anything but a checkpoint, and a checkpoint without ``overwrite``."""
    if not dst.exists() and not dst.is_symlink():
        return
    if dst.is_dir() and not any(dst.iterdir()):
        return
    if not checkpoint.is_checkpoint(dst):
        raise ConversionError(f"{dst} exists and is not a JLLM checkpoint, so it is not replaced; choose another name")
    if not overwrite:
        raise ConversionError(f"{dst} exists; choose another name, or replace it with overwrite (--overwrite)")


def _check_space(dst: Path, jobs: Sequence[TensorJob]) -> None:
    """Refuse a conversion that the disk has no room for. Files of an interrupted one count as room."""
    written = partial_checkpoint.partial_folder(dst)
    # Their space is given back, or they are resumed and need not be written again.
    there = sum(path.stat().st_size for path in written.rglob("*") if path.is_file())
    needed = stored_nbytes(jobs)
    parent, free = free_space(dst.absolute().parent)
    free += there
    if needed > free:
        raise ConversionError(
            f"{dst} needs {needed:,} bytes, {parent} has {free:,} free; make room, or convert to another disk"
        )


def _receipt(plan: ConversionPlan, ids: np.ndarray, folder: Path, memory: int) -> Receipt:
    """Measure the quality receipt of the quantised arrays in ``folder`` on token ids ``[T]``."""
    by_name = {match.array: match for match in plan.matches}
    stores: dict[str, checkpoint.ArrayStore] = {}

    def reference(name: str, box: checkpoint.Box | None = None) -> np.ndarray:
        return by_name[name].read(box)

    # Stores stay open: the receipt reads each array slab by slab.
    def quantized(name: str, box: checkpoint.Box | None = None) -> np.ndarray:
        if name not in stores:
            stores[name] = checkpoint.ArrayStore.open(folder / checkpoint.WEIGHTS_FOLDER, name)
        return stores[name].read(box)

    return measure(plan.config, ids, plan.infos, reference, quantized, memory)
