"""Exported arrays: checkpoint arrays with their Hugging Face tensors, copied block by block into files."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock

import numpy as np
from jllm_core.array_info import ArrayInfo, named_leaves
from jllm_core.checkpoint import WEIGHTS_FOLDER, ArrayStore, Box, CheckpointError, Manifest, box_shape
from jllm_core.config import ModelConfig
from jllm_core.weight_specs import abstract_weights

from jllm_convert.errors import ConversionError
from jllm_convert.exporting.quantized_store import QuantizedStore
from jllm_convert.exporting.safetensors_writer import SafetensorsWriter, TensorInfo
from jllm_convert.families import exported_family
from jllm_convert.families.tensor_parts import Shape, Slot, inside, intersection, shapes_by_owner, slots_of
from jllm_convert.quality.grid_choice import matrices_of
from jllm_convert.writing.float32_arrays import exported_dtype, float32_arrays
from jllm_convert.writing.memory_budget import Task, run_tasks

# Blocks of the largest size that fit in the memory budget.
_BLOCKS_AT_ONCE = 4


@dataclass(frozen=True)
class ExportedTensor:
    """A Hugging Face tensor that holds an array, or a part of it.

    Attributes:
        name: its name.
        slot: the box of the array, and its layout in the tensor.
    """

    name: str
    slot: Slot


@dataclass(frozen=True)
class ExportedArray:
    """An array of the model in a checkpoint, and its tensor, a tensor for each expert, or pieces of one.

    Attributes:
        store: the array.
        parts: the tensors.
        own_dtype: the element type of its tensors where that is not the one of the others.
    """

    store: ArrayStore | QuantizedStore
    parts: tuple[ExportedTensor, ...]
    own_dtype: np.dtype | None = None

    def tensors(self, dtype: np.dtype) -> dict[str, TensorInfo]:
        """Shapes of the tensors by their names, with this element type where the array has none of its own."""
        return {
            part.name: TensorInfo(part.slot.layout.source_shape(box_shape(part.slot.place)), self.own_dtype or dtype)
            for part in self.parts
        }


def open_arrays(
    src: Path, config: ModelConfig, manifest: Manifest, infos: dict[str, ArrayInfo], names: Mapping[str, np.dtype]
) -> list[ExportedArray]:
    """Open every array of a checkpoint, in the model's order. No values are read.

    Args:
        src: the checkpoint.
        config: its architecture.
        manifest: its manifest.
        infos: the description of each stored array, by name.
        names: the element types that a tensor may have, by name.

    Raises:
        CheckpointError: an array is missing or not as described.
    """
    weights = src / WEIGHTS_FOLDER
    matrices = {}
    if manifest.quantization is not None:
        matrices = matrices_of(abstract_weights(config, manifest.dtype, manifest.quantization))
    arrays, plain = [], named_leaves(abstract_weights(config))
    shapes, fixed = shapes_by_owner(plain), float32_arrays(config)
    for name in plain:
        store: ArrayStore | QuantizedStore
        if name in matrices:
            store = QuantizedStore.open(weights, name, matrices[name])
        else:
            store = ArrayStore.open(weights, name)
        for part in store.stores if isinstance(store, QuantizedStore) else [store]:
            described = infos[part.name]
            if (part.shape, part.dtype) != (described.shape, described.dtype):
                raise CheckpointError(
                    f"the array {part.name} in {weights} holds {part.dtype}{list(part.shape)}, "
                    f"the manifest says {described.dtype}{list(described.shape)}"
                )
        own = exported_dtype(name, manifest.source, names) if name in fixed else None
        arrays.append(ExportedArray(store, _exported_tensors(name, shapes, config), own))
    return arrays


def _exported_tensors(
    array: str, shapes: Mapping[str, Mapping[str, Shape]], config: ModelConfig
) -> tuple[ExportedTensor, ...]:
    """The tensors of an array by the first rule for it: the publishers' own way comes first."""
    # "layers.3.attn.q" -> "3"; empty for arrays outside the layers.
    _, _, rest = array.partition("layers.")
    layer = rest.partition(".")[0]
    for rule in exported_family(config).rules:
        pattern = rule.name_in("hf")
        if pattern is None or rule.array.format(i=layer) != array:
            continue
        if rule.mixer is not None and rule.mixer != config.mixer(int(layer)):
            continue
        experts = range(config.moe.num_experts if config.moe else 0) if "{e}" in pattern else (None,)
        return tuple(
            ExportedTensor(pattern.format(i=layer, e=expert), slot)
            for expert in experts
            for slot in slots_of(rule.layout_in("hf"), array, shapes, expert)
        )
    raise ConversionError(f"{array} has no name in Hugging Face files of a {config.model_type} model")


