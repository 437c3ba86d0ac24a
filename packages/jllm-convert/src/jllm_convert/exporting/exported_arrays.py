"""The arrays of a checkpoint on their way to Hugging Face tensors: which they become, and block by block into files."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock

import numpy as np
from jllm_core.array_info import ArrayInfo, named_leaves
from jllm_core.checkpoint import WEIGHTS_FOLDER, ArrayStore, Box, CheckpointError, Manifest, box_shape
from jllm_core.config import ModelConfig
from jllm_core.weights import abstract_weights

from jllm_convert.errors import ConversionError
from jllm_convert.exporting.quantized_store import QuantizedStore
from jllm_convert.exporting.safetensors_writer import SafetensorsWriter, TensorInfo
from jllm_convert.families import FAMILIES
from jllm_convert.matching.layout import Layout
from jllm_convert.quality.quantization import matrices_of
from jllm_convert.writing.memory_budget import Task, run_tasks

# Blocks of the largest size that the window of memory has room for.
_AT_ONCE = 4


@dataclass(frozen=True)
class Output:
    """A tensor that an array becomes.

    Attributes:
        tensor: its name in Hugging Face files.
        layout: how it stores the array, or the part.
        shape: the model's shape of what it stores.
        expert: the entry of the array's first axis that it stores; None is the whole array.
    """

    tensor: str
    layout: Layout
    shape: tuple[int, ...]
    expert: int | None = None


@dataclass(frozen=True)
class ExportedArray:
    """An array of the model in a checkpoint, and the tensor that it becomes, or one for each expert."""

    store: ArrayStore | QuantizedStore
    outputs: tuple[Output, ...]

    def tensors(self, dtype: np.dtype) -> dict[str, TensorInfo]:
        """The tensors by their names, in this element type."""
        return {o.tensor: TensorInfo(o.layout.source_shape(o.shape), dtype) for o in self.outputs}


def open_arrays(src: Path, config: ModelConfig, manifest: Manifest, infos: dict[str, ArrayInfo]) -> list[ExportedArray]:
    """Open every array of a checkpoint, in the model's order. No numbers are read.

    Args:
        src: the checkpoint.
        config: its architecture.
        manifest: its manifest.
        infos: the description of each array that is stored, by name.

    Raises:
        CheckpointError: arrays that are missing or not as described.
    """
    weights = src / WEIGHTS_FOLDER
    matrices = {}
    if manifest.quantization is not None:
        matrices = matrices_of(abstract_weights(config, manifest.dtype, manifest.quantization))
    arrays = []
    for name, info in named_leaves(abstract_weights(config)).items():
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
        arrays.append(ExportedArray(store, _outputs(name, info.shape, config)))
    return arrays


def _outputs(array: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[Output, ...]:
    """The tensors of an array, as the first rule has it that fills the array: publishers' own way comes first."""
    _, _, rest = array.partition("layers.")
    layer = rest.partition(".")[0]
    for rule in FAMILIES[config.model_type].rules:
        pattern = rule.name_in("hf")
        if pattern is None or rule.array.format(i=layer) != array:
            continue
        layout = rule.layout_in("hf")
        if "{e}" not in pattern:
            return (Output(pattern.format(i=layer), layout, shape),)
        return tuple(Output(pattern.format(i=layer, e=e), layout, shape[1:], e) for e in range(shape[0]))
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
        arrays: what to copy.
        writer: takes their tensors.
        dtype: the element type of the tensors.
        memory: bytes that the blocks in work may hold; a single chunk may hold more.
        exact: refuse numbers that ``dtype`` would change.
        on_block: called after each block, from one thread at a time, with the bytes written, and 1 where the array is
            whole now, else 0.

    Raises:
        CheckpointError: damage, naming the array.
        ConversionError: numbers that ``dtype`` cannot hold.
        OSError: the disk cannot take them.
    """
    lock, tasks = Lock(), []
    left: dict[str, int] = {}

    def copy(array: ExportedArray, box: Box, stopped: Callable[[], bool]) -> None:
        _copy_block(array, box, writer, dtype, exact)
        with lock:
            left[array.store.name] -= 1
            on_block(math.prod(box_shape(box)) * dtype.itemsize, int(left[array.store.name] == 0))

    for array in arrays:
        element = _bytes_an_element(array, dtype)
        boxes = array.store.blocks(memory // _AT_ONCE * array.store.dtype.itemsize // element)
        left[array.store.name] = len(boxes)
        tasks += [Task(math.prod(box_shape(box)) * element, partial(copy, array, box)) for box in boxes]
    run_tasks(tasks, memory)


def _bytes_an_element(array: ExportedArray, dtype: np.dtype) -> int:
    """Bytes that copying holds for an element: what is read, what it is cast to, and what is laid out of that."""
    copies = array.store.dtype.itemsize + 2 * dtype.itemsize
    # Casting is checked, and dequantising has steps of its own.
    return copies if array.store.dtype == dtype and isinstance(array.store, ArrayStore) else copies + 8


def _copy_block(array: ExportedArray, box: Box, writer: SafetensorsWriter, dtype: np.dtype, exact: bool) -> None:
    values = _cast(array.store.read(box), dtype, array.store.name, exact)
    for output in array.outputs:
        part, part_box = values, box
        if output.expert is not None:
            if not box[0].start <= output.expert < box[0].stop:
                continue
            part, part_box = values[output.expert - box[0].start], box[1:]
        writer.write(output.tensor, output.layout.source_box(part_box, output.shape), output.layout.to_source(part))


def _cast(values: np.ndarray, dtype: np.dtype, name: str, exact: bool) -> np.ndarray:
    """The values in another element type.

    Raises:
        ConversionError: finite numbers that become infinite, or with ``exact`` any that change.
    """
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        cast: np.ndarray = values.astype(dtype)
    if dtype == np.float32:  # holds all of the others
        return cast
    if exact:
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
