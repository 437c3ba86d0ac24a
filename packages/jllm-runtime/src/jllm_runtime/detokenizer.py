"""Incremental detokenizer: the text of tokens as they come."""

import codecs
import re
from collections.abc import Sequence

from jllm_runtime.tokenizer import Tokenizer

# The codec's own letters for bytes that are no character, one for each byte.
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")

MAX_CHARACTER_BYTES = 4
"""Most bytes of a character in UTF-8."""


class Detokenizer:
    """Incremental detokenizer: text comes as soon as it is certain, so that at most three bytes are held back.

    What ``add`` and ``finish`` return makes together what ``Tokenizer.decode`` returns of all tokens. A byte that can
    no longer become a character comes at once, as U+FFFD. The work of a token does not grow with those before it.

    Args:
        tokenizer: the model's.
        behind: token ids that the text goes on from, such as a prompt. A text of its own begins without the space that
            a tokenizer such as SentencePiece puts before its first word; one that goes on keeps it. Bytes that begin a
            character at the end of ``behind`` belong to the text.
        skip_special_tokens: leave special tokens out.
    """

    def __init__(self, tokenizer: Tokenizer, behind: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        # Of bytes that are no character, tokenizers with an alphabet of bytes give one U+FFFD for all that began one,
        # those that spell characters in byte tokens one for each.
        errors = "surrogateescape" if tokenizer.spells_bytes else "replace"
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._first_spaces = tokenizer.first_spaces
        # The last token with a text. Decoders that are neither, such as WordPiece's, write a token by the one before.
        self._before: list[int] = []
        for token_id in self._last_character(behind):
            self.add(token_id)

    def add(self, token_id: int) -> str:
        """Add a token; the text that is certain by it, often empty."""
        added = self._bytes(token_id)
        if added:
            self._before = [token_id]
        return self._shown(self._decoder.decode(added))

    def finish(self) -> str:
        """End the text. What was held back has become no character, and comes as U+FFFD."""
        return self._shown(self._decoder.decode(b"", final=True))

    def _last_character(self, token_ids: Sequence[int]) -> Sequence[int]:
        """The tokens at the end that hold the last character, which may be incomplete."""
        count = 0
        for start in reversed(range(len(token_ids))):
            count += len(self._bytes(token_ids[start]))
            if count >= MAX_CHARACTER_BYTES:
                return token_ids[start:]
        return token_ids

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._skipped:
            return b""
        return self._tokenizer.text_bytes(token_id, self._before)

    def _shown(self, text: str) -> str:
        if self._first_spaces and text:
            rest = text.lstrip(" ")
            taken = min(len(text) - len(rest), self._first_spaces)
            # What stands behind a first letter, or behind as many spaces as are left out, stays.
            self._first_spaces = 0 if rest else self._first_spaces - taken
            text = text[taken:]
        return _ESCAPED_BYTE.sub("\N{REPLACEMENT CHARACTER}", text)
