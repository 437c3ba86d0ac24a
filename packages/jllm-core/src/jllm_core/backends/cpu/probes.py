"""Probes of the processor: kernels that only read, or only multiply, to measure how fast it can.

They use the loads, the products and the threads that the other kernels use, and do nothing else. So what they reach is
a limit of the machine for those, and not of any way to write a matrix multiplication.
"""

import os
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from llvmlite import ir

from jllm_core.backends.cpu import ffi
from jllm_core.backends.cpu.llvm_builder import F32, I32, LANES, Code, Module, Value, Variable, has_avx512, vector
from jllm_core.backends.cpu.threads import Frame, Launch, write_kernel
from jllm_core.backends.cpu.vector_ops import fma, splat

CHUNK_BYTES = 256 << 10
"""Bytes that are one task of reading."""
VECTOR_BYTES = 4 * LANES
TASKS_PER_CORE = 4
"""Of multiplying: several, so that no thread waits long for the last one."""
UNROLL = 8
"""Vectors that are loaded before the loop goes on."""
FMAS = 96
"""Multiply-adds of vectors in a round of multiplying: a multiple of the sums that are kept in registers."""
FLOPS = 2 * LANES * FMAS
"""Of a round of multiplying, a multiply-add counted as two."""


def read(array: Float[Array, "*shape"], passes: int, streams: int) -> tuple[Int[Array, "chunks L"], int]:
    """Read an array again and again, and compute next to nothing.

    Args:
        array: of whole MiB.
        passes: times that all of it is read.
        streams: places that a thread reads at by turns: 1, 2, 4 or 8.

    Returns:
        An array to wait for, and the bytes that are read.
    """
    sums = jax.ShapeDtypeStruct((array.nbytes // CHUNK_BYTES, LANES), jnp.int32)
    (done,) = ffi.call(Read(streams), {"array": array}, [sums], passes=np.int64(passes))
    return done, passes * CHUNK_BYTES * len(done)


def multiply(rounds: int) -> tuple[Float[Array, "tasks L"], int]:
    """Multiply and add in registers, as often as ``rounds`` says in each of a few tasks for each core.

    Returns:
        An array to wait for, and the FLOPs.
    """
    tasks = TASKS_PER_CORE * (os.cpu_count() or 1)
    return ffi.call(Multiply(), {}, [(tasks, LANES)], rounds=np.int64(rounds))[0], rounds * tasks * FLOPS


@dataclass(frozen=True)
class Read:
    """Kernel: read ``array``, a whole number of chunks, as often as the attribute ``passes`` (int64) says.

    The result, int32 ``[chunks, LANES]``, is a sum of the bits: it is there so that the loads are not left out.

    Attributes:
        streams: places that a task reads at by turns.
    """

    streams: int

    @property
    def operands(self) -> list[str]:
        """Names of the operands, in order."""
        return ["array"]

    def write(self, module: Module) -> None:
        """Write the kernel's instructions."""

        def prepare(frame: Frame, launch: Launch) -> None:
            sums = frame.result(0)
            launch.set("array", frame.argument(0).data)
            launch.set("sums", sums.data)
            launch.set("chunks", sums.dim(0))
            launch.add_phase(sums.dim(0) * frame.attribute(0))

        def read_chunk(code: Code, launch: Launch, task: Value) -> None:
            chunk = task % launch["chunks"]
            address, kind = launch["array"] + chunk * CHUNK_BYTES, vector(I32)
            start = Value(code.builder, ir.Constant(kind, [0] * LANES))
            sums = [Variable(code, start) for _ in range(UNROLL)]
            stream = CHUNK_BYTES // self.streams
            with code.loop(0, stream, UNROLL // self.streams * VECTOR_BYTES) as offset:
                for n, sum_ in enumerate(sums):
                    place = n % self.streams * stream + n // self.streams * VECTOR_BYTES
                    sum_.value += code.load(address + offset + place, kind)
            for sum_ in sums[1:]:
                sums[0].value += sum_.value
            code.store(launch["sums"] + chunk * VECTOR_BYTES, sums[0].value)

        write_kernel(module, prepare, [read_chunk])


@dataclass(frozen=True)
class Multiply:
    """Kernel: multiply and add vectors in registers, ``FMAS`` in each of the rounds that the attribute ``rounds`` says.

    The result, float32 ``[tasks, LANES]``, says how many tasks there are.
    """

    @property
    def operands(self) -> list[str]:
        """None."""
        return []

    def write(self, module: Module) -> None:
        """Write the kernel's instructions."""
        # Enough sums that no multiply-add waits for the one before, and few enough that all stay in registers.
        count = 12 if has_avx512() else 6

        def prepare(frame: Frame, launch: Launch) -> None:
            result = frame.result(0)
            launch.set("y", result.data)
            launch.set("rounds", frame.attribute(0))
            launch.add_phase(result.dim(0))

        def multiply(code: Code, launch: Launch, task: Value) -> None:
            # Factors that the compiler does not know: 1 and 1/2, so that no sum becomes infinite.
            number = Value(code.builder, code.builder.sitofp((task + 1).ir, F32))
            one, half = splat(code, number / number), splat(code, number / (number + number))
            # They begin at different numbers, or the compiler would find that one will do for all.
            sums = [Variable(code, one * float(n)) for n in range(count)]
            with code.loop(0, launch["rounds"]):
                for _ in range(FMAS // count):
                    for sum_ in sums:
                        sum_.value = fma(code, one, half, sum_.value)
            for sum_ in sums[1:]:
                sums[0].value += sum_.value
            code.store(launch["y"] + task * VECTOR_BYTES, sums[0].value)

        write_kernel(module, prepare, [multiply])
