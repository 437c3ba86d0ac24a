"""Hostile GGUF files: whatever the bytes, a file is converted as it says or refused with a ConversionError.

The files are packed here and not by the gguf package, which refuses to write what is wrong. `fuzz/fuzz_gguf.py` holds
the same property for an hour.
"""

import contextlib
import math
import os
import re
import struct
import tempfile
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jllm_convert.errors import ConversionError
from jllm_convert.sources.gguf.source import GGUFSource

CORPUS = Path(__file__).parents[3] / "fuzz" / "corpus" / "gguf"
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10
EXTREMES = [0, 1, 2, 3, 7, 127, 128, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**60, 2**63 - 1, 2**63, 2**64 - 1]


@dataclass(frozen=True)
class Number:
    """A number of a header, by its letter in the struct module, so that it can be replaced."""

    code: str
    value: float

    def packed(self) -> bytes:
        return struct.pack(f"<{self.code}", self.value)


@dataclass(frozen=True)
class Value:
    """A value of the metadata with the number of its GGUF type; an array has a tuple of Values of the type ``item``."""

    kind: int
    value: Any
    item: int = U32


@dataclass(frozen=True)
class Tensor:
    """An entry of the header; without an offset, it comes after the one before."""

    name: str
    shape: tuple[int, ...]
    kind: int = 0
    nbytes: int = 0
    offset: int | None = None


Part = bytes | Number


def packed_string(text: str | bytes) -> list[Part]:
    raw = text if isinstance(text, bytes) else text.encode()
    return [Number("Q", len(raw)), raw]


def packed_value(value: Value) -> list[Part]:
    if value.kind == STRING:
        return packed_string(value.value)
    if value.kind != ARRAY:
        return [Number(CODES.get(value.kind, "I"), value.value)]
    items = [part for each in value.value for part in packed_value(each)]
    return [Number("I", value.item), Number("Q", len(value.value)), *items]


