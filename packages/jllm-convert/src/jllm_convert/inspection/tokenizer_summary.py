"""Tokenizer summary: vocabulary size and chat template, from a model's files, without loading the tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jllm_convert.errors import ConversionError
from jllm_convert.files.model_folder import ModelFolder, tokenizer_file_names

# The largest tokenizer.json whose tokens are counted: that of Gemma 3 has 33 MB and 580,000 lists.
_MAX_BYTES = 36 << 20
_MAX_CONTAINERS = 1_000_000


@dataclass(frozen=True)
class TokenizerSummary:
    """Tokenizer of a model.

    Attributes:
        present: whether there is one that a conversion can use.
        vocabulary: the number of its tokens, added ones included; None where they cannot be counted.
        chat_template: whether it has a chat template.
    """

    present: bool = False
    vocabulary: int | None = None
    chat_template: bool = False


def tokenizer_in_folder(folder: ModelFolder, problems: list[str]) -> TokenizerSummary:
    """Summarise the tokenizer of a Hugging Face folder or a checkpoint. Problems are added to ``problems``."""
    settings: dict[str, Any] | None = None
    vocabulary = None
    try:
        settings = folder.read_json("tokenizer_config.json")
    except ConversionError as error:
        problems += error.problems
    try:
        vocabulary = _count(folder)
    except ConversionError as error:
        problems += error.problems
    files = any(name.endswith(".jinja") and (folder.path / name).exists() for name in tokenizer_file_names(folder.path))
    template = bool((settings or {}).get("chat_template")) or files
    return TokenizerSummary("tokenizer.json" in folder.names, vocabulary, template)


def tokenizer_in_metadata(metadata: Mapping[str, Any], problems: list[str]) -> TokenizerSummary:
    """Summarise the tokenizer of a GGUF file's metadata. Problems of rebuilding it are added to ``problems``."""
    from jllm_convert.sources.gguf.chat_templates import is_template_key
    from jllm_convert.sources.gguf.tokenizer import tokenizer_files

    tokens = metadata.get("tokenizer.ggml.tokens")
    vocabulary = len(tokens) if isinstance(tokens, list) else None
    try:
        present = bool(tokenizer_files(metadata))
    except ConversionError as error:
        problems += error.problems
        present = True
    template = any(value and is_template_key(key) for key, value in metadata.items())
    return TokenizerSummary(present, vocabulary, template)


def _count(folder: ModelFolder) -> int | None:
    """Count the different tokens of a tokenizer.json; None where there is none, or it is too large to read."""
    file = folder.file("tokenizer.json")
    # Too large is no problem of the model: a conversion copies the file without parsing it.
    if file is None or file.size > _MAX_BYTES:
        return None
    fields = folder.read_json(file.name, _MAX_BYTES, _MAX_CONTAINERS) or {}
    try:
        vocab, added = fields["model"]["vocab"], fields.get("added_tokens") or []
        # Unigram has a list of pieces with their scores, every other kind an object of ids.
        words = set(vocab) if isinstance(vocab, dict) else {piece for piece, _ in vocab}
        return len(words | {token["content"] for token in added})
    except (KeyError, TypeError, ValueError) as error:
        raise ConversionError(
            f"{file.name}: it has no vocabulary that can be counted (model.vocab and added_tokens)"
        ) from error
