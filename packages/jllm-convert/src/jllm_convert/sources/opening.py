"""Source of a model by its path: a Hugging Face folder, a GGUF file or a JLLM checkpoint."""

from collections.abc import Sequence
from pathlib import Path

from jllm_core import checkpoint

from jllm_convert.errors import ConversionError
from jllm_convert.sources.base import Source
from jllm_convert.sources.checkpoint import CheckpointSource
from jllm_convert.sources.gguf.source import GGUFSource
from jllm_convert.sources.huggingface.folder import SafetensorsSource


def open_source(path: Path, ignored: Sequence[str] = ()) -> Source:
    """Open a source by what is at the path.

    Args:
        path: a folder, a GGUF file or a checkpoint.
        ignored: fields of its config that this version does not know, and that change nothing, as the user says.

    Raises:
        ConversionError: there is nothing, or nothing that can be converted.
    """
    if path.is_dir():
        # A checkpoint is a folder too, with the tokenizer files of the model it was made from.
        if checkpoint.is_checkpoint(path):
            if ignored:
                raise ConversionError(f"{path} is a checkpoint: it has no fields that could be ignored ({ignored[0]})")
            return CheckpointSource(path)
        return SafetensorsSource(path, ignored)
    if not path.exists():
        raise ConversionError(
            f"there is nothing at {path}; expected a Hugging Face folder, a .gguf file or a model's name on the hub"
        )
    if path.suffix.lower() != ".gguf":
        raise ConversionError(f"{path} is neither a folder nor a .gguf file")
    return GGUFSource(path, ignored)
