"""Headers as strangers may write them: each wrong one is refused with what was expected, and in bounded memory."""

import itertools
import json
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from jllm_convert.files.regular_file import RegularFile
from jllm_convert.sources.huggingface.safetensors_header import MAX_HEADER, Entry, read_safetensors_header

MIB = 1 << 20


def entry(dtype: Any = "F32", shape: Any = (2,), start: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def opened(folder: Path, header: Any, data: bytes = bytes(8), length: int | None = None) -> RegularFile:
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    path = folder / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return RegularFile.at(path, path.name)


def problems_of(folder: Path, header: Any, data: bytes = bytes(8), length: int | None = None) -> list[str]:
    problems: list[str] = []
    read_safetensors_header(opened(folder, header, data, length), problems)
    return problems


def entries_of(folder: Path, header: Any, data: bytes = bytes(8)) -> list[Entry]:
    problems: list[str] = []
    entries = read_safetensors_header(opened(folder, header, data), problems)
    assert problems == []
    return entries


def test_entries_are_those_of_the_file(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt", 'a "b" \\ \u00e9 }': "{"},
        "late": entry("BF16", [2, 1], 8, 12),
        "first": entry("F32", [2], 0, 8),
        "scalar": entry("U8", [], 12, 13),
        "empty": entry("F32", [0, 7], 8, 8),
    }
    start = 8 + len(json.dumps(header).encode())
    assert entries_of(tmp_path, header, bytes(13)) == [
        Entry("late", "BF16", (2, 1), start + 8, 4),
        Entry("first", "F32", (2,), start, 8),
        Entry("scalar", "U8", (), start + 12, 1),
        Entry("empty", "F32", (0, 7), start + 8, 0),
    ]


@pytest.mark.parametrize("text", ["{}", "{ }", "{}   ", '{"__metadata__":{}}', '{"__metadata__": { } \n\t}'])
def test_a_file_may_hold_no_tensor(tmp_path: Path, text: str) -> None:
    assert entries_of(tmp_path, text, b"") == []


def test_a_header_may_be_padded(tmp_path: Path) -> None:
    assert len(entries_of(tmp_path, json.dumps({"a": entry()}) + " " * 7)) == 1


@pytest.mark.parametrize("name", ["a" * 1000, "\u00e9" * 1000, "", "a b", 'quo"te', "back\\slash", "\U0001f600"])
@pytest.mark.parametrize("escaped", [True, False])
def test_names_that_can_be_printed_are_fine(tmp_path: Path, name: str, escaped: bool) -> None:
    (found,) = entries_of(tmp_path, json.dumps({name: entry()}, ensure_ascii=escaped))
    assert found.name == name


# ---- The header as a whole

VALID = json.dumps({"a": entry()})


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("", "does not start with '{'"),
        (" " + VALID, "does not start with '{'"),
        ("[]", "does not start with '{'"),
        ("\ufeff" + VALID, "does not start with '{'"),
        ("{", "no string at character 1"),
        ("{1: 2}", "no string at character 1"),
        ('{"a"}', "no ':' at character 4"),
        ('{"a": }', "no value of at most 4,096 characters at character 6"),
        (VALID[:-1], "no ',' at character"),
        (VALID[:-1] + ",}", "no string at character"),
        (VALID + "x", "goes on after its end"),
        (VALID + VALID, "goes on after its end"),
        (b'{"\xff": 1}', "can't decode byte 0xff"),
        (VALID.encode("utf-16"), "can't decode byte"),
        ('{"a": 1, "a": 2}', "names 'a' twice"),
        ('{"a": 1, "\\u0061": 2}', "names 'a' twice"),
        ('{"__metadata__": {}, "__metadata__": {}}', "names '__metadata__' twice"),
        ('{"a": {"dtype": "F32", "dtype": "F16"}}', "the name 'dtype' stands twice"),
        ('{"__metadata__": 5}', "no '{' at character"),
        ('{"__metadata__": {"a": 5}}', "no string at character"),
        ('{"__metadata__": {"a": null}}', "no string at character"),
        ('{"__metadata__": {"a": "\\q"}}', "no string at character"),
        ('{"__metadata__": {"a": "b" "c": "d"}}', "no ',' at character"),
        # Deeper than Python's json goes, and as deep as it goes in what is parsed at a time.
        ('{"a": ' + "[" * 2000 + "]" * 2000 + "}", "no value of at most 4,096 characters"),
        ('{"a": ' + '{"":' * 800 + "0" + "}" * 801, "no value of at most 4,096 characters|of dtype, shape"),
        ('{"a": ' + "[" * 700 + "]" * 700 + "}", "of dtype, shape, data_offsets, got [[[...]]]"),
        ('{"a": [' + "0, " * 4000 + "0]}", "no value of at most 4,096 characters"),
        ('{"a": ' + "9" * 4090 + "}", "of dtype, shape, data_offsets, got 9999999"),
        (json.dumps({"a" * 1001: entry()}), "a tensor name of more than 1,000 characters: 'aaaa"),
        (json.dumps({"\u00e9" * 1001: entry()}), "a tensor name of more than 1,000 characters"),
        (json.dumps({"a" * 100_000: entry()}), "a tensor name of more than 1,000 characters"),
        *(
            (json.dumps({f"a{mark}": entry()}), "characters that cannot be printed")
            for mark in "\x00\n\x1b\x7f\u202e\ud800\u2028"
        ),
    ],
)
def test_a_header_that_is_no_header_is_refused(tmp_path: Path, header: Any, message: str) -> None:
    (problem,) = problems_of(tmp_path, header)
    assert problem.startswith("m.safetensors: ")
    assert any(part in problem for part in message.split("|"))
    assert problem.isprintable()
    assert len(problem) < 500


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, MAX_HEADER + 1, len(VALID) + 9])
def test_a_length_that_cannot_be_is_refused(tmp_path: Path, length: int) -> None:
    (problem,) = problems_of(tmp_path, VALID, length=length)
    assert f"its header is said to have {length:,} bytes, at most {len(VALID) + 8:,} are possible" in problem


