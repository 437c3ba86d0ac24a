"""The rebuilt tokenizer gives the ids of the original, which each test spells out as the model's own files have it."""

import json
import math
import re
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jllm_convert.errors import ConversionError
from jllm_convert.sources.gguf.tokenizer import tokenizer_files
from jllm_convert.sources.gguf.tokenizer_pipelines import BYTE_LEVEL_PIPELINES
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox doesn't jump; we'll see, they've said I'M late and HE'D agree.",
    "Numbers 1 12 123 1234 20250 3.14 1,000,000 and ½ Ⅻ ٣٤ in text.",
    "def main(argv):\n    if len(argv) > 1:\n\t\treturn 0\n\n\nprint('a  b   c    d')\r\n",
    "naïve café résumé Ångström — “quotes” … l'été où ça mène",
    "中文字符和日本語のテスト、한국어 문장도 있습니다。",
    "emoji 👍🏽 👩‍👩‍👧‍👦 🇩🇪 hello hello world world the the the of of and and",
    "हिन्दी की किताब, தமிழ் மொழி, ภาษาไทยที่น้ำ",
] * 4
SPECIALS = ["<|bos|>", "<|im_start|>", "<|im_end|>"]
TOOL = "<tool>"
TEXTS = [
    *["", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", " \n \t x"],
    *["hello", " hello", "  hello", "hello ", "hello  ", "a  b   c    d", "\n hello\n\n  world \n"],
    *["1", "12", "123", "1234", "12345 678", " 1 2", "x1y22z333", "½ Ⅻ ٣٤", "3.14!1,000"],
    *["don't", "DON'T we'll WE'LL they've I'm I'M he'd", "'s 's'S", "l'été", "DON'TALK", "DON'TALK I'MMERSE"],
    *["e\u0301 é", "A\u030angstro\u0308m", "\u1e9b\u0323", "à́̂"],
    *["中文字符", "日本語 テスト", "한국어", "👍🏽 👩‍👩‍👧‍👦 🇩🇪", "\u00a0x\u3000y\u2003z\u200b", "▁ a▁b ▁▁", "\x00\x7f"],
    *["हिन्दी की किताब", "x\u0301\u0302y", "தமிழ்,\u0bcd மொழி", "ภาษาไทยที่น้ำ!\u0e49\u0e33"],
    *["a<unk>b", "<s> x</s>"],
    *["<|im_start|>user\nhi<|im_end|>", " <|im_end|> x", "a<tool>b", "<|bos|><|bos|>", "<|im_end|", "<0x41>", "[PAD9]"],
    *CORPUS[:6],
]
FRAGMENTS = [
    "hello",
    "the",
    "don't",
    "12",
    "3",
    "é",
    "e\u0301",
    "की",
    "文",
    "👍",
    "\n",
    "\t",
    " ",
    "  ",
    "▁",
    "-",
    *SPECIALS,
    TOOL,
]
ANY_TEXT = st.text(max_size=40) | st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)

QWEN_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN35_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def split_by(regex):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def digits_then_words():
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


ORIGINALS = {
    "gpt-2": (None, lambda: pre_tokenizers.ByteLevel(add_prefix_space=False), {}, False),
    "mpt": (normalizers.NFC, lambda: pre_tokenizers.ByteLevel(add_prefix_space=False), {}, False),
    "smollm": (None, digits_then_words, {}, False),
    "command-r": (normalizers.NFC, digits_then_words, {}, False),
    "qwen2": (normalizers.NFC, lambda: split_by(QWEN_REGEX), {}, False),
    "megrez": (None, lambda: split_by(QWEN_REGEX), {}, False),
    "qwen35": (normalizers.NFC, lambda: split_by(QWEN35_REGEX), {}, False),
    "llama-bpe": (None, lambda: split_by(LLAMA3_REGEX), {"ignore_merges": True}, True),
    "smaug-bpe": (None, lambda: split_by(LLAMA3_REGEX), {"ignore_merges": True}, False),
    "dbrx": (None, lambda: split_by(LLAMA3_REGEX), {}, False),
}
# llama.cpp's names for the same pipeline (`llama_vocab::impl::load`).
ALIASES = {
    "gpt-2": "phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 mellum modern-bert exaone4 jais trillion "
    "granite-docling",
    "mpt": "olmo",
    "smollm": "starcoder refact codeshell exaone minerva-7b mellum2",
    "qwen2": "deepseek-r1-qwen f2llmv2",
    "megrez": "stablelm2 kormo hunyuan solar-open grok-2",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
    "dbrx": "chatglm-bpe glm4",
}
ALIAS_OF = {alias: name for name, aliases in ALIASES.items() for alias in aliases.split()}
_memo: dict[str, tuple[Tokenizer, dict[str, object]]] = {}


