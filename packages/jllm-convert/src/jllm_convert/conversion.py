"""Convert a model: open the source, match its tensors, stream them to the disk, put it in place when it is whole."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jllm_core import checkpoint
from jllm_core.config import ModelConfig
from jllm_core.quantized import Quantization, QuantizationError
from jllm_core.weights import Weights, abstract_weights

from jllm_convert import partial_checkpoint
from jllm_convert.__about__ import __version__
from jllm_convert.errors import ConversionError
from jllm_convert.hub import download, looks_like_id, origin
from jllm_convert.partial_checkpoint import Entries, PartialCheckpoint
from jllm_convert.production import PlainArray, Production, QuantizedMatrix
from jllm_convert.progress import Counter, Progress
from jllm_convert.quantization import choose_grid, matrices_of
from jllm_convert.receipt import Receipt, measure
from jllm_convert.replacing import recover
from jllm_convert.rules import Match, match_tensors
from jllm_convert.sources.base import Source
from jllm_convert.sources.fp8 import FP8
from jllm_convert.sources.gguf import GGUFSource
from jllm_convert.sources.jllm import CheckpointSource
from jllm_convert.sources.safetensors import SafetensorsSource
from jllm_convert.window import DEFAULT_MEMORY, Task, check_memory, run_tasks

DTYPES = checkpoint.DTYPES


@dataclass(frozen=True)
class Conversion:
    """What a conversion made.

    Attributes:
        path: the checkpoint.
        config: the model's architecture.
        manifest: what was written.
        warnings: what a user should know though it is no error, such as a missing tokenizer.
        receipt: what quantising did to the model's predictions; None where nothing was quantised or measured.
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
    revision: str | None = None,
    memory: int = DEFAULT_MEMORY,
    on_progress: Callable[[Progress], None] | None = None,
) -> Conversion:
    """Convert a Hugging Face folder, a GGUF file or another checkpoint to a JLLM checkpoint, without torch.

    The checkpoint is written beside ``dst`` under another name and renamed when it is whole, so ``dst`` holds the old
    checkpoint, the new one or none, whatever happens. A conversion that was broken off is gone on with by the next call
    with the same arguments. Arrays pass through a window of memory, however large the model is.

    Args:
        src: a folder with config.json and safetensors, a ``.gguf`` file, a checkpoint that is to be quantised or to
            have another element type, or a model's name on the Hugging Face hub, which is downloaded first.
        dst: the folder to make.
        dtype: ``"float32"``, ``"bfloat16"``, or None (or ``"keep"``) for the source's own: bfloat16 stays, everything
            else, quantised weights included, becomes float32.
        quantize: ``"int8"`` or ``"int4"`` for the weight matrices; the embedding, the norms and a mixture's router stay
            ``dtype``. The manifest then has a receipt of what that did to the model's predictions.
        overwrite: replace a checkpoint that is at ``dst``. Nothing but a checkpoint is ever replaced.
        group: inputs that share a scale, 32, 64 or 128; None is a whole channel for int8 and 32 for int4, or what the
            source has already (``quantization.choose_grid``).
        offsets: give each group of int4 an offset besides its scale.
        revision: branch, tag or commit of a model on the hub; its main branch when None.
        memory: bytes of weights that are in memory at a time, at least 64 MiB; the libraries take 200 MiB besides.
        on_progress: called as bytes are downloaded and then as arrays are written, from one thread at a time.

    Raises:
        ConversionError: with everything that is wrong with the source or the destination.
        CheckpointError: the source is a checkpoint that is damaged.
    """
    dst = Path(dst)
    if dtype not in (None, "keep", *DTYPES):
        raise ConversionError(f"dtype must be one of {', '.join(DTYPES)} or keep, got {dtype!r}")
    check_memory(memory)
    recover(dst)
    _check_destination(dst, overwrite)
    src = local_source(src, revision, on_progress)
    source = open_source(src)
    if isinstance(source, CheckpointSource) and dtype in (None, "keep") and quantize is None:
        raise ConversionError(f"{src} is a JLLM checkpoint already; say what to make of it (dtype or quantize)")
    plan = plan_conversion(source, dtype, quantize, group, offsets)
    _check_space(dst, plan.productions)
    with partial_checkpoint.begin(dst, plan.job(source)) as made:
        folder = made.folder
        (folder / checkpoint.MODEL_FILE).write_text(plan.config.to_json(), encoding="utf-8")
        generation = json.dumps(source.generation_config(), indent=2)
        (folder / checkpoint.GENERATION_FILE).write_text(generation + "\n", encoding="utf-8")
        tokenizer = source.write_tokenizer(folder)
        entries = write_arrays(made, plan.productions, memory, on_progress)
        receipt = None if plan.grid is None else _receipt(plan, folder, memory)
        manifest = checkpoint.Manifest(
            dtype=plan.dtype.name,
            arrays=entries,
            source=_described_source(src, source),
            quantization=plan.grid,
            receipt=None if receipt is None else receipt.as_dict(),
            created_by=f"jllm-convert {__version__}",
        )
        manifest.write(folder)
    warnings: tuple[str, ...] = ()
    if not tokenizer:
        warnings += (f"{src.name} has no tokenizer.json: the model will take token ids only",)
    if plan.grid is not None and receipt is None:
        warnings += ("without a tokenizer nothing was read to measure what quantising did: there is no receipt",)
    return Conversion(dst, plan.config, manifest, warnings, receipt)


