"""Token ids of a tokenizer.json that are beyond the embedding."""

from pathlib import Path

from jllm_convert.errors import ConversionError
from jllm_convert.files.model_folder import ModelFolder

TOKENIZER_FILE = "tokenizer.json"
# The largest file that is looked at: that of Gemma 3 has 33 MB and 580,000 lists.
_MAX_BYTES = 36 << 20
_MAX_CONTAINERS = 1_000_000


def ids_beyond(folder: Path, rows: int) -> str | None:
    """A sentence about tokens whose ids are not in an embedding of so many rows; None where there are none.

    None also where the file is missing, is too large, or is none of a tokenizer: others say so.
    """
    try:
        fields = ModelFolder(folder).read_json(TOKENIZER_FILE, _MAX_BYTES, _MAX_CONTAINERS) or {}
        vocab, added = fields["model"]["vocab"], fields.get("added_tokens") or []
        # Unigram has a list of pieces, whose places are the ids; every other kind an object of ids.
        ids = dict(vocab) if isinstance(vocab, dict) else {piece: number for number, (piece, _) in enumerate(vocab)}
        ids |= {token["content"]: token["id"] for token in added}
        beyond = sorted((number, token) for token, number in ids.items() if number >= rows)
    except (ConversionError, KeyError, TypeError, ValueError):
        return None
    if not beyond:
        return None
    (first, token), (last, _) = beyond[0], beyond[-1]
    which = f"id {first:,}" if first == last else f"ids {first:,} to {last:,}"
    return (
        f"{TOKENIZER_FILE} has {len(beyond):,} token{'s' * (len(beyond) > 1)} beyond the embedding's {rows:,} rows "
        f"({which}, such as {token[:80]!r}): a text with one of them will be refused"
    )