def header(
    metadata: Sequence[tuple[str | bytes, Value]], tensors: Sequence[Tensor], version: int = 3, magic: bytes = b"GGUF"
) -> list[Part]:
    parts: list[Part] = [magic, Number("I", version), Number("Q", len(tensors)), Number("Q", len(metadata))]
    for key, value in metadata:
        parts += [*packed_string(key), Number("I", value.kind), *packed_value(value)]
    at = 0
    for tensor in tensors:
        offset = at if tensor.offset is None else tensor.offset
        parts += [*packed_string(tensor.name), Number("I", len(tensor.shape))]
        parts += [Number("Q", length) for length in reversed(tensor.shape)]
        parts += [Number("I", tensor.kind), Number("Q", offset)]
        at = -(-(offset + tensor.nbytes) // 32) * 32
    return parts


def joined(parts: Sequence[Part], data: int = 0) -> bytes:
    """The parts, then so many bytes of data on the alignment of 32."""
    raw = b"".join(part if isinstance(part, bytes) else part.packed() for part in parts)
    random = np.random.default_rng(0).integers(0, 128, data, np.uint8).tobytes()
    return raw + bytes(-len(raw) % 32) + random if data else raw


def texts(*items: str) -> Value:
    return Value(ARRAY, tuple(Value(STRING, item) for item in items), STRING)


def ints(*items: int) -> Value:
    return Value(ARRAY, tuple(Value(5, item) for item in items), 5)


METADATA: dict[str, Value] = {
    "general.architecture": Value(STRING, "llama"),
    "general.alignment": Value(U32, 32),
    "llama.block_count": Value(U32, 1),
    "llama.context_length": Value(U32, 64),
    "llama.embedding_length": Value(U32, 32),
    "llama.feed_forward_length": Value(U32, 32),
    "llama.attention.head_count": Value(U32, 4),
    "llama.attention.head_count_kv": Value(U32, 2),
    "llama.attention.key_length": Value(U32, 8),
    "llama.attention.layer_norm_rms_epsilon": Value(F32, 1e-5),
    "llama.rope.freq_base": Value(F32, 1e4),
    "tokenizer.ggml.model": Value(STRING, "gpt2"),
    "tokenizer.ggml.pre": Value(STRING, "gpt-2"),
    "tokenizer.ggml.tokens": texts("a", "b", "ab", "<s>"),
    "tokenizer.ggml.token_type": ints(1, 1, 1, 3),
    "tokenizer.ggml.merges": texts("a b"),
    "tokenizer.ggml.bos_token_id": Value(U32, 3),
    "tokenizer.ggml.eos_token_id": Value(U32, 3),
    "tokenizer.ggml.add_bos_token": Value(BOOL, 1),
    "tokenizer.chat_template": Value(STRING, "{{ messages }}"),
    "some.numbers": Value(ARRAY, tuple(Value(F32, i / 2) for i in range(5)), F32),
    "some.flags": Value(ARRAY, (Value(BOOL, 1), Value(BOOL, 0)), BOOL),
    "some.nested": Value(ARRAY, (texts("x"), ints(1, 2)), ARRAY),
    "some.long": Value(U64, 2**40),
}
SENTENCEPIECE = {
    "tokenizer.ggml.model": Value(STRING, "llama"),
    "tokenizer.ggml.tokens": texts("<unk>", "<s>", "</s>", "a", "aa"),
    "tokenizer.ggml.token_type": ints(2, 3, 3, 1, 1),
    "tokenizer.ggml.scores": Value(ARRAY, tuple(Value(F32, -i) for i in range(5)), F32),
}
F16, Q4, Q8, BF16 = 1, 2, 8, 30
TENSORS = (
    Tensor("token_embd.weight", (5, 32), Q8, 5 * 34),
    Tensor("rope_freqs.weight", (4,), 0, 16),
    Tensor("blk.0.attn_norm.weight", (32,), F16, 64),
    Tensor("blk.0.attn_q.weight", (32, 32), BF16, 2048),
    Tensor("blk.0.ffn_up_exps.weight", (2, 3, 32), Q4, 6 * 18),
)
DATA = 192 + 32 + 64 + 2048 + 128


def valid() -> list[Part]:
    return header(list(METADATA.items()), TENSORS)


@contextlib.contextmanager
def written(content: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        path.write_bytes(content)
        yield path


def refused(content: bytes) -> str:
    """The message with which a file is refused on opening, before it takes memory."""
    tracemalloc.start()
    try:
        with written(content) as path, pytest.raises(ConversionError) as caught:
            GGUFSource(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert "model.gguf" in str(caught.value)
    return str(caught.value)


def exercise(content: bytes) -> set[str]:
    """Ask of a file all that a conversion asks; what it gave. Any exception but ConversionError comes out."""
    given: set[str] = set()
    started = time.thread_time()
    tracemalloc.start()
    try:
        with written(content) as path, contextlib.suppress(ConversionError):
            source = GGUFSource(path)
            given.add("opened")
            asked = {
                "config": source.config,
                "generation": source.generation_config,
                "tokenizer": lambda: source.write_tokenizer(path.parent),
                "fingerprint": source.fingerprint,
            }
            for what, ask in asked.items():
                with contextlib.suppress(ConversionError):
                    ask()
                    given.add(what)
            for tensor in source.tensors.values():
                with contextlib.suppress(ConversionError):
                    values = tensor.read()
                    assert (values.shape, values.dtype) == (tensor.shape, tensor.dtype)
                    part = tuple(slice(length // 3, length // 3 + max(length // 2, 1)) for length in tensor.shape)
                    assert tensor.read(part).tobytes() == values[part].tobytes()
                    given.add(tensor.name)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert time.thread_time() - started < 5
    return given


# ---- What is refused, and how it is told

FAR = 2**60


def with_value(key: str | bytes, *parts: Part) -> bytes:
    """A file whose last metadata pair has a value of these parts."""
    pair = [*packed_string(key), *parts]
    return joined([b"GGUF", Number("I", 3), Number("Q", 0), Number("Q", 1), *pair])


def with_tensors(*tensors: Tensor, data: int = 256) -> bytes:
    return joined(header(list(METADATA.items()), tensors), data)


def with_pairs(*pairs: tuple[str | bytes, Value]) -> bytes:
    return joined(header(pairs, ()))


def array(item: int, count: int, *parts: Part) -> list[Part]:
    return [Number("I", ARRAY), Number("I", item), Number("Q", count), *parts]


ONE = Value(U32, 1)
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the magic number takes 4 bytes or more, the file has 0 left"),
    "another format": (b"PK\x03\x04" + bytes(99), r"expected the bytes b'GGUF', got b'PK"),
    "version 1": (joined(header([], [], version=1)), "version 1, supported: 2, 3"),
    "version 4": (joined(header([], [], version=4)), "version 4, supported: 2, 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian GGUF file, which is not supported"),
    "tensors that do not fit": (
        b"GGUF" + struct.pack("<IQQ", 3, 90_000, 0),
        "a list of 90,000 tensors takes 2,970,000",
    ),
    "too many tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**64 - 1, 0), "at most 131,072 are supported"),
    "too many pairs": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "metadata pairs, at most 65,536"),
    "a key that does not end": (joined([b"GGUF", Number("I", 3), *[Number("Q", n) for n in (0, 1, FAR, 0)]]), "left"),
    "a key twice": (with_pairs(("a", ONE), ("a", ONE)), "a metadata key was there before: 'a'"),
    "a key without letters": (with_pairs(("", ONE)), "a metadata key has 0 bytes, expected 1 to 65,535"),
    "a long key": (with_pairs(("x" * 70_000, ONE)), "a metadata key has 70,000 bytes"),
    "a key for a terminal": (with_pairs(("a\x1b[2J", ONE)), "a metadata key has control characters"),
    "a key that is not UTF-8": (with_pairs((b"\xff\xfe", ONE)), "a metadata key is not UTF-8"),
    "a text that is not UTF-8": (with_value("a", Number("I", STRING), *packed_string(b"\xed\xa0\x80")), "not UTF-8"),
    "a type that is not known": (with_value("a", Number("I", 13), bytes(50)), "is of the unknown type 13"),
    "items that are not known": (with_value("a", *array(13, 1, bytes(50))), "array of the unknown type 13"),
    "2**60 strings": (
        with_value("a", *array(STRING, FAR, bytes(50))),
        "the value of 'a' takes 9,223,372,036,854,775,808",
    ),
    "2**60 numbers": (with_value("a", *array(U64, FAR, bytes(50))), "the value of 'a' takes 9,223,372,036,854,775,808"),
    "2**60 truth values": (with_value("a", *array(BOOL, FAR, bytes(50))), "the value of 'a' takes"),
    "2**60 arrays": (with_value("a", *array(ARRAY, FAR, bytes(50))), "the value of 'a' takes"),
    "nested arrays": (
        with_value("a", *array(ARRAY, 1), *array(ARRAY, 1)[1:] * 9, bytes(20)),
        "nested more than 4 deep",
    ),
    "a truth value of 2": (with_pairs(("a", Value(BOOL, 2))), "a truth value other than 0 and 1: 2"),
    "truth values of 3": (with_pairs(("a", Value(ARRAY, (Value(BOOL, 3),), BOOL))), "other than 0 and 1: 3"),
    "no alignment": (
        with_pairs(("general.alignment", Value(U32, 0))),
        "expected general.alignment to be a power of two",
    ),
    "an odd alignment": (with_pairs(("general.alignment", Value(U32, 48))), "expected general.alignment to be a power"),
    "a huge alignment": (with_pairs(("general.alignment", Value(U32, 2**31))), "from 8 to 1,048,576"),
    "an alignment of 64 bits": (with_pairs(("general.alignment", Value(U64, 32))), "as a 32 bit number"),
    "a tensor twice": (with_tensors(Tensor("a", (4,)), Tensor("a", (4,))), "a tensor name was there before: 'a'"),
    "a long name": (with_tensors(Tensor("a" * 65, (4,))), "a tensor name has 65 bytes, expected 1 to 64"),
    "no axes": (with_tensors(Tensor("a", ())), "tensor 'a' has 0 axes, expected 1 to 4"),
    "five axes": (with_tensors(Tensor("a", (1,) * 5)), "tensor 'a' has 5 axes, expected 1 to 4"),
    "no rows": (with_tensors(Tensor("a", (0, 4))), r"tensor 'a' has shape \[0, 4\]"),
    "part of a block": (with_tensors(Tensor("a", (2, 33), Q8)), "rows of 33, type Q8_0 needs a multiple of 32"),
    "sizes that overflow": (with_tensors(Tensor("a", (2**63, 2**63, 2**63, 2**63))), "tensor 'a' ends at byte"),
    "sizes whose product is 0 in 64 bits": (with_tensors(Tensor("a", (2**32, 2**32))), "tensor 'a' ends at byte"),
    "a tensor beyond the end": (with_tensors(Tensor("a", (4,), offset=2**64 - 32)), "'a' ends at byte 18,446,744"),
    "a tensor off the alignment": (with_tensors(Tensor("a", (4,), offset=8)), "expected a multiple of 32"),
    "a tensor in another": (
        with_tensors(Tensor("a", (16,)), Tensor("b", (4,), offset=32)),
        "'b' starts at .* within 'a'",
    ),
    "a tensor of another time": (with_tensors(Tensor("a", (32,), kind=31)), "tensor 'a' is of type number 31"),
    "a tensor that holds no weights": (with_tensors(Tensor("a", (4,), kind=26)), "tensor 'a' is of type I32"),
    "a tensor of a type for activations": (with_tensors(Tensor("a", (256,), kind=15), data=292), "is of type Q8_K"),
    "an architecture that is no text": (
        with_pairs(("general.architecture", texts("llama"))),
        "architecture .'llama'. is",
    ),
    "parts that are no number": (with_pairs(("split.count", Value(STRING, "3"))), "split.count must be a whole number"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_header_that_cannot_be_is_refused_at_once(name: str) -> None:
    content, message = BROKEN[name]
    started = time.thread_time()
    assert re.search(message, refused(content))
    assert time.thread_time() - started < 1


def test_every_wrong_tensor_is_named_up_to_a_number() -> None:
    told = refused(with_tensors(Tensor("a", (33,), Q8), Tensor("b", (4,), 99), Tensor("c", (4,), offset=1)))
    assert all(f"tensor '{name}'" in told for name in "abc")
    told = refused(with_tensors(*(Tensor(f"t{i}", (4,), 99) for i in range(500))))
    assert "'t19'" in told
    assert "'t20'" not in told
    assert "and 480 more like these" in told


def test_a_header_has_a_largest_size(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(with_value("a", Number("I", STRING), Number("Q", 100 << 20)))
    os.truncate(path, 200 << 20)
    with pytest.raises(
        ConversionError, match=r"'a' takes 104,857,608 bytes or more, a header of at most 67,108,864 has"
    ):
        GGUFSource(path)


def test_the_place_of_the_damage_is_told() -> None:
    assert "(at byte 24: a metadata key has control characters)" in refused(with_pairs(("\n", ONE)))


def test_what_a_layer_count_could_allocate_is_refused() -> None:
    metadata = METADATA | {"general.architecture": Value(STRING, "smollm3"), "llama.block_count": Value(U32, 2**32 - 1)}
    renamed = [(key.replace("llama.", "smollm3."), value) for key, value in metadata.items()]
    with written(joined(header(renamed, TENSORS), DATA)) as path:
        source = GGUFSource(path)
        with pytest.raises(ConversionError, match="block_count is 4294967295, the file has only 5 tensors"):
            source.config()


def test_ids_that_are_none_are_refused() -> None:
    for value, told in ((ints(1), r"got \[1\]"), (Value(5, -1), "got -1"), (Value(BOOL, 1), "got True")):
        metadata = METADATA | {"tokenizer.ggml.eos_token_id": value}
        with written(joined(header(list(metadata.items()), TENSORS), DATA)) as path:
            source = GGUFSource(path)
            with pytest.raises(ConversionError, match=rf"eos_token_id must be a token id, {told}"):
                source.generation_config()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope.freq_base": Value(12, 1e300)}, "rope.freq_base must be a finite number, got 1e[+]300"),
        ({"rope.freq_base": Value(F32, math.nan)}, "rope.freq_base must be a finite number, got nan"),
        ({"rope.freq_base": texts("1")}, r"rope.freq_base must be a number, got \['1'\]"),
        ({"block_count": Value(BOOL, 1)}, "block_count must be a whole number, got True"),
        ({"attention.key_length": Value(STRING, "8")}, "attention.key_length must be a whole number, got '8'"),
        ({"attention.key_length": Value(U64, 2**40)}, "head_dim 1099511627776 needs 549755813888, and at most 32768"),
        ({"rope.scaling.type": texts("yarn")}, r"rope type \['yarn'\] is not supported"),
        ({"some.thing": texts(*"x" * 1000)}, r"some.thing = \['x', 'x', 'x', 'x', 'x', 'x', \.\.\.\] is not known"),
    ],
    ids=str,
)
def test_metadata_of_the_wrong_type_is_named(changes: dict[str, Value], message: str) -> None:
    metadata = METADATA | {f"llama.{key}": value for key, value in changes.items()}
    with written(joined(header(list(metadata.items()), TENSORS), DATA)) as path:
        source = GGUFSource(path)
        with pytest.raises(ConversionError, match=message) as caught:
            source.config()
    assert str(caught.value).startswith("model.gguf: ")


def test_rotary_factors_that_are_no_numbers_are_refused() -> None:
    content = bytearray(joined(valid(), DATA))
    start = len(content) - DATA + 192
    content[start : start + 16] = struct.pack("<4f", 1, 2, math.inf, 4)
    with (
        written(bytes(content)) as path,
        pytest.raises(ConversionError, match=r"rope_freqs.weight.*infinite or no number"),
    ):
        GGUFSource(path).config()


def test_rotary_factors_are_few() -> None:
    metadata = METADATA | {"llama.attention.key_length": Value(U32, 80_000)}
    tensors = (TENSORS[0], Tensor("rope_freqs.weight", (40_000,), 0, 160_000))
    with (
        written(joined(header(list(metadata.items()), tensors), 192 + 160_000)) as path,
        pytest.raises(ConversionError, match="has 40000 factors, head_dim 80000 needs 40000, and at most 32768 are"),
    ):
        GGUFSource(path).config()


# ---- Any bytes


def test_the_file_that_is_damaged_below_is_valid() -> None:
    expected = {"opened", "config", "generation", "tokenizer", "fingerprint", *(tensor.name for tensor in TENSORS)}
    assert exercise(joined(valid(), DATA)) == expected
    assert exercise(joined(header(list((METADATA | SENTENCEPIECE).items()), TENSORS), DATA)) == expected


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 3))
def test_any_bytes(content: bytes, whole_parts: int) -> None:
    exercise(joined(valid()[:whole_parts]) + content)


@settings(max_examples=400, derandomize=True, deadline=None)
@given(st.data())
def test_a_valid_file_with_numbers_replaced_bits_flipped_and_the_end_cut_off(data: st.DataObject) -> None:
    parts = valid()
    places = [i for i, part in enumerate(parts) if isinstance(part, Number)]
    for place in data.draw(st.lists(st.sampled_from(places), max_size=3, unique=True), "numbers"):
        number = parts[place]
        assert isinstance(number, Number)
        value = data.draw(st.sampled_from(EXTREMES) | st.sampled_from([-1, 1]).map(int(number.value).__add__), "value")
        size = struct.calcsize(f"<{number.code}")
        parts[place] = (value % 2 ** (8 * size)).to_bytes(size, "little")
    content = bytearray(joined(parts, DATA))
    for bit in data.draw(st.lists(st.integers(0, 8 * (len(content) - DATA) - 1), max_size=3), "bits"):
        content[bit // 8] ^= 1 << bit % 8
    exercise(bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)), "length")]))


