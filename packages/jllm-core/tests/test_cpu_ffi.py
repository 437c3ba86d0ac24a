"""The bridge from kernels to XLA: the key of cached machine code, and the room in a launch."""

import shutil
from pathlib import Path
from typing import Any

import jax
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


# ---- The room in the record of a launch


def write(module: Any, phases: int, values: int) -> None:
    from jllm_core.backends.cpu.threads import Frame, Launch, write_kernel

    def prepare(frame: Frame, launch: Launch) -> None:
        for number in range(values):
            launch.set(str(number), number)

    write_kernel(module, prepare, [lambda code, launch, task: None] * phases)


def test_a_launch_has_room_for_so_many_phases_and_values() -> None:
    from jllm_core.backends.cpu.llvm_builder import Module
    from jllm_core.backends.cpu.threads import MAX_LAUNCH_VALUES, MAX_PHASES

    write(Module(), MAX_PHASES, MAX_LAUNCH_VALUES)
    with pytest.raises(ValueError, match=f"at most {MAX_PHASES} phases, got {MAX_PHASES + 1}"):
        write(Module(), MAX_PHASES + 1, 1)
    with pytest.raises(ValueError, match=f"room for {MAX_LAUNCH_VALUES} values, '{MAX_LAUNCH_VALUES}' is one too many"):
        write(Module(), 1, MAX_LAUNCH_VALUES + 1)


def test_the_fields_of_the_record_do_not_overlap() -> None:
    from jllm_core.backends.cpu import ffi_call_frame, threads

    assert threads.OFFSET_FIRST_TASKS + 8 * (threads.MAX_PHASES + 1) <= threads.OFFSET_SCHEDULE_ARGS
    assert threads.OFFSET_SCHEDULE_ARGS + ffi_call_frame.SCHEDULE_SIZE <= threads.OFFSET_THREADS_ARGS
    assert threads.OFFSET_THREADS_ARGS + ffi_call_frame.THREADS_SIZE <= threads.OFFSET_ERROR_ARGS
    assert threads.OFFSET_ERROR_ARGS + ffi_call_frame.DESTROY_SIZE <= threads.OFFSET_THREAD_COUNT
    assert threads.OFFSET_THREAD_COUNT + 8 <= threads.OFFSET_VALUES


# ---- Releases of JAX


def test_no_kernel_is_given_to_a_jax_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "__version_info__", (0, 9, 2))
    monkeypatch.setattr(jax, "__version__", "0.9.2")
    from jllm_core.backends.cpu.embedding_and_head import Head
    from jllm_core.backends.cpu.few_row_matmul import Kind
    from jllm_core.backends.cpu.kernel_building_blocks import Matrix

    register = ffi._registered.__wrapped__
    monkeypatch.setattr(ffi, "target", None)
    assert ffi._fault.__wrapped__() == "they need jax 0.10 or newer, this is 0.9.2"
    with pytest.raises(RuntimeError, match=r"no CPU kernels: they need jax 0\.10 or newer"):
        register(Head(Matrix("w", Kind("float32")), transposed=True))
