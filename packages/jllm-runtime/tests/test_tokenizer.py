"""Tokenizer: the published files, token ids, and texts token by token."""

import json
from pathlib import Path
from typing import Any

import pytest
from jllm_runtime import RequestError, Tokenizer
from jllm_runtime.errors import ModelError
from tokenizers import AddedToken, decoders, models, processors
from tokenizers import Tokenizer as RawTokenizer

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def raw(tiny) -> RawTokenizer:
    return RawTokenizer.from_str(tiny.tokenizer._raw.to_str())


@pytest.fixture
def folder(raw: RawTokenizer, tmp_path: Path) -> Path:
    """A checkpoint's folder with a tokenizer.json and nothing else."""
    raw.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def configure(folder: Path, **settings: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def read(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    return tokenizer


# ---- The files.


def test_without_tokenizer_json_there_is_no_tokenizer(tmp_path: Path) -> None:
    configure(tmp_path, eos_token="<|end|>")
    assert Tokenizer.from_folder(tmp_path) is None


def test_tokenizer_json_alone_is_enough(folder: Path) -> None:
    tokenizer = read(folder)
    assert tokenizer.encode("hi") == [ord("h"), ord("i")]
    assert tokenizer.chat_template is None
    assert tokenizer.eos_ids == ()
    assert tokenizer.vocab_size == 262


@pytest.mark.parametrize(
    ("file", "contents"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"\xff"),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_the_folder(file: str, contents: bytes, folder: Path) -> None:
    (folder / file).write_bytes(contents)
    with pytest.raises(ModelError, match=r"the tokenizer in .* cannot be read") as caught:
        Tokenizer.from_folder(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("token", ["<|end|>", {"content": "<|end|>", "lstrip": False, "special": True}])
def test_the_end_of_text_token_may_be_a_text_or_a_description(token: object, folder: Path) -> None:
    configure(folder, eos_token=token)
    assert read(folder).eos_ids == (259,)


@pytest.mark.parametrize("token", [None, "<|unknown|>", {}, 5])
def test_an_end_of_text_token_that_is_none_ends_nothing(token: object, folder: Path) -> None:
    configure(folder, eos_token=token)
    assert read(folder).eos_ids == ()


def test_a_stored_truncation_and_padding_are_not_applied(raw: RawTokenizer, tmp_path: Path) -> None:
    raw.enable_truncation(max_length=3)
    raw.enable_padding(length=20)
    raw.save(str(tmp_path / "tokenizer.json"))
    assert len(RawTokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("hello").ids) == 20
    assert read(tmp_path).encode("hello") == list(b"hello")


# ---- Which template.


def test_the_template_file_comes_before_the_settings(folder: Path) -> None:
    configure(folder, chat_template="from the settings")
    (folder / "chat_template.jinja").write_text("from the file")
    assert read(folder).render_chat(HELLO) == "from the file"


def test_the_template_may_be_in_the_settings(folder: Path) -> None:
    configure(folder, chat_template="from the settings")
    assert read(folder).render_chat(HELLO) == "from the settings"


def test_of_several_templates_the_default_is_for_chats(folder: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "chat"}]
    configure(folder, chat_template=named)
    assert read(folder).render_chat(HELLO) == "chat"
    # A list without a default has its first template for chats; transformers would refuse them.
    configure(folder, chat_template=named[:1])
    assert read(folder).render_chat(HELLO) == "tools"


def test_the_template_for_tools_is_taken_where_there_are_some(folder: Path) -> None:
    configure(
        folder, chat_template=[{"name": "default", "template": "chat"}, {"name": "tool_use", "template": "tools"}]
    )
    tokenizer = read(folder)
    assert [tokenizer.render_chat(HELLO, tools=tools) for tools in (None, [], [{}])] == ["chat", "chat", "tools"]
    assert tokenizer.encode_chat(HELLO, tools=[{}]) == list(b"tools")


def test_files_of_named_templates_are_added_to_those_of_the_settings(folder: Path) -> None:
    configure(folder, chat_template="chat")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (folder / "additional_chat_templates" / "README.md").write_text("read me")
    assert read(folder).templates.sources == {"default": "chat", "tool_use": "tools"}
    (folder / "chat_template.jinja").write_text("newer")
    assert read(folder).templates.sources == {"default": "newer", "tool_use": "tools"}


@pytest.mark.parametrize("names", [("default",), ("default", "tool_use"), ("tool_use",), ("../../a/b", "default")])
def test_named_templates_are_saved_with_the_tokenizer(names: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    configure(folder, chat_template=[{"name": name, "template": f"{name}!"} for name in names])
    tokenizer = read(folder)
    (again := tmp_path / "again").mkdir()
    for name, text in tokenizer.files().items():
        assert "/" not in name
        (again / name).write_text(text)
    assert read(again).templates.sources == tokenizer.templates.sources == {name: f"{name}!" for name in names}


def test_without_a_template_there_is_no_chat(folder: Path) -> None:
    with pytest.raises(RequestError, match=r"no chat template.*--raw"):
        read(folder).encode_chat(HELLO)


# ---- Ids.


def with_bos(raw: RawTokenizer) -> RawTokenizer:
    raw.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 258)])
    return raw


def test_a_text_gets_the_special_tokens_that_the_model_wants(raw: RawTokenizer) -> None:
    tokenizer = Tokenizer(with_bos(raw), {}, None)
    assert tokenizer.encode("hi") == [258, *b"hi"]
    assert tokenizer.encode("hi", add_special_tokens=False) == list(b"hi")


def test_a_conversation_begins_with_one_bos(raw: RawTokenizer) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = Tokenizer(with_bos(raw), {"bos_token": "<|bos|>", "eos_token": "<|end|>"}, template)
    assert tokenizer.encode_chat(HELLO) == [258, *b"hello", 259]


def test_the_special_tokens_of_stops(tiny) -> None:
    tokenizer, end, im_end = tiny.tokenizer, tiny.end, tiny.im_end
    assert tokenizer.special_stops(["a", "<|end", ""]) == {}
    assert tokenizer.special_stops(["<|end|>"]) == {end: [""]}
    # The first of several; each with the text before it.
    assert tokenizer.special_stops(["\n<|im_end|>\n<|end|>", "<|im_end|>", "b<|end|>"]) == {
        im_end: ["\n", ""],
        end: ["b"],
    }


def test_of_special_tokens_that_begin_alike_a_stop_has_the_longest(raw: RawTokenizer) -> None:
    raw.add_special_tokens([AddedToken(text, special=True) for text in ("<x", "<xy>", "<xy")])
    assert Tokenizer(raw, {}, None).special_stops(["a<xy>"]) == {raw.token_to_id("<xy>"): ["a"]}
    # Not special: the text shows it, and a stop is found there.
    raw.add_tokens([AddedToken("<tool>")])
    assert Tokenizer(raw, {}, None).special_stops(["<tool>"]) == {}


def test_special_tokens_are_no_text(tiny) -> None:
    ids = [258, *b"hi", 261]
    assert tiny.tokenizer.decode(ids) == "hi"
    assert tiny.tokenizer.decode(ids, skip_special_tokens=False) == "<|bos|>hi<|im_end|>"


def test_each_detokenizer_is_a_text_of_its_own(tiny) -> None:
    first, second = tiny.tokenizer.detokenizer(), tiny.tokenizer.detokenizer()
    half, rest = list("é".encode())
    assert first.add(half) == ""
    assert second.add(ord("a")) == "a"
    assert first.add(rest) == "é"


@pytest.mark.parametrize("text", ["plain", "the then", "naïve 漢字 😀!", "a\n\n  b\tc", "👩‍👩‍👧 family"])
def test_token_by_token_gives_the_whole_text(text: str, tiny) -> None:
    detokenizer = tiny.tokenizer.detokenizer()
    pieces = [detokenizer.add(token) for token in tiny.tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)


# ---- Tokenizers of the SentencePiece kind: a space is "▁", and a rare character is spelt in byte tokens.

WORDS = ["▁hello", "▁wor", "ld", "▁", "."]


@pytest.fixture
def sentencepiece() -> RawTokenizer:
    vocab = {text: number for number, text in enumerate(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS])}
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens([AddedToken("<unk>", special=True)])
    return raw


