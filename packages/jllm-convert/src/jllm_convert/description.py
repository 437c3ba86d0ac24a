"""Description of a model that is not converted (entry point group ``jllm.descriptions``): its architecture, and the
types that a conversion would store it in. It is read off headers and config.json; no weights are read or downloaded.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jllm_core.config import ModelConfig
from jllm_core.quantization.arrays import Quantization

from jllm_convert.errors import ConversionError

if TYPE_CHECKING:
    from jllm_convert.hub.model_id import ModelId
    from jllm_convert.hub.remote_file import RemoteFile
    from jllm_convert.hub.repository import Repository
    from jllm_convert.sources.base import Source

_FIRST_BYTES = 8 << 20  # the header of most models, which has their vocabulary


@dataclass(frozen=True)
class Description:
    """Architecture and types of a model.

    Attributes:
        config: its architecture.
        dtype: the element type that arrays would be stored in, unless they are quantised: ``float32`` or ``bfloat16``.
        quantization: how its matrices would be stored; None is ``dtype``.
        origin: words that say how the types are known, to stand after them.
    """

    config: ModelConfig
    dtype: str
    quantization: Quantization | None
    origin: str


def describe(model: str) -> Description | None:
    """Describe a Hugging Face folder, a GGUF file or a model on the hub as ``jllm generate`` would convert it.

    Of a model on the hub, config.json is downloaded to the hub's cache, or the header of a GGUF file to memory.

    Args:
        model: the path or the name that the user gave.

    Returns:
        The description, or None where this package cannot convert ``model``.

    Raises:
        ConversionError: the model cannot be converted, or the hub cannot be asked.
    """
    from jllm_core import checkpoint

    from jllm_convert.hub.model_id import ModelId, looks_like_id
    from jllm_convert.hub.selection import has_model
    from jllm_convert.sources.opening import open_source

    path = Path(model)
    try:
        if checkpoint.is_checkpoint(path):
            return None
        if path.is_dir():
            # The headers know the types; config.json says what they should be.
            return _of_source(open_source(path)) if has_model(path) else _of_config_file(path)
        if path.is_file():
            return _of_source(open_source(path)) if path.suffix.lower() == ".gguf" else None
    except (OSError, ValueError):  # such as a name that is too long for a path
        return None
    return _of_hub(ModelId.parse(model)) if looks_like_id(model) else None


def _of_source(source: "Source") -> Description:
    from jllm_convert.quality.storage_choice import storage_of
    from jllm_convert.writing.plan import plan_conversion

    storage = storage_of(source)
    plan = plan_conversion(source, storage.dtype, storage.quantize, embedding=storage.embedding)
    return Description(plan.config, plan.dtype.name, plan.grid, _origin(storage.words))


def _origin(words: str) -> str:
    return f"as `jllm generate` would convert it ({words})"


def _of_config_file(folder: Path) -> Description:
    from jllm_convert.files.model_folder import CONFIG_FILE, ModelFolder

    fields = ModelFolder(folder).read_json(CONFIG_FILE)
    if fields is None:
        raise ConversionError(
            f"{folder} is not a model: it has no config.json, and no manifest.json of a checkpoint; expected a folder "
            "with one of them"
        )
    return _of_config(fields, CONFIG_FILE)


def _of_config(fields: Mapping[str, Any], where: str) -> Description:
    """The description by config.json alone."""
    from jllm_convert.sources.huggingface.config import read_hf_config

    config = read_hf_config(fields, where)
    stored = fields.get("dtype") or fields.get("torch_dtype")
    quantized = fields.get("quantization_config") is not None
    words = (
        "weights in FP8" if quantized else f"{where} has torch_dtype {stored}" if stored else f"{where} has no dtype"
    )
    return Description(config, config_dtype(fields), None, _origin(words))


def config_dtype(fields: Mapping[str, Any]) -> str:
    """The element type that a conversion keeps, by config.json alone."""
    # The only quantised weights that are read are FP8, which publishers make from a model in bfloat16.
    quantized = fields.get("quantization_config") is not None
    stored = fields.get("dtype") or fields.get("torch_dtype")
    return "bfloat16" if quantized or stored == "bfloat16" else "float32"


def _of_hub(wanted: "ModelId") -> Description:
    from huggingface_hub import constants

    from jllm_convert.hub.downloading import download_config
    from jllm_convert.hub.repository import Repository
    from jllm_convert.hub.selection import gguf_file
    from jllm_convert.hub.store import CacheStore, cache_folder, cached_commit

    if wanted.file is None:
        return _of_config_file(download_config(wanted.repo))
    if constants.is_offline_mode():
        here = cache_folder(wanted.repo) / "snapshots" / str(cached_commit(wanted.repo, "main")) / wanted.file
        if not here.is_file():
            raise ConversionError(
                f"offline (HF_HUB_OFFLINE), and {wanted} is not in the hub's cache; unset HF_HUB_OFFLINE to read it"
            )
        return _of_gguf(here)
    repository = Repository(wanted.repo, "main")
    file = gguf_file(repository, wanted.file)
    found = CacheStore(wanted.repo, "main", repository.commit).find(file)
    if found is not None:
        return _of_gguf(found)
    try:
        return _of_remote_gguf(repository, file)
    except OSError as error:
        raise ConversionError(
            f"the header of {wanted} cannot be written to {tempfile.gettempdir()} ({error})"
        ) from error


def _of_gguf(path: Path) -> Description:
    from jllm_convert.sources.gguf.source import GGUFSource

    return _of_source(GGUFSource(path))


def _of_remote_gguf(repository: "Repository", file: "RemoteFile") -> Description:
    """The description by the header of a GGUF file on the hub, of which no more is downloaded than that."""
    from jllm_convert.hub.remote_header import fetch_header
    from jllm_convert.sources.gguf.cursor import MAX_HEADER_BYTES
    from jllm_convert.sources.gguf.header import gguf_header_end

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(file.name).name

        fetch_header(repository, file, path, lambda: gguf_header_end(path), _FIRST_BYTES, MAX_HEADER_BYTES)
        return _of_gguf(path)
