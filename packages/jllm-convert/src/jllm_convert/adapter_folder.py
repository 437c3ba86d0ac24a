"""Adapter folder in PEFT's format: written from an adapter that was trained here, and read to train it further."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jllm_core.adapters import Adapter, LowRank, abstract_adapter, lora_scale
from jllm_core.array_info import named_leaves
from jllm_core.checkpoint import whole
from jllm_core.config import ModelConfig
from jllm_core.weight_specs import abstract_weights

from jllm_convert.errors import ConversionError
from jllm_convert.exporting.export import DTYPES, temporary_folder
from jllm_convert.exporting.safetensors_writer import SafetensorsWriter, TensorInfo, shard
from jllm_convert.families import exported_family
from jllm_convert.families.table import Family
from jllm_convert.families.tensor_layout import Linear
from jllm_convert.files.paths import checked_path
from jllm_convert.sources.peft_adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX, AdapterSource, Factors, is_number

_WEIGHT = ".weight"


def save_adapter(
    adapter: Adapter, path: str | Path, config: ModelConfig, *, base: str | Path | None = None, overwrite: bool = False
) -> Path:
    """Save an adapter as PEFT does, for ``jllm-convert convert --adapter`` and for other programs.

    The folder is written beside ``path`` under a temporary name and renamed when it is complete.

    Args:
        adapter: the adapter; its factors become ``lora_A [r, in]`` and ``lora_B [out, r]``, of their own element type.
        path: the folder to create.
        config: the architecture that it was trained with.
        base: the model's name on the hub or its folder, by which PEFT finds the model that it belongs to.
        overwrite: replace an adapter that is there. Nothing but an adapter is ever replaced.

    Returns:
        The folder.

    Raises:
        ConversionError: a matrix that shares its tensor with others in Hugging Face's files, or that the architecture
            has not, or has with another shape; factors of several ranks, or that are NaN or infinite; an alpha that is
            no finite number below a billion; or a destination that may not be replaced.
    """
    path = checked_path(path)
    _check_destination(path, overwrite)
    ranks = {part.rank for part in adapter.factors.values()}
    if len(ranks) != 1:
        raise ConversionError(f"an adapter to save has matrices of one rank, got {sorted(ranks) or 'no matrices'}")
    if not is_number(adapter.alpha):
        raise ConversionError(f"an adapter to save has an alpha below a billion, got {adapter.alpha!r}")
    tensors, modules = _tensors(adapter, config)
    infos = {name: TensorInfo(values.shape, values.dtype) for name, values in tensors.items()}
    with temporary_folder(path) as folder:
        text = json.dumps(_fields(adapter, ranks.pop(), modules, base), indent=2)
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
        that differs from the adapter's.

    Raises:
        ConversionError: no adapter, fields that would change the result and are not honoured, or matrices that the
            model has not, that have another shape there, or that are part of a larger array, such as an expert. To
            merge those, convert the model with it (``convert(..., adapter=)``).
    """
    source = AdapterSource(checked_path(path))
    arrays = {module: array for array, module in _module_names(exported_family(config), config).items()}
    # Of any rank: what is asked is which axes of each matrix are inputs.
    described = abstract_adapter(config, 1, 1.0, targets=None).factors
    alpha = source.alpha or 1.0  # by one of 0 nothing can be scaled
    problems: list[str] = []
    factors: dict[str, LowRank] = {}
    for module, each in source.factors.items():
        part = described.get(arrays.get(module, ""))
        if part is None:
            problems.append(
                f"{ADAPTER_WEIGHTS}: {each.module} is no matrix of its own in a {config.model_type} model with "
                f"{config.num_layers} layers; merge the adapter while the model is converted (jllm-convert convert SRC "
                "DST --adapter DIR), or take one that was trained on this model"
            )
            continue
        inputs, outputs = part.a.shape[:-1], part.b.shape[1:]
        expected, found = (math.prod(outputs), math.prod(inputs)), (each.b.shape[0], each.a.shape[1])
        if found != expected:
            problems.append(
                f"{ADAPTER_WEIGHTS}: the change of {each.module} has shape {list(found)}, the matrix of the model "
                f"{list(expected)}; it was trained on another model"
            )
            continue
        factors[arrays[module]] = _low_rank(each, inputs, outputs, lora_scale(alpha, each.rank, source.rslora))
    if problems:
        raise ConversionError(problems)
    return Adapter(factors, alpha, source.rslora)