def test_a_header_of_more_than_16_mib_is_refused_though_the_file_has_it(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, VALID + " " * MAX_HEADER)
    assert "at most 16,777,216 are possible" in problem


# ---- Single tensors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (5, "expected an object of dtype, shape, data_offsets, got 5"),
        ([], "expected an object of dtype, shape, data_offsets, got []"),
        ({}, "got []"),
        ({"dtype": "F32", "shape": [2]}, "got ['dtype', 'shape']"),
        ({**entry(), "layout": "rows"}, "got ['data_offsets', 'dtype', 'layout', 'shape']"),
        (entry(dtype=5), "dtype must be a name such as 'F32', got 5"),
        (entry(dtype=""), "dtype must be a name"),
        (entry(dtype="F32\n"), "dtype must be a name such as 'F32', got 'F32\\n'"),
        (entry(dtype="F" * 100), "dtype must be a name"),
        (entry(shape=2), "shape must be a list of at most 64 whole numbers of at least 0, got 2"),
        (entry(shape={}), "shape must be a list"),
        (entry(shape=[2.0]), "got [2.0]"),
        (entry(shape=["2"]), "got ['2']"),
        (entry(shape=[True, 2]), "got [True, 2]"),
        (entry(shape=[None]), "got [None]"),
        (entry(shape=[-2]), "got [-2]"),
        (entry(shape=[-1, -2]), "got [-1, -2]"),
        (entry(shape=[1] * 65), "shape must be a list of at most 64"),
        (entry(shape=[2**63]), "shape must be a list"),
        (entry(shape=[2**62]), "more elements than any array can have"),
        (entry(shape=[2**32, 2**32, 2]), "more elements than any array can have"),
        (entry(shape=[0, 2**62]), "more elements than any array can have"),
        (entry(start=8, end=0), "data_offsets must be two whole numbers, start and end, got [8, 0]"),
        (entry(start=-8, end=0), "data_offsets must be"),
        (entry(start=0.0, end=8), "data_offsets must be"),
        (entry(start=False, end=8), "data_offsets must be"),
        (entry(end=2**64), "data_offsets must be"),
        ({**entry(), "data_offsets": [8]}, "got [8]"),
        ({**entry(), "data_offsets": [0, 4, 8]}, "got [0, 4, 8]"),
        ({**entry(), "data_offsets": None}, "got None"),
        ({**entry(), "data_offsets": "08"}, "got '08'"),
    ],
    ids=str,
)
def test_a_wrong_entry_is_named_with_what_was_expected(tmp_path: Path, fields: Any, message: str) -> None:
    (problem,) = problems_of(tmp_path, {"good": entry(), "w": fields})
    assert problem.startswith("m.safetensors: tensor 'w': ")
    assert message in problem


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e400", "-0.0"])
def test_numbers_that_are_not_whole_are_refused(tmp_path: Path, constant: str) -> None:
    header = f'{{"w": {{"dtype": "F32", "shape": [{constant}], "data_offsets": [0, 8]}}}}'
    (problem,) = problems_of(tmp_path, header)
    assert "shape must be a list" in problem