def values(kinds: st.SearchStrategy[int], depth: int = 0) -> st.SearchStrategy[Value]:
    """Values of any type; the ids and sizes among them are as often plausible as not."""

    def of(kind: int) -> st.SearchStrategy[Value]:
        if kind == STRING:
            known = ["llama", "gpt2", "gpt-2", "yarn", "linear", "none", "a", "ab", "a b", "<s>"]
            return st.builds(Value, st.just(kind), st.sampled_from(known) | st.text(max_size=5))
        if kind == ARRAY:
            items = st.sampled_from([*CODES, STRING, *([ARRAY] if depth < 2 else [])])
            lists = items.flatmap(
                lambda item: st.tuples(st.just(item), st.lists(values(st.just(item), depth + 1), max_size=6))
            )
            return lists.map(lambda pair: Value(ARRAY, tuple(pair[1]), pair[0]))
        if CODES[kind] in "fd":
            width = 32 if kind == F32 else 64
            return st.builds(Value, st.just(kind), st.floats(width=width) | st.sampled_from([0.0, 1.0, -1.0]))
        bits = 8 * struct.calcsize(f"<{CODES[kind]}")
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if CODES[kind].islower() else (0, 2**bits - 1)
        low, high = (0, 1) if kind == BOOL else (low, high)
        small = st.integers(max(low, -2), min(high, 8))
        return st.builds(Value, st.just(kind), small | st.integers(low, high))

    return kinds.flatmap(of)


