"""Vocabulary reader for GGUF metadata (``tokenizer.ggml.*``): tokens, types, scores, merges, special ids.

Source of the keys and of the token types: the GGUF specification and ``llama_token_type`` in llama.cpp.
Every function adds problems to ``problems`` and returns what it could read, so that one run names all of them.
"""

import itertools
import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeAlias

Merges: TypeAlias = list[tuple[str, str]]

ADVICE = "Convert from the model's Hugging Face folder instead, or get an intact GGUF file."
PREFIX = "tokenizer.ggml."
SPECIAL_ROLES: Mapping[str, str] = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "pad": "padding_token_id",
    "eot": "eot_token_id",
}
"""Role -> the key, below ``tokenizer.ggml.``, that holds the id of the token with that role."""

NO_ID = 2**32 - 1
"""The id of a token that there is not: converters write -1 into an unsigned number."""


class TokenType(IntEnum):
    """Token types, by the numbers that GGUF stores."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Several times the sizes of published tokenizers (262,144 tokens of 2 million characters, 600,000 merges), so that no
# file can ask for all memory.
_MAX_TOKENS, _MAX_TOKEN, _MAX_TOKEN_TEXT = 1 << 20, 1 << 10, 1 << 23
_MAX_MERGES, _MAX_MERGE_TEXT = 1 << 21, 1 << 25
# UNUSED too: the unused tokens that `_index` keeps have a role, such as padding.
_ADDED_TYPES = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNUSED)


@dataclass(frozen=True)
class Vocabulary:
    """A checked vocabulary.

    Attributes:
        ids: token text -> id, in the order of the ids, without the entries that only pad the embedding table.
        added: text of each token that is cut out of the raw text before anything else -> whether it is special.
        scores: the SentencePiece score of each id (higher merges first); empty where the file has none.
        special: role (a key of ``SPECIAL_ROLES``) -> token text, for the roles that the file fills.
    """

    ids: dict[str, int]
    added: dict[str, bool]
    scores: list[float]
    special: dict[str, str]


def read_vocabulary(
    metadata: Mapping[str, Any], default_ids: Mapping[str, int], needs_scores: bool, problems: list[str]
) -> Vocabulary:
    """Read tokens, types, scores and special ids. ``default_ids`` (role -> id) replace missing id keys."""
    tokens: list[str] = _read_list(metadata, "tokens", (str,), problems, max_length=_MAX_TOKENS)
    long = _some(f"{reprlib.repr(token)} of {len(token):,}" for token in tokens if len(token) > _MAX_TOKEN)
    if long or sum(map(len, tokens)) > _MAX_TOKEN_TEXT:
        problems.append(
            f"{PREFIX}tokens: expected at most {_MAX_TOKEN:,} characters in each text and {_MAX_TOKEN_TEXT:,} in "
            f"all, got {long or 'more in all'}. {ADVICE}"
        )
        tokens = []
    types: list[int] = _read_list(metadata, "token_type", (int,), problems)
    has_scores = needs_scores or PREFIX + "scores" in metadata
    scores: list[float] = _read_list(metadata, "scores", (float, int), problems) if has_scores else []
    for key, values in (("token_type", types), ("scores", scores)):
        if values and tokens and len(values) != len(tokens):
            problems.append(
                f"{PREFIX}{key}: expected {len(tokens)} entries, one for each of {PREFIX}tokens, got {len(values)}."
                f" {ADVICE}"
            )
    known = set(TokenType)  # a set: looking a number up in the enum costs far more, 150,000 times
    if unknown := _some(f"{value} at id {i}" for i, value in enumerate(types) if value not in known):
        problems.append(f"{PREFIX}token_type: expected values from 1 to 6, got {unknown}. {ADVICE}")
    if broken := _some(f"{value} at id {i}" for i, value in enumerate(scores) if not math.isfinite(value)):
        problems.append(f"{PREFIX}scores: expected finite numbers, got {broken}. {ADVICE}")
    if len(types) != len(tokens):
        types = [TokenType.NORMAL] * len(tokens)  # reported above; the checks below need one for each
    special_ids = _read_special_ids(metadata, default_ids, len(tokens), problems)
    ids = _index(tokens, types, set(special_ids.values()), problems)
    return Vocabulary(
        ids=ids,
        added={text: types[i] != TokenType.USER_DEFINED for text, i in ids.items() if types[i] in _ADDED_TYPES},
        scores=scores,
        special={role: tokens[token_id] for role, token_id in special_ids.items()},
    )


def read_merges(metadata: Mapping[str, Any], ids: Mapping[str, int], problems: list[str]) -> Merges:
    """Read the merges, each ``"left right"``. Left, right and their join must all be in ``ids``."""
    key = "merges"
    entries: list[str] = _read_list(metadata, key, (str,), problems, max_length=_MAX_MERGES)
    # At most 2 splits: a third piece shows that the entry is malformed.
    pairs = [tuple(entry.split(" ", 2)) for entry in entries]
    malformed = _some(
        f"{reprlib.repr(entries[i])} at {i}" for i, pair in enumerate(pairs) if len(pair) != 2 or not all(pair)
    )
    if malformed:
        problems.append(
            f"{PREFIX}{key}: expected two pieces separated by one space in each entry, got {malformed}. {ADVICE}"
        )
    merges = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]
    strangers = _some(
        f"{reprlib.repr(piece)} of {reprlib.repr(left + ' ' + right)}"
        for left, right in merges
        for piece in (left, right, left + right)
        if piece and piece not in ids
    )
    if strangers and ids:
        problems.append(
            f"{PREFIX}{key}: expected pieces that {PREFIX}tokens holds, as well as their join, got {strangers}."
            f" {ADVICE}"
        )
    return merges


def rebuild_merges(vocabulary: Vocabulary, problems: list[str]) -> Merges:
    """Rebuild the merges of a SentencePiece vocabulary, which a GGUF file does not store: all splits of pieces in two.

    SentencePiece joins the two neighbours whose join is the piece with the best score. The published ``tokenizer.json``
    files list all such joins, best score first, then by the ids of the piece and of its halves.
    """
    # A piece of n characters has n - 1 splits; the limits below bound time and memory.
    ids, scores = vocabulary.ids, vocabulary.scores
    ranked: list[tuple[float, int, int, int, str, str]] = []
    text = 0
    for piece, piece_id in ids.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                ranked.append((-scores[piece_id], piece_id, ids[left], ids[right], left, right))
                text += len(piece)
        if len(ranked) > _MAX_MERGES or text > _MAX_MERGE_TEXT:
            problems.append(
                f"{PREFIX}tokens: expected pieces with at most {_MAX_MERGES:,} splits into others, of "
                f"{_MAX_MERGE_TEXT:,} characters in all, got more. {ADVICE}"
            )
            return []
    # Converters that had no tokenizer.model write one placeholder for all; ids do not always follow the lost scores.
    if len({row[0] for row in ranked}) == 1 < len({row[1] for row in ranked}):
        problems.append(
            f"{PREFIX}scores: expected scores that rank the pieces, got {-ranked[0][0]} for all of them."
            " Convert from the model's Hugging Face folder instead."
        )
    return [(left, right) for *_, left, right in sorted(ranked)]


def read_flag(metadata: Mapping[str, Any], key: str, default: bool, problems: list[str]) -> bool:
    """Read a true or false value below ``tokenizer.ggml.``, ``default`` where the file has none."""
    value = metadata.get(PREFIX + key, default)
    if not isinstance(value, bool):
        problems.append(f"{PREFIX}{key}: expected true or false, got {reprlib.repr(value)}. {ADVICE}")
        return default
    return value


def _read_list(
    metadata: Mapping[str, Any], key: str, kinds: tuple[type, ...], problems: list[str], max_length: int | None = None
) -> list[Any]:
    """Read a list whose items are exactly of ``kinds`` (so that True is no int); empty where it is anything else."""
    value = metadata.get(PREFIX + key)
    if max_length is not None and isinstance(value, list | tuple) and len(value) > max_length:
        problems.append(f"{PREFIX}{key}: expected at most {max_length:,} entries, got {len(value):,}. {ADVICE}")
        return []
    if isinstance(value, list | tuple) and value and set(map(type, value)) <= set(kinds):
        return list(value)
    if value is None:
        got = "nothing"
    elif not isinstance(value, list | tuple):
        got = f"{type(value).__name__}"
    else:
        got = f"a list of {_some(sorted({type(item).__name__ for item in value}))}" if value else "an empty list"
    problems.append(f"{PREFIX}{key}: expected a list of {kinds[0].__name__}, got {got}. {ADVICE}")
    return []


def _read_special_ids(
    metadata: Mapping[str, Any], default_ids: Mapping[str, int], token_count: int, problems: list[str]
) -> dict[str, int]:
    """Read role -> id, for the roles that the file, or the default of its kind, gives an id of the vocabulary."""
    found: dict[str, int] = {}
    for role, key in SPECIAL_ROLES.items():
        value = metadata.get(PREFIX + key, default_ids.get(role))
        if value in (None, NO_ID) or token_count == 0:
            continue
        if type(value) is int and 0 <= value < token_count:
            found[role] = value
        else:
            problems.append(
                f"{PREFIX}{key}: expected an id from 0 to {token_count - 1}, got {reprlib.repr(value)}. {ADVICE}"
            )
    return found


def _index(tokens: Sequence[str], types: Sequence[int], named_ids: set[int], problems: list[str]) -> dict[str, int]:
    """Make token text -> id, without padding, as in the original tokenizer, unless ``named_ids`` give it a role."""
    ids: dict[str, int] = {}
    duplicates: list[str] = []
    for token_id, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        # Converters fill ids that the original tokenizer lacks with "[PAD<id>]", and older ones type it otherwise.
        is_padding = kind == TokenType.UNUSED or token == f"[PAD{token_id}]"
        if is_padding and token_id not in named_ids:
            continue
        if token in ids:
            duplicates.append(f"{reprlib.repr(token)} at ids {ids[token]} and {token_id}")
        ids.setdefault(token, token_id)
    if duplicates:
        problems.append(f"{PREFIX}tokens: expected every text once, got {_some(duplicates)}. {ADVICE}")
    return ids


def _some(items: Iterable[str], limit: int = 3) -> str:
    """Format the first few of ``items`` and the number of the others; empty for none."""
    rest = iter(items)
    first = list(itertools.islice(rest, limit))
    count = sum(1 for _ in rest)
    return ", ".join(first) + (f" and {count} more" if count else "")
