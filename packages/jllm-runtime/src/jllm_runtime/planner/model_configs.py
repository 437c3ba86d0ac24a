"""Models to plan, by name, folder or file: architecture, and the types of their weights where these are known."""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jllm_core import checkpoint
from jllm_core.config import ConfigError, ModelConfig
from jllm_core.errors import JLLMError, reason
from jllm_core.quantization.arrays import Quantization

from jllm_runtime.errors import PlanError
from jllm_runtime.planner.catalogue import PUBLISHED, find_published
from jllm_runtime.planner.suggestions import suggest

DESCRIPTIONS = "jllm.descriptions"
"""Entry point group of functions ``describe(model: str)`` that read a model's config without converting or downloading
it. They return None for what is no model of theirs, else an object with ``config`` (a ModelConfig), ``dtype``,
``quantization`` and ``origin``, as in ``FoundModel``."""


@dataclass(frozen=True)
class FoundModel:
    """A model to plan.

    Attributes:
        name: what to call it.
        config: its architecture.
        known_by: words that say where the architecture is from.
        dtype: the element type of its arrays, ``float32``, ``bfloat16`` or ``float16``; None where nothing says it.
        quantization: how its matrices are stored; None is ``dtype``.
        origin: words that say how ``dtype`` and ``quantization`` are known, to stand after them.
    """

    name: str
    config: ModelConfig
    known_by: str
    dtype: str | None = None
    quantization: Quantization | None = None
    origin: str = "assumed"


def find_model(name: str) -> FoundModel:
    """Find the model of this name; nothing is converted, and no weights are read or downloaded.

    Args:
        name: a checkpoint's folder, a model.json, the name of a published model (in any case, with or without its
            organisation), or anything that an installed package can describe (with jllm-convert installed: a Hugging
            Face folder, a GGUF file or a name on the hub).

    Raises:
        PlanError: an unknown model; the message suggests names.
        CheckpointError: a checkpoint that is damaged.
        JLLMError: a model that cannot be described, with the reason.
    """
    if not name:  # Path would take it for the current folder
        raise PlanError("the model's name is empty; expected a folder, a file or a name on the hub")
    path = Path(name)
    if checkpoint.is_checkpoint(path):
        manifest = checkpoint.read_manifest(path)
        return FoundModel(
            name=path.resolve().name,
            config=checkpoint.read_config(path),
            known_by="the checkpoint",
            dtype=manifest.dtype,
            quantization=manifest.quantization,
            origin="as the checkpoint has it",
        )
    if path.is_file() and path.suffix == ".json":
        return FoundModel(path.stem, _read_json(path), f"the file {path.name}")
    # A path wins over a published model of the same name, as in every other command.
    published = None if path.exists() else find_published(name)
    if published:
        return FoundModel(published.name, published.config, f"the published config.json of {published.name}")
    return _described(name)


def _described(name: str) -> FoundModel:
    """What the first installed package that knows the model says of it."""
    entries = importlib.metadata.entry_points(group=DESCRIPTIONS)
    is_path = Path(name).exists()
    for entry in entries:
        describe: Callable[[str], Any] = entry.load()
        try:
            found = describe(name)
        except JLLMError as error:
            # Of a path its error says all; a name may be one of the catalogue's with a typo.
            if is_path:
                raise
            raise PlanError(f"{error}. In the catalogue: {suggest(name, PUBLISHED)}") from error
        if found is not None:
            return FoundModel(
                name=Path(name).resolve().name if is_path else name,
                config=found.config,
                known_by="config.json, or the header of a GGUF file",
                dtype=found.dtype,
                quantization=found.quantization,
                origin=found.origin,
            )
    if is_path:
        problem = "neither a checkpoint, nor a model.json, nor a Hugging Face folder, nor a .gguf file"
    else:
        problem = f"not a folder or file, nor known by name; {suggest(name, PUBLISHED)}"
    advice = (
        "" if entries else ". To plan Hugging Face folders, GGUF files and names on the hub: pip install jllm-convert"
    )
    raise PlanError(f"unknown model {name!r}: {problem}{advice}")


def _read_json(path: Path) -> ModelConfig:
    try:
        return ModelConfig.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} cannot be read: {reason(error)}") from error
    except ConfigError as error:
        raise PlanError(
            f"{path} is not the model.json of a checkpoint: {error}. Of a Hugging Face model give the folder"
        ) from error
