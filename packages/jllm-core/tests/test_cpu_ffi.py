"""The cache of machine code: what its key is made of."""

import shutil
from pathlib import Path

import pytest
from jllm_core.backends.cpu import ffi

pytest.importorskip("llvmlite")

SOURCES = sorted(path.name for path in Path(ffi.__file__).parent.glob("*.py"))


def test_the_kernel_is_in_the_key() -> None:
    assert ffi._fingerprint("Norm('float32')") == ffi._fingerprint("Norm('float32')")
    assert ffi._fingerprint("Norm('float32')") != ffi._fingerprint("Norm('bfloat16')")


@pytest.mark.parametrize("changed", SOURCES)
def test_every_source_of_the_kernels_is_in_the_key(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = ffi._fingerprint("kernel")
    folder = tmp_path / "cpu"
    shutil.copytree(Path(ffi.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(ffi, "__file__", str(folder / "ffi.py"))
    assert ffi._fingerprint("kernel") == before
    (folder / changed).write_bytes((folder / changed).read_bytes() + b"#")
    assert ffi._fingerprint("kernel") != before
