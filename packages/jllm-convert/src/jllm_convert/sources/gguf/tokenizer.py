"""GGUF tokenizer to Hugging Face files: ``tokenizer.json`` and ``tokenizer_config.json``.

``vocabulary`` reads and checks what the file stores, ``tokenizer_pipelines`` knows what it only names, and this module
writes both in the format of the ``tokenizers`` library.
"""

import json
import reprlib
from collections.abc import Mapping
from typing import Any

from jllm_convert.errors import ConversionError
from jllm_convert.sources.gguf.chat_templates import read_chat_templates
from jllm_convert.sources.gguf.tokenizer_pipelines import BYTE_LEVEL_PIPELINES, SENTENCEPIECE_PIPELINES, Json, Pipeline
from jllm_convert.sources.gguf.vocabulary import (
    ADVICE,
    PREFIX,
    SPECIAL_ROLES,
    Merges,
    Vocabulary,
    read_flag,
    read_merges,
    read_vocabulary,
    rebuild_merges,
)

# The ids that a SentencePiece GGUF file leaves out when they have these values.
_DEFAULT_IDS: Mapping[str, Mapping[str, int]] = {"gpt2": {}, "llama": {"unk": 0, "bos": 1, "eos": 2}}
_KNOWN_SPLITS = ("gpt-2", "smollm", "qwen2", "qwen35", "llama-bpe")  # in errors; there are many names for the same
_EXACT_MATCH = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, str] | None:
    """Rebuild the Hugging Face tokenizer of a GGUF file.

    The ids are those of the original tokenizer. What a GGUF file does not record is lost: whether an added token strips
    the spaces around it, and ``special`` for added tokens that merely look like control tokens.

    Args:
        metadata: the file's key/value metadata as Python values (str, int, float, bool, list).

    Returns:
        File name -> content for ``tokenizer.json`` and ``tokenizer_config.json``; None where the file has no tokenizer.

    Raises:
        ConversionError: every problem found: an unknown kind or split, missing keys, lengths that disagree, ids out of
            range, malformed merges, duplicate tokens, scores that rank nothing.
    """
    kind = metadata.get(PREFIX + "model")
    if kind is None or kind == "none":
        return None
    if not isinstance(kind, str) or kind not in _DEFAULT_IDS:
        raise ConversionError(
            f"{PREFIX}model: expected one of {', '.join(_DEFAULT_IDS)}, got {reprlib.repr(kind)}. {ADVICE}"
        )
    problems: list[str] = []
    vocabulary = read_vocabulary(metadata, _DEFAULT_IDS[kind], kind == "llama", problems)
    read_kind = _read_byte_level if kind == "gpt2" else _read_sentencepiece
    pipeline, merges = read_kind(metadata, vocabulary, problems)
    added_ends = {
        role: read_flag(metadata, f"add_{role}_token", default, problems)
        # A file may do without a BOS, such as one of a Llama 3 vocabulary that was trained without.
        for role, default in (("bos", pipeline.add_bos and "bos" in vocabulary.special), ("eos", False))
    }
    for role, added in added_ends.items():
        if added and vocabulary.ids and role not in vocabulary.special:
            key = PREFIX + SPECIAL_ROLES[role]
            problems.append(f"{key}: expected an id, since the tokenizer adds that token, got nothing. {ADVICE}")
    config = _tokenizer_config(metadata, vocabulary, added_ends, problems)
    if problems:
        raise ConversionError(problems)
    document = json.dumps(_tokenizer_json(vocabulary, pipeline, merges, added_ends), ensure_ascii=False)
    _check_loads(document)
    return {
        "tokenizer.json": document,
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2) + "\n",
    }


