"""Restoring weights from a checkpoint: each device reads its own part of each array."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jllm_core.array_info import ArrayInfo, named_leaves
from jllm_core.checkpoint.array_store import ArrayStore
from jllm_core.checkpoint.chunk_grid import box_shape
from jllm_core.checkpoint.large_pages import LargePageArena
from jllm_core.checkpoint.manifest import (
    MANIFEST_FILE,
    MODEL_FILE,
    WEIGHTS_FOLDER,
    CheckpointError,
    Manifest,
    read_manifest,
)
from jllm_core.checkpoint.nonfinite import first_made_infinite
from jllm_core.config import ModelConfig
from jllm_core.quantization.device_form import Conversion, conversions
from jllm_core.weight_specs import abstract_weights
from jllm_core.weights import Weights

_MAX_NAMED = 20


def restore_weights(
    folder: Path,
    config: ModelConfig,
    dtype: Any = None,
    shardings: Weights | None = None,
    held: Weights | None = None,
) -> Weights:
    """Read the weights of a checkpoint onto devices.

    The files are orbax's; they are read by ``ArrayStore``, without orbax's half second of start-up, into the memory
    that a CPU computes from, and with errors that name the array.

    Args:
        folder: the checkpoint.
        config: its architecture.
        dtype: element type to load what is not quantised in; the one on disk when None.
        shardings: a Weights tree of shardings; the default device when None.
        held: the description of the weights as they are to lie on the devices (``held_weights``), each part converted
            as it is read; as they are stored when None.

    Raises:
        CheckpointError: an array is missing, left over, damaged, or of another shape or type than the config and the
            manifest say; or holds finite numbers that ``dtype`` cannot hold.
    """
    manifest = read_manifest(folder)
    infos = abstract_weights(config, dtype or manifest.dtype, manifest.quantization)
    check_against_config(folder, config, manifest)
    converted = {} if held is None else conversions(infos, held)
    held = infos if held is None else held
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda info: device, held)

    def read(name: str, info: ArrayInfo, sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> jax.Array:
        stored = manifest.arrays[name]["dtype"]
        convert = converted.get(name)
        return _read_array(folder / WEIGHTS_FOLDER, name, info, stored, sharding, arena, too_large, shape, convert)

    too_large: dict[str, str] = {}  # by the array's name, its first number that is
    arena, named = LargePageArena(), named_leaves(infos)
    # Reading and checksums release Python's lock, so threads read several arrays at once.
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        shapes = [info.shape for info in jax.tree.leaves(held)]
        leaves = list(pool.map(read, named, named.values(), jax.tree.leaves(shardings), shapes))
    if too_large:
        shown = [f"{name} ({too_large[name]})" for name in sorted(too_large)[:_MAX_NAMED]]
        more = f" and {len(too_large) - _MAX_NAMED:,} more" if len(too_large) > _MAX_NAMED else ""
        raise CheckpointError(
            f"{folder} holds numbers that {np.dtype(dtype).name} cannot hold: {', '.join(shown)}{more}. "
            f"Load it in a wider type, such as its own ({manifest.dtype})"
        )
    weights: Weights = jax.tree.unflatten(jax.tree.structure(held), leaves)
    return weights


def _read_array(
    folder: Path,
    name: str,
    info: ArrayInfo,
    stored_dtype: str,
    sharding: jax.sharding.Sharding,
    arena: LargePageArena,
    too_large: dict[str, str],
    shape: tuple[int, ...],
    convert: Conversion | None = None,
) -> jax.Array:
    """Read one array, which is to have this shape on the devices.

    Each part is read once for all devices that hold it, for a CPU into memory where it can stay.
    A finite number that the type cannot hold is noted in ``too_large``.
    """
    store = ArrayStore.open(folder, name)
    if store.shape != info.shape or store.dtype.name != stored_dtype:
        raise CheckpointError(
            f"{store.path} holds {store.dtype.name}{list(store.shape)}, "
            f"the manifest says {stored_dtype}{list(info.shape)}"
        )
    # Devices that hold the same part share what was read of it. Slices cannot be keys, their text can.
    parts: dict[str, np.ndarray] = {}
    # XLA on a CPU takes an aligned numpy array as it is, without a copy; for other devices the array is a passing one.
    stays = _platforms(sharding) == {"cpu"}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        if str(index) not in parts:
            box = tuple(slice(*cut.indices(size)[:2]) for cut, size in zip(index or (), shape, strict=True))
            if convert is not None:
                return parts.setdefault(str(index), convert(box, store.read))
            values = arena.empty(box_shape(box), info.dtype) if stays else np.empty(box_shape(box), info.dtype)
            if store.dtype == info.dtype:  # straight into its place, without a copy
                store.read(box, values)
            else:
                read = store.read(box)
                with np.errstate(over="ignore"):  # said in our own words
                    values[...] = read
                if (at := first_made_infinite(read, values)) is not None:
                    place = [side.start + i for side, i in zip(box, at, strict=True)]
                    too_large[name] = f"{read[at]:.4g} at {place}"
            parts[str(index)] = values
        return parts[str(index)]

    return jax.make_array_from_callback(shape, sharding, part)


def _platforms(sharding: jax.sharding.Sharding) -> set[str]:
    devices: set[Any] = sharding.device_set
    return {device.platform for device in devices}


def check_against_config(folder: Path, config: ModelConfig, manifest: Manifest) -> dict[str, ArrayInfo]:
    """Compare the arrays that a manifest lists with the ones that the architecture needs.

    Returns:
        The description of each array as it is stored, by its dotted name.

    Raises:
        CheckpointError: an array is missing, left over, or of another shape or type.
    """
    infos: dict[str, ArrayInfo] = named_leaves(abstract_weights(config, manifest.dtype, manifest.quantization))
    problems = differences(infos, {name: (entry["dtype"], entry["shape"]) for name, entry in manifest.arrays.items()})
    if problems:
        raise CheckpointError(
            f"{folder / MANIFEST_FILE} and {MODEL_FILE} do not agree: {'; '.join(problems)}. "
            "One of the two was changed or comes from another model; convert again"
        )
    return infos


def differences(infos: Mapping[str, ArrayInfo], got: Mapping[str, tuple[str, Sequence[int]]]) -> list[str]:
    """Problems of arrays, by their types and shapes, with the descriptions of what an architecture needs; sorted."""
    expected = {name: f"{info.dtype.name}{list(info.shape)}" for name, info in infos.items()}
    given = {name: f"{dtype}{list(shape)}" for name, (dtype, shape) in got.items()}
    # All problems at once: a wrong config shows in their pattern.
    problems = [f"{name} is missing" for name in expected.keys() - given.keys()]
    problems += [f"{name} is left over" for name in given.keys() - expected.keys()]
    problems += [
        f"{name} is {given[name]}, the config needs {needed}"
        for name, needed in expected.items()
        if name in given and given[name] != needed
    ]
    return sorted(problems)