def _low_rank(each: Factors, inputs: tuple[int, ...], outputs: tuple[int, ...], scale: float) -> LowRank:
    """Factors in the layout of the Weights tree, of a change that is scaled by ``scale``."""
    # [r, in] -> [*inputs, r]; [out, r] -> [r, *outputs].
    a = each.a.read().astype(np.float32).T.reshape(*inputs, each.rank)
    b = each.b.read().astype(np.float32).T.reshape(each.rank, *outputs)
    return LowRank(jnp.asarray(a), jnp.asarray(b if each.scale == scale else b * np.float32(each.scale / scale)))


def _fields(adapter: Adapter, rank: int, modules: list[str], base: str | Path | None) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if base is None else str(base),
        "r": rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha,
        "use_rslora": adapter.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        # Whole names: not every layer need be adapted.
        "target_modules": modules,
    }


def _tensors(adapter: Adapter, config: ModelConfig) -> tuple[dict[str, np.ndarray], list[str]]:
    """The factors by PEFT's names, and the paths of the modules."""
    names = _module_names(exported_family(config), config)
    arrays = named_leaves(abstract_weights(config))
    tensors: dict[str, np.ndarray] = {}
    problems: list[str] = []
    modules: list[str] = []
    for array, part in adapter.factors.items():
        module = names.get(array)
        if module is None:
            problems.append(
                f"{array} has no tensor of its own in Hugging Face's files of {config.model_type}, so PEFT cannot "
                "adapt it alone; merge the adapter instead (jllm_core.merge_adapter, Model.save)"
            )
            continue
        modules.append(module)
        changed = (*part.a.shape[:-1], *part.b.shape[1:])
        if changed != (expected := arrays[array].shape):
            problems.append(
                f"the change of {array} has shape {list(changed)}, the matrix of this config {list(expected)}; it was "
                "trained on another model"
            )
        a, b = _factors(array, part, problems)
        tensors[f"{PREFIX}{module}.lora_A.weight"], tensors[f"{PREFIX}{module}.lora_B.weight"] = a, b
    if problems:
        raise ConversionError(problems)
    return tensors, modules


def _factors(array: str, part: LowRank, problems: list[str]) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(part.a), np.asarray(part.b)
    if a.dtype.name not in DTYPES or b.dtype.name not in DTYPES:
        problems.append(f"the factors of {array} are {a.dtype} and {b.dtype}; expected one of {', '.join(DTYPES)}")
    if not (np.isfinite(a.astype(np.float32)).all() and np.isfinite(b.astype(np.float32)).all()):
        problems.append(f"the factors of {array} are NaN or infinite: the training has failed")
    # [*inputs, r] -> [r, in]; [r, *outputs] -> [out, r].
    right = np.ascontiguousarray(a.reshape(-1, part.rank).T)
    return right, np.ascontiguousarray(b.reshape(part.rank, -1).T)


def _module_names(family: Family, config: ModelConfig) -> Mapping[str, str]:
    """The module of each array that is an ``nn.Linear`` of its own in the family's Hugging Face model."""
    names: dict[str, str] = {}
    for rule in family.rules:
        pattern = rule.hf
        if pattern is None or not isinstance(rule.layout, Linear) or "{e}" in pattern or "{i}" not in pattern:
            continue
        for i in range(config.num_layers):
            if rule.mixer in (None, config.mixer(i)):
                names.setdefault(rule.array.format(i=i), pattern.format(i=i).removesuffix(_WEIGHT))
    return names


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
