"""Detokenizer: pieces that together are the whole text, as early as they can be, for each kind of tokenizer."""

import dataclasses
import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jllm_runtime import SamplingParams, generate
from jllm_runtime.tokenizer import ChatPrompt, Tokenizer
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")
WORDS = ["▁hello", "▁wor", "ld", "▁", "▁▁▁", ".", "é", "漢", "\N{REPLACEMENT CHARACTER}"]
# Tokens of a byte alphabet that hold parts of characters: a space and the first byte of an emoji, two ends, ...
PARTS = ["Ġð", "ĠðŁ", "ðŁĺ", "Ģx", "Ã©Ã", "æ¼", "Ġhello", "ĠĠ", "ï¿½"]


def byte_level(split: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None) -> RawTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: number for number, text in enumerate([*alphabet, *PARTS])}
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    raw.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    if normalizer is not None:
        raw.normalizer = normalizer
    raw.decoder = decoders.ByteLevel()
    return marked(raw)


def spelling(*ends: decoders.Decoder, starts: str = "first") -> RawTokenizer:
    """Llama 2's pipeline, as transformers builds it (``LlamaTokenizer``)."""
    texts = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    vocab = {text: number for number, text in enumerate(texts)}
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=starts, split=False)
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    return marked(raw)


def marked(raw: RawTokenizer) -> RawTokenizer:
    raw.add_special_tokens([AddedToken(text, normalized=False) for text in ("<|end|>", "<|漢|>")])
    raw.add_tokens([AddedToken("<tool>", normalized=False)])
    return raw


RAW = {
    "qwen": byte_level(pre_tokenizers.Split(Regex(QWEN), "isolated"), normalizers.NFC()),
    "llama3": byte_level(pre_tokenizers.Split(Regex(LLAMA3), "isolated")),
    "smollm2": byte_level(pre_tokenizers.Digits(True)),
    "llama2": spelling(decoders.Strip(" ", 1, 0)),
    "no first space": spelling(starts="never"),
}
BYTE_LEVEL = ["qwen", "llama3", "smollm2"]
KINDS = [*RAW]
TOKENIZERS = {kind: Tokenizer(raw, {}, None) for kind, raw in RAW.items()}
NUMBERS = {kind: {TOKENIZERS[kind].token_bytes(number): number for number in range(256)} for kind in BYTE_LEVEL}
SPECIAL = {kind: {raw.token_to_id("<|end|>"), raw.token_to_id("<|漢|>")} for kind, raw in RAW.items()}
LAST = {kind: raw.get_vocab_size() for kind, raw in RAW.items()}


def bytes_of(kind: str, data: bytes) -> list[int]:
    """The tokens of single bytes."""
    if kind not in BYTE_LEVEL:
        return [1 + byte for byte in data]
    return [NUMBERS[kind][bytes([byte])] for byte in data]


def pieces_of(kind: str, token_ids: Sequence[int], behind: Sequence[int] = (), skip: bool = True) -> list[str]:
    detokenizer = TOKENIZERS[kind].detokenizer(behind, None if skip else ())
    return [*(detokenizer.add(token) for token in token_ids), detokenizer.finish()]


def any_ids(kind: str) -> st.SearchStrategy[list[int]]:
    """Any ids, one beyond the vocabulary, too, with long runs of single bytes among them."""
    some = st.integers(0, LAST[kind]) | st.sampled_from(range(256, LAST[kind]))
    bytes_ = st.binary(max_size=6) | st.text(max_size=3).map(str.encode)
    return st.lists(some.map(lambda one: [one]) | bytes_.map(lambda data: bytes_of(kind, data)), max_size=12).map(
        lambda runs: [token for run in runs for token in run]
    )


