"""Incremental detokenizer: the text of tokens as they come."""

import codecs
import json
import re
from collections.abc import Collection, Sequence

from tokenizers import Tokenizer as RawTokenizer

# The codec's own letters for bytes that are no character, one for each byte.
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")

MAX_CHARACTER_BYTES = 4
"""Most bytes of a character in UTF-8."""


class TokenDecoder:
    """The bytes of single tokens, by the decoder of a ``tokenizer.json``.

    Attributes:
        special_ids: the special tokens, which decoded text leaves out.
        spells_bytes: whether rare characters are spelt in byte tokens, as SentencePiece does.
        first_spaces: spaces that are no part of a decoded text where it begins with them.
    """

    def __init__(self, raw: RawTokenizer) -> None:
        self._raw = raw
        added = raw.get_added_tokens_decoder()
        self.special_ids = frozenset(number for number, token in added.items() if token.special)
        # The bindings do not tell the kind of a decoder, except in its pickled state, which is JSON.
        state = json.loads((raw.decoder and raw.decoder.__getstate__()) or "{}")
        steps = {step.get("type"): step for step in state.get("decoders", [state])}
        self._byte_letters = _byte_letters() if "ByteLevel" in steps else None
        self.spells_bytes = "ByteFallback" in steps
        # Added tokens are kept as text, whatever the vocabulary's alphabet; but SentencePiece's space is one in them.
        self._names = frozenset() if self.spells_bytes else frozenset(added)
        self.first_spaces: int = 0
        if self.spells_bytes:
            prepends = steps.get("Metaspace", {}).get("prepend_scheme", "never") != "never"
            self.first_spaces = 1 if prepends else steps.get("Strip", {}).get("start", 0)

    def token_bytes(self, token_id: int) -> bytes:
        """``Tokenizer.token_bytes``."""
        token = self._raw.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._names:
            return token.encode()
        if self._byte_letters is not None:
            letters = [self._byte_letters.get(letter) for letter in token]
            return token.encode() if None in letters else b"".join(filter(None, letters))
        # SentencePiece: a byte without a token of its own is <0xNN>, and a space is U+2581.
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(byte[1])
        return token.replace("\u2581", " ").encode()

    def text_bytes(self, token_id: int, before: Sequence[int]) -> bytes:
        """The bytes that a token, special or not, adds to a decoded text behind the tokens ``before``."""
        if self._byte_letters is not None or self.spells_bytes:
            return self.token_bytes(token_id)
        # Other decoders, such as WordPiece's, write a token by the one before it.
        known = self._raw.decode(list(before), skip_special_tokens=False)
        return self._raw.decode([*before, token_id], skip_special_tokens=False)[len(known) :].encode()


class Detokenizer:
    """Incremental detokenizer: text comes as soon as it is certain, so that at most three bytes are held back.

    What ``add`` and ``finish`` return makes together what ``Tokenizer.decode`` returns of all tokens. A byte that can
    no longer become a character comes at once, as U+FFFD. The work of a token does not grow with those before it.

    Args:
        decoder: the tokenizer's.
        behind: token ids that the text goes on from, such as a prompt. A text of its own begins without the space that
            a tokenizer such as SentencePiece puts before its first word; one that goes on keeps it. Bytes that begin a
            character at the end of ``behind`` belong to the text.
        hidden: special tokens that the text leaves out; all of them when None.
    """

    def __init__(
        self, decoder: TokenDecoder, behind: Sequence[int] = (), hidden: Collection[int] | None = None
    ) -> None:
        self._tokens = decoder
        self._hidden = decoder.special_ids if hidden is None else decoder.special_ids.intersection(hidden)
        # Of bytes that are no character, tokenizers with an alphabet of bytes give one U+FFFD for all that began one,
        # those that spell characters in byte tokens one for each.
        errors = "surrogateescape" if decoder.spells_bytes else "replace"
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)
        self._first_spaces = decoder.first_spaces
        # The last token with a text.
        self._before: list[int] = []
        for token_id in self._last_character(behind):
            self.add(token_id)

    def add(self, token_id: int) -> str:
        """Add a token; the text that is certain by it, often empty."""
        added = self._bytes(token_id)
        if added:
            self._before = [token_id]
        return self._shown(self._utf8.decode(added))

    def finish(self) -> str:
        """End the text. What was held back has become no character, and comes as U+FFFD."""
        return self._shown(self._utf8.decode(b"", final=True))

    def _last_character(self, token_ids: Sequence[int]) -> Sequence[int]:
        """The tokens at the end that hold the last character, which may be incomplete."""
        count = 0
        for start in reversed(range(len(token_ids))):
            count += len(self._bytes(token_ids[start]))
            if count >= MAX_CHARACTER_BYTES:
                return token_ids[start:]
        return token_ids

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._hidden:
            return b""
        return self._tokens.text_bytes(token_id, self._before)

    def _shown(self, text: str) -> str:
        if self._first_spaces and text:
            rest = text.lstrip(" ")
            taken = min(len(text) - len(rest), self._first_spaces)
            # What stands behind a first letter, or behind as many spaces as are left out, stays.
            self._first_spaces = 0 if rest else self._first_spaces - taken
            text = text[taken:]
        return _ESCAPED_BYTE.sub("\N{REPLACEMENT CHARACTER}", text)


def _byte_letters() -> dict[str, bytes]:
    """The byte of each letter in a byte-level vocabulary (GPT-2's ``bytes_to_unicode``).

    Bytes that Latin-1 shows are the same letter; the others are letters from U+0100 on, in order.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), 256)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): bytes([byte]) for byte in visible} | {
        chr(256 + number): bytes([byte]) for number, byte in enumerate(others)
    }
