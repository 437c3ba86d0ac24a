"""Files written by direct I/O, and where that cannot be done."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from jllm_core.checkpoint.direct_io import WriteBuffer

DIRECT = getattr(os, "O_DIRECT", 0)
SIZES = [0, 1, 4096, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (3 << 20) + 4]


def filled(nbytes: int, seed: int = 0) -> WriteBuffer:
    buffer = WriteBuffer(nbytes)
    buffer.content[:] = np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)
    return buffer


@pytest.mark.parametrize("nbytes", SIZES)
def test_a_file_holds_the_content_and_no_more(nbytes: int, tmp_path: Path) -> None:
    buffer = filled(nbytes)
    buffer.write(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == buffer.content.tobytes()


def test_a_longer_file_is_replaced_and_a_buffer_used_again(tmp_path: Path) -> None:
    filled(5 << 20).write(tmp_path / "a")
    buffer = filled(2 << 20, seed=1)
    for path in (tmp_path / "a", tmp_path / "b"):
        buffer.content[0] ^= 1
        buffer.write(path)
        assert path.read_bytes() == buffer.content.tobytes()


@pytest.mark.parametrize("refused", ["open", "pwrite"])
def test_a_file_system_that_writes_nothing_directly_gets_usual_writes(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open, real_pwrite, direct = os.open, os.pwrite, set()

    def open_(path: Path, flags: int, mode: int = 0o777) -> int:
        if DIRECT and flags & DIRECT:
            if refused == "open":
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            descriptor = real_open(path, flags & ~DIRECT, mode)
            direct.add(descriptor)
            return descriptor
        return real_open(path, flags, mode)

    def pwrite(descriptor: int, view: memoryview, offset: int) -> int:
        if descriptor in direct:
            direct.remove(descriptor)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_pwrite(descriptor, view, offset)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "pwrite", pwrite)
    buffer = filled(2 << 20)
    buffer.write(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == buffer.content.tobytes()
    assert not direct


@pytest.mark.parametrize("call", ["open", "pwrite"])
def test_a_full_disk_is_an_error(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        filled(2 << 20).write(tmp_path / "a")