def reference(kind: str, token_ids: Sequence[int], skip: bool = True) -> str:
    """The whole text by Python's decoder of all bytes at once: for a byte alphabet the same as the tokenizers library.

    The library gives U+FFFD for each byte of a run that has one wrong byte, also for its right characters.
    SentencePiece itself does not, nor does llama.cpp.
    """
    if kind in BYTE_LEVEL:
        return RAW[kind].decode(list(token_ids), skip_special_tokens=skip)
    kept = [token for token in token_ids if not (skip and token in SPECIAL[kind])]
    text = b"".join(map(TOKENIZERS[kind].token_bytes, kept)).decode(errors="surrogateescape")
    text = "".join("\ufffd" if "\udc80" <= letter <= "\udcff" else letter for letter in text)
    return text.removeprefix(" ") if kind == "llama2" else text


# ---- The whole text.


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_the_pieces_together_are_the_decoded_text(kind: str, data: st.DataObject) -> None:
    token_ids, skip = data.draw(any_ids(kind)), data.draw(st.booleans())
    pieces = pieces_of(kind, token_ids, skip=skip)
    assert "".join(pieces) == TOKENIZERS[kind].decode(token_ids, skip_special_tokens=skip)
    assert "".join(pieces) == reference(kind, token_ids, skip)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_valid_text_is_as_the_tokenizers_library_decodes_it(kind: str, data: st.DataObject) -> None:
    token_ids = RAW[kind].encode(data.draw(st.text(max_size=30))).ids
    assert "".join(pieces_of(kind, token_ids)) == RAW[kind].decode(token_ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_text_goes_on_behind_other_tokens(kind: str, data: st.DataObject) -> None:
    """As if it had been one text from the beginning, wherever it was cut."""
    token_ids = data.draw(any_ids(kind))
    cut = data.draw(st.integers(0, len(token_ids)))
    before = pieces_of(kind, token_ids[:cut])[:-1]
    assert "".join([*before, *pieces_of(kind, token_ids[cut:], behind=token_ids[:cut])]) == reference(kind, token_ids)


def test_an_added_token_is_its_name_whatever_the_alphabet_of_bytes() -> None:
    """The tokenizers library takes the letters of such a name for bytes."""
    raw = byte_level(pre_tokenizers.Digits(True))
    raw.add_tokens([AddedToken("<é>", normalized=False)])
    tokenizer = Tokenizer(raw, {}, None)
    assert tokenizer.decode(tokenizer.encode("a<é>b")) == "a<é>b"


def test_a_space_of_sentencepiece_is_one_in_an_added_token_too() -> None:
    raw = spelling(decoders.Strip(" ", 1, 0))
    raw.add_tokens([AddedToken("▁▁▁▁", normalized=False), AddedToken("<0xyz>", normalized=False)])
    ids = [257, *(raw.token_to_id(text) for text in ("▁▁▁▁", "<0xyz>"))]
    assert Tokenizer(raw, {}, None).decode(ids) == raw.decode(ids) == "hello    <0xyz>"


# ---- As early as it can be.


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_only_bytes_that_can_still_become_a_character_are_held_back(kind: str, data: st.DataObject) -> None:
    token_ids = data.draw(any_ids(kind))
    detokenizer, shown = TOKENIZERS[kind].detokenizer(), ""
    for count, token in enumerate(token_ids, start=1):
        shown += detokenizer.add(token)
        missing = reference(kind, token_ids[:count]).removeprefix(shown)
        assert len(missing) <= 3
        assert not missing.strip("\ufffd")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", [b"\x80", b"\xff", b"\xc0\xaf", b"\xf8"], ids=repr)
def test_bytes_that_never_become_a_character_come_at_once(kind: str, data: bytes) -> None:
    token_ids = bytes_of(kind, data) * 1500
    start = time.thread_time()
    *pieces, last = pieces_of(kind, token_ids)
    assert time.thread_time() - start < 0.5
    assert pieces == ["\ufffd"] * len(token_ids)
    assert last == ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("data", "pieces"),
    [
        (b"\xef\xbf\xbda", ["", "", "\ufffd", "a", ""]),  # a true U+FFFD
        (b"\xf0\x9f\x98\x80", ["", "", "", "😀", ""]),
        (b"\xc3a", ["", "\ufffda", ""]),
        (b"\xc3\xc3\xa9", ["", "\ufffd", "é", ""]),
        (b"\xc3", ["", "\ufffd"]),
        (b"a\xed\x9f\xbf", ["a", "", "", "\ud7ff", ""]),
    ],
    ids=repr,
)
def test_a_character_comes_with_its_last_byte(kind: str, data: bytes, pieces: list[str]) -> None:
    assert pieces_of(kind, bytes_of(kind, data)) == pieces


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_before_a_cut_character_is_not_held_back(kind: str) -> None:
    data = [*bytes_of(kind, b"ab"), *bytes_of(kind, "😀".encode()[:3])]
    assert "".join(pieces_of(kind, data)[:-1]) == "ab"
    tokenizer = TOKENIZERS["qwen"]
    assert tokenizer.detokenizer().add(tokenizer.encode(" hello")[0]) == " hello"


