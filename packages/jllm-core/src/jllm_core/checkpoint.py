"""The checkpoint on disk: what jllm-convert writes and jllm-runtime reads.

A checkpoint is a folder::

    manifest.json            format and version, where it came from, name, shape, type and hash of every array
    model.json               the ModelConfig
    weights/                 the arrays, by orbax (any orbax restores them, without JLLM)
    generation_config.json   what the publisher says of sampling and of the end of a text
    tokenizer.json ...       the publisher's tokenizer files

orbax is an extra of jllm-core (``pip install "jllm-core[checkpoint]"``), and is imported when it is first needed.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jllm_core.array_info import ArrayInfo, named_leaves
from jllm_core.config import ModelConfig
from jllm_core.errors import JLLMError
from jllm_core.quantized import Quantization, QuantizationError
from jllm_core.weights import Weights, abstract_weights

FORMAT = "jllm-checkpoint"
FORMAT_VERSION = 1

MANIFEST_FILE = "manifest.json"
MODEL_FILE = "model.json"
GENERATION_FILE = "generation_config.json"
WEIGHTS_FOLDER = "weights"

DTYPES = ("float32", "bfloat16")
"""The element types that weights are stored in."""

# Each large array is cut into this many chunks along the axis that tensor parallelism splits, so that a device reads
# its own part of the file and nothing else. Eight serves 2, 4 and 8 devices.
CHUNKS_PER_ARRAY = 8
SMALLEST_CHUNKED_BYTES = 1 << 20
# Axes in the order of preference for cutting: the ones that ShardingRules splits by default.
CHUNKED_AXES = ("heads", "kv_heads", "ffw", "vocab")


class CheckpointError(JLLMError):
    """A folder that is no checkpoint, is of another format version, or whose contents do not fit its manifest."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        dtype: element type of the weights that are not quantised, such as ``"float32"``.
        arrays: by dotted name (``layers.0.attn.q``), each array's ``shape``, ``dtype`` and ``sha256`` of its
            little-endian bytes in C order.
        source: where the weights came from, as the converter knows it.
        quantization: how the weight matrices are stored; None like the rest.
        receipt: what quantising did to the model's predictions, as the converter has measured it.
        created_by: the package and version that wrote it.
    """

    dtype: str
    arrays: dict[str, dict[str, Any]]
    source: dict[str, Any] = field(default_factory=dict)
    quantization: Quantization | None = None
    receipt: dict[str, Any] | None = None
    created_by: str = ""
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        """Write it into the checkpoint's folder."""
        (folder / MANIFEST_FILE).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder looks like a checkpoint; it may still be damaged."""
    return (folder / MANIFEST_FILE).is_file() and (folder / MODEL_FILE).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
        CheckpointError: there is none, it cannot be read, or its format or version is not this package's.
    """
    path = folder / MANIFEST_FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} is not a JLLM checkpoint: it has no {MANIFEST_FILE}. "
            "Convert a Hugging Face folder or a GGUF file first: jllm-convert convert SRC DST"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the manifest of a JLLM checkpoint (expected format {FORMAT!r})")
    if fields.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {fields.get('format_version')}, this jllm-core reads {FORMAT_VERSION}; "
            "convert the model again, or install the version of jllm-core that matches"
        )
    try:
        if fields.get("quantization") is not None:
            fields["quantization"] = Quantization(**fields["quantization"])
        manifest = Manifest(**fields)
    except (TypeError, QuantizationError) as error:
        raise CheckpointError(f"{path} does not have the fields of a manifest: {error}") from error
    if manifest.dtype not in DTYPES:
        raise CheckpointError(f"{path}: dtype is {manifest.dtype!r}, expected one of {', '.join(DTYPES)}")
    arrays = manifest.arrays if isinstance(manifest.arrays, dict) else {"arrays": None}
    for name, entry in arrays.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list) or "dtype" not in entry:
            raise CheckpointError(f"{path}: {name} must have a shape and a dtype, got {entry!r}")
    return manifest


def read_config(folder: Path) -> ModelConfig:
    """Read a checkpoint's architecture.

    Raises:
        CheckpointError: there is none.
        ConfigError: it is not a valid ModelConfig.
    """
    try:
        text = (folder / MODEL_FILE).read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{folder / MODEL_FILE} cannot be read: {error}") from error
    return ModelConfig.from_json(text)


