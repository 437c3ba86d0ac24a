"""Tokenizer pipelines by their GGUF names: normalizer, pre-tokenizer and decoder sections of a ``tokenizer.json``.

A GGUF file stores only a name for them (``tokenizer.ggml.pre``). Sources: these names in llama.cpp
(``llama-vocab.cpp`` and ``convert_hf_to_gguf_update.py``, which say from which model each comes) and the published
``tokenizer.json`` of GPT-2, SmolLM, Qwen 2 and 3, Llama 2 and 3, and Mistral 7B v0.3.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Json: TypeAlias = dict[str, Any]

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece writes this for a space


@dataclass(frozen=True)
class Pipeline:
    """A ``tokenizer.json`` without the vocabulary, the merges and the special tokens.

    Attributes:
        decoder, normalizer, pre_tokenizer: those sections, as JSON.
        model: the options of the BPE model that are on.
        add_bos: whether the beginning-of-sequence token is added, where the GGUF file does not say.
    """

    decoder: Json
    normalizer: Json | None = None
    pre_tokenizer: Json | None = None
    model: Mapping[str, bool] = field(default_factory=dict)
    add_bos: bool = False


def _sequence(kind: str, steps: list[Json]) -> Json:
    return {"type": "Sequence", kind: steps}


def _byte_level(use_regex: bool) -> Json:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _regex_then_bytes(digits: str) -> Json:
    """The pre-tokenizer that Qwen and Llama 3 share: contractions, words, numbers, symbols, line ends, other space."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return _sequence("pretokenizers", [split, _byte_level(use_regex=False)])


def _sentencepiece(
    normalizers: list[Json], pre_tokenizer: Json | None = None, takes_off_space: bool = True
) -> Pipeline:
    """The pipeline of Llama 2: unknown characters become bytes, and decoding strips the space before the text."""
    steps: list[Json] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    return Pipeline(
        decoder=_sequence("decoders", steps if takes_off_space else steps[:-1]),
        normalizer=_sequence("normalizers", normalizers) if normalizers else None,
        pre_tokenizer=pre_tokenizer,
        model={"fuse_unk": True, "byte_fallback": True},
        add_bos=True,
    )


_BYTES = _byte_level(use_regex=True)
_DIGITS = {"type": "Digits", "individual_digits": True}
_NFC = {"type": "NFC"}
_GPT2 = Pipeline(_BYTES, pre_tokenizer=_BYTES)
_SMOLLM = Pipeline(_BYTES, pre_tokenizer=_sequence("pretokenizers", [_DIGITS, _BYTES]))
_QWEN2 = Pipeline(_BYTES, normalizer=_NFC, pre_tokenizer=_regex_then_bytes(r"\p{N}"))
_LLAMA3 = Pipeline(_BYTES, pre_tokenizer=_regex_then_bytes(r"\p{N}{1,3}"), model={"ignore_merges": True}, add_bos=True)

BYTE_LEVEL_PIPELINES: Mapping[str, Pipeline] = {
    "gpt-2": _GPT2,
    "smollm": _SMOLLM,
    "qwen2": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
}
"""``tokenizer.ggml.pre`` -> pipeline. ``default`` is missing: converters write it where they do not know the split."""

_PREPEND = {"type": "Prepend", "prepend": _SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_METASPACE = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "first", "split": False}

SENTENCEPIECE_PIPELINES: Mapping[str, Pipeline] = {
    "nowhere": _sentencepiece([_REPLACE], takes_off_space=False),
    "before each text": _sentencepiece([_PREPEND, _REPLACE]),
    "before the first text": _sentencepiece([], pre_tokenizer=_METASPACE),
}
"""Place where a space is inserted -> pipeline. The texts are the parts before, between and after the special tokens."""