def test_a_token_may_end_a_character_and_begin_another() -> None:
    ids = [RAW["qwen"].token_to_id(text) for text in ("Ã©Ã", "©", "ĠðŁ")]
    assert pieces_of("qwen", ids) == ["é", "é", " ", "\ufffd"]


# ---- The first space of a tokenizer such as SentencePiece.

HELLO, LD = 257, 259


def test_a_text_of_its_own_begins_without_the_space() -> None:
    assert pieces_of("llama2", [HELLO, HELLO]) == ["hello", " hello", ""]
    assert pieces_of("llama2", [LAST["llama2"] - 3, HELLO]) == ["", "hello", ""]  # behind a special token
    assert pieces_of("llama2", [261, HELLO]) == ["  ", " hello", ""]  # of three spaces, one
    assert pieces_of("no first space", [HELLO]) == [" hello", ""]


def test_a_text_that_goes_on_keeps_the_space() -> None:
    assert pieces_of("llama2", [HELLO], behind=[LD]) == [" hello", ""]
    assert pieces_of("llama2", [HELLO], behind=[LD, LAST["llama2"] - 3]) == [" hello", ""]
    assert pieces_of("llama2", [HELLO], behind=[LAST["llama2"] - 3]) == ["hello", ""]  # nothing but a special token
    assert pieces_of("llama2", [HELLO], behind=[260]) == [" hello", ""]


def test_an_answer_goes_on_with_its_prompt_but_not_with_a_conversation(tiny) -> None:
    """vLLM decodes a completion behind its prompt, too; an assistant's message begins without the space."""
    model = dataclasses.replace(tiny.saying([LD, HELLO, 258, 10]), tokenizer=TOKENIZERS["llama2"])
    params = SamplingParams(max_tokens=3)
    prompts: list[list[int]] = [[LD], ChatPrompt([LD])]
    assert [output.text for output in generate(model, prompts, params)] == [" hello wor\t", "hello wor\t"]
    assert [generate(model, prompt, params)[0].text for prompt in prompts] == [" hello wor\t", "hello wor\t"]


# ---- Decoders of other kinds, which write a token by the one before it.


@pytest.mark.parametrize(
    ("decoder", "texts", "whole"),
    [
        (decoders.WordPiece(), ["play", "##ing", "a", "game", "."], "playing a game."),
        (decoders.Metaspace(), ["▁play", "ing", "▁a", "▁game", "."], "playing a game."),
        (None, ["play", "a", "game"], "play a game"),
    ],
    ids=["wordpiece", "metaspace", "none"],
)
def test_other_decoders(decoder: decoders.Decoder | None, texts: list[str], whole: str) -> None:
    raw = RawTokenizer(models.WordLevel({text: number for number, text in enumerate(texts)}, unk_token="."))
    if decoder is not None:
        raw.decoder = decoder
    tokenizer, ids = Tokenizer(raw, {}, None), [*range(len(texts))]
    assert raw.decode(ids) == whole
    assert tokenizer.decode(ids) == whole
    for cut in range(len(ids)):
        detokenizer = tokenizer.detokenizer(behind=ids[:cut])
        assert tokenizer.decode(ids[:cut]) + "".join(map(detokenizer.add, ids[cut:])) == whole
