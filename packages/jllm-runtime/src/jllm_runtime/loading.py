"""Model loading: from a name to a Model in the devices' memory."""

import contextlib
import dataclasses
import importlib.metadata
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jllm_core import checkpoint
from jllm_core.array_info import ArrayInfo, array_bytes
from jllm_core.mesh_axes import default_axes, model_rules, partial_lanes
from jllm_core.quantization.device_form import Activations, form_note, held_weights
from jllm_core.sharding import Placement, ShardingRules
from jllm_core.weight_specs import abstract_weights
from jllm_core.weights import Weights

from jllm_runtime.compile_cache import use_compile_cache
from jllm_runtime.device_layouts import lay_out
from jllm_runtime.dtype_advice import float16_advice
from jllm_runtime.errors import ModelError
from jllm_runtime.mesh import automatic_mesh, make_mesh
from jllm_runtime.model import ChatModel, Model
from jllm_runtime.progress import status
from jllm_runtime.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

RESOLVERS = "jllm.resolvers"
"""Entry point group of functions ``resolve(model: str, folder: Path | None = None) -> Path | None``: they turn a name
into a checkpoint, which they make in ``folder``, or where none is given in a cache of theirs."""


def load_model(
    path_or_id: str | Path,
    mesh: Mesh | None = None,
    dtype: checkpoint.Dtype | None = None,
    rules: ShardingRules | None = None,
    compile_cache: bool = True,
    progress: bool | None = None,
    activations: Activations | None = None,
) -> Model:
    """Load a model onto a mesh, each device reading its own part of each array.

    What is compiled for it afterwards is kept on disk, by ``jllm_runtime.compile_cache.use_compile_cache``.

    Args:
        path_or_id: a checkpoint that jllm-convert made, or anything that an installed resolver turns into one (with
            jllm-convert installed: a Hugging Face folder or a GGUF file).
        mesh: from ``make_mesh``, or another with some of its axes. None takes all devices, and the axes that suit the
            model: a mixture's experts are shared out over ``expert``, all else goes over ``tensor``.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; the checkpoint's own when None. float16 is the faster one
            on GPUs without bfloat16 (T4), for models whose activations it holds.
        rules: where each array goes on the mesh; tensor-parallel inference when None.
        compile_cache: False leaves JAX's compilation cache as it is.
        progress: show a line on standard error meanwhile; None shows it on a terminal or in a notebook.
        activations: ``"int8"`` rounds the activations that matrices of int8 (a scale a channel) are multiplied with to
            8 bits too, for TPUs that multiply int8 at twice the rate; None does not.

    Raises:
        ModelError: there is no such model, or it does not fit.
        ShardingError: the mesh has several devices along an axis that no rule names.
        CheckpointError: the checkpoint is damaged or of another version, or has numbers that ``dtype`` cannot hold.
    """
    if dtype not in (None, *checkpoint.DTYPES):
        raise ModelError(f"dtype must be one of {', '.join(checkpoint.DTYPES)}, got {dtype!r}")
    if compile_cache:
        use_compile_cache()
    folder = resolve_model(str(path_or_id))
    # Not before: a resolver may say something itself.
    with status(f"loading {folder.name} ...", progress):
        model = _load(folder, mesh, dtype, rules or ShardingRules(), activations)
    if dtype is None and (advice := float16_advice(model.mesh.devices.flat[0], model.weights.dtype)):
        logger.warning("%s", advice)
    return model


def _load(
    folder: Path, given: Mesh | None, dtype: str | None, rules: ShardingRules, activations: Activations | None = None
) -> Model:
    config, manifest = checkpoint.read_config(folder), checkpoint.read_manifest(folder)
    if activations is not None and (manifest.quantization is None or manifest.quantization.group is not None):
        grid = "not quantised" if manifest.quantization is None else manifest.quantization.name
        raise ModelError(
            f"activations in int8 are for weights of int8 with a scale a channel, {folder} is {grid}; convert it "
            "with --quantize int8, or leave the activations as they are"
        )
    mesh = make_mesh(default_axes(config, jax.device_count(), rules)) if given is None else automatic_mesh(given)
    rules = model_rules(config, mesh, rules)
    placement = Placement(mesh, rules)
    if given is not None and (lost := partial_lanes(config, placement)):
        logger.warning("%s", lost)
    stored = abstract_weights(config, dtype or manifest.dtype, manifest.quantization)
    infos = held_weights(stored, placement, activations)
    shardings = rules.tree_shardings(infos, mesh)
    _check_fits(infos, shardings, mesh)
    restored = checkpoint.restore_weights(folder, config, dtype, shardings, infos)
    weights = lay_out(restored, infos, mesh.devices.flat[0].platform)
    if note := form_note(placement.device_kind, manifest.quantization):
        logger.warning("%s: %s", folder, note)
    tokenizer = Tokenizer.from_folder(folder)
    eos_ids = set(checkpoint.read_eos_ids(folder)) | set(tokenizer.eos_ids if tokenizer else ())
    settings = checkpoint.read_generation_config(folder)
    return Model(config, weights, mesh, rules, tokenizer, tuple(sorted(eos_ids)), folder, settings)


