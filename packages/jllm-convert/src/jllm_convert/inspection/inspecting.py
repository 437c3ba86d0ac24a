"""Inspection of a Hugging Face folder, a GGUF file or a checkpoint: ``inspect``."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from jllm_core import checkpoint
from jllm_core.array_info import named_leaves
from jllm_core.config import ModelConfig
from jllm_core.errors import JLLMError
from jllm_core.weight_specs import abstract_weights

from jllm_convert.errors import ConversionError
from jllm_convert.families import FAMILIES
from jllm_convert.files.model_folder import CONFIG_FILE, ModelFolder
from jllm_convert.hub.downloading import origin
from jllm_convert.inspection.report import Inspection
from jllm_convert.inspection.stored_tensors import (
    WEIGHTS_SUFFIX,
    TensorsAndShards,
    stored_in_checkpoint,
    stored_in_folder,
    stored_in_gguf,
)
from jllm_convert.inspection.tokenizer_summary import TokenizerSummary, tokenizer_in_folder, tokenizer_in_metadata
from jllm_convert.matching.rules import match_tensors
from jllm_convert.sources.gguf.header import find_gguf_file, read_gguf_header
from jllm_convert.sources.huggingface.config import read_hf_config
from jllm_convert.sources.left_out import recorded
from jllm_convert.sources.opening import open_source

T = TypeVar("T")


def inspect(path: str | Path, ignore_fields: Sequence[str] = ()) -> Inspection:
    """Inspect a Hugging Face folder, a ``.gguf`` file or a JLLM checkpoint.

    Only headers are read, and, where a model that ties its output head to the embedding ships both, these two tensors.
    Problems of the model raise nothing: they are in the result's ``problems``.

    Args:
        path: the folder or file.
        ignore_fields: as ``convert`` has them.

    Raises:
        ConversionError: the path is none of the three, or a GGUF file with a malformed header.
    """
    path = Path(path)
    if path.is_dir():
        return _inspect_checkpoint(path) if checkpoint.is_checkpoint(path) else _inspect_folder(path, ignore_fields)
    if not path.exists():
        raise ConversionError(
            f"there is nothing at {path}; expected a Hugging Face folder, a .gguf file or a JLLM checkpoint"
        )
    if path.suffix.lower() != ".gguf":
        raise ConversionError(f"{path} is neither a folder nor a .gguf file")
    return _inspect_gguf(path, ignore_fields)


def _inspect_folder(path: Path, ignored: Sequence[str]) -> Inspection:
    problems: list[str] = []
    folder = ModelFolder(path)
    if CONFIG_FILE not in folder.names and not any(name.endswith(WEIGHTS_SUFFIX) for name in folder.names):
        raise ConversionError(
            f"{path} holds no model: expected {CONFIG_FILE} and safetensors (a Hugging Face folder), or "
            f"{checkpoint.MANIFEST_FILE} and {checkpoint.MODEL_FILE} (a JLLM checkpoint)"
        )
    # Problems of the file itself are dropped here: opening the source reports them.
    fields = _collect([], lambda: folder.read_json(CONFIG_FILE))
    config = None if fields is None else _collect(problems, lambda: read_hf_config(fields, CONFIG_FILE, ignored))
    _, left_out = _dry_run(path, config, problems, ignored)
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
        # The config and the dry run may report the same problem: each is listed once, in order.
        problems=tuple(dict.fromkeys(problems)),
        left_out=left_out,
    )


def _inspect_gguf(path: Path, ignored: Sequence[str]) -> Inspection:
    problems: list[str] = []
    (tensors, shards), family, name, tokenizer = _gguf_header(path, problems)
    config, left_out = _dry_run(path, None, problems, ignored)
    return Inspection(
        path=path,
        kind="gguf",
        family=family,
        config=config,
        tensors=tensors,
        shards=shards,
        tokenizer=tokenizer,
        source=_source(path, name),
        problems=tuple(dict.fromkeys(problems)),
        left_out=left_out,
    )


def _gguf_header(path: Path, problems: list[str]) -> tuple[TensorsAndShards, str | None, str | None, TokenizerSummary]:
    """Read a GGUF file's header: tensors, family, name, tokenizer. The metadata, which may be large, are not kept."""
    file = find_gguf_file(path)
    header = read_gguf_header(file)
    architecture, name = (header.metadata.get(f"general.{key}") for key in ("architecture", "name"))
    # Shown by its model_type, like a Hugging Face folder; an unknown one by its own name.
    families = {family.gguf_architecture: each for each, family in FAMILIES.items() if family.gguf_architecture}
    return (
        stored_in_gguf(path, file.size, header),
        families.get(architecture, architecture) if isinstance(architecture, str) else None,
        name if isinstance(name, str) else None,
        tokenizer_in_metadata(header.metadata, problems),
    )


def _dry_run(
    path: Path, config: ModelConfig | None, problems: list[str], ignored: Sequence[str]
) -> tuple[ModelConfig | None, dict[str, int]]:
    """Run the steps of a conversion that read no data.

    Returns:
        The config, read from the source where it is None, and how many tensors are left out, by what they are.
    """
    source = _collect(problems, lambda: open_source(path, ignored))
    if source is None:
        return config, {}
    known = _collect(problems, source.config) if config is None else config
    # Matching needs a config; without one it would report every tensor.
    if known is not None:
        _collect(problems, lambda: match_tensors(source, known))
    return known, dict(source.left_out)


def _source(path: Path, name: str | None = None) -> dict[str, str | None]:
    """The origin of a model by its download record; else the name in its own metadata."""
    found = origin(path)
    return {"name": found["repo"], "revision": found["revision"]} if found else {"name": name, "revision": None}


def _inspect_checkpoint(path: Path) -> Inspection:
    problems: list[str] = []
    config = _collect(problems, lambda: checkpoint.read_config(path))
    manifest = _collect(problems, lambda: checkpoint.read_manifest(path))
    # Without a manifest nothing is known of the arrays; the config is still shown.
    stored: TensorsAndShards = (), ()
    if manifest is not None:
        stored = _collect(problems, lambda: stored_in_checkpoint(path, manifest, problems)) or stored
        if config is not None:
            problems += _collect(problems, lambda: _disagreements(manifest, config)) or []
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
        left_out={} if manifest is None else recorded(manifest.source),
    )


def _disagreements(manifest: checkpoint.Manifest, config: ModelConfig) -> list[str]:
    """Problems of a manifest that lists other arrays than the config needs, in the model's order."""
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


def _collect(problems: list[str], read: Callable[[], T]) -> T | None:
    """Return the result of ``read``; where it fails, add its errors to ``problems`` and return None."""
    try:
        return read()
    except ConversionError as error:
        problems += error.problems
    except (JLLMError, OSError) as error:
        problems.append(str(error))
    return None
