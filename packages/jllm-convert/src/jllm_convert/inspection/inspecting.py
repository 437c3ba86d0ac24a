"""Look at a model, whichever kind it is."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from jllm_core import checkpoint
from jllm_core.array_info import named_leaves
from jllm_core.config import ModelConfig
from jllm_core.errors import JLLMError
from jllm_core.weights import abstract_weights

from jllm_convert.errors import ConversionError
from jllm_convert.families import FAMILIES
from jllm_convert.files.model_folder import CONFIG_FILE, ModelFolder
from jllm_convert.hub.downloading import origin
from jllm_convert.inspection.report import Inspection
from jllm_convert.inspection.stored_tensors import (
    WEIGHTS_SUFFIX,
    Stored,
    stored_in_checkpoint,
    stored_in_folder,
    stored_in_gguf,
)
from jllm_convert.inspection.tokenizer_summary import TokenizerSummary, tokenizer_in_folder, tokenizer_in_metadata
from jllm_convert.matching.rules import match_tensors
from jllm_convert.sources.gguf.header import find_file, read_header
from jllm_convert.sources.huggingface.config import read_hf_config
from jllm_convert.sources.opening import open_source

T = TypeVar("T")


def inspect(path: str | Path) -> Inspection:
    """Look at a Hugging Face folder, a ``.gguf`` file or a JLLM checkpoint.

    Only headers are read, and, where a model that ties its output head to the embedding ships both, these two. What is
    wrong with the model is told in ``problems``.

    Raises:
        ConversionError: the path is none of the three, or a GGUF file whose header cannot be trusted.
    """
    path = Path(path)
    if path.is_dir():
        return _inspect_checkpoint(path) if checkpoint.is_checkpoint(path) else _inspect_folder(path)
    if not path.exists():
        raise ConversionError(
            f"there is nothing at {path}; expected a Hugging Face folder, a .gguf file or a JLLM checkpoint"
        )
    if path.suffix.lower() != ".gguf":
        raise ConversionError(f"{path} is neither a folder nor a .gguf file")
    return _inspect_gguf(path)


def _inspect_folder(path: Path) -> Inspection:
    problems: list[str] = []
    folder = ModelFolder(path)
    if CONFIG_FILE not in folder.names and not any(name.endswith(WEIGHTS_SUFFIX) for name in folder.names):
        raise ConversionError(
            f"{path} holds no model: expected {CONFIG_FILE} and safetensors (a Hugging Face folder), or "
            f"{checkpoint.MANIFEST_FILE} and {checkpoint.MODEL_FILE} (a JLLM checkpoint)"
        )
    fields = _kept([], lambda: folder.read_json(CONFIG_FILE))  # opening the source says what is wrong with it
    config = None if fields is None else _kept(problems, lambda: read_hf_config(fields, CONFIG_FILE))
    _try(path, config, problems)
    tensors, shards = stored_in_folder(folder)
    family = (fields or {}).get("model_type")
    return Inspection(
        path=path,
        kind="hf",
        family=family if isinstance(family, str) else None,
        config=config,
        tensors=tensors,
        shards=shards,
        tokenizer=tokenizer_in_folder(folder, problems),
        source=_source(path),
        problems=tuple(dict.fromkeys(problems)),
    )


def _inspect_gguf(path: Path) -> Inspection:
    problems: list[str] = []
    (tensors, shards), family, name, tokenizer = _gguf_header(path, problems)
    return Inspection(
        path=path,
        kind="gguf",
        family=family,
        config=_try(path, None, problems),
        tensors=tensors,
        shards=shards,
        tokenizer=tokenizer,
        source=_source(path, name),
        problems=tuple(dict.fromkeys(problems)),
    )


def _gguf_header(path: Path, problems: list[str]) -> tuple[Stored, str | None, str | None, TokenizerSummary]:
    """What is shown of a GGUF file's header. Its metadata, large as they may be, are let go before it is opened."""
    file = find_file(path)
    header = read_header(file)
    architecture, name = (header.metadata.get(f"general.{key}") for key in ("architecture", "name"))
    families = {family.gguf_architecture: each for each, family in FAMILIES.items() if family.gguf_architecture}
    return (
        stored_in_gguf(path, file.size, header),
        families.get(architecture, architecture) if isinstance(architecture, str) else None,
        name if isinstance(name, str) else None,
        tokenizer_in_metadata(header.metadata, problems),
    )


def _try(path: Path, config: ModelConfig | None, problems: list[str]) -> ModelConfig | None:
    """Do as a conversion would, as far as that goes without data; the config, the source's own where none is given."""
    source = _kept(problems, lambda: open_source(path))
    if source is None:
        return config
    known = _kept(problems, source.config) if config is None else config
    if known is not None:
        _kept(problems, lambda: match_tensors(source, known))
    return known


def _source(path: Path, name: str | None = None) -> dict[str, str | None]:
    """Where a model is from, as far as its download is on record; else the name that it gives itself."""
    found = origin(path)
    return {"name": found["repo"], "revision": found["revision"]} if found else {"name": name, "revision": None}


def _inspect_checkpoint(path: Path) -> Inspection:
    problems: list[str] = []
    config = _kept(problems, lambda: checkpoint.read_config(path))
    manifest = _kept(problems, lambda: checkpoint.read_manifest(path))
    stored: Stored = (), ()
    if manifest is not None:
        stored = _kept(problems, lambda: stored_in_checkpoint(path, manifest, problems)) or stored
        if config is not None:
            problems += _kept(problems, lambda: _disagreements(manifest, config)) or []
    return Inspection(
        path=path,
        kind="checkpoint",
        family=None if config is None else config.model_type,
        config=config,
        tensors=stored[0],
        shards=stored[1],
        tokenizer=tokenizer_in_folder(ModelFolder(path), problems),
        source={} if manifest is None else manifest.source,
        problems=tuple(problems),
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
    return problems + [f"{name}: {where} lists it, the config has no use for it" for name in listed.keys() - needed]


def _kept(problems: list[str], step: Callable[[], T]) -> T | None:
    """What the step returns; None where it fails, and ``problems`` then say why."""
    try:
        return step()
    except ConversionError as error:
        problems += error.problems
    except (JLLMError, OSError) as error:
        problems.append(str(error))
    return None