KEYS = [
    *METADATA,
    *("llama.vocab_size", "llama.attention.value_length", "llama.rope.dimension_count", "llama.rope.scaling.type"),
    *("llama.rope.scaling.factor", "llama.rope.scaling.original_context_length", "split.count", "llama.expert_count"),
    *("tokenizer.ggml.scores", "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.unknown_token_id"),
    *("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id", "tokenizer.ggml.padding_token_id"),
]


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    st.dictionaries(st.sampled_from(KEYS), values(st.sampled_from([*CODES, STRING, ARRAY])), min_size=1, max_size=4),
    st.sampled_from(["llama", "qwen3", "qwen3moe", "smollm3"]),
    st.booleans(),
    st.booleans(),
)
def test_metadata_of_any_types(changes: dict[str, Value], family: str, sentencepiece: bool, factors: bool) -> None:
    metadata = METADATA | (SENTENCEPIECE if sentencepiece else {}) | changes
    if "general.architecture" not in changes:
        metadata["general.architecture"] = Value(STRING, family)
    renamed = [(key.replace("llama.", f"{family}."), value) for key, value in metadata.items()]
    exercise(joined(header(renamed, TENSORS if factors else [t for t in TENSORS if "rope" not in t.name]), DATA))


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*.gguf")), ids=lambda path: path.name)
def test_the_corpus_of_the_fuzzer(path: Path) -> None:
    assert {"opened", "config"} <= exercise(path.read_bytes())