def read_eos_ids(folder: Path) -> tuple[int, ...]:
    """The ids that end a text, as the publisher's config and generation config have them; none if neither says.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / GENERATION_FILE
    if not path.is_file():
        return ()
    try:
        ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        return tuple(int(token) for token in ([ids] if isinstance(ids, int) else ids or ()))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


@dataclass(frozen=True)
class LazyArray:
    """An array that is made when its turn to be written comes, so that a save never holds the whole model.

    Attributes:
        shape: shape of the array that ``make`` returns.
        dtype: its element type.
        logical_axes: the names of its axes; they decide along which one the file is cut.
        make: called once, in a worker thread.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    logical_axes: tuple[str | None, ...]
    make: Callable[[], np.ndarray]

    def chunk_shape(self) -> tuple[int, ...]:
        """The shape of one chunk of the file: a slice along the axis that devices share out, or all of it."""
        nbytes = int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize
        axis = next((self.logical_axes.index(name) for name in CHUNKED_AXES if name in self.logical_axes), None)
        if axis is None or nbytes < SMALLEST_CHUNKED_BYTES:
            return self.shape
        size = -(-self.shape[axis] // CHUNKS_PER_ARRAY)
        return (*self.shape[:axis], size, *self.shape[axis + 1 :])


def save_weights(
    folder: Path, arrays: Mapping[str, LazyArray], on_written: Callable[[str], None] | None = None
) -> None:
    """Write arrays under ``folder/weights`` by orbax, as many at a time as there are cores.

    The arrays are zarr 3, uncompressed, with a crc32c for each chunk: stock orbax restores them and notices damage.

    Args:
        folder: the checkpoint's folder, without ``weights`` in it yet.
        arrays: by dotted name, such as ``layers.0.attn.q``.
        on_written: called with the name of each array when it is on disk, from a worker's event loop.

    Raises:
        Whatever a ``make`` or the disk raises; all writes have ended by then.
    """
    import orbax.checkpoint as ocp

    failures: list[BaseException] = []
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,
        use_zarr3=True,
        use_compression=False,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (LazyArray, _lazy_array_handler(on_written, failures)), (jax.Array, ocp.type_handlers.ArrayHandler())
        ),
    )
    path = (folder / WEIGHTS_FOLDER).absolute()

    def save() -> None:
        with _silent_orbax(), ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path, args=ocp.args.PyTreeSave(_nested(arrays)))

    # In a thread of its own: Ctrl-C comes to the main one, and would leave orbax's threads writing.
    with ThreadPoolExecutor(1) as pool:
        saving = pool.submit(save)
        try:
            saving.result()
        except BaseException as error:
            failures.append(error)  # no further array is begun; the pool waits for those that are
    if failures:
        shutil.rmtree(path, ignore_errors=True)
        raise failures[0]


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


def restore_weights(folder: Path, config: ModelConfig, dtype: Any = None, shardings: Weights | None = None) -> Weights:
    """Read the weights of a checkpoint, each device its own part of each array.

    The files are orbax's; they are read by tensorstore, which orbax reads them by too, without orbax's half second of
    start-up and with errors that name the array.

    Args:
        folder: the checkpoint.
        config: its architecture.
        dtype: element type to load what is not quantised in; the one on disk when None.
        shardings: a Weights tree of shardings; the default device when None.

    Raises:
        CheckpointError: an array is missing, left over, damaged, or of another shape or type than the config and the
            manifest say.
    """
    manifest = read_manifest(folder)
    infos = abstract_weights(config, dtype or manifest.dtype, manifest.quantization)
    _check_against_manifest(folder, abstract_weights(config, manifest.dtype, manifest.quantization), manifest)
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda info: device, infos)

    def read(name: str, info: ArrayInfo, sharding: jax.sharding.Sharding) -> jax.Array:
        return _read_array(folder / WEIGHTS_FOLDER / name, info, manifest.arrays[name]["dtype"], sharding)

    named = named_leaves(infos)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        leaves = list(pool.map(read, named, named.values(), jax.tree.leaves(shardings)))
    weights: Weights = jax.tree.unflatten(jax.tree.structure(infos), leaves)
    return weights