def test_all_wrong_entries_are_told(tmp_path: Path) -> None:
    problems = problems_of(tmp_path, {"a": entry(shape=[-1]), "b": entry(), "c": entry(dtype=1)})
    assert [problem.partition(": ")[2][:10] for problem in problems] == ["tensor 'a'", "tensor 'c'"]


# ---- Where the data lie


@pytest.mark.parametrize(
    ("places", "messages"),
    [
        ({"a": (0, 8), "b": (4, 12)}, ["tensor 'b' overlaps tensor 'a'"]),
        ({"a": (0, 8), "b": (0, 8)}, ["tensor 'b' overlaps tensor 'a'", "end at byte"]),
        ({"a": (0, 12), "b": (4, 8)}, ["tensor 'b' overlaps tensor 'a'"]),
        ({"a": (0, 12), "b": (4, 4)}, ["tensor 'b' overlaps tensor 'a'"]),
        ({"b": (8, 12), "a": (0, 4)}, ["tensor 'b' leaves a hole after tensor 'a'"]),
        ({"a": (4, 12)}, ["tensor 'a' leaves a hole after the header"]),
        ({"a": (0, 8)}, ["the data of tensor 'a' end at byte"]),
        ({}, ["the data of the header end at byte"]),
        ({"a": (0, 13)}, ["not a whole safetensors file (the data of tensor 'a' end at byte"]),
        ({"a": (0, 2**62)}, ["not a whole safetensors file (the data of tensor 'a' end at byte"]),
        ({"a": (12, 12), "b": (0, 4)}, ["tensor 'a' leaves a hole after tensor 'b'"]),
    ],
    ids=str,
)
def test_tensors_lie_one_after_another_to_the_end(
    tmp_path: Path, places: dict[str, tuple[int, int]], messages: list[str]
) -> None:
    header = {name: entry("U8", [0], *place) for name, place in places.items()}
    problems = problems_of(tmp_path, header, bytes(12))
    assert len(problems) == len(messages)
    for problem, message in zip(problems, messages, strict=True):
        assert problem.startswith("m.safetensors: ")
        assert message in problem


def test_any_order_of_the_data_is_fine(tmp_path: Path) -> None:
    for order in itertools.permutations([(0, 4), (4, 4), (4, 12), (12, 12)]):
        header = {str(i): entry("U8", [0], *place) for i, place in enumerate(order)}
        assert len(entries_of(tmp_path, header, bytes(12))) == 4


# ---- Memory and time, for the largest header that is read


@pytest.mark.parametrize(
    "text",
    [
        '{"a":' + "[]," * (5 * MIB),
        '{"a":[' + "[]," * (5 * MIB),
        "{" + ",".join(f'"{i}":0' for i in range(400_000)) + "}",
        '{"__metadata__":{"a":"' + "\\n" * (7 * MIB) + '"}}',
        '{"' + "a" * (15 * MIB) + '":0}',
    ],
    ids=["lists", "a list of lists", "not entries", "metadata", "name"],
)
def test_memory_and_time_are_bounded(tmp_path: Path, text: str) -> None:
    file, problems = opened(tmp_path, text, b""), []
    tracemalloc.start()
    started = time.process_time()
    entries = read_safetensors_header(file, problems)
    seconds, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert entries == []
    assert len(problems) <= 101
    assert peak < 64 * MIB  # the bytes and their text; as objects, lists alone would take 400
    assert seconds < 20
