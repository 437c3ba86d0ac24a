"""Writing weights: the metadata that orbax knows its checkpoints by, and arrays that are all in memory."""

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jllm_core.array_info import ArrayInfo
from jllm_core.checkpoint.array_store import ArrayStore, whole
from jllm_core.checkpoint.manifest import WEIGHTS_FOLDER


def write_orbax_metadata(folder: Path, names: Iterable[str]) -> Path:
    """Make ``folder/weights`` as orbax makes it for arrays of these names, with all of its files but the arrays.

    orbax writes the metadata itself, into a folder that it puts in place whole. ArrayStore then adds the arrays, by
    parts and in any order.

    Args:
        folder: the checkpoint's folder, without ``weights`` in it yet.
        names: dotted names, such as ``layers.0.attn.q``.

    Returns:
        The folder of the weights.
    """
    import jax
    import orbax.checkpoint as ocp

    class Placeholder:
        """Stands for an array that is written later."""

    class PlaceholderHandler(ocp.type_handlers.NumpyHandler):  # type: ignore[misc]
        """Has orbax note a numpy array, and writes nothing; reading needs no handler of its own."""

        async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
            return []

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
    if success.exists():  # it has the path in it, which is not the checkpoint's last
        success.write_text("Checkpoint commit was successful\n", encoding="utf-8")
    return path


def save_weights(folder: Path, arrays: Mapping[str, Any], infos: Mapping[str, ArrayInfo]) -> dict[str, dict[str, Any]]:
    """Write arrays that are in memory under ``folder/weights``; stock orbax restores them and notices damage.

    Args:
        folder: the checkpoint's folder, without ``weights`` in it yet.
        arrays: by dotted name, numpy arrays or JAX arrays that this process has all of.
        infos: the description of each, by the same names.

    Returns:
        For each array the manifest's entry: ``shape``, ``dtype`` and ``sha256``.

    Raises:
        ValueError: an array is not as it is described.
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
    """Wait until everything in a folder is on the disk.

    Thousands of files that are waited for one after another take four times as long as all at once, which Linux can.

    Raises:
        OSError: it cannot be written.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "syncfs"):
        with _opened(folder) as descriptor:
            if libc.syncfs(descriptor):
                error = ctypes.get_errno()
                raise OSError(error, os.strerror(error), str(folder))
        return
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
    """While it saves, orbax logs what it also raises, and warns that there are no OCDBT files, which is on purpose."""

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
