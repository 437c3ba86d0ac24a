"""Saving weights: orbax's metadata, arrays from memory, and syncing them to the disk."""

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jllm_core.array_info import ArrayInfo
from jllm_core.checkpoint.array_store import ArrayStore
from jllm_core.checkpoint.chunk_grid import whole
from jllm_core.checkpoint.manifest import WEIGHTS_FOLDER


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
    with _silent_orbax(), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(_nested(dict.fromkeys(names, Placeholder()))))
    success = path / "commit_success.txt"
    if success.exists():  # it names the folder of the conversion, which is renamed in the end
        success.write_text("Checkpoint commit was successful\n", encoding="utf-8")
    return path


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