def spelt(text: str) -> list[int]:
    return [1 + byte for byte in text.encode()]


def test_spaces_between_words_come_one_by_one(sentencepiece: RawTokenizer) -> None:
    detokenizer = Tokenizer(sentencepiece, {}, None).detokenizer()
    ids = [257, 258, 259, 261, *spelt("漢😀"), 257]
    assert "".join(detokenizer.add(token) for token in ids) == "hello world.漢😀 hello"


def test_bytes_that_are_no_character_break_nothing(sentencepiece: RawTokenizer) -> None:
    """A model that samples may say any byte."""
    detokenizer = Tokenizer(sentencepiece, {}, None).detokenizer()
    ids = [257, *spelt("é"), 1 + 0xFF, 258, 259, 261]
    text = "".join(detokenizer.add(token) for token in ids)
    assert text.startswith("hello")
    assert text.endswith(" world.")


# ---- Tokens one by one.


def test_the_bytes_of_tokens_make_the_text(raw: RawTokenizer) -> None:
    tokenizer = Tokenizer(raw, {}, None)
    text = "the \u6f22\u5b57, \xe9\xa0\xad\n<|end|>"
    token_ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, token_ids)).decode() == text
    assert [tokenizer.token_bytes(token_id) for token_id in tokenizer.encode("\xe9")] == [b"\xc3", b"\xa9"]


def test_the_bytes_of_a_vocabulary_of_texts() -> None:
    vocab = {"\u2581the": 0, "<0xC3>": 1, "<0xA9>": 2, "s": 3, "<0x>": 4}
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = Tokenizer(raw, {}, None)
    assert [tokenizer.token_bytes(token_id) for token_id in range(6)] == [b" the", b"\xc3", b"\xa9", b"s", b"<0x>", b""]


def test_a_tokenizer_without_a_decoder_has_its_tokens() -> None:
    tokenizer = Tokenizer(RawTokenizer(models.BPE(vocab={"a": 0}, merges=[])), {}, None)
    assert tokenizer.token_bytes(0) == b"a"


def test_marks_that_were_added_are_known(raw: RawTokenizer) -> None:
    raw.add_tokens([AddedToken("<think>", normalized=False)])
    tokenizer = Tokenizer(raw, {}, None)
    assert tokenizer.is_added("<think>")
    assert tokenizer.is_added("<|end|>")
    assert not tokenizer.is_added("the")
