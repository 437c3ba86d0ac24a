"""Embedding and head kernels: rows of the embedding, the final RMSNorm, and the matmul that gives logits."""

from dataclasses import dataclass

from jllm_core.backends.cpu.few_row_matmul import write_transposed_matmul
from jllm_core.backends.cpu.kernel_building_blocks import (
    Gamma,
    Matrix,
    for_each_vector,
    rms_norm,
    store_operand_addresses,
    task_count,
    task_width,
)
from jllm_core.backends.cpu.layer_inputs import Matmuls
from jllm_core.backends.cpu.llvm_builder import F32, Code, Module, Value
from jllm_core.backends.cpu.threads import Frame, Launch, write_kernel
from jllm_core.backends.cpu.vector_ops import LOADS, SIZES


@dataclass(frozen=True)
class Head:
    """Kernel: logits ``[rows, V]`` of ``x [rows, D]``, float32.

    Attributes:
        w: the matrix ``[D, V]``, of any kind.
        transposed: whether it is a tied embedding ``[V, D]``, which has no groups.
    """

    w: Matrix
    transposed: bool

    @property
    def operands(self) -> list[str]:
        """Names of the operands, in order."""
        return ["x", *self.w.operands]

    def write(self, module: Module) -> None:
        """Write the kernel's instructions."""
        matmuls = None if self.transposed else Matmuls(module, self.w)
        transposed_matmul = write_transposed_matmul(module, self.w.kind.name) if self.transposed else None

        def prepare(frame: Frame, launch: Launch) -> None:
            store_operand_addresses(frame, launch, self.operands)
            x, y = frame.argument(0), frame.result(0)
            sizes = {"rows": x.dim(0), "inputs": x.dim(1), "outs": y.dim(1), "y": y.data}
            for name, value in sizes.items():
                launch.set(name, value)
            launch.add_phase(task_count(launch, sizes["outs"]))

        def multiply(code: Code, launch: Launch, task: Value) -> None:
            x, y, inputs, outs = (
                (launch["x"], 4 * launch["inputs"]),
                (launch["y"], 4 * launch["outs"]),
                launch["inputs"],
                launch["outs"],
            )
            if matmuls is not None:
                self.w.multiply(launch, matmuls[self.w], x, y, inputs, outs, task)
                return
            # As Matrix.multiply does it, for a matrix that lies the other way.
            width = task_width(launch, outs)
            first = task * width
            # An output is a row of w here, so a task's part of w is one run of memory.
            w = launch[self.w.name] + first * inputs * SIZES[self.w.kind.name]
            count, y_now = code.minimum(width, outs - first), y[0] + 4 * first
            code.call(transposed_matmul, *x, launch["rows"], w, 0, 0, inputs, inputs, y_now, y[1], count)
            self.w.scale_and_add_bias(launch, (y_now, y[1]), first, count)

        write_kernel(module, prepare, [multiply])


@dataclass(frozen=True)
class Norm:
    """Kernel: RMSNorm of each row of ``x [rows, D]`` with ``gamma [D]``; the result is float32 ``[rows, D]``.

    The attribute ``eps`` is float32.

    Attributes:
        norms: how gamma is stored.
    """

    norms: Gamma

    @property
    def operands(self) -> list[str]:
        """Names of the operands, in order."""
        return ["x", "gamma"]

    def write(self, module: Module) -> None:
        """Write the kernel's instructions."""

        def prepare(frame: Frame, launch: Launch) -> None:
            store_operand_addresses(frame, launch, self.operands)
            launch.set("width", frame.argument(0).dim(1))
            launch.set("y", frame.result(0).data)
            launch.set_float("eps", frame.attribute(0, F32))
            launch.add_phase(frame.argument(0).dim(0))  # a task a row

        def norm(code: Code, launch: Launch, row: Value) -> None:
            offset = 4 * row * launch["width"]
            rms_norm(
                code,
                x=launch["x"] + offset,
                gamma=launch["gamma"],
                width=launch["width"],
                eps=launch.get_float("eps"),
                y=launch["y"] + offset,
                kind=self.norms,
            )

        write_kernel(module, prepare, [norm])


@dataclass(frozen=True)
class Rows:
    """Kernel: rows of a table, ``table[tokens]``, as float32 ``[rows, D]``.

    Operands ``table [V, D]`` and int32 ``tokens [rows]``. An id outside the table is clamped.

    Attributes:
        kind: the type of the table.
    """

    kind: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands, in order."""
        return ["table", "tokens"]

    def write(self, module: Module) -> None:
        """Write the kernel's instructions."""

        def prepare(frame: Frame, launch: Launch) -> None:
            store_operand_addresses(frame, launch, self.operands)
            launch.set("count", frame.argument(0).dim(0))
            launch.set("width", frame.argument(0).dim(1))
            launch.set("y", frame.result(0).data)
            launch.add_phase(frame.argument(1).dim(0))  # a task a token

        def copy_row(code: Code, launch: Launch, row: Value) -> None:
            token = code.load_int32(launch["tokens"] + 4 * row)
            # An id outside the table would read memory that is not its own.
            token = code.minimum(code.maximum(token, 0), launch["count"] - 1)
            source = launch["table"] + token * launch["width"] * SIZES[self.kind]
            target = launch["y"] + 4 * row * launch["width"]

            def copy(index: Value, lanes: int) -> None:
                code.store(target + 4 * index, LOADS[self.kind](code, source + SIZES[self.kind] * index, lanes))

            for_each_vector(code, launch["width"], copy)

        write_kernel(module, prepare, [copy_row])