def local_source(
    src: str | Path, revision: str | None = None, on_progress: Callable[[Progress], None] | None = None
) -> Path:
    """The folder or file of a source; a model on the hub is downloaded, if it is not there already.

    Raises:
        ConversionError: it cannot be had, or a revision is asked for of something that has none.
    """
    if not looks_like_id(str(src)):
        if revision is not None:
            raise ConversionError(f"a revision is for a model on the hub (owner/name), and {src} is none")
        return Path(src)
    tell = None if on_progress is None else lambda done, total: on_progress(Progress(0, 1, done, total))
    try:
        return download(str(src), revision=revision, on_progress=tell)
    except ConversionError as error:
        raise ConversionError(
            f"there is nothing at {src} on this machine, and as a model of the hub: {error}"
        ) from error


def _described_source(src: Path, source: Source) -> dict[str, object]:
    """What the manifest keeps of a source: name, kind, element type if it is a plain one, and where it is from."""
    described: dict[str, object] = {"name": src.resolve().name, "kind": source.naming}
    stored = {tensor.stored for tensor in source.tensors.values()}
    if len(stored) == 1 and stored <= {"F32", "F16", "BF16"}:
        described["dtype"] = next(iter(source.tensors.values())).dtype.name
    published = origin(src)
    return described if published is None else {**described, "name": published["repo"], **published}


def open_source(path: Path) -> Source:
    """Open a source by what is at the path.

    Raises:
        ConversionError: nothing is there, or nothing that can be converted.
    """
    if path.is_dir():
        if checkpoint.is_checkpoint(path):
            return CheckpointSource(path)
        return SafetensorsSource(path)
    if not path.exists():
        raise ConversionError(
            f"there is nothing at {path}; expected a Hugging Face folder, a .gguf file or a model's name on the hub"
        )
    if path.suffix.lower() != ".gguf":
        raise ConversionError(f"{path} is neither a folder nor a .gguf file")
    return GGUFSource(path)


