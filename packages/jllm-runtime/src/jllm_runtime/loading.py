"""Model loading: from a name to a Model in the devices' memory."""

import importlib.metadata
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jllm_core import checkpoint
from jllm_core.array_info import ArrayInfo
from jllm_core.backends.base import Backend
from jllm_core.backends.select import select_backend
from jllm_core.config import ModelConfig
from jllm_core.model import Capture, Captured
from jllm_core.sharding import Placement, ShardingRules
from jllm_core.weight_specs import abstract_weights
from jllm_core.weights import Weights

from jllm_runtime.errors import ModelError, RequestError
from jllm_runtime.layouts import lay_out
from jllm_runtime.mesh import make_mesh
from jllm_runtime.programs import batch
from jllm_runtime.tokenizer import Tokenizer

RESOLVERS = "jllm.resolvers"
"""Entry point group of functions ``resolve(model: str) -> Path | None`` that turn a name into a checkpoint."""


@dataclass(frozen=True)
class Model:
    """A model that is ready to run.

    Attributes:
        config: the architecture.
        weights: its arrays, laid out over the mesh.
        mesh: the devices it runs on.
        rules: how its arrays are laid out over them.
        tokenizer: None where the checkpoint has none; the model then takes token ids only.
        eos_ids: every id that ends a text, by the config, the generation config or the tokenizer.
        path: the checkpoint it was loaded from; None for weights made in memory.
    """

    config: ModelConfig
    weights: Weights
    mesh: Mesh
    rules: ShardingRules
    tokenizer: Tokenizer | None = None
    eos_ids: tuple[int, ...] = ()
    path: Path | None = None

    def logits(self, token_ids: Any) -> jax.Array:
        """The logits of the token after each given one, by the plain causal model without a cache.

        Args:
            token_ids: whole numbers, ``[B, T]``; texts of one length. To score shorter ones among them, fill up their
                ends with any valid id: no token sees what comes after it.

        Returns:
            float32 ``[B, T, V]``, whole on every device.

        Raises:
            RequestError: not ``[B, T]``, empty, longer than the context, or with ids outside the vocabulary.
        """
        tokens = _checked_tokens(token_ids, self.config)
        logits: jax.Array = batch.all_logits(self.weights, tokens, self.config, self.placement)
        return logits

    def inspect(
        self,
        token_ids: Any,
        hidden: Sequence[int] = (),
        attention: Sequence[int] = (),
        routing: bool = False,
    ) -> tuple[jax.Array, Captured]:
        """The logits, and what the model computes on the way to them, by the plain causal model without a cache.

        Layers count from 0.

        Args:
            token_ids: as ``logits`` takes them.
            hidden: the layers after which the residual stream is wanted.
            attention: the layers whose attention probabilities are wanted. They take ``4 * B * N * T * T`` bytes each.
            routing: whether the router choices of every mixture of experts are wanted.

        Returns:
            float32 ``[B, T, V]``; and by the numbers of the layers ``hidden [B, T, D]``, ``attention [B, N, T, T]`` in
            float32, and ``routing`` with ``probabilities [B*T, E]``, ``weights`` and ``experts [B*T, X]``. All whole on
            every device.

        Raises:
            RequestError: as ``logits``; or a layer that the model has not.
        """
        tokens = _checked_tokens(token_ids, self.config)
        for number in (*hidden, *attention):
            if not 0 <= number < self.config.num_layers:
                raise RequestError(
                    f"there is no layer {number} to inspect: the model's are 0 to {self.config.num_layers - 1}"
                )
        capture = Capture(tuple(hidden), tuple(attention), routing)
        found: tuple[jax.Array, Captured] = batch.inspect(self.weights, tokens, capture, self.config, self.placement)
        return found

    @property
    def placement(self) -> Placement:
        """The mesh and the rules, as the compiled steps take them."""
        return Placement(self.mesh, self.rules)

    @cached_property
    def backend(self) -> Backend:
        """Where the model runs: the fastest backend that takes it on these devices, chosen when it is first used."""
        return select_backend(self.weights, self.config, self.placement)

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of an array that is whole on every device of the mesh."""
        return NamedSharding(self.mesh, PartitionSpec())


def _checked_tokens(token_ids: Any, config: ModelConfig) -> np.ndarray:
    """Texts of one length as int32 ``[B, T]``, or a RequestError."""
    try:
        tokens = np.asarray(token_ids)
    except ValueError as error:
        raise RequestError(f"token_ids must be whole numbers [B, T], texts of one length: {error}") from error
    if tokens.ndim != 2 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
        raise RequestError(f"token_ids must be whole numbers [B, T], got {tokens.dtype} {list(tokens.shape)}")
    if tokens.shape[1] > config.context_length:
        raise RequestError(f"{tokens.shape[1]} tokens are more than the context of {config.context_length}")
    check_token_ids(tokens.ravel(), config)
    return tokens.astype(np.int32)


def check_token_ids(token_ids: Any, config: ModelConfig) -> None:
    """Raise a RequestError for ids that are not in the vocabulary."""
    ids = np.asarray(token_ids)
    outside = ids[(ids < 0) | (ids >= config.vocab_size)]
    if outside.size:
        raise RequestError(f"token id {outside[0]} is outside the vocabulary of {config.vocab_size}")


def load_model(
    path_or_id: str | Path,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    rules: ShardingRules | None = None,
) -> Model:
    """Load a model onto a mesh, each device reading its own part of each array.

    Args:
        path_or_id: a checkpoint that jllm-convert made, or anything that an installed resolver turns into one (with
            jllm-convert installed: a Hugging Face folder or a GGUF file).
        mesh: from ``make_mesh``; all devices on the tensor axis when None.
        dtype: ``"float32"`` or ``"bfloat16"``; the checkpoint's own when None.
        rules: where each array goes on the mesh; tensor-parallel inference when None.

    Raises:
        ModelError: there is no such model, or it does not fit.
        CheckpointError: the checkpoint is damaged or of another version.
    """
    if dtype not in (None, *checkpoint.DTYPES):
        raise ModelError(f"dtype must be one of {', '.join(checkpoint.DTYPES)}, got {dtype!r}")
    folder = resolve_model(str(path_or_id))
    config, manifest = checkpoint.read_config(folder), checkpoint.read_manifest(folder)
    mesh, rules = make_mesh() if mesh is None else mesh, rules or ShardingRules()
    infos = abstract_weights(config, dtype or manifest.dtype, manifest.quantization)
    shardings = rules.tree_shardings(infos, mesh)
    _check_fits(infos, shardings, mesh)
    restored = checkpoint.restore_weights(folder, config, dtype, shardings)
    weights = lay_out(restored, infos, mesh.devices.flat[0].platform)
    tokenizer = Tokenizer.from_folder(folder)
    eos_ids = set(checkpoint.read_eos_ids(folder)) | set(tokenizer.eos_ids if tokenizer else ())
    return Model(config, weights, mesh, rules, tokenizer, tuple(sorted(eos_ids)), folder)


def resolve_model(name: str) -> Path:
    """The checkpoint that a model's name means: the folder itself, or what the first resolver that knows it gives.

    Raises:
        ModelError: none does.
    """
    path = Path(name)
    if checkpoint.is_checkpoint(path):
        return path
    for entry in importlib.metadata.entry_points(group=RESOLVERS):
        found: Path | None = entry.load()(name)
        if found is not None:
            return found
    if not path.exists():
        raise ModelError(f"there is no model at {name}; expected a folder that `jllm-convert convert` made")
    if importlib.metadata.entry_points(group=RESOLVERS):
        raise ModelError(f"{name} is not a model: neither a checkpoint, nor a Hugging Face folder, nor a .gguf file")
    raise ModelError(
        f"{name} is not a checkpoint that `jllm-convert convert` made. To run Hugging Face folders and GGUF files "
        "directly, install the converter: pip install jllm-convert"
    )


def _check_fits(infos: Weights, shardings: Weights, mesh: Mesh) -> None:
    """Refuse a model whose weights alone are more than a device has, before anything is read."""

    def bytes_per_device(info: ArrayInfo, sharding: NamedSharding) -> int:
        return int(np.prod(sharding.shard_shape(info.shape), dtype=np.int64)) * int(info.dtype.itemsize)

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