def once(name, make):
    """Train each tokenizer once; hypothesis runs its test many times."""
    if name not in _memo:
        _memo[name] = make()
    return _memo[name]


def add_tokens(tokenizer):
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIALS])
    tokenizer.add_tokens([AddedToken(TOOL, normalized=False)])


def as_gguf(tokenizer, padding=3):
    """What llama.cpp's converter stores of ``tokenizer``: tokens, types and merges, then unused ids for padding."""
    document = json.loads(tokenizer.to_str())
    size = tokenizer.get_vocab_size()
    types = dict.fromkeys(range(size), 1) | {a["id"]: 3 if a["special"] else 4 for a in document["added_tokens"]}
    return {
        "general.architecture": "llama",
        "llama.context_length": 2048,
        "tokenizer.ggml.tokens": [tokenizer.id_to_token(i) for i in range(size)]
        + [f"[PAD{size + i}]" for i in range(padding)],
        "tokenizer.ggml.token_type": [types[i] for i in range(size)] + [5] * padding,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in document["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": tokenizer.token_to_id("<|bos|>"),
        "tokenizer.ggml.eos_token_id": tokenizer.token_to_id("<|im_end|>"),
    }


def make_byte_level(pre):
    normalizer, pre_tokenizer, options, has_bos = ORIGINALS[pre]
    tokenizer = Tokenizer(models.BPE())
    # Learned without any split, so that there are merges across every place where the original splits.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS + TEXTS + ["TALK"] * 20, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    # A word that no merge reaches: only `ignore_merges` finds it.
    vocab = trained["vocab"] | {"Ġunmergeable": len(trained["vocab"])}
    tokenizer.model = models.BPE(vocab=vocab, merges=[tuple(pair) for pair in trained["merges"]], **options)
    tokenizer.pre_tokenizer = pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer()
    add_tokens(tokenizer)
    if has_bos:
        bos = ("<|bos|>", tokenizer.token_to_id("<|bos|>"))
        tokenizer.post_processor = processors.TemplateProcessing("<|bos|> $A", "<|bos|> $A <|bos|>:1 $B:1", [bos])
    metadata = as_gguf(tokenizer) | {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre}
    return tokenizer, metadata


def make_sentencepiece():
    """Llama 2's configuration, its merges found the slow way: all pairs of pieces whose join is a piece."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    joins = ["▁▁", *("".join(pair) for pair in learned["merges"])]
    pieces = [*joins, *(piece for piece in learned["vocab"] if len(piece) == 1)]
    scores = {piece: -float(rank) for rank, piece in enumerate(pieces)} | {"▁▁": -1e9}
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    ids = {text: i for i, text in enumerate(texts)}
    pairs = [(left, right) for left in pieces for right in pieces if left + right in scores]
    pairs.sort(key=lambda pair: (-scores["".join(pair)], ids[pair[0]], ids[pair[1]]))
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    add_tokens(tokenizer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s>:1 $B:1", [("<s>", 1)])
    metadata = as_gguf(tokenizer) | {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
    count = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.scores"] = [scores.get(text, 0.0) for text in texts] + [-1000.0] * (count - len(texts))
    metadata["tokenizer.ggml.token_type"][:259] = [2, 3, 3, *[6] * 256]
    for key in ("merges", "bos_token_id", "eos_token_id"):  # it has no merges, and the usual ids may be left out
        del metadata[f"tokenizer.ggml.{key}"]
    return tokenizer, metadata


def original_and_metadata(kind):
    if kind in ALIAS_OF:
        original, metadata = original_and_metadata(ALIAS_OF[kind])
        return original, metadata | {"tokenizer.ggml.pre": kind}
    return once(kind, make_sentencepiece if kind == "llama" else lambda: make_byte_level(kind))


def rebuild(metadata):
    files = tokenizer_files(metadata)
    assert files is not None
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}
    return Tokenizer.from_str(files["tokenizer.json"])


def rebuilt(kind):
    return once(f"{kind} rebuilt", lambda: rebuild(original_and_metadata(kind)[1]))


KINDS = [*ORIGINALS, *ALIAS_OF, "llama"]


def test_every_known_name_is_compared():
    assert {*ORIGINALS, *ALIAS_OF} == set(BYTE_LEVEL_PIPELINES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("marks", [True, False], ids=["with_marks", "without_marks"])
def test_gives_the_ids_and_the_text_of_the_original(kind, marks):
    original, ours = original_and_metadata(kind)[0], rebuilt(kind)
    for text in [*TEXTS, "say unmergeable"]:
        expected = original.encode(text, add_special_tokens=marks).ids
        assert ours.encode(text, add_special_tokens=marks).ids == expected, text
        assert ours.decode(expected) == original.decode(expected)
        assert ours.decode(expected, skip_special_tokens=False) == original.decode(expected, skip_special_tokens=False)


@pytest.mark.parametrize("kind", [*ORIGINALS, "llama"])
@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT)
def test_gives_the_ids_of_the_original_for_any_text(kind, text):
    original, ours = original_and_metadata(kind)[0], rebuilt(kind)
    assert ours.encode(text).ids == original.encode(text).ids


@pytest.mark.parametrize("kind", KINDS)
def test_marks_a_pair_of_texts_as_the_original_does(kind):
    original, ours = original_and_metadata(kind)[0], rebuilt(kind)
    assert ours.encode("a", "b").ids == original.encode("a", "b").ids


@pytest.mark.parametrize("kind", [*ORIGINALS, "llama"])
def test_decoding_gives_the_text_back(kind):
    ours = rebuilt(kind)
    for text in ("hello world", " two  spaces\n\n", "naïve 文 👍🏽 12345", "\t<x>"):
        assert ours.decode(ours.encode(text).ids) == text


def test_sentencepiece_joins_the_best_scoring_neighbours_first():
    """The published algorithm itself, without merges: the neighbours whose join has the best score, leftmost first."""
    metadata = original_and_metadata("llama")[1]
    tokens = metadata["tokenizer.ggml.tokens"]
    score = dict(zip(tokens[259:], metadata["tokenizer.ggml.scores"][259:], strict=True))
    for text in ("hello world", "the quick brown fox", "return  argv", "Numbers 1234 and text", "résumé of the fox"):
        pieces = list("▁" + text.replace(" ", "▁"))
        while joins := [i for i in range(len(pieces) - 1) if pieces[i] + pieces[i + 1] in score]:
            best = max(joins, key=lambda i: (score[pieces[i] + pieces[i + 1]], -i))
            pieces[best : best + 2] = [pieces[best] + pieces[best + 1]]
        assert rebuilt("llama").encode(text, add_special_tokens=False).tokens == pieces


@pytest.mark.parametrize(
    ("pieces", "text", "expected"),
    [
        (["a", "b", "c", "ab", "bc", "abc"], "abc", ["abc"]),
        (["a", "b", "c", "bc", "ab"], "abc", ["a", "bc"]),
        (["a", "aa", "aaa"], "aaaaa", ["aa", "aaa"]),
    ],
)
def test_sentencepiece_ranks_joins_by_score(pieces, text, expected):
    metadata = small_sentencepiece(pieces) | {"tokenizer.ggml.add_space_prefix": False}
    assert rebuild(metadata).encode(text, add_special_tokens=False).tokens == expected


def test_sentencepiece_merges_come_in_the_published_order():
    metadata = small_sentencepiece(["aaa", "a", "aa", "b", "ab"]) | {
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -3.0, -9.0, -2.0, -9.0, -2.0]
    }
    merges = json.loads(tokenizer_files(metadata)["tokenizer.json"])["model"]["merges"]
    # Best score first; of one score the lower id; of one piece the lower id of its left half.
    assert merges == [["a", "a"], ["a", "b"], ["a", "aa"], ["aa", "a"]]


def small_sentencepiece(pieces):
    texts = ["<unk>", "<s>", "</s>", *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(texts))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[1] * len(pieces)],
    }


def test_sentencepiece_without_space_prefix():
    original, metadata = original_and_metadata("llama")
    ours = rebuild(metadata | {"tokenizer.ggml.add_space_prefix": False})
    bare = Tokenizer.from_str(original.to_str())
    bare.normalizer = normalizers.Replace(" ", "▁")
    bare.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    for text in TEXTS:
        ids = bare.encode(text).ids
        assert ours.encode(text).ids == ids
        assert ours.decode(ids) == bare.decode(ids)
    assert ours.encode("hello").ids != original.encode("hello").ids


def test_mistral_puts_the_space_before_the_first_text_only():
    pieces = ["[INST]", "▁", "h", "i"]
    metadata = small_sentencepiece(pieces)
    metadata["tokenizer.ggml.token_type"][3] = 3
    assert rebuild(metadata).encode("hi[INST] hi[INST]hi").tokens == (
        ["<s>", "▁", "h", "i", "[INST]", "▁", "h", "i", "[INST]", "h", "i"]
    )
    metadata = small_sentencepiece(["▁", "h", "i", "[INST]"])
    metadata["tokenizer.ggml.token_type"][6] = 3
    assert rebuild(metadata).encode("hi[INST]hi").tokens == ["<s>", "▁", "h", "i", "[INST]", "▁", "h", "i"]


def test_unused_ids_leave_the_others_where_they_are():
    original, metadata = original_and_metadata("qwen2")
    assert len(metadata["tokenizer.ggml.tokens"]) == original.get_vocab_size() + 3
    metadata = {key: list(value) if isinstance(value, list) else value for key, value in metadata.items()}
    # Two more in the middle, of which an older converter typed one as a token to look for in the text.
    metadata["tokenizer.ggml.tokens"][300:300] = ["<spare>", "[PAD301]"]
    metadata["tokenizer.ggml.token_type"][300:300] = [5, 4]
    for role in ("bos", "eos"):
        metadata[f"tokenizer.ggml.{role}_token_id"] += 2
    ours = rebuild(metadata)
    for text in [*TEXTS, "[PAD301] <spare>"]:
        expected = [i if i < 300 else i + 2 for i in original.encode(text).ids]
        assert ours.encode(text).ids == expected
    assert ours.decode([300, 301, original.get_vocab_size() + 2]) == ""


def test_padding_with_a_role_stays():
    metadata = original_and_metadata("gpt-2")[1]
    pad_id = len(metadata["tokenizer.ggml.tokens"]) - 1
    files = tokenizer_files(metadata | {"tokenizer.ggml.padding_token_id": pad_id})
    assert json.loads(files["tokenizer_config.json"])["pad_token"] == f"[PAD{pad_id}]"
    ours = Tokenizer.from_str(files["tokenizer.json"])
    assert ours.encode(f"[PAD{pad_id}]").ids == [pad_id]
    assert ours.decode([pad_id]) == ""


@pytest.mark.parametrize("kind", ["smollm", "llama-bpe", "llama"])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_adds_the_marks_that_the_file_asks_for(kind, bos, eos):
    metadata = original_and_metadata(kind)[1]
    flags = {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
    files = tokenizer_files(metadata | flags)
    ours, config = Tokenizer.from_str(files["tokenizer.json"]), json.loads(files["tokenizer_config.json"])
    text = rebuilt(kind).encode("hi", add_special_tokens=False).tokens
    first, last = ("<s>", "</s>") if kind == "llama" else ("<|bos|>", "<|im_end|>")
    assert ours.encode("hi").tokens == [first] * bos + text + [last] * eos
    assert (config["add_bos_token"], config["add_eos_token"]) == (bos, eos)
    assert (config["bos_token"], config["eos_token"]) == (first, last)


@pytest.mark.parametrize("kind", ["llama-bpe", "falcon3", "lfm2", "pixtral"])
@pytest.mark.parametrize("none", [None, 2**32 - 1], ids=["no_id", "id_none"])
def test_adds_no_bos_that_the_file_does_not_have(kind, none):
    """llama.cpp would take id 11 for it, which is a comma or the like; the model's own files have no such mark."""
    metadata = broken(original_and_metadata(kind)[1], {"bos_token_id": none})
    files = tokenizer_files(metadata)
    ours, config = Tokenizer.from_str(files["tokenizer.json"]), json.loads(files["tokenizer_config.json"])
    assert ours.encode("hi there").ids == rebuilt(kind).encode("hi there", add_special_tokens=False).ids
    assert config["add_bos_token"] is False
    assert "bos_token" not in config


@pytest.mark.parametrize("kind", ["llama-bpe", "smaug-bpe", "deepseek-r1-qwen"])
@pytest.mark.parametrize("bos", [True, False])
def test_the_file_decides_on_bos_whatever_its_split(kind, bos):
    ours = rebuild(original_and_metadata(kind)[1] | {"tokenizer.ggml.add_bos_token": bos})
    assert ours.encode("hi").tokens[0] == ("<|bos|>" if bos else "hi")


@pytest.mark.parametrize("role", ["bos", "eos", "unknown", "padding", "eot"])
@pytest.mark.parametrize("kind", ["gpt-2", "llama"])
def test_a_special_id_of_all_ones_means_none(kind, role):
    """The -1 of a config.json, as converters write it into an unsigned number."""
    metadata = original_and_metadata(kind)[1]
    files = tokenizer_files(metadata | {f"tokenizer.ggml.{role}_token_id": 2**32 - 1})
    assert f"{ {'unknown': 'unk', 'padding': 'pad'}.get(role, role) }_token" not in json.loads(
        files["tokenizer_config.json"]
    )
    with pytest.raises(ConversionError, match=f"{role}_token_id"):
        tokenizer_files(metadata | {f"tokenizer.ggml.{role}_token_id": 2**32 - 2})


def test_config_holds_what_the_file_says():
    metadata = original_and_metadata("smollm")[1] | {
        "tokenizer.ggml.padding_token_id": 5,
        "tokenizer.ggml.unknown_token_id": 6,
        "tokenizer.chat_template": "{{ messages }}",
    }
    config = json.loads(tokenizer_files(metadata)["tokenizer_config.json"])
    tokens = metadata["tokenizer.ggml.tokens"]
    assert config == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<|bos|>",
        "eos_token": "<|im_end|>",
        "unk_token": tokens[6],
        "pad_token": tokens[5],
        "model_max_length": 2048,
        "chat_template": "{{ messages }}",
    }