@dataclass(frozen=True)
class Plan:
    """What a conversion will write, decided before anything is written.

    Attributes:
        config: the architecture.
        dtype: element type of what is not quantised.
        grid: how the matrices are quantised, or None.
        infos: the tree of descriptions of what is stored.
        productions: every array of the model on its way there.
    """

    config: ModelConfig
    dtype: np.dtype
    grid: Quantization | None
    infos: Weights
    matches: Sequence[Match]
    productions: Sequence[Production]

    def job(self, source: Source) -> str:
        """What tells this conversion from all others: where two have the same, one can go on with the other's files."""
        stored = [(name, str(info)) for each in self.productions for name, info in each.infos.items()]
        text = json.dumps([__version__, checkpoint.FORMAT_VERSION, source.fingerprint(), stored, str(self.grid)])
        return hashlib.sha256(text.encode()).hexdigest()


def plan_conversion(
    source: Source,
    dtype: str | None = None,
    quantize: str | None = None,
    group: int | None = None,
    offsets: bool = False,
) -> Plan:
    """Match a source's tensors and decide what is stored of each.

    Raises:
        ConversionError: with everything that is wrong with the source, or with what is asked for.
    """
    config = source.config()
    matches = match_tensors(source, config)
    target = np.dtype(_kept_dtype(matches) if dtype in (None, "keep") else dtype)
    grid = _grid(quantize, group, offsets, matches, config)
    infos = _described(config, target, grid, source)
    matrices = matrices_of(infos)
    productions: list[Production] = [
        PlainArray(match, target)
        if grid is None or match.array not in matrices
        else QuantizedMatrix(match, matrices[match.array], grid)
        for match in matches
    ]
    return Plan(config, target, grid, infos, matches, productions)


def _check_destination(dst: Path, overwrite: bool) -> None:
    if not dst.exists() and not dst.is_symlink():
        return
    if dst.is_dir() and not any(dst.iterdir()):
        return
    if not checkpoint.is_checkpoint(dst):
        raise ConversionError(f"{dst} exists and is not a JLLM checkpoint, so it is not replaced; choose another name")
    if not overwrite:
        raise ConversionError(f"{dst} exists; choose another name, or replace it with overwrite (--overwrite)")


def _check_space(dst: Path, productions: Sequence[Production]) -> None:
    """Refuse a conversion that the disk has no room for. What an earlier one has written counts as room."""
    parent = next(folder for folder in dst.absolute().parents if folder.exists())
    partial_folder = dst.absolute().with_name(f".{dst.name}.partial")
    there = sum(path.stat().st_size for path in partial_folder.rglob("*") if path.is_file())
    needed = sum(info.nbytes for production in productions for info in production.infos.values())
    free = shutil.disk_usage(parent).free + there
    if needed > free:
        raise ConversionError(
            f"{dst} needs {needed:,} bytes, {parent} has {free:,} free; make room, or convert to another disk"
        )


def _kept_dtype(matches: list[Match]) -> np.dtype:
    """The type that "keep" means: bfloat16 if most weights have it or FP8, else float32 (which holds all others)."""
    weight = dict.fromkeys(DTYPES, 0)
    for match in matches:
        tensor = match.parts[0].tensor
        # Eight bits and the scales that publishers give them are of a model in bfloat16.
        name = "bfloat16" if tensor.stored == FP8 else tensor.dtype.name
        weight[name if name in weight else "float32"] += match.info.size
    return np.dtype(max(DTYPES, key=lambda name: weight[name]))


def _grid(
    quantize: str | None, group: int | None, offsets: bool, matches: list[Match], config: ModelConfig
) -> Quantization | None:
    if quantize is None:
        if group is not None or offsets:
            raise ConversionError("group and offsets say how to quantise; give quantize as well (int8 or int4)")
        return None
    matrices = matrices_of(abstract_weights(config, quantization=Quantization(8)))
    return choose_grid(quantize, group, offsets, [match for match in matches if match.array in matrices])


def _described(config: ModelConfig, dtype: np.dtype, grid: Quantization | None, source: Source) -> Weights:
    try:
        return abstract_weights(config, dtype, grid)
    except QuantizationError as error:
        raise ConversionError(f"{source.path.name} cannot be quantised so: {error}") from error


