"""Saving a checkpoint from memory: orbax's metadata, the arrays, and syncing them to the disk."""

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from jllm_core.__about__ import __version__
from jllm_core.array_info import ArrayInfo, named_leaves
from jllm_core.checkpoint.array_store import ArrayStore
from jllm_core.checkpoint.atomic_rename import recover, remove, replace_folder
from jllm_core.checkpoint.chunk_grid import whole
from jllm_core.checkpoint.manifest import (
    DTYPES,
    MODEL_FILE,
    WEIGHTS_FOLDER,
    CheckpointError,
    Manifest,
    is_checkpoint,
)
from jllm_core.checkpoint.restoring import differences
from jllm_core.config import ModelConfig
from jllm_core.quantization.arrays import quantization_of
from jllm_core.quantization.device_form import stored_weights
from jllm_core.weight_specs import abstract_weights
from jllm_core.weights import Weights


def write_orbax_metadata(folder: Path, names: Iterable[str]) -> Path:
    """Create ``folder/weights`` as orbax does for arrays of these names, with all files but the arrays themselves.

    orbax writes the metadata itself, into a folder that appears at once as a whole. ArrayStore then adds the arrays,
    in parts and in any order.

    Args:
        folder: the checkpoint's folder, without ``weights`` in it yet.
        names: dotted names, such as ``layers.0.attn.q``.

    Returns:
        The folder of the weights.
    """
    import jax
    import orbax.checkpoint as ocp

    class Placeholder:
        """Stand-in for an array that is written later."""

        size, dtype = 0, np.dtype(np.float32)  # most releases of orbax count the bytes that they are to write

    class PlaceholderHandler(ocp.type_handlers.NumpyHandler):  # type: ignore[misc]
        """Make orbax note down a numpy array, and write nothing. Reading needs no handler of its own."""

        async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
            return []

    # Uncompressed zarr 3, one folder an array: what ArrayStore writes, and what any device can read its part of.
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,
        use_zarr3=True,
        use_compression=False,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (Placeholder, PlaceholderHandler()), (jax.Array, ocp.type_handlers.ArrayHandler())
        ),
    )
    path = (folder / WEIGHTS_FOLDER).absolute()
    with _silent_orbax(), ocp.Checkpointer(handler) as checkpointer, _place_for_orbax(path) as place:
        checkpointer.save(place, args=ocp.args.PyTreeSave(_nested(dict.fromkeys(names, Placeholder()))))
    success = path / "commit_success.txt"
    if success.exists():  # it names the folder of the conversion, which is renamed in the end
        success.write_text("Checkpoint commit was successful\n", encoding="utf-8")
    return path