def _read_byte_level(
    metadata: Mapping[str, Any], vocabulary: Vocabulary, problems: list[str]
) -> tuple[Pipeline, Merges]:
    pre = metadata.get(PREFIX + "pre")
    pipeline = BYTE_LEVEL_PIPELINES.get(pre) if isinstance(pre, str) else None
    if pipeline is None:
        problems.append(
            f"{PREFIX}pre: expected the name of a split that is known, such as {', '.join(_KNOWN_SPLITS)}, got"
            f" {'nothing' if pre is None else reprlib.repr(pre)}; the file does not say how that tokenizer splits text."
            " Convert from the model's Hugging Face folder instead."
        )
    # Any pipeline will do after a problem: the merges are still checked, so that one run names all problems.
    return pipeline or BYTE_LEVEL_PIPELINES["gpt-2"], read_merges(metadata, vocabulary.ids, problems)


def _read_sentencepiece(
    metadata: Mapping[str, Any], vocabulary: Vocabulary, problems: list[str]
) -> tuple[Pipeline, Merges]:
    space = "before each text"
    if not read_flag(metadata, "add_space_prefix", True, problems):
        space = "nowhere"
    elif vocabulary.ids.get("[INST]") == 3:  # Mistral v0.3; a fine-tuned Llama 2 has such a token at the end, if any
        space = "before the first text"
    return SENTENCEPIECE_PIPELINES[space], [] if problems else rebuild_merges(vocabulary, problems)


def _tokenizer_json(vocabulary: Vocabulary, pipeline: Pipeline, merges: Merges, added_ends: Mapping[str, bool]) -> Json:
    options = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False, **pipeline.model}
    # Byte-level BPE knows every byte; only SentencePiece falls back to an unknown token.
    unknown = vocabulary.special.get("unk") if options["byte_fallback"] else None
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        # Cut out of the raw text before everything else.
        "added_tokens": [
            {"id": vocabulary.ids[text], "content": text, **_EXACT_MATCH, "special": special}
            for text, special in vocabulary.added.items()
        ],
        "normalizer": pipeline.normalizer,
        "pre_tokenizer": pipeline.pre_tokenizer,
        "post_processor": _post_processor(vocabulary, added_ends),
        "decoder": pipeline.decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            **options,
            "vocab": vocabulary.ids,
            "merges": merges,
        },
    }


def _post_processor(vocabulary: Vocabulary, added_ends: Mapping[str, bool]) -> Json | None:
    """The section that adds the beginning and end tokens around each sequence; None where none is added."""
    ends = {role: vocabulary.special[role] for role, added in added_ends.items() if added}
    if not ends:
        return None

    def around(sequence: str, type_id: int) -> list[Json]:
        text: Json = {"Sequence": {"id": sequence, "type_id": type_id}}
        marks: dict[str, Json] = {
            role: {"SpecialToken": {"id": token, "type_id": type_id}} for role, token in ends.items()
        }
        return [part for part in (marks.get("bos"), text, marks.get("eos")) if part]

    special = {token: {"id": token, "ids": [vocabulary.ids[token]], "tokens": [token]} for token in ends.values()}
    single = around("A", 0)
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single + around("B", 1),
        "special_tokens": special,
    }


def _tokenizer_config(
    metadata: Mapping[str, Any], vocabulary: Vocabulary, added_ends: Mapping[str, bool], problems: list[str]
) -> Json:
    config: Json = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {f"add_{role}_token": added for role, added in added_ends.items()}
    # transformers has no name for the end-of-turn token; generation_config.json has its id.
    config |= {f"{role}_token": text for role, text in vocabulary.special.items() if role != "eot"}
    # Below the architecture's own name, such as llama.context_length.
    context_length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if type(context_length) is int and context_length > 0:
        config["model_max_length"] = context_length
    templates = read_chat_templates(metadata, problems)
    if templates is not None:
        config["chat_template"] = templates
    return config


def _check_loads(document: str) -> None:
    from tokenizers import Tokenizer  # here, so that importing this module stays light

    try:
        Tokenizer.from_str(document)
    except Exception as error:  # the library raises bare Exception for a document it cannot read
        raise ConversionError(f"the rebuilt tokenizer.json: expected one that loads, got {error}. {ADVICE}") from error
