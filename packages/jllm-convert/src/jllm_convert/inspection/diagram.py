"""Diagram of a model's weights as Mermaid text: the tree that ``abstract_weights`` gives, layers of a kind once."""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from jllm_core import checkpoint
from jllm_core.array_info import ArrayInfo
from jllm_core.config import ModelConfig
from jllm_core.quantization.arrays import QuantizedArray
from jllm_core.sharding import EXPERT_AXIS, ShardingRules
from jllm_core.weight_specs import abstract_weights
from jllm_core.weights import Weights

from jllm_convert.description import config_dtype
from jllm_convert.errors import ConversionError
from jllm_convert.files.model_folder import CONFIG_FILE, ModelFolder
from jllm_convert.hub.selection import has_model
from jllm_convert.sources.huggingface.config import read_hf_config
from jllm_convert.sources.opening import open_source
from jllm_convert.writing.plan import plan_conversion

_MAX_RANGES = 3
_WIDE = '%%{init: {"flowchart": {"wrappingWidth": 600}}}%%'  # an array on one line
LEGEND = "name: type [axis size, ...]; /tensor: split over the mesh's axis tensor"
"""The explanation at the foot of a diagram; the mesh axes are those of the usual sharding rules."""


def diagram(path: str | Path, ignore_fields: Sequence[str] = ()) -> str:
    """Draw the weights of a model, as a conversion stores them, as a Mermaid flowchart.

    Only headers are read.

    Args:
        path: a Hugging Face folder, a folder with nothing but its config.json, that file, a ``.gguf`` file or a
            checkpoint.
        ignore_fields: as ``convert`` has them.

    Returns:
        Mermaid text, without a newline at its end.

    Raises:
        ConversionError: there is no model, or it cannot be converted.
        CheckpointError: the checkpoint is damaged.
    """
    path = Path(path)
    if path.name == checkpoint.MODEL_FILE:  # a config of ours, alone or in its checkpoint
        path = path.parent
        if not checkpoint.is_checkpoint(path):
            config = checkpoint.read_config(path)
            return weights_diagram(abstract_weights(config), config)
    if path.suffix != ".json" and not path.exists():
        raise ConversionError(
            f"there is nothing at {path}; expected a Hugging Face folder, a config.json, a .gguf file or a JLLM "
            "checkpoint"
        )
    if checkpoint.is_checkpoint(path):
        manifest, config = checkpoint.read_manifest(path), checkpoint.read_config(path)
        return weights_diagram(abstract_weights(config, manifest.dtype, manifest.quantization), config)
    folder = path.parent if path.suffix == ".json" else path
    if path.suffix == ".json" or (path.is_dir() and not has_model(path)):
        name = path.name if path.suffix == ".json" else CONFIG_FILE
        config_fields = ModelFolder(folder).read_json(name)
        if config_fields is None:
            raise ConversionError(f"there is no {name} in {folder}; expected a model's config.json, or a model")
        config = read_hf_config(config_fields, name, ignore_fields)
        return weights_diagram(abstract_weights(config, config_dtype(config_fields)), config)
    plan = plan_conversion(open_source(path, ignore_fields))
    return weights_diagram(plan.infos, plan.config)


def weights_diagram(weights: Weights, config: ModelConfig) -> str:
    """Draw a tree of descriptions of arrays.

    Args:
        weights: the tree, of ArrayInfo and of QuantizedArray of them.
        config: the architecture.
    """
    lines = [_WIDE, "flowchart TD", *_node("weights", weights, config)]
    lines += [f'  legend["{LEGEND}"]', "  style legend fill:none,stroke-dasharray:4"]
    return "\n".join(lines)


def _node(name: str, part: Any, config: ModelConfig) -> Iterator[str]:
    """The box of a dataclass with its arrays, the boxes of what is in it, and arrows to them."""
    values = [(field.name, getattr(part, field.name)) for field in fields(part)]
    arrays = [f"{each}: {_array(value, config)}" for each, value in values if _is_array(value)]
    label = "<br/>".join([f"<b>{type(part).__name__}</b>", *arrays])
    yield f'  {name}["{label}"]'
    for each, value in values:
        if isinstance(value, list):
            for number, (layer, numbers) in enumerate(_kinds(value)):
                yield from _node(f"{name}_{number}", layer, config)
                yield f'  {name} -->|"{len(numbers)} x: {each} {_ranges(numbers)}"| {name}_{number}'
        elif value is not None and not _is_array(value):
            yield from _node(f"{name}_{each}", value, config)
            yield f'  {name} -->|"{each}"| {name}_{each}'


def _is_array(value: Any) -> bool:
    return isinstance(value, ArrayInfo | QuantizedArray)


def _array(info: Any, config: ModelConfig) -> str:
    """``bfloat16 [model 1024, heads 16 /tensor, head_dim 128]``; of a quantised array its values and scales."""
    if isinstance(info, QuantizedArray):
        scales = f"{_array(info.values, config)} with scales {info.scales.dtype.name} {list(info.scales.shape)}"
        return scales if info.offsets is None else f"{scales} and offsets"
    axes = (_axis(axis, size, config) for axis, size in zip(info.logical_axes, info.shape, strict=True))
    return f"{info.dtype.name} [{', '.join(axes)}]"


def _axis(axis: str | None, size: int, config: ModelConfig) -> str:
    rule = getattr(ShardingRules(), axis) if axis is not None else None
    names = [rule] if isinstance(rule, str) else list(rule or ())
    # A mesh for a model without experts has no axis for them.
    split = "+".join(name for name in names if config.moe is not None or name != EXPERT_AXIS)
    named = f"{size:,}" if axis is None else f"{axis} {size:,}"
    return f"{named} /{split}" if split else named


def _kinds(layers: list[Any]) -> list[tuple[Any, list[int]]]:
    """The different layers, each with the numbers of those that are like it."""
    kinds: dict[str, tuple[Any, list[int]]] = {}
    for number, layer in enumerate(layers):
        # Shapes, types and axes; the functions that make random values of them are no part of what is drawn.
        kinds.setdefault(_shape_key(layer), (layer, []))[1].append(number)
    return list(kinds.values())


def _shape_key(part: Any) -> str:
    if isinstance(part, ArrayInfo):
        return f"{part.dtype.name}{part.shape}{part.logical_axes}"
    if isinstance(part, QuantizedArray):
        return f"{_shape_key(part.values)}{_shape_key(part.scales)}"
    if part is None:
        return "-"
    return f"{type(part).__name__}({','.join(_shape_key(getattr(part, field.name)) for field in fields(part))})"


def _ranges(numbers: list[int]) -> str:
    """``0-2, 4-6, 8-10, ...`` for the numbers of layers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs[:_MAX_RANGES]]
    return ", ".join(texts) + (", ..." if len(runs) > _MAX_RANGES else "")
