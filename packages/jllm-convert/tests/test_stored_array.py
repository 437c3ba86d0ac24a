"""Boxes of arrays that lie in files: the same values as numpy's, in few reads and little memory, or an error."""

import errno
import math
import os
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jllm_convert.errors import ConversionError
from jllm_convert.files import regular_file
from jllm_convert.files.regular_file import RegularFile
from jllm_convert.sources.stored_array import StoredArray
from jllm_core.checkpoint import Box, whole

KIB = 1 << 10
DTYPES: list[Any] = [np.uint8, np.float16, ml_dtypes.bfloat16, np.float32]
Reads = list[tuple[int, int]]


def stored(folder: Path, values: np.ndarray, offset: int = 3) -> StoredArray:
    """The array in a file, with other bytes before and after it."""
    path = folder / "data"
    path.write_bytes(b"\xaa" * offset + values.tobytes() + b"\xbb" * 5)
    return StoredArray("w", RegularFile.at(path, "data"), offset, values.shape, values.dtype)


def numbered(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Every element another, as far as the type goes."""
    return np.arange(math.prod(shape)).astype(dtype).reshape(shape)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Offset and size of each read that is made."""
    made: Reads = []
    original = os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        made.append((offset, sum(len(buffer) for buffer in buffers)))
        return original(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    return made


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=4)))
    box = []
    for size in shape:
        start, stop = sorted((draw(st.integers(0, size)), draw(st.integers(0, size))))
        box.append(slice(start, stop) if draw(st.booleans()) else slice(0, size))
    return shape, tuple(box)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    case=boxes(), dtype=st.sampled_from(DTYPES), call=st.sampled_from([0, 16, 8 << 10]), slab=st.sampled_from([8, 64])
)
def test_every_box_is_numpys(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[tuple[int, ...], Box], dtype: Any, call: int, slab: int
) -> None:
    """With calls that cost little or much, and slabs that hold few rows, so that every way of reading is taken."""
    shape, box = case
    values = numbered(shape, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jllm_convert.sources.stored_array._CALL_COST_BYTES", call)
        patch.setattr("jllm_convert.sources.stored_array._MAX_SLAB_BYTES", slab)
        part = stored(tmp_path_factory.getbasetemp(), values).read(box)
    assert part.dtype == dtype
    assert part.flags.c_contiguous
    assert part.flags.writeable
    np.testing.assert_array_equal(part, values[box])


@pytest.mark.parametrize(
    ("shape", "box", "expected"),
    [
        ((), (), [(3, 4)]),
        ((64, 32, 8), whole((64, 32, 8)), [(3, 64 * 1024)]),
        ((64, 32, 8), (slice(2, 10), slice(0, 32), slice(0, 8)), [(3 + 2 * 1024, 8 * 1024)]),
        # Pieces of 8 KiB, 32 KiB apart: one read each.
        ((3, 8192), (slice(0, 3), slice(2048, 4096)), [(3 + 32768 * i + 8192, 8192) for i in range(3)]),
        # Pieces of 4 bytes in rows of 256: all rows in reads of 1 MiB, and the rest.
        (
            (10_000, 64),
            (slice(8, 10_000), slice(1, 2)),
            [(2051, 2**20), (2051 + 2**20, 2**20), (2051 + 2**21, 9992 * 256 - 2**21)],
        ),
        # Pieces of 4 bytes in rows of 2 MiB: one read each.
        ((2, 2**19), (slice(0, 2), slice(5, 6)), [(3 + 20, 4), (3 + 2**21 + 20, 4)]),
        # One row's piece, though it is small.
        ((100, 64), (slice(7, 8), slice(3, 5)), None),
    ],
    ids=str,
)
def test_how_much_is_read(
    tmp_path: Path, reads: Reads, shape: tuple[int, ...], box: Box, expected: list[tuple[int, int]] | None
) -> None:
    values = numbered(shape)
    np.testing.assert_array_equal(stored(tmp_path, values).read(box), values[box])
    if expected is None:
        assert len(reads) == 1
        assert reads[0][1] <= 256
    else:
        assert reads == expected


def test_an_empty_box_reads_nothing(tmp_path: Path, reads: Reads) -> None:
    assert stored(tmp_path, numbered((4, 5))).read((slice(2, 2), slice(0, 5))).shape == (0, 5)
    assert reads == []


def test_a_column_takes_no_more_memory_than_itself_and_a_slab(tmp_path: Path) -> None:
    array = stored(tmp_path, np.zeros((8192, 512), np.float32))
    tracemalloc.start()
    array.read((slice(0, 8192), slice(0, 1)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1024 * KIB + 8192 * 4 + 64 * KIB  # of 16 MiB


def test_large_reads_are_split(tmp_path: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call reads 2 GiB at most; here the most is 10 bytes."""
    monkeypatch.setattr(regular_file, "_MAX_AT_ONCE", 10)
    values = numbered((3, 2))
    np.testing.assert_array_equal(stored(tmp_path, values).read(whole((3, 2))), values)
    assert reads == [(3, 10), (13, 10), (23, 4)]


def test_a_call_that_reads_less_than_asked_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: original(fd, [buffers[0][:5]], offset))
    values = numbered((3, 2))
    np.testing.assert_array_equal(stored(tmp_path, values).read(whole((3, 2))), values)


@pytest.mark.parametrize(
    "box",
    [(), (slice(0, 4),), (slice(0, 5), slice(0, 5)), (slice(-1, 4), slice(0, 5)), (slice(3, 2), slice(0, 5))],
    ids=str,
)
def test_a_box_of_another_array_is_refused(tmp_path: Path, box: Box) -> None:
    with pytest.raises(ValueError, match="is not a box of tensor 'w', whose shape is"):
        stored(tmp_path, numbered((4, 5))).read(box)


def test_threads_may_read_at_once(tmp_path: Path) -> None:
    values = numbered((256, 64))
    array = stored(tmp_path, values)
    wrong: list[int] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(50):
            (a, b), (c, d) = (sorted(random.integers(0, size + 1, 2).tolist()) for size in values.shape)
            box = (slice(a, b), slice(c, d))
            if not np.array_equal(array.read(box), values[box]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    array = stored(tmp_path, numbered((4, 5)))
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    for _ in range(5):
        array.read(whole((4, 5)))
    os.truncate(tmp_path / "data", 1)
    with pytest.raises(ConversionError):
        array.read(whole((4, 5)))
    again = os.open(os.devnull, os.O_RDONLY)
    os.close(again)
    assert again == lowest


# ---- Files that do not stay what they were


def message_of(array: StoredArray) -> str:
    with pytest.raises(ConversionError) as caught:
        array.read(whole(array.shape))
    (problem,) = caught.value.problems
    assert problem.startswith("data: tensor 'w' cannot be read (")
    return problem


def test_a_disk_fault_is_told_with_file_and_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = stored(tmp_path, numbered((4, 5)))

    def preadv(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", preadv)
    assert "Input/output error" in message_of(array)


def test_a_file_that_is_gone_is_told(tmp_path: Path) -> None:
    array = stored(tmp_path, numbered((4, 5)))
    (tmp_path / "data").unlink()
    assert "No such file" in message_of(array)


def test_a_file_that_was_cut_before_it_is_read_is_told(tmp_path: Path) -> None:
    array = stored(tmp_path, numbered((4, 5)))
    os.truncate(tmp_path / "data", 20)
    assert "it had 88 bytes and has 20" in message_of(array)


def test_a_file_that_is_cut_while_it_is_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = stored(tmp_path, numbered((4, 5)))
    original = os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        os.truncate(tmp_path / "data", 20)
        return original(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    assert "cut short while it was read: it ends at byte 20, 63 bytes too early" in message_of(array)


def test_a_file_that_was_replaced_is_told(tmp_path: Path) -> None:
    array = stored(tmp_path, numbered((4, 5)))
    status = (tmp_path / "data").stat()
    stored(tmp_path, numbered((4, 5)) + 1)
    os.utime(tmp_path / "data", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert "was changed while it was in use" in message_of(array)


def test_a_pipe_in_the_file_s_place_does_not_hang(tmp_path: Path) -> None:
    array = stored(tmp_path, numbered((4, 5)))
    (tmp_path / "data").unlink()
    os.mkfifo(tmp_path / "data")
    assert "a pipe, not a regular file" in message_of(array)


def test_a_link_in_the_file_s_place_is_not_followed(tmp_path: Path) -> None:
    array = stored(tmp_path, numbered((4, 5)))
    (tmp_path / "data").rename(tmp_path / "other")
    (tmp_path / "data").symlink_to("other")
    message_of(array)