def read_array(folder: Path, name: str, info: ArrayInfo) -> np.ndarray:
    """One array of a checkpoint, or of one that is being made, as it is stored.

    Raises:
        CheckpointError: it is missing, damaged, or not of that shape and type.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return np.asarray(_read_array(folder / WEIGHTS_FOLDER / name, info, info.dtype.name, device))


def _read_array(path: Path, info: ArrayInfo, stored_dtype: str, sharding: jax.sharding.Sharding) -> jax.Array:
    """One array, each part of it read once for the devices that hold it."""
    import tensorstore as ts

    try:
        kvstore = {"driver": "file", "path": f"{path}/"}
        # A chunk that is missing is damage, not zeros.
        store = ts.open({"driver": "zarr3", "kvstore": kvstore, "fill_missing_data_reads": False}).result()
        if store.shape != info.shape or store.dtype.name != stored_dtype:
            raise CheckpointError(
                f"{path} holds {store.dtype.name}{list(store.shape)}, "
                f"the manifest says {stored_dtype}{list(info.shape)}"
            )
        parts: dict[str, np.ndarray] = {}

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            if str(index) not in parts:
                values = store[index or ()].read().result()
                parts[str(index)] = np.asarray(values).astype(info.dtype, copy=False)
            return parts[str(index)]

        return jax.make_array_from_callback(info.shape, sharding, part)
    except ValueError as error:  # what tensorstore raises for every fault: a missing file, a checksum that is off
        raise CheckpointError(
            f"the array {path.name} in {path.parent} cannot be read, its files are missing or damaged: {error}"
        ) from error


def _check_against_manifest(folder: Path, infos: Weights, manifest: Manifest) -> None:
    expected = {name: f"{info.dtype.name}{list(info.shape)}" for name, info in named_leaves(infos).items()}
    got = {name: f"{entry['dtype']}{entry['shape']}" for name, entry in manifest.arrays.items()}
    problems = [f"{name} is missing" for name in expected.keys() - got.keys()]
    problems += [f"{name} is left over" for name in got.keys() - expected.keys()]
    problems += [
        f"{name} is {got[name]}, the config needs {needed}"
        for name, needed in expected.items()
        if name in got and got[name] != needed
    ]
    if problems:
        raise CheckpointError(
            f"{folder / MANIFEST_FILE} and {MODEL_FILE} do not agree: {'; '.join(sorted(problems))}. "
            "One of the two was changed or comes from another model; convert again"
        )


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


def _lazy_array_handler(on_written: Callable[[str], None] | None, failures: list[BaseException]) -> Any:
    """The orbax type handler of LazyArray; a function, because its base class is only there once orbax is imported."""
    import orbax.checkpoint as ocp
    import tensorstore as ts

    class LazyArrayHandler(ocp.type_handlers.NumpyHandler):  # type: ignore[misc]
        """Writes a LazyArray as the numpy array it makes; reading needs no handler of its own."""

        async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
            return [ocp.future.CommitFutureAwaitingContractedSignals(self._write_all(values, infos), name="lazy")]

        async def _write_all(self, values: Any, infos: Any) -> None:
            slots = asyncio.Semaphore(os.cpu_count() or 1)
            await asyncio.gather(*(self._write(value, info, slots) for value, info in zip(values, infos, strict=True)))

        async def _write(self, value: LazyArray, info: Any, slots: asyncio.Semaphore) -> None:
            await info.await_path_creation()
            async with slots:
                if failures:
                    return
                # Kept, not raised: orbax would log the traceback, and cancel writes that tensorstore then goes on with.
                try:
                    await self._make_and_write(value, info)
                    if on_written is not None:
                        on_written(info.name)
                except BaseException as error:
                    failures.append(error)

        async def _make_and_write(self, value: LazyArray, info: Any) -> None:
            array = await asyncio.to_thread(value.make)
            if array.shape != value.shape or array.dtype != value.dtype:
                raise ValueError(
                    f"{info.name}: made {array.dtype}{list(array.shape)}, announced {value.dtype}{list(value.shape)}"
                )
            spec = _zarr_spec(info.parent_dir / info.name, value)
            store = await ts.open(ts.Spec(spec), create=True, context=info.ts_context)
            await store.write(np.ascontiguousarray(array), can_reference_source_data_indefinitely=True)

    return LazyArrayHandler()


def _zarr_spec(path: Any, value: LazyArray) -> dict[str, Any]:
    """The tensorstore spec of one array: raw little-endian chunks, each with its crc32c."""
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "metadata": {
            "shape": list(value.shape),
            "data_type": value.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(value.chunk_shape())}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        },
        "store_data_equal_to_fill_value": True,
    }