@contextlib.contextmanager
def _place_for_orbax(path: Path) -> Iterator[Path]:
    """The path to give to orbax for what is to be at ``path``: orbax writes paths into files, as UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:  # a name that is no UTF-8: by way of another folder
        with tempfile.TemporaryDirectory() as folder:
            place, new = Path(folder) / path.name, path.with_name(f"{path.name}.new")
            yield place
            shutil.copytree(place, new)
            new.rename(path)
    else:
        yield path


def save_weights(folder: Path, arrays: Mapping[str, Any], infos: Mapping[str, ArrayInfo]) -> dict[str, dict[str, Any]]:
    """Write arrays from memory under ``folder/weights``. Stock orbax restores them and notices damage.

    Args:
        folder: the checkpoint's folder, without ``weights`` in it yet.
        arrays: by dotted name, numpy arrays or JAX arrays that this process has all of.
        infos: the description of each, by the same names.

    Returns:
        The manifest's entry for each array: ``shape``, ``dtype`` and ``sha256``.

    Raises:
        ValueError: an array has another shape or type than its description.
        OSError: the disk cannot take them.
    """
    weights = write_orbax_metadata(folder, arrays)
    entries = {}
    for name, array in arrays.items():
        values = np.asarray(array)
        store = ArrayStore.create(weights, name, infos[name])
        store.write(whole(infos[name].shape), values)
        entries[name] = {
            "shape": list(values.shape),
            "dtype": values.dtype.name,
            "sha256": hashlib.sha256(values.tobytes("C")).hexdigest(),
        }
    sync(weights)
    return entries


def save_checkpoint(
    dst: Path,
    config: ModelConfig,
    weights: Weights,
    *,
    files: Mapping[str, bytes] = MappingProxyType({}),
    source: Mapping[str, Any] = MappingProxyType({"kind": "saved"}),
    created_by: str = f"jllm-core {__version__}",
    overwrite: bool = False,
) -> Manifest:
    """Save a model's weights as a checkpoint, such as after training.

    It is written beside ``dst`` under another name and renamed when it is complete and on the disk, so ``dst`` holds
    the old checkpoint, the new one or none, whatever happens. One array at a time is copied to the host.

    Args:
        dst: the folder to create.
        config: the architecture.
        weights: its arrays, quantised or not, on any devices of this process.
        files: further files by their names, such as a tokenizer's.
        source: where the weights come from, for the manifest.
        created_by: package and version, for the manifest.
        overwrite: replace a checkpoint that is at ``dst``. Nothing but a checkpoint is ever replaced.

    Returns:
        The manifest.

    Raises:
        CheckpointError: arrays that are not those of the architecture, that a checkpoint cannot hold or that other
            processes have a part of; a destination that may not be replaced, or a full disk.
    """
    from jllm_core.adapters import adapted_matrices  # it imports JAX

    dst = Path(os.path.abspath(dst))
    if adapted := adapted_matrices(weights):
        raise CheckpointError(
            f"{adapted[0]} has an adapter beside it, which a checkpoint does not hold; merge it "
            "(jllm_core.merge_adapter), or save it by itself (jllm_convert.save_adapter)"
        )
    weights = stored_weights(weights)
    arrays = named_leaves(weights)
    manifest = Manifest(
        dtype=np.dtype(weights.dtype).name,
        arrays={},
        source=dict(source),
        quantization=quantization_of(weights.layers[0].attn.q, weights.embedding),
        created_by=created_by,
    )
    infos = _infos_of(arrays, config, manifest)
    # First: after a kill in a replacement, the old checkpoint has another name, and ``dst`` would look free.
    recover(dst)
    _check_destination(dst, overwrite)
    # A random name: two that save at a time do not disturb each other.
    folder = dst.with_name(f".{dst.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        folder.mkdir(parents=True)
        _check_space(dst, sum(info.nbytes for info in infos.values()))
        for name, content in {**files, MODEL_FILE: config.to_json().encode()}.items():
            (folder / name).write_bytes(content)
        manifest = replace(manifest, arrays=save_weights(folder, arrays, infos))
        manifest.write(folder)
        sync(folder)
        replace_folder(folder, dst)
    except OSError as error:
        raise CheckpointError(f"writing {dst} failed: {error}") from error
    finally:
        if folder.exists():
            remove(folder)
    return manifest


def _infos_of(arrays: Mapping[str, Any], config: ModelConfig, manifest: Manifest) -> dict[str, ArrayInfo]:
    """The description of each array, or a CheckpointError where they are not those of the architecture."""
    if manifest.dtype not in DTYPES:
        raise CheckpointError(
            f"a checkpoint holds {' or '.join(DTYPES)}, these weights are {manifest.dtype}; cast them before"
        )
    infos: dict[str, ArrayInfo] = named_leaves(abstract_weights(config, manifest.dtype, manifest.quantization))
    given = {name: (np.dtype(array.dtype).name, array.shape) for name, array in arrays.items()}
    if far := [name for name, array in arrays.items() if not getattr(array, "is_fully_addressable", True)]:
        raise CheckpointError(
            f"{far[0]} and {len(far) - 1} more arrays are spread over several processes, and this one has a part of "
            "each; load the model in one process to save it"
        )
    if problems := differences(infos, given):
        raise CheckpointError(f"the weights are not those of the config: {'; '.join(problems)}")
    return infos


def _check_destination(dst: Path, overwrite: bool) -> None:
    if not os.path.lexists(dst) or (dst.is_dir() and not any(dst.iterdir())):
        return
    if not is_checkpoint(dst):
        raise CheckpointError(f"{dst} exists and is not a JLLM checkpoint, so it is not replaced; choose another name")
    if not overwrite:
        raise CheckpointError(f"{dst} exists; choose another name, or replace it with overwrite=True")


def _check_space(dst: Path, needed: int) -> None:
    free = shutil.disk_usage(dst.parent).free
    if free < needed:
        raise CheckpointError(f"{dst} needs {needed:,} bytes, {dst.parent} has {free:,} free; choose another disk")


def sync(folder: Path) -> None:
    """Wait until all files in a folder are on the disk.

    Linux syncs a whole file system at once (syncfs). One by one, thousands of files take four times as long.

    Raises:
        OSError: it cannot be written.
    """
    import ctypes

    # Python's os module has no syncfs.
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "syncfs"):
        with _opened(folder) as descriptor:
            if libc.syncfs(descriptor):
                error = ctypes.get_errno()
                raise OSError(error, os.strerror(error), str(folder))
        return
    # The folder itself last: its entries are what names the files.
    for path in (*folder.rglob("*"), folder):
        with _opened(path) as descriptor:
            os.fsync(descriptor)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _silent_orbax() -> Iterator[None]:
    """Drop what orbax logs while it saves: errors, which it raises too, and a warning of missing OCDBT files."""

    def drop(record: logging.LogRecord) -> bool:
        return False

    logger = logging.getLogger("absl")
    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a.b": x}`` as ``{"a": {"b": x}}``: orbax joins keys with dots itself, so a key must not hold one."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
