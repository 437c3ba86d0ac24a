"""What the first process has the others do: the names of its messages, and what must be alike in all of them."""

import hashlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import jax
import numpy as np

from jllm_runtime.__about__ import __version__
from jllm_runtime.engine.config import EngineConfig
from jllm_runtime.loading import Model
from jllm_runtime.logits_processors import Rows
from jllm_runtime.sampling import SamplingArrays

BEGIN, END, RESET = "begin", "end", "reset"
"""From the first process: an engine begins, with these sizes; it has ended; the pages begin anew. The names of all
other messages are those of a Runner's orders."""

READY, FAILED, ENDED = "ready", "failed", "ended"
"""From the others: ready, or why not; an order has failed; the end has been heard."""

SAMPLING = tuple(field.name for field in fields(SamplingArrays))


def flat_rows(rows: Rows) -> dict[str, np.ndarray]:
    """The arrays of the rows by their names, those of their sampling among them."""
    flat = {field.name: getattr(rows, field.name) for field in fields(rows) if field.name != "sampling"}
    return flat | {name: getattr(rows.sampling, name) for name in SAMPLING}


def rows_of(arrays: Mapping[str, np.ndarray]) -> Rows:
    """The inverse of ``flat_rows``."""
    sampling = SamplingArrays(**{name: arrays[name] for name in SAMPLING})
    return Rows(sampling=sampling, **{name: array for name, array in arrays.items() if name not in SAMPLING})


def sizes_of(config: EngineConfig, pages: int) -> dict[str, Any]:
    """The fields of an EngineConfig that decide what a Runner holds."""
    return {
        "max_batch": config.max_batch,
        "page_size": config.page_size,
        "pages": pages,
        "kv_dtype": config.kv_dtype,
    }


def traits(model: Model) -> dict[str, str]:
    """What must be the same in every process; else they run different programs, and wait for each other for ever."""
    leaves = jax.tree_util.tree_leaves_with_path(model.weights)
    weights = [f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}" for path, leaf in leaves]
    axes = ",".join(f"{axis}={size}" for axis, size in model.mesh.shape.items())
    return {
        "version of jllm-runtime": __version__,
        "version of jax": jax.__version__,
        "model": _digest(model.config.to_json()),
        "type or quantization of the weights": _digest(*weights),
        "mesh": f"{axes} over devices {[device.id for device in model.mesh.devices.flat]}",
        "sharding": _digest(repr(model.rules)),
    }


def differences(own: Mapping[str, str], firsts: Mapping[str, str]) -> str:
    """In words, where a process is not like the first; empty where it is."""
    return ", ".join(
        f"another {name} ({value}, the first has {firsts.get(name)})"
        for name, value in own.items()
        if firsts.get(name) != value
    )


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]
