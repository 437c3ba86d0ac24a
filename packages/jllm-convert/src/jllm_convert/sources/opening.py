"""From what a user calls a model to a source: a folder, a file, a checkpoint, or a name on the hub."""

from collections.abc import Callable
from pathlib import Path

from jllm_core import checkpoint

from jllm_convert.errors import ConversionError
from jllm_convert.hub.downloading import download, looks_like_id
from jllm_convert.progress import Progress
from jllm_convert.sources.base import Source
from jllm_convert.sources.checkpoint import CheckpointSource
from jllm_convert.sources.gguf.source import GGUFSource
from jllm_convert.sources.huggingface.folder import SafetensorsSource


def local_source(
    src: str | Path, revision: str | None = None, on_progress: Callable[[Progress], None] | None = None
) -> Path:
    """The folder or file of a source; a model on the hub is downloaded, if it is not there already.

    Raises:
        ConversionError: it cannot be had, or a revision is asked for of something that has none.
    """
    if not looks_like_id(str(src)):
        if revision is not None:
            raise ConversionError(f"a revision is for a model on the hub (owner/name), and {src} is none")
        return Path(src)
    tell = None if on_progress is None else lambda done, total: on_progress(Progress(0, 1, done, total))
    try:
        return download(str(src), revision=revision, on_progress=tell)
    except ConversionError as error:
        raise ConversionError(
            f"there is nothing at {src} on this machine, and as a model of the hub: {error}"
        ) from error


def open_source(path: Path) -> Source:
    """Open a source by what is at the path.

    Raises:
        ConversionError: nothing is there, or nothing that can be converted.
    """
    if path.is_dir():
        if checkpoint.is_checkpoint(path):
            return CheckpointSource(path)
        return SafetensorsSource(path)
    if not path.exists():
        raise ConversionError(
            f"there is nothing at {path}; expected a Hugging Face folder, a .gguf file or a model's name on the hub"
        )
    if path.suffix.lower() != ".gguf":
        raise ConversionError(f"{path} is neither a folder nor a .gguf file")
    return GGUFSource(path)
