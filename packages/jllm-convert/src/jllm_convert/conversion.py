"""Convert a model: open the source, match its tensors, write the checkpoint, put it in place when it is whole."""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock

import numpy as np
from jllm_core import checkpoint
from jllm_core.array_info import ArrayInfo
from jllm_core.config import ModelConfig
from jllm_core.quantized import Quantization, QuantizationError
from jllm_core.weights import Weights, abstract_weights

from jllm_convert.__about__ import __version__
from jllm_convert.errors import ConversionError
from jllm_convert.quantization import QuantizedMatch, choose_grid, matrices_of
from jllm_convert.receipt import Receipt, measure
from jllm_convert.rules import Match, match_tensors
from jllm_convert.sources.base import Source
from jllm_convert.sources.gguf import GGUFSource
from jllm_convert.sources.safetensors import SafetensorsSource

DTYPES = checkpoint.DTYPES

Lazy = tuple[ArrayInfo, Callable[[], np.ndarray]]


@dataclass(frozen=True)
class Progress:
    """How far a conversion is: arrays and bytes written, of how many."""

    arrays: int
    total_arrays: int
    nbytes: int
    total_nbytes: int


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
    on_progress: Callable[[Progress], None] | None = None,
) -> Conversion:
    """Convert a Hugging Face folder or a GGUF file to a JLLM checkpoint, without torch.

    The checkpoint is written beside ``dst`` under a temporary name and renamed when it is whole, so ``dst`` holds the
    old checkpoint, the new one or none, whatever happens.

    Args:
        src: a folder with config.json and safetensors, or a ``.gguf`` file.
        dst: the folder to make.
        dtype: ``"float32"``, ``"bfloat16"``, or None (or ``"keep"``) for the source's own: bfloat16 stays, everything
            else, quantised weights included, becomes float32.
        quantize: ``"int8"`` or ``"int4"`` for the weight matrices; the embedding, the norms and a mixture's router stay
            ``dtype``. The manifest then has a receipt of what that did to the model's predictions.
        overwrite: replace a checkpoint that is at ``dst``. Nothing but a checkpoint is ever replaced.
        group: inputs that share a scale, 32, 64 or 128; None is a whole channel for int8 and 32 for int4, or what the
            source has already (``quantization.choose_grid``).
        offsets: give each group of int4 an offset besides its scale.
        on_progress: called after each array, from one thread at a time.

    Raises:
        ConversionError: with everything that is wrong with the source or the destination.
    """
    src, dst = Path(src), Path(dst)
    if dtype not in (None, "keep", *DTYPES):
        raise ConversionError(f"dtype must be one of {', '.join(DTYPES)} or keep, got {dtype!r}")
    _check_destination(dst, overwrite)
    source = open_source(src)
    config = source.config()
    matches = match_tensors(source, config)
    target = np.dtype(_kept_dtype(matches) if dtype in (None, "keep") else dtype)
    grid = _grid(quantize, group, offsets, matches, config)
    infos = _described(config, target, grid, source)
    with _written_beside(dst) as folder:
        (folder / checkpoint.MODEL_FILE).write_text(config.to_json(), encoding="utf-8")
        generation = json.dumps(source.generation_config(), indent=2)
        (folder / checkpoint.GENERATION_FILE).write_text(generation + "\n", encoding="utf-8")
        tokenizer = source.write_tokenizer(folder)
        hashes: dict[str, str] = {}
        arrays = _arrays(matches, target, grid, infos, hashes)
        weights = checkpoint.write_orbax_metadata(folder, arrays)
        count = _counter({name: info for name, (info, _) in arrays.items()}, on_progress)
        for name, (info, make) in arrays.items():
            store = checkpoint.ArrayStore.create(weights, name, info)
            store.write(checkpoint.whole(info.shape), make())
            count(name)
        entries = {
            name: {"shape": list(array.shape), "dtype": array.dtype.name, "sha256": hashes[name]}
            for name, (array, _) in arrays.items()
        }
        receipt = None if grid is None else _receipt(config, folder, infos, matches)
        manifest = checkpoint.Manifest(
            dtype=target.name,
            arrays=entries,
            source={"name": src.resolve().name, "kind": source.naming},
            quantization=grid,
            receipt=None if receipt is None else receipt.as_dict(),
            created_by=f"jllm-convert {__version__}",
        )
        manifest.write(folder)
    warnings: tuple[str, ...] = ()
    if not tokenizer:
        warnings += (f"{src.name} has no tokenizer.json: the model will take token ids only",)
    if grid is not None and receipt is None:
        warnings += ("without a tokenizer nothing was read to measure what quantising did: there is no receipt",)
    return Conversion(dst, config, manifest, warnings, receipt)


