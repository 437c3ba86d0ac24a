"""Look at a model, whichever kind it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from jllm_core import checkpoint
from jllm_core.array_info import named_leaves
from jllm_core.config import ModelConfig
from jllm_core.errors import JLLMError
from jllm_core.weights import abstract_weights

from jllm_convert.conversion import open_source
from jllm_convert.errors import ConversionError
from jllm_convert.families import FAMILIES
from jllm_convert.hf_config import read_hf_config
from jllm_convert.inspection.gguf_header import read_gguf_header
from jllm_convert.inspection.json_object import json_object
from jllm_convert.inspection.layers import summarise
from jllm_convert.inspection.origin import origin_of_folder, origin_of_metadata
from jllm_convert.inspection.report import Inspection, Kind
from jllm_convert.inspection.stored import Stored, stored_in_checkpoint, stored_in_folder, stored_in_gguf
from jllm_convert.inspection.tokenizer import tokenizer_in_folder, tokenizer_in_metadata
from jllm_convert.rules import match_tensors
from jllm_convert.sources.base import Source

T = TypeVar("T")

CONFIG_FILE = "config.json"
# What the names of a layer's tensors begin with.
_STACKS: dict[Kind, str] = {"hf": "model.layers", "gguf": "blk", "checkpoint": "layers"}


def inspect(path: str | Path) -> Inspection:
    """Look at a Hugging Face folder, a ``.gguf`` file or a JLLM checkpoint.

    Only headers are read, and, where a model that ties its output head to the embedding ships both, these two. What is
    wrong with the model is told in ``problems``.

    Raises:
        ConversionError: the path is none of the three, or its file cannot be read at all.
    """
    path = Path(path)
    if path.is_dir():
        if checkpoint.is_checkpoint(path):
            return _inspect_checkpoint(path)
        if (path / CONFIG_FILE).is_file() or any(path.glob("*.safetensors")):
            return _inspect_folder(path)
        raise ConversionError(
            f"{path} holds no model: expected {CONFIG_FILE} and safetensors (a Hugging Face folder), or "
            f"{checkpoint.MANIFEST_FILE} and {checkpoint.MODEL_FILE} (a JLLM checkpoint)"
        )
    if not path.exists():
        raise ConversionError(
            f"there is nothing at {path}; expected a Hugging Face folder, a .gguf file or a JLLM checkpoint"
        )
    if path.suffix.lower() != ".gguf":
        raise ConversionError(f"{path} is neither a folder nor a .gguf file")
    return _inspect_gguf(path)


def _inspect_folder(folder: Path) -> Inspection:
    problems: list[str] = []
    fields = json_object(folder / CONFIG_FILE, []) or {}  # opening the source says what is wrong with the file
    family = fields.get("model_type")
    stored = stored_in_folder(folder)
    config = _kept(problems, lambda: read_hf_config(fields, CONFIG_FILE)) if fields else None
    _try(folder, lambda source: config, stored, problems)
    return _inspection(
        path=folder,
        kind="hf",
        family=family if isinstance(family, str) else None,
        config=config,
        stored=stored,
        tokenizer=tokenizer_in_folder(folder, problems),
        source=origin_of_folder(folder),
        problems=problems,
    )


def _inspect_gguf(path: Path) -> Inspection:
    problems: list[str] = []
    header = read_gguf_header(path)
    architecture = header.metadata.get("general.architecture")
    families = {family.gguf_architecture: name for name, family in FAMILIES.items() if family.gguf_architecture}
    stored = stored_in_gguf(path, header)
    config = _try(path, lambda source: _kept(problems, source.config), stored, problems)
    return _inspection(
        path=path,
        kind="gguf",
        family=families.get(architecture, architecture) if isinstance(architecture, str) else None,
        config=config,
        stored=stored,
        tokenizer=tokenizer_in_metadata(header.metadata, problems),
        source=origin_of_metadata(header.metadata),
        problems=problems,
    )


def _try(
    path: Path, config_of: Callable[[Source], ModelConfig | None], stored: Stored, problems: list[str]
) -> ModelConfig | None:
    """Do as a conversion would, as far as that goes without data; the config, where it came to that."""
    source = _kept(problems, lambda: open_source(path))
    if source is None:
        return None
    problems += stored.problems
    config = config_of(source)
    if config is not None:
        _kept(problems, lambda: match_tensors(source, config))
    return config


def _inspect_checkpoint(folder: Path) -> Inspection:
    problems: list[str] = []
    config = _kept(problems, lambda: checkpoint.read_config(folder))
    manifest = _kept(problems, lambda: checkpoint.read_manifest(folder))
    stored = Stored((), ())
    if manifest is not None:
        stored = stored_in_checkpoint(folder, manifest)
        problems += stored.problems
    if manifest is not None and config is not None:
        problems += _kept(problems, lambda: _disagreements(manifest, config)) or []
    return _inspection(
        path=folder,
        kind="checkpoint",
        family=None if config is None else config.model_type,
        config=config,
        stored=stored,
        tokenizer=tokenizer_in_folder(folder, problems),
        source=manifest.source if manifest is not None and isinstance(manifest.source, dict) else {},
        problems=problems,
        quantization=None if manifest is None else manifest.quantization,
        receipt=None if manifest is None else manifest.receipt,
    )


def _disagreements(manifest: checkpoint.Manifest, config: ModelConfig) -> list[str]:
    """Where the manifest lists other arrays than the config needs, in the model's order."""
    infos = named_leaves(abstract_weights(config, manifest.dtype, manifest.quantization))
    needed = {name: f"{info.dtype.name}{list(info.shape)}" for name, info in infos.items()}
    listed = {name: f"{entry['dtype']}{entry['shape']}" for name, entry in manifest.arrays.items()}
    where = checkpoint.MANIFEST_FILE
    problems = [
        f"{name}: the config needs {what}, {where} lists {listed.get(name, 'none')}"
        for name, what in needed.items()
        if listed.get(name) != what
    ]
    return problems + [
        f"{name}: {where} lists it, the config has no use for it" for name in listed if name not in needed
    ]


def _inspection(*, kind: Kind, config: ModelConfig | None, stored: Stored, **known: Any) -> Inspection:
    layers, outside = summarise(stored.tensors, config, _STACKS[kind])
    problems = tuple(known.pop("problems"))
    return Inspection(
        kind=kind, config=config, stored=stored, layers=layers, outside_layers=outside, problems=problems, **known
    )


def _kept(problems: list[str], step: Callable[[], T]) -> T | None:
    """What the step returns; None where it fails, and ``problems`` then say why."""
    try:
        return step()
    except ConversionError as error:
        problems += error.problems
    except (JLLMError, UnicodeDecodeError) as error:
        problems.append(str(error))
    return None