def load_chat_model(
    path_or_id: str | Path,
    mesh: Mesh | None = None,
    dtype: checkpoint.Dtype | None = None,
    rules: ShardingRules | None = None,
    **options: Any,
) -> ChatModel:
    """Load a model for conversations: as ``load_model``, and the tokenizer and its chat template are sure to be there.

    The arguments are those of ``load_model``.

    Raises:
        ModelError: as ``load_model``; or the model has no tokenizer or no chat template.
        CheckpointError: as ``load_model``.
    """
    model = load_model(path_or_id, mesh, dtype, rules, **options)
    if model.tokenizer is None or model.tokenizer.chat_template is None:
        missing = "no tokenizer" if model.tokenizer is None else "no chat template"
        raise ModelError(f"{path_or_id} has {missing}, so it is not for conversations; load it with load_model")
    return ChatModel(**{field.name: getattr(model, field.name) for field in dataclasses.fields(model)})


def resolve_model(name: str, folder: Path | None = None) -> Path:
    """The checkpoint that a model's name means: the folder itself, or what the first resolver that knows it gives.

    Args:
        name: a checkpoint's folder, or a name for a resolver.
        folder: where a resolver makes the checkpoint; its cache when None.

    Raises:
        ModelError: none does.
    """
    if not name:  # Path would take it for the current folder
        raise ModelError("the model's name is empty; expected a folder, a file or a name on the hub")
    path = Path(name)
    if checkpoint.is_checkpoint(path):
        return path
    for entry in importlib.metadata.entry_points(group=RESOLVERS):
        resolve = entry.load()
        # A resolver need not take a folder where none is given.
        found: Path | None = resolve(name) if folder is None else resolve(name, folder)
        if found is not None:
            return found
    if not path.exists():
        raise ModelError(
            f"there is no model at {name}: no such file or folder. A model is what `jllm-convert convert` made or, "
            f"with it installed, a Hugging Face folder, a .gguf file or owner/name on the hub{_on_the_hub(name)}"
        )
    if importlib.metadata.entry_points(group=RESOLVERS):
        raise ModelError(f"{name} is not a model: neither a checkpoint, nor a Hugging Face folder, nor a .gguf file")
    raise ModelError(
        f"{name} is not a checkpoint that `jllm-convert convert` made. To run Hugging Face folders and GGUF files "
        "directly, install the converter: pip install jllm-convert"
    )


@contextlib.contextmanager
def temporary_checkpoint(name: str) -> Iterator[Path]:
    """The checkpoint that a model's name means; what a resolver makes for it is removed at the end of the block.

    Raises:
        ModelError: as ``resolve_model``.
    """
    with tempfile.TemporaryDirectory(prefix="jllm-", ignore_cleanup_errors=True) as folder:
        yield resolve_model(name, Path(folder))


def _on_the_hub(name: str) -> str:
    """A question after a name that is no path: the published models that are called so, or nearly."""
    from jllm_runtime.planner.catalogue import PUBLISHED
    from jllm_runtime.planner.suggestions import near_names, short_name

    near = near_names(Path(name).name, PUBLISHED, cutoff=0.75)
    called_so = [model for model in near if short_name(model) == short_name(Path(name).name)]
    return f". {' or '.join(called_so or near)} on the hub?" if near else ""


def _check_fits(infos: Weights, shardings: Weights, mesh: Mesh) -> None:
    """Refuse a model whose weights alone are more than a device has, before anything is read."""

    def bytes_per_device(info: ArrayInfo, sharding: NamedSharding) -> int:
        return array_bytes(sharding.shard_shape(info.shape), info.dtype)

    needed = sum(jax.tree.leaves(jax.tree.map(bytes_per_device, infos, shardings)))
    device = next(device for device in mesh.devices.flat if device.process_index == jax.process_index())
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        # Devices of the CPU share the machine's memory.
        needed *= len(mesh.local_devices)
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        stats = device.memory_stats() or {}
        available = stats.get("bytes_limit", needed) - stats.get("bytes_in_use", 0)
    if needed > available:
        raise ModelError(
            f"the weights need {needed / 2**30:.1f} GiB on each {device.platform} device, "
            f"{available / 2**30:.1f} GiB are there; use more devices, a smaller type (bfloat16) or a smaller model"
        )
