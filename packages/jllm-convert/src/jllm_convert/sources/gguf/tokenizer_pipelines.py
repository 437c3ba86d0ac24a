"""Tokenizer pipelines by their GGUF names: normalizer, pre-tokenizer and decoder sections of a ``tokenizer.json``.

A GGUF file stores only a name for them (``tokenizer.ggml.pre``). Sources: these names in llama.cpp
(``llama-vocab.cpp`` and ``convert_hf_to_gguf_update.py``, which say from which model each comes) and the published
``tokenizer.json`` of GPT-2, GPT-NeoX, SmolLM, Qwen 2 to 3.5, Command R, Llama 2 and 3, and Mistral 7B v0.3.
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
        add_bos: whether the beginning-of-sequence token is added, where the GGUF file has one and does not say.
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


def _regex_then_bytes(digits: str, letter: str = r"\p{L}", symbol: str = r"[^\s\p{L}\p{N}]") -> Json:
    """The pre-tokenizer that Qwen and Llama 3 share: contractions, words, numbers, symbols, line ends, other space."""
    pattern = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?{letter}+|{digits}| ?{symbol}+[\r\n]*"
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
_DIGITS_THEN_BYTES = _sequence("pretokenizers", [_DIGITS, _BYTES])
_ONE_DIGIT = _regex_then_bytes(r"\p{N}")
_THREE_DIGITS = _regex_then_bytes(r"\p{N}{1,3}")
# Qwen 3.5 takes the marks of Indian and other scripts for parts of their words.
_MARKS_IN_WORDS = _regex_then_bytes(r"\p{N}", letter=r"[\p{L}\p{M}]", symbol=r"[^\s\p{L}\p{M}\p{N}]")
_WHOLE_WORDS = {"ignore_merges": True}

_PIPELINES_BY_NAMES: Mapping[str, Pipeline] = {
    "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 mellum modern-bert exaone4 jais trillion "
    "granite-docling": Pipeline(_BYTES, pre_tokenizer=_BYTES),
    "mpt olmo": Pipeline(_BYTES, normalizer=_NFC, pre_tokenizer=_BYTES),
    "smollm starcoder refact codeshell exaone minerva-7b mellum2": Pipeline(_BYTES, pre_tokenizer=_DIGITS_THEN_BYTES),
    "command-r": Pipeline(_BYTES, normalizer=_NFC, pre_tokenizer=_DIGITS_THEN_BYTES),
    "qwen2 deepseek-r1-qwen f2llmv2": Pipeline(_BYTES, normalizer=_NFC, pre_tokenizer=_ONE_DIGIT),
    "stablelm2 megrez kormo hunyuan solar-open grok-2": Pipeline(_BYTES, pre_tokenizer=_ONE_DIGIT),
    "qwen35": Pipeline(_BYTES, normalizer=_NFC, pre_tokenizer=_MARKS_IN_WORDS),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": Pipeline(
        _BYTES, pre_tokenizer=_THREE_DIGITS, model=_WHOLE_WORDS, add_bos=True
    ),
    # Llama 3 and its fine-tunes, as published with a tokenizer that adds no BOS.
    "smaug-bpe": Pipeline(_BYTES, pre_tokenizer=_THREE_DIGITS, model=_WHOLE_WORDS),
    "dbrx chatglm-bpe glm4": Pipeline(_BYTES, pre_tokenizer=_THREE_DIGITS),
}

BYTE_LEVEL_PIPELINES: Mapping[str, Pipeline] = {
    name: pipeline for names, pipeline in _PIPELINES_BY_NAMES.items() for name in names.split()
}
"""``tokenizer.ggml.pre`` -> pipeline, for the names that llama.cpp splits as one of these models.

``default`` is missing: converters write it where they do not know the split."""

_PREPEND = {"type": "Prepend", "prepend": _SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_METASPACE = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "first", "split": False}

SENTENCEPIECE_PIPELINES: Mapping[str, Pipeline] = {
    "nowhere": _sentencepiece([_REPLACE], takes_off_space=False),
    "before each text": _sentencepiece([_PREPEND, _REPLACE]),
    "before the first text": _sentencepiece([], pre_tokenizer=_METASPACE),
}
"""Place where a space is inserted -> pipeline. The texts are the parts before, between and after the special tokens."""
