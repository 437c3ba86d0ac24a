"""JAX FFI targets: CPU kernels compiled once a machine, loaded once a process, registered with XLA by name.

XLA's foreign function interface calls the C function behind a PyCapsule with a call frame (``ffi_call_frame``), which
holds the addresses of the buffers. ``jax.ffi.ffi_call`` puts such a call into a compiled program like any other
operation.

Object code is cached on disk. Its key is made of all that it depends on: the kernel (the dataclass's ``repr``, fields
included), the sources of this folder, llvmlite's version, and the processor.
"""

import ctypes
import functools
import hashlib
import importlib
import importlib.metadata
import logging
import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax

logger = logging.getLogger(__name__)

_registering = threading.RLock()

LLVM_PACKAGE = "llvmlite"

MIN_JAX = (0, 10)
"""Oldest release of JAX whose interface is the one of ``ffi_call_frame``."""

SWITCH = "JLLM_KERNELS"
"""Environment variable that turns the kernels off when it is ``xla``. It is read when a backend is chosen."""


@runtime_checkable
class Kernel(Protocol):
    """A kernel: a frozen dataclass whose fields decide its instructions, and so its name."""

    def __hash__(self) -> int: ...

    @property
    def operands(self) -> list[str]:
        """Names of the operands, in order."""
        ...

    def write(self, module: Any) -> None:
        """Write the kernel's instructions into an ``llvm_builder.Module``."""
        ...


def available() -> bool:
    """Whether kernels are wanted, can be compiled and are accepted by XLA."""
    return obstacle() is None


def obstacle() -> str | None:
    """Why no kernels run, in a few words: they are not wanted, cannot be compiled, or XLA refuses them. None: they run.

    What the user did not ask for is logged too, once a process.
    """
    if os.environ.get(SWITCH) == "xla":
        return f"{SWITCH}=xla"
    return _fault()


@functools.cache
def _fault() -> str | None:
    reason = _old_jax() or _missing_package() or _failure_of_a_kernel()
    if reason is not None:
        logger.warning("The CPU kernels do not run here, XLA computes in their place: %s", reason)
    return reason


def _old_jax() -> str | None:
    # Older ones have a shorter record for what a kernel says of itself, and would be written past its end.
    if jax.__version_info__ < MIN_JAX:
        return f"they need jax {'.'.join(map(str, MIN_JAX))} or newer, this is {jax.__version__}"
    return None


def _missing_package() -> str | None:
    # The module of llvmlite that loads LLVM: a build for another system is found out here.
    for package, module in ((LLVM_PACKAGE, f"{LLVM_PACKAGE}.binding"), ("platformdirs", "platformdirs")):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError:
            return f"{package} is not installed (pip install {package})"
        except Exception as error:  # a broken library raises whatever it likes
            return f"{package} cannot be imported: {_first_line(error)}"
    return None


def _failure_of_a_kernel() -> str | None:
    from jllm_core.backends.cpu.embedding_and_head import Head
    from jllm_core.backends.cpu.few_row_matmul import Kind
    from jllm_core.backends.cpu.kernel_building_blocks import Matrix

    try:
        target(Head(Matrix("w", Kind("float32")), transposed=True))
    except Exception as error:  # whatever it is, XLA's own operations give the same results
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def call(
    kernel: Kernel,
    operands: dict[str, Any],
    results: Sequence[tuple[int, ...] | jax.Array | jax.ShapeDtypeStruct],
    aliases: dict[int, int] | None = None,
    **attributes: Any,
) -> list[jax.Array]:
    """Call a kernel inside a program.

    Args:
        kernel: the kernel.
        operands: arrays by the kernel's names for them; others may be among them.
        results: for each result its shape, if it is float32, or an array of its shape and type.
        aliases: ``{operand: result}`` by their places, for operands that are changed in place.
        attributes: numpy scalars of the types that the kernel reads.
    """
    made = [
        jax.ShapeDtypeStruct(like, jax.numpy.float32)
        if isinstance(like, tuple)
        else jax.ShapeDtypeStruct(like.shape, like.dtype)
        for like in results
    ]
    run = jax.ffi.ffi_call(target(kernel), made, input_output_aliases=aliases)
    return list(run(*(operands[name] for name in kernel.operands), **attributes))


def target(kernel: Kernel) -> str:
    """Compile, load and register a kernel, once a process; its name in XLA.

    Raises:
        RuntimeError: XLA is too old, which would crash the process.
    """
    # Programs are traced in several threads, and XLA refuses a name that it has already.
    with _registering:
        return _registered(kernel)


@functools.cache
def _registered(kernel: Kernel) -> str:
    if reason := _old_jax():
        raise RuntimeError(f"no CPU kernels: {reason}")
    name = f"jllm_{type(kernel).__name__.lower()}_{hashlib.sha256(repr(kernel).encode()).hexdigest()[:16]}"
    address = _load(_object_code(kernel))
    # Without a CPU backend yet, JAX would put the registration off, and a refusal of XLA's would break its start.
    jax.local_devices(backend="cpu")
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(ctypes.c_void_p(address)), platform="cpu")
    return name


def _load(code: bytes) -> int:
    """Load object code; the address of its function, which stays loaded as long as the process lives."""
    from llvmlite import binding

    from jllm_core.backends.cpu.threads import C_FUNCTIONS, SYMBOL

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine()
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
    # LLVM ends the process where it does not find one of them.
    if missing := [name for name in C_FUNCTIONS if binding.address_of_symbol(name) is None]:
        raise OSError(f"this system does not offer {', '.join(missing)} to compiled code")
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    address: int = engine.get_function_address(SYMBOL)
    engine.detach()  # freed with the process: XLA may call it to the end
    return address


def _object_code(kernel: Kernel) -> bytes:
    """A kernel's object code, from the cache folder if it has been compiled before."""
    file = cache_folder() / f"{_fingerprint(repr(kernel))}.o"
    try:
        digest, code = file.read_bytes()[:32], file.read_bytes()[32:]
        # A damaged file would crash the process, so it is compiled again instead.
        if hashlib.sha256(code).digest() == digest:
            return code
    except OSError:
        pass  # not there yet, or not to be read
    from jllm_core.backends.cpu.llvm_builder import Module

    module = Module()
    kernel.write(module)
    code = module.object_code()
    _write_atomically(file, hashlib.sha256(code).digest() + code)
    return code


def _write_atomically(file: Path, content: bytes) -> None:
    """Write a file whole or not at all, even beside other processes; do nothing where it cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        os.replace(temporary, file)
    except OSError:
        return


def cache_folder() -> Path:
    """The folder of cached object code: ``kernels`` in ``JLLM_CACHE``, or in the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("JLLM_CACHE") or platformdirs.user_cache_dir("jllm", appauthor=False)) / "kernels"


def _fingerprint(kernel: str) -> str:
    """The key of a kernel's object code: a hash of all that the code depends on."""
    from llvmlite import binding

    digest = hashlib.sha256(kernel.encode())
    # Every module of this folder: which of them a kernel is written with is not recorded anywhere.
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    machine = (binding.get_default_triple(), binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten())
    digest.update(repr((importlib.metadata.version(LLVM_PACKAGE), *machine)).encode())
    return digest.hexdigest()[:32]