def test_config_leaves_out_what_the_file_does_not_say():
    metadata = dict(original_and_metadata("smollm")[1])
    for key in ("general.architecture", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"):
        del metadata[key]
    config = json.loads(tokenizer_files(metadata)["tokenizer_config.json"])
    assert set(config) == {"tokenizer_class", "clean_up_tokenization_spaces", "add_bos_token", "add_eos_token"}


@pytest.mark.parametrize("metadata", [{}, {"tokenizer.ggml.model": "none"}, {"general.architecture": "llama"}])
def test_no_tokenizer(metadata):
    assert tokenizer_files(metadata) is None


def small_byte_level():
    """A small valid byte-level tokenizer; the tests below break it."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "c", "ab", "<eos>"],
        "tokenizer.ggml.token_type": [1, 1, 1, 1, 3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 4,
    }


def problems_of(metadata):
    with pytest.raises(ConversionError) as caught:
        tokenizer_files(metadata)
    return caught.value.problems


def test_the_small_tokenizers_are_valid():
    assert rebuild(small_byte_level()).encode("abc<eos>").tokens == ["ab", "c", "<eos>"]
    assert rebuild(small_sentencepiece(["▁", "a", "▁a"])).encode("a").tokens == ["<s>", "▁a"]


def test_sentencepiece_without_bytes_gives_one_unknown_token_for_a_run():
    assert rebuild(small_sentencepiece(["▁", "a"])).encode("axyza").tokens == ["<s>", "▁", "a", "<unk>", "a"]


BROKEN_BYTE_LEVEL = {
    "unknown model": ({"model": "bert"}, ["tokenizer.ggml.model", "gpt2, llama", "'bert'", "Hugging Face"]),
    "model of another type": ({"model": ["gpt2"]}, ["tokenizer.ggml.model", "['gpt2']"]),
    "unknown pre": ({"pre": "tekken"}, ["tokenizer.ggml.pre", "gpt-2, smollm, qwen2", "'tekken'", "Hugging Face"]),
    "another unknown pre": ({"pre": "deepseek-coder"}, ["tokenizer.ggml.pre", "'deepseek-coder'", "Hugging Face"]),
    "a split with a separator": ({"pre": "roberta-bpe"}, ["tokenizer.ggml.pre", "'roberta-bpe'", "Hugging Face"]),
    "pre of an unknown original": ({"pre": "default"}, ["tokenizer.ggml.pre", "'default'"]),
    "pre of another type": ({"pre": ["gpt-2"]}, ["tokenizer.ggml.pre", "['gpt-2']"]),
    "no pre": ({"pre": None}, ["tokenizer.ggml.pre", "got nothing"]),
    "no tokens": ({"tokens": None}, ["tokenizer.ggml.tokens", "list of str", "got nothing"]),
    "empty tokens": ({"tokens": []}, ["tokenizer.ggml.tokens", "an empty list"]),
    "tokens that are no text": ({"tokens": ["a", 3, "c", "ab", "d"]}, ["tokenizer.ggml.tokens", "a list of int, str"]),
    "tokens that are no list": ({"tokens": "abc"}, ["tokenizer.ggml.tokens", "got str"]),
    "no types": ({"token_type": None}, ["tokenizer.ggml.token_type", "got nothing"]),
    "too few types": ({"token_type": [1, 1]}, ["tokenizer.ggml.token_type", "5 entries", "got 2"]),
    "types that are no numbers": ({"token_type": [True] * 5}, ["tokenizer.ggml.token_type", "bool"]),
    "unknown type": ({"token_type": [1, 1, 1, 9, 3]}, ["tokenizer.ggml.token_type", "1 to 6", "9 at id 3"]),
    "too many scores": ({"scores": [0.0] * 6}, ["tokenizer.ggml.scores", "5 entries", "got 6"]),
    "duplicate tokens": ({"tokens": ["a", "b", "a", "ab", "<eos>"]}, ["tokenizer.ggml.tokens", "'a' at ids 0 and 2"]),
    "no merges": ({"merges": None}, ["tokenizer.ggml.merges", "got nothing"]),
    "merge of one piece": ({"merges": ["a b", "ab"]}, ["tokenizer.ggml.merges", "one space", "'ab' at 1"]),
    "merge of three pieces": ({"merges": ["a b c"]}, ["tokenizer.ggml.merges", "one space", "'a b c' at 0"]),
    "merge of an empty piece": ({"merges": [" ab"]}, ["tokenizer.ggml.merges", "one space", "' ab' at 0"]),
    "merge of a stranger": ({"merges": ["a x"]}, ["tokenizer.ggml.merges", "'x' of 'a x'", "'ax' of 'a x'"]),
    "merge into a stranger": ({"merges": ["b c"]}, ["tokenizer.ggml.merges", "'bc' of 'b c'"]),
    "id too large": ({"eos_token_id": 5}, ["tokenizer.ggml.eos_token_id", "0 to 4", "got 5"]),
    "id below zero": ({"padding_token_id": -1}, ["tokenizer.ggml.padding_token_id", "0 to 4", "got -1"]),
    "id that is no number": ({"eot_token_id": "4"}, ["tokenizer.ggml.eot_token_id", "0 to 4", "got '4'"]),
    "mark with the id of none": ({"add_eos_token": True, "eos_token_id": 2**32 - 1}, ["eos_token_id", "got nothing"]),
    "mark without an id": ({"add_bos_token": True}, ["tokenizer.ggml.bos_token_id", "got nothing"]),
    "flag that is no flag": ({"add_eos_token": 1}, ["tokenizer.ggml.add_eos_token", "true or false", "got 1"]),
}


def broken(metadata, changes):
    full = metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {key: value for key, value in full.items() if value is not None}


@pytest.mark.parametrize("name", BROKEN_BYTE_LEVEL)
def test_names_what_is_wrong(name):
    changes, words = BROKEN_BYTE_LEVEL[name]
    (problem,) = problems_of(broken(small_byte_level(), changes))
    assert all(word in problem for word in words), problem


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scores": None}, ["tokenizer.ggml.scores", "list of float", "got nothing"]),
        ({"scores": [0.0]}, ["tokenizer.ggml.scores", "6 entries", "got 1"]),
        ({"scores": [0.0, 0.0, 0.0, math.nan, -1.0, -2.0]}, ["tokenizer.ggml.scores", "finite", "nan at id 3"]),
        ({"unknown_token_id": 6}, ["tokenizer.ggml.unknown_token_id", "0 to 5", "got 6"]),
        ({"add_space_prefix": "yes"}, ["tokenizer.ggml.add_space_prefix", "true or false", "'yes'"]),
    ],
)
def test_names_what_is_wrong_with_sentencepiece(changes, words):
    (problem,) = problems_of(broken(small_sentencepiece(["a", "b", "ab"]), changes))
    assert all(word in problem for word in words), problem


def test_scores_that_rank_nothing():
    metadata = small_sentencepiece(["a", "b", "ab", "ba"]) | {"tokenizer.ggml.scores": [-1000.0] * 7}
    (problem,) = problems_of(metadata)
    assert "rank the pieces, got -1000.0 for all" in problem


def test_a_text_that_is_no_unicode():
    metadata = broken(small_byte_level(), {"tokens": ["a", "b", "\ud800", "ab", "<eos>"]})
    (problem,) = problems_of(metadata)
    assert "expected one that loads" in problem


@pytest.mark.parametrize("key", ["tokenizer.chat_template", "tokenizer.chat_template.tool_use"])
def test_chat_template_that_is_no_text(key: str):
    (problem,) = problems_of(small_byte_level() | {key: ["a"]})
    assert f"{key}: expected text" in problem


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, None),
        ({"": "chat"}, "chat"),
        ({"": "chat", ".tool_use": "tools"}, {"default": "chat", "tool_use": "tools"}),
        (
            {".rag": "documents", ".tool_use": "tools", "": "chat"},
            {"rag": "documents", "tool_use": "tools", "default": "chat"},
        ),
        ({".tool_use": "tools"}, {"tool_use": "tools"}),
        ({".default": "other", "": "chat"}, "chat"),
        ({"": "chat", ".default": "other"}, "chat"),
        ({".default": "chat"}, "chat"),
        # Beside a list of the names, as llama.cpp's converter writes it.
        ({"": "chat", "s": ["tool_use"], ".tool_use": "tools"}, {"default": "chat", "tool_use": "tools"}),
    ],
)
def test_named_chat_templates_are_kept(keys: dict[str, str], expected: object):
    metadata = small_byte_level() | {f"tokenizer.chat_template{name}": value for name, value in keys.items()}
    found = json.loads(tokenizer_files(metadata)["tokenizer_config.json"]).get("chat_template")
    # A list of names and templates is the form that transformers reads.
    assert ({each["name"]: each["template"] for each in found} if isinstance(found, list) else found) == expected


def test_names_every_problem_at_once():
    changes = {
        "pre": "viking",
        "token_type": [1, 1, 1, 1],
        "merges": ["ab", "a x"],
        "eos_token_id": 99,
        "add_bos_token": "no",
    }
    found = problems_of(broken(small_byte_level(), changes))
    for key in ("pre", "token_type", "eos_token_id", "add_bos_token", "merges"):
        assert any(problem.startswith(f"tokenizer.ggml.{key}:") for problem in found), key


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["a", "x" * 1025], "at most 1,024 characters in each text .* got 'xxx.*' of 1,025"),
        ([str(i).zfill(1000) for i in range(8500)], "8,388,608 in all, got more in all"),
        (["a"] * (2**20 + 1), "at most 1,048,576 entries, got 1,048,577"),
    ],
    ids=["long text", "much text", "many texts"],
)
def test_a_vocabulary_has_a_largest_size(tokens, message):
    changes = {"tokens": tokens, "token_type": [1] * len(tokens)}
    assert re.search(message, problems_of(broken(small_byte_level(), changes))[0])


def test_merges_have_a_largest_number():
    merges = ["a b"] * (2**21 + 1)
    (problem,) = problems_of(broken(small_byte_level(), {"merges": merges}))
    assert "tokenizer.ggml.merges: expected at most 2,097,152 entries" in problem
    # A thousand pieces of which every part is a piece: half a million splits of 300 million characters.
    (problem,) = problems_of(small_sentencepiece(["a" * length for length in range(1, 1000)]))
    assert "expected pieces with at most 2,097,152 splits into others, of 33,554,432 characters in all" in problem


def test_a_merge_of_many_pieces_is_cut_in_the_message():
    tracemalloc.start()
    (problem,) = problems_of(broken(small_byte_level(), {"merges": [" " * 10**7]}))
    assert tracemalloc.get_traced_memory()[1] < 5e7
    tracemalloc.stop()
    assert "two pieces separated by one space" in problem
    assert len(problem) < 400


def test_long_lists_of_faults_are_cut():
    (problem,) = problems_of(broken(small_byte_level(), {"merges": ["x"] * 1000}))
    assert "and 997 more" in problem
    assert len(problem) < 400
