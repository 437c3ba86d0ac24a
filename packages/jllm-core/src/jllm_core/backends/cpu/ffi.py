"""From a kernel to a function that XLA calls: compiled once a machine, loaded once a process, registered by name.

XLA's foreign function interface calls the C function behind a PyCapsule, with a call frame (cpu_frame.py) that holds
the addresses of the buffers. ``jax.ffi.ffi_call`` puts that call into a compiled program like any other operation.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax

PACKAGE = "llvmlite"
SWITCH = "JLLM_KERNELS"
"""The environment variable that turns the kernels off, when it is ``xla``. It is read where a program is traced."""


@runtime_checkable
class Kernel(Protocol):
    """A frozen dataclass of cpu_kernels.py: what it says of itself names it."""

    def __hash__(self) -> int: ...

    @property
    def operands(self) -> list[str]:
        """Names of what it takes, in order."""
        ...

    def write(self, module: Any) -> None:
        """Write its instructions."""
        ...


def available() -> bool:
    """Whether kernels can be compiled and XLA takes them. Where they should and do not, one warning says why."""
    return os.environ.get(SWITCH) != "xla" and _works()


@functools.cache
def _works() -> bool:
    try:
        import llvmlite  # noqa: F401
        import platformdirs  # noqa: F401
    except ImportError:
        return False  # the extra is not installed
    from jllm_core.backends.cpu.embedding_and_head import Head
    from jllm_core.backends.cpu.few_row_matmul import Kind
    from jllm_core.backends.cpu.kernel_parts import Matrix

    try:
        target(Head(Matrix("w", Kind("float32")), transposed=True))
    except Exception as error:  # whatever it is, XLA's own operations give the same results
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        warnings.warn(f"the CPU kernels do not run here, XLA computes in their place: {reason}", stacklevel=2)
        return False
    return True


def call(
    kernel: Kernel,
    operands: dict[str, Any],
    results: Sequence[tuple[int, ...] | jax.Array | jax.ShapeDtypeStruct],
    aliases: dict[int, int] | None = None,
    **attributes: Any,
) -> list[jax.Array]:
    """Run a kernel inside a program.

    Args:
        kernel: which.
        operands: arrays by the names that it gives them.
        results: the shape of each result, which is float32 then, or an array like it.
        aliases: which operand (by its place) becomes which result, changed in place.
        attributes: numbers (numpy's, of a definite type) that it reads, in the order of their names.
    """
    made = [
        jax.ShapeDtypeStruct(like, jax.numpy.float32)
        if isinstance(like, tuple)
        else jax.ShapeDtypeStruct(like.shape, like.dtype)
        for like in results
    ]
    run = jax.ffi.ffi_call(target(kernel), made, input_output_aliases=aliases)
    return list(run(*(operands[name] for name in kernel.operands), **attributes))


@functools.cache
def target(kernel: Kernel) -> str:
    """The name under which XLA knows a kernel."""
    name = f"jllm_{type(kernel).__name__.lower()}_{hashlib.sha256(repr(kernel).encode()).hexdigest()[:16]}"
    address = _load(_object_code(kernel))
    # Before there is a CPU backend, registering would only be noted down, and a refusal break the backend's start.
    jax.local_devices(backend="cpu")
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(ctypes.c_void_p(address)), platform="cpu")
    return name


def _load(code: bytes) -> int:
    """The address of the function in object code, which stays in memory as long as the process."""
    from llvmlite import binding

    from jllm_core.backends.cpu.threads import SYMBOL

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine()
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    address: int = engine.get_function_address(SYMBOL)
    engine.detach()  # freed with the process: XLA may call it to the end
    return address


def _object_code(kernel: Kernel) -> bytes:
    """A kernel's machine code, from the cache folder where it has been compiled before."""
    file = cache_folder() / f"{_fingerprint(repr(kernel))}.o"
    try:
        digest, code = file.read_bytes()[:32], file.read_bytes()[32:]
        if hashlib.sha256(code).digest() == digest:
            return code
    except OSError:
        pass  # not there yet, or not to be read
    from jllm_core.backends.cpu.llvm_builder import Module

    module = Module()
    kernel.write(module)
    code = module.object_code()
    _keep(file, hashlib.sha256(code).digest() + code)
    return code


def _keep(file: Path, content: bytes) -> None:
    """Write a file whole or not at all, beside others that write it too; where none can be written, none is."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        os.replace(temporary, file)
    except OSError:
        return


def cache_folder() -> Path:
    """Where machine code is kept: in ``JLLM_CACHE``, or the user's cache folder of the platform."""
    import platformdirs

    return Path(os.environ.get("JLLM_CACHE") or platformdirs.user_cache_dir("jllm", appauthor=False)) / "kernels"


def _fingerprint(kernel: str) -> str:
    """Of all that the machine code depends on: what it is written from and by, and the machine."""
    from llvmlite import binding

    digest = hashlib.sha256(kernel.encode())
    # Every module of this folder: which of them a kernel is written with is not recorded anywhere.
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    machine = (binding.get_default_triple(), binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten())
    digest.update(repr((importlib.metadata.version(PACKAGE), *machine)).encode())
    return digest.hexdigest()[:32]
