"""What a model's files say of its tokenizer, without loading it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jllm_convert.errors import ConversionError
from jllm_convert.inspection.json_object import json_object


@dataclass(frozen=True)
class TokenizerSummary:
    """The tokenizer of a model.

    Attributes:
        present: whether there is one that a conversion takes along.
        vocabulary: how many tokens it knows, added ones included; None where there is none or it cannot be read.
        chat_template: whether a template for conversations comes with it.
    """

    present: bool = False
    vocabulary: int | None = None
    chat_template: bool = False


def tokenizer_in_folder(folder: Path, problems: list[str]) -> TokenizerSummary:
    """The tokenizer of a Hugging Face folder or a checkpoint. What is wrong with its files goes to ``problems``."""
    settings = json_object(folder / "tokenizer_config.json", problems) or {}
    template = bool(settings.get("chat_template")) or (folder / "chat_template.jinja").is_file()
    path = folder / "tokenizer.json"
    fields = json_object(path, problems)
    vocabulary = None if fields is None else _vocabulary(fields)
    if fields is not None and vocabulary is None:
        problems.append(f"{path.name}: it has no vocabulary that can be counted (model.vocab and added_tokens)")
    return TokenizerSummary(path.is_file(), vocabulary, template)


def tokenizer_in_metadata(metadata: Mapping[str, Any], problems: list[str]) -> TokenizerSummary:
    """The tokenizer that a GGUF file embeds. What keeps it from being rebuilt goes to ``problems``."""
    from jllm_convert.gguf_tokenizer import tokenizer_files

    tokens = metadata.get("tokenizer.ggml.tokens")
    vocabulary = len(tokens) if isinstance(tokens, list) else None
    try:
        present = bool(tokenizer_files(metadata))
    except ConversionError as error:
        problems += error.problems
        present = True
    return TokenizerSummary(present, vocabulary, bool(metadata.get("tokenizer.chat_template")))


def _vocabulary(fields: Mapping[str, Any]) -> int | None:
    """How many different tokens a tokenizer.json has; None where it is not in the form of any tokenizer."""
    try:
        vocab, added = fields["model"]["vocab"], fields.get("added_tokens") or []
        # Unigram has a list of pieces with their scores, every other kind an object of ids.
        words = set(vocab) if isinstance(vocab, dict) else {piece for piece, _ in vocab}
        return len(words | {token["content"] for token in added})
    except (KeyError, TypeError, ValueError):
        return None