def open_source(path: Path) -> Source:
    """Open a source by what is at the path.

    Raises:
        ConversionError: nothing is there, or nothing that can be converted.
    """
    if path.is_dir():
        if checkpoint.is_checkpoint(path):
            raise ConversionError(f"{path} is a JLLM checkpoint already; give the Hugging Face folder or GGUF file")
        return SafetensorsSource(path)
    if not path.exists():
        raise ConversionError(f"there is nothing at {path}; expected a Hugging Face folder or a .gguf file")
    if path.suffix.lower() != ".gguf":
        raise ConversionError(f"{path} is neither a folder nor a .gguf file")
    return GGUFSource(path)


def _check_destination(dst: Path, overwrite: bool) -> None:
    if not dst.exists() and not dst.is_symlink():
        return
    if dst.is_dir() and not any(dst.iterdir()):
        return
    if not checkpoint.is_checkpoint(dst):
        raise ConversionError(f"{dst} exists and is not a JLLM checkpoint, so it is not replaced; choose another name")
    if not overwrite:
        raise ConversionError(f"{dst} exists; choose another name, or replace it with overwrite (--overwrite)")


@contextlib.contextmanager
def _written_beside(dst: Path) -> Iterator[Path]:
    """A new folder beside ``dst`` that takes its name when the block ends well, and is removed when it does not."""
    dst = dst.absolute()
    token = uuid.uuid4().hex[:8]
    folder, old = (dst.with_name(f".{dst.name}.{token}.{state}") for state in ("partial", "old"))
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConversionError(f"cannot write beside {dst}: {error}") from error
    try:
        yield folder
        if os.path.lexists(dst):
            os.rename(dst, old)
        os.rename(folder, dst)
    except OSError as error:
        raise ConversionError(f"writing {dst} failed: {error}") from error
    finally:
        if os.path.lexists(old) and not os.path.lexists(dst):
            os.rename(old, dst)
        if old.is_symlink():
            old.unlink()
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)


def _kept_dtype(matches: list[Match]) -> np.dtype:
    """The type that "keep" means: bfloat16 if most weights have it, else float32 (which holds all others exactly)."""
    weight = dict.fromkeys(DTYPES, 0)
    for match in matches:
        name = match.parts[0].tensor.dtype.name
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


def _arrays(
    matches: list[Match], dtype: np.dtype, grid: Quantization | None, infos: Weights, hashes: dict[str, str]
) -> dict[str, Lazy]:
    """What is to be written, by name: each match, or the parts that it becomes."""
    arrays: dict[str, Lazy] = {}
    matrices = matrices_of(infos)
    for match in matches:
        if grid is None or match.array not in matrices:
            plain = partial(_cast, match, dtype)
            arrays[match.array] = _lazy(match.array, replace(match.info, dtype=dtype), plain, hashes)
            continue
        matrix = QuantizedMatch(match, matrices[match.array], grid)
        for part, info in matrix.infos().items():
            name = f"{match.array}.{part}"
            arrays[name] = _lazy(name, info, partial(matrix.take, part), hashes)
    return arrays


def _cast(match: Match, dtype: np.dtype) -> np.ndarray:
    array: np.ndarray = np.ascontiguousarray(match.read().astype(dtype, copy=False))
    return array


def _lazy(name: str, info: ArrayInfo, read: Callable[[], np.ndarray], hashes: dict[str, str]) -> Lazy:
    """The array to be read, laid out and cast when its turn comes; its hash goes into ``hashes``."""

    def make() -> np.ndarray:
        array = read()
        hashes[name] = hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()
        return array

    return info, make


def _receipt(config: ModelConfig, folder: Path, infos: Weights, matches: list[Match]) -> Receipt | None:
    by_name = {match.array: match for match in matches}
    return measure(
        config,
        folder,
        infos,
        lambda name: by_name[name].read(),
        lambda name: checkpoint.ArrayStore.open(folder / checkpoint.WEIGHTS_FOLDER, name).read(),
    )


def _counter(arrays: dict[str, ArrayInfo], on_progress: Callable[[Progress], None] | None) -> Callable[[str], None]:
    """Turn "this array is written" into Progress."""
    sizes = {name: info.nbytes for name, info in arrays.items()}
    progress = Progress(0, len(arrays), 0, sum(sizes.values()))
    lock = Lock()

    def count(name: str) -> None:
        nonlocal progress
        with lock:
            progress = replace(progress, arrays=progress.arrays + 1, nbytes=progress.nbytes + sizes[name])
            if on_progress is not None:
                on_progress(progress)

    return count
