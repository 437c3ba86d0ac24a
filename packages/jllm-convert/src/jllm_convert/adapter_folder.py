"""Adapter folder in PEFT's format: written from an adapter that was trained here, and read to train it further."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jllm_core.adapters import Adapter, LowRank, lora_scale
from jllm_core.checkpoint import whole
from jllm_core.config import ModelConfig

from jllm_convert.errors import ConversionError
from jllm_convert.exporting.export import DTYPES, temporary_folder
from jllm_convert.exporting.safetensors_writer import SafetensorsWriter, TensorInfo, shard
from jllm_convert.files.paths import checked_path
from jllm_convert.matching.adapted_modules import Module, adapted_modules
from jllm_convert.sources.peft_adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX, AdapterSource, Factors, is_number


def save_adapter(
    adapter: Adapter, path: str | Path, config: ModelConfig, *, base: str | Path | None = None, overwrite: bool = False
) -> Path:
    """Save an adapter as PEFT does, for ``jllm-convert convert --adapter`` and for other programs.

    Matrices that share one in Hugging Face's model (q and gate, or q, k and v, of Qwen3.5) become one pair of factors,
    whose rank is the sum of theirs. The folder is written beside ``path`` under a temporary name and renamed when it is
    complete.

    Args:
        adapter: the adapter; its factors become ``lora_A [r, in]`` and ``lora_B [out, r]``, of their own element type.
        path: the folder to create.
        config: the architecture that it was trained with.
        base: the model's name on the hub or its folder, by which PEFT finds the model that it belongs to.
        overwrite: replace an adapter that is there. Nothing but an adapter is ever replaced.

    Returns:
        The folder.

    Raises:
        ConversionError: a matrix that the architecture has not, or has with another shape; factors that are NaN or
            infinite, or no factors; an alpha that is no finite number below a billion; or a destination that may not be
            replaced.
    """
    path = checked_path(path)
    _check_destination(path, overwrite)
    if not adapter.factors:
        raise ConversionError("an adapter to save has factors of at least one matrix, got none")
    if not is_number(adapter.alpha):
        raise ConversionError(f"an adapter to save has an alpha below a billion, got {adapter.alpha!r}")
    modules = adapted_modules(config)
    if problems := _problems(adapter, modules, config):
        raise ConversionError(problems)
    saved = {
        name: _saved_factors(adapter, module)
        for name, module in modules.items()
        if not adapter.factors.keys().isdisjoint(module.arrays)
    }
    tensors = {
        f"{PREFIX}{module}.lora_{part}.weight": values
        for module, each in saved.items()
        for part, values in (("A", each.a), ("B", each.b))
    }
    infos = {name: TensorInfo(values.shape, values.dtype) for name, values in tensors.items()}
    with temporary_folder(path) as folder:
        text = json.dumps(_fields(adapter, saved, base), indent=2)
        (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
        writer = SafetensorsWriter(folder, infos, [shard(ADAPTER_WEIGHTS, infos)])
        for name, values in tensors.items():
            writer.write(name, whole(values.shape), values)
        writer.finish()
    return path


def load_adapter(path: str | Path, config: ModelConfig) -> Adapter:
    """Load an adapter that PEFT or ``save_adapter`` has saved, to train it further or to run it beside the weights.

    Args:
        path: a folder with adapter_config.json and adapter_model.safetensors.
        config: the architecture of the model that it belongs to.

    Returns:
        The adapter, in float32. Where single modules have an alpha of their own, their ``b`` is multiplied by what
        that differs from the adapter's. Of a module that is several matrices here, each has its own part of ``b``, and
        the columns of ``a`` that count in it.

    Raises:
        ConversionError: no adapter, fields that would change the result and are not honoured, or matrices that the
            model has not, that have another shape there, or that are part of a larger array, such as an expert. To
            merge those, convert the model with it (``convert(..., adapter=)``).
    """
    source = AdapterSource(checked_path(path))
    modules, alpha = adapted_modules(config), source.alpha or 1.0  # by one of 0 nothing can be scaled
    problems: list[str] = []
    factors: dict[str, LowRank] = {}
    for name, each in source.factors.items():
        module = modules.get(name)
        if module is None:
            problems.append(
                f"{ADAPTER_WEIGHTS}: {each.module} is no matrix of its own in a {config.model_type} model with "
                f"{config.num_layers} layers; merge the adapter while the model is converted (jllm-convert convert SRC "
                "DST --adapter DIR), or take one that was trained on this model"
            )
            continue
        if (found := (each.b.shape[0], each.a.shape[1])) != module.shape:
            problems.append(
                f"{ADAPTER_WEIGHTS}: the change of {each.module} has shape {list(found)}, the matrix of the model "
                f"{list(module.shape)}; it was trained on another model"
            )
            continue
        factors |= _loaded_factors(module, each, alpha, source.rslora)
    if problems:
        raise ConversionError(problems)
    return Adapter(factors, alpha, source.rslora)


def _loaded_factors(module: Module, each: Factors, alpha: float, rslora: bool) -> dict[str, LowRank]:
    """The factors of the arrays that a module holds, in the layout of the Weights tree."""
    a, b = each.a.read().astype(np.float32), each.b.read().astype(np.float32)  # [r, in], [out, r]
    factors = {}
    for name, array in module.arrays.items():
        own = array.take(b)
        # Where only one of several arrays was trained, or each for itself, the rest of b is zero; all of it is where
        # nothing was learnt yet.
        shared = len(module.arrays) > 1 and b.any()
        counts = own.reshape(each.rank, -1).any(axis=1) if shared else np.full(each.rank, True)
        if rank := int(counts.sum()):
            by = each.scale / lora_scale(alpha, rank, rslora)
            right = a[counts].T.reshape(*array.inputs, rank)
            factors[name] = LowRank(jnp.asarray(right), jnp.asarray(own[counts] * np.float32(by)))
    return factors


@dataclass(frozen=True)
class _Saved:
    """The factors of a module, ``scale * B A``: ``a [r, in]`` and ``b [out, r]``, and what PEFT takes for alpha."""

    a: np.ndarray
    b: np.ndarray
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.a)


def _saved_factors(adapter: Adapter, module: Module) -> _Saved:
    """The factors of a module: those of its arrays one below the other in ``a``, and each in its own rows of ``b``."""
    parts = {array: adapter.factors[array] for array in module.arrays if array in adapter.factors}
    first, rank = next(iter(parts.values())), sum(part.rank for part in parts.values())
    # PEFT has one scale for a module, which is that of the first.
    scale = lora_scale(1.0, first.rank, adapter.rslora)
    columns, rows = [], []
    for array, part in parts.items():
        own = np.asarray(part.b)
        own = own * own.dtype.type(lora_scale(1.0, part.rank, adapter.rslora) / scale)
        columns.append(np.asarray(part.a).reshape(-1, part.rank).T)
        rows.append(module.arrays[array].spread(own, module.shape[0]))
    more = rank / first.rank
    return _Saved(
        np.concatenate(columns),
        np.concatenate(rows, axis=1),
        adapter.alpha * (math.sqrt(more) if adapter.rslora else more),
    )


def _problems(adapter: Adapter, modules: Mapping[str, Module], config: ModelConfig) -> list[str]:
    """Reasons not to save an adapter."""
    arrays = {name: array for module in modules.values() for name, array in module.arrays.items()}
    problems = []
    for name, part in adapter.factors.items():
        a, b = np.asarray(part.a), np.asarray(part.b)
        if name not in arrays:
            problems.append(
                f"{name} is no matrix that an adapter changes in a {config.model_type} model with "
                f"{config.num_layers} layers"
            )
        elif (*a.shape[:-1], *b.shape[1:]) != arrays[name].shape:
            problems.append(
                f"the change of {name} has shape {[*a.shape[:-1], *b.shape[1:]]}, the matrix of this config "
                f"{list(arrays[name].shape)}; it was trained on another model"
            )
        if a.dtype.name not in DTYPES or b.dtype.name not in DTYPES:
            problems.append(f"the factors of {name} are {a.dtype} and {b.dtype}; expected one of {', '.join(DTYPES)}")
        if not (np.isfinite(a.astype(np.float32)).all() and np.isfinite(b.astype(np.float32)).all()):
            problems.append(f"the factors of {name} are NaN or infinite: the training has failed")
    return problems


def _fields(adapter: Adapter, saved: Mapping[str, _Saved], base: str | Path | None) -> dict[str, Any]:
    rank = min(each.rank for each in saved.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if base is None else str(base),
        "r": rank,
        "lora_alpha": _plain(adapter.alpha),
        "rank_pattern": {name: each.rank for name, each in saved.items() if each.rank != rank},
        "alpha_pattern": {name: _plain(each.alpha) for name, each in saved.items() if each.alpha != adapter.alpha},
        "use_rslora": adapter.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        # Whole names: not every layer need be adapted.
        "target_modules": list(saved),
    }


def _plain(number: float) -> float:
    return int(number) if number == int(number) else number


def _check_destination(path: Path, overwrite: bool) -> None:
    if not path.exists() and not path.is_symlink():
        return
    if path.is_dir() and not any(path.iterdir()):
        return
    if not (path / ADAPTER_CONFIG).is_file():
        raise ConversionError(
            f"{path} exists and is not an adapter ({ADAPTER_CONFIG}), so it is not replaced; choose another name"
        )
    if not overwrite:
        raise ConversionError(f"{path} exists; choose another name, or replace it with overwrite")