def write_arrays(
    made: PartialCheckpoint,
    productions: Sequence[Production],
    memory: int,
    on_progress: Callable[[Progress], None] | None = None,
) -> dict[str, dict[str, object]]:
    """Write what is to be stored, and keep what an earlier conversion has written of it if its hashes are right.

    Returns:
        The manifest's entries, in the order of the productions.
    """
    stored = [name for production in productions for name in production.infos]
    if not (made.weights / "_METADATA").exists():
        for unfinished in made.folder.glob(f"{checkpoint.WEIGHTS_FOLDER}*"):
            shutil.rmtree(unfinished)
        checkpoint.write_orbax_metadata(made.folder, stored)
    total = sum(info.nbytes for production in productions for info in production.infos.values())
    counter = Counter(len(productions), total, on_progress)
    entries: Entries = {}

    def write(production: Production, stopped: Callable[[], bool]) -> None:
        done = made.done.get(production.array)
        if done is not None and _still_there(made.weights, production, done):
            entries.update(done)
            counter.add(sum(info.nbytes for info in production.infos.values()), arrays=1)
            return
        own = _write(made.weights, production, limit, counter, stopped)
        if not stopped():
            made.note(production.array, own)
            entries.update(own)
            counter.add(0, arrays=1)

    limit = memory // 4
    run_tasks([Task(each.held(limit), partial(write, each)) for each in productions], memory)
    return {name: entries[name] for name in stored}


def _write(weights: Path, production: Production, limit: int, counter: Counter, stopped: Callable[[], bool]) -> Entries:
    """Write one production's arrays, and give the manifest's entries of them."""
    stores = {name: checkpoint.ArrayStore.create(weights, name, info) for name, info in production.infos.items()}
    hashes = {name: _Hash(store) for name, store in stores.items()}
    for name, box, values in production.pieces(limit):
        if stopped():
            return {}
        stores[name].write(box, values)
        hashes[name].update(box, values)
        counter.add(values.nbytes)
    return {
        name: {"shape": list(store.shape), "dtype": store.dtype.name, "sha256": hashes[name].hexdigest()}
        for name, store in stores.items()
    }


class _Hash:
    """The hash of an array's bytes in C order: as the pieces pass if they come in that order, else from the disk."""

    def __init__(self, store: checkpoint.ArrayStore) -> None:
        self._store, self._hashed, self._rows = store, hashlib.sha256(), 0

    def update(self, box: checkpoint.Box, values: np.ndarray) -> None:
        next_rows = box[1:] == checkpoint.whole(self._store.shape[1:]) and (not box or box[0].start == self._rows)
        if next_rows:
            self._hashed.update(values.reshape(-1).view(np.uint8).data)
            self._rows = box[0].stop if box else 1

    def hexdigest(self) -> str:
        complete = self._rows == (self._store.shape[0] if self._store.shape else 1)
        return self._hashed.hexdigest() if complete else self._store.digest()


def _still_there(weights: Path, production: Production, done: Entries) -> bool:
    """Whether the arrays that a journal says are done are on the disk as it has them."""
    try:
        return set(done) == set(production.infos) and all(
            not list((store := checkpoint.ArrayStore.open(weights, name)).damage())
            and store.digest() == entry["sha256"]
            for name, entry in done.items()
        )
    except (checkpoint.CheckpointError, OSError):
        return False


def _receipt(plan: Plan, folder: Path, memory: int) -> Receipt | None:
    by_name = {match.array: match for match in plan.matches}
    stores: dict[str, checkpoint.ArrayStore] = {}

    def reference(name: str, box: checkpoint.Box | None = None) -> np.ndarray:
        return by_name[name].read(box)

    def quantized(name: str, box: checkpoint.Box | None = None) -> np.ndarray:
        if name not in stores:
            stores[name] = checkpoint.ArrayStore.open(folder / checkpoint.WEIGHTS_FOLDER, name)
        return stores[name].read(box)

    return measure(plan.config, folder, plan.infos, reference, quantized, memory)