def write_arrays(
    arrays: list[ExportedArray],
    writer: SafetensorsWriter,
    dtype: np.dtype,
    memory: int,
    exact: bool,
    on_block: Callable[[int, int], None],
) -> None:
    """Copy arrays into the files of a writer, several blocks at a time.

    Args:
        arrays: the arrays.
        writer: the writer of their tensors.
        dtype: the element type of the tensors.
        memory: the memory budget of all blocks in work, in bytes; a single chunk may need more.
        exact: whether to refuse values that ``dtype`` would change.
        on_block: called after each block, from one thread at a time, with the bytes written, and 1 where the array is
            complete now, else 0.

    Raises:
        CheckpointError: an array is damaged.
        ConversionError: a value does not fit ``dtype``.
        OSError: writing fails.
    """
    lock, tasks = Lock(), []
    left: dict[str, int] = {}

    def copy(array: ExportedArray, box: Box, stopped: Callable[[], bool]) -> None:
        own = array.own_dtype
        _copy_block(array, box, writer, own or dtype, exact or own is not None)
        with lock:
            left[array.store.name] -= 1
            on_block(math.prod(box_shape(box)) * (own or dtype).itemsize, int(left[array.store.name] == 0))

    # ``blocks`` takes bytes of the stored type; copying needs ``element`` bytes for each of its elements.
    for array in arrays:
        element = _bytes_an_element(array, array.own_dtype or dtype)
        boxes = array.store.blocks(memory // _BLOCKS_AT_ONCE * array.store.dtype.itemsize // element)
        left[array.store.name] = len(boxes)
        tasks += [Task(math.prod(box_shape(box)) * element, partial(copy, array, box)) for box in boxes]
    run_tasks(tasks, memory)


def _bytes_an_element(array: ExportedArray, dtype: np.dtype) -> int:
    """Bytes of memory for an element while it is copied: as read, as cast, and as laid out."""
    copies = array.store.dtype.itemsize + 2 * dtype.itemsize
    # The check of a cast, and dequantising, take temporary arrays.
    return copies if array.store.dtype == dtype and isinstance(array.store, ArrayStore) else copies + 8


def _copy_block(array: ExportedArray, box: Box, writer: SafetensorsWriter, dtype: np.dtype, exact: bool) -> None:
    values = _cast(array.store.read(box), dtype, array.store.name, exact)
    for tensor in array.parts:
        place, layout = tensor.slot.place, tensor.slot.layout
        if (shared := intersection(place, box)) is not None:
            target = layout.source_box(inside(shared, place), box_shape(place))
            writer.write(tensor.name, target, layout.to_source(values[inside(shared, box)]))


def _cast(values: np.ndarray, dtype: np.dtype, name: str, exact: bool) -> np.ndarray:
    """Cast values to another element type.

    Raises:
        ConversionError: a finite value becomes infinite, or with ``exact`` any value changes.
    """
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        cast: np.ndarray = values.astype(dtype)
    if dtype == np.float32:  # holds all of the others
        return cast
    if exact:
        # Casting back shows any lost bit. NaN differs from itself, and is kept as NaN.
        changed = (cast.astype(values.dtype) != values) & ~np.isnan(values)
        problem = f"does not hold exactly, though the checkpoint's manifest says that the source was {dtype}"
    else:
        changed = np.isinf(cast) & np.isfinite(values)
        problem = "cannot hold"
    if changed.any():
        raise ConversionError(
            f"{name} has numbers such as {values[changed][0]}, which {dtype} {problem}; "
            f"export with dtype {values.dtype} (--dtype {values.dtype})"
        )
    return cast
