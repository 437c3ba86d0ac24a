"""Inputs of a layer's mixer: RMSNorm of the rows and their projections, as phases of kernels; those of attention.

``Project`` is a kernel of prompts, and what ``layer_kernels.Step`` begins with. A delta net has other projections of
the same norm.
"""

from dataclasses import dataclass
from typing import Any

from jllm_core.backends.cpu.kernel_building_blocks import (
    Gamma,
    Matrix,
    for_each_vector,
    rms_norm,
    rotate_head,
    store_operand_addresses,
    store_result_addresses,
    task_count,
)
from jllm_core.backends.cpu.llvm_builder import F32, Code, Module, Value
from jllm_core.backends.cpu.many_row_matmul import write_matmul
from jllm_core.backends.cpu.threads import Buffer, Frame, Launch, WriteTask, write_kernel
from jllm_core.backends.cpu.vector_ops import load, sigmoid


class Matmuls:
    """The matmul functions of a module, one for each kind of matrix in it; look one up by its matrix."""

    def __init__(self, module: Module, *matrices: Matrix) -> None:
        # From a dict, not a set: its order is fixed, and so the same kernel is always written the same.
        self._written = {kind: write_matmul(module, kind) for kind in {matrix.kind: None for matrix in matrices}}

    def __getitem__(self, matrix: Matrix) -> Any:
        return self._written[matrix.kind]


@dataclass(frozen=True)
class Projections:
    """RMSNorm of ``x [rows, D]`` with ``pre_gamma [D]`` to ``normed``, and its products with some matrices.

    Attributes:
        outputs: the matrices, each with the names of its width and of its result ``[rows, width]``.
        norms: how gamma is stored.
    """

    outputs: tuple[tuple[Matrix, str, str], ...]
    norms: Gamma

    def add_phases(self, launch: Launch) -> None:
        """Add the phases of ``phases``."""
        launch.add_phase(launch["rows"])
        # One phase for all of them: with a barrier between them, small ones would be too few tasks for many threads.
        end = launch["rows"] * 0
        for matrix, width, _ in self.outputs:
            end = end + task_count(launch, launch[width])
            launch.set(f"{matrix.name}_end", end)
        launch.add_phase(end)

    def phases(self, module: Module) -> list[WriteTask]:
        """The norm, a task a row; and the products, whose tasks are numbered one after another."""
        matmuls = Matmuls(module, *(matrix for matrix, _, _ in self.outputs))

        def norm(code: Code, launch: Launch, row: Value) -> None:
            offset = 4 * row * launch["width"]
            rms_norm(
                code,
                x=launch["x"] + offset,
                gamma=launch["pre_gamma"],
                width=launch["width"],
                eps=launch.get_float("eps"),
                y=launch["normed"] + offset,
                kind=self.norms,
            )

        def project(code: Code, launch: Launch, task: Value) -> None:
            first = Value(code.builder, task.type(0))
            for matrix, width, result in self.outputs:
                end = launch[f"{matrix.name}_end"]
                with code.if_then((task >= first) & (task < end)):
                    matrix.multiply(
                        launch,
                        matmuls[matrix],
                        x=(launch["normed"], 4 * launch["width"]),
                        y=(launch[result], 4 * launch[width]),
                        inputs=launch["width"],
                        outs=launch[width],
                        task=task - first,
                    )
                first = end

        return [norm, project]


@dataclass(frozen=True)
class Project:
    """Kernel: RMSNorm, the projections to q, k and v with their biases, RMSNorm of heads, and rotation.

    Operands as named, with ``x [rows, D]``, ``pre_gamma [D]``, ``cos`` and ``sin [rows, F]``. Results
    ``q_heads [rows, N, H]``, ``k_heads`` and ``v_heads [rows, K, H]``, with a gate ``gate_heads [rows, N, H]``, its
    sigmoid, and the workspace ``normed [rows, D]``. The attribute ``eps`` is float32.

    Attributes:
        projections: the matrices of q, k and v, and of the gate of the output where there is one.
        head_norms: whether each head of q and k is normalised, with ``q_gamma`` and ``k_gamma [H]``.
        rotates: whether heads of q and k are rotated, in their first 2 F features.
        norms: how every gamma is stored.
    """

    projections: tuple[Matrix, ...]
    head_norms: bool
    rotates: bool
    norms: Gamma

    @property
    def gated(self) -> bool:
        """Whether the output has a gate."""
        return len(self.projections) == 4

    @property
    def results(self) -> list[str]:
        """Names of the results, in order."""
        return ["q_heads", "k_heads", "v_heads", *(["gate_heads"] if self.gated else []), "normed"]

    @property
    def operands(self) -> list[str]:
        """Names of the operands, in order."""
        norms = ["q_gamma", "k_gamma"] if self.head_norms else []
        angles = ["cos", "sin"] if self.rotates else []
        return ["x", "pre_gamma", *(name for matrix in self.projections for name in matrix.operands), *norms, *angles]

    def write(self, module: Module) -> None:
        """Write the kernel's instructions."""

        def prepare(frame: Frame, launch: Launch) -> None:
            store_operand_addresses(frame, launch, self.operands)
            store_result_addresses(frame, launch, self.results)
            angles = frame.argument(len(self.operands) - 1) if self.rotates else None
            store_layer_sizes(launch, frame.argument(0), frame.result(0), frame.result(1), angles)
            launch.set_float("eps", frame.attribute(0, F32))
            self.add_phases(launch)
            if self.head_norms or self.rotates or self.gated:
                launch.add_phase(launch["rows"])

        write_kernel(module, prepare, [*self.phases(module), self.finish_heads])

    def add_phases(self, launch: Launch) -> None:
        """Add the phases of ``phases``. A phase for ``finish_heads`` is the caller's to add."""
        self._inputs.add_phases(launch)

    def phases(self, module: Module) -> list[WriteTask]:
        """The norm, and the projections."""
        return self._inputs.phases(module)

    @property
    def _inputs(self) -> Projections:
        widths = ("q_width", "k_width", "k_width", "q_width")[: len(self.projections)]
        return Projections(tuple(zip(self.projections, widths, self.results[:-1], strict=True)), self.norms)

    def finish_heads(self, code: Code, launch: Launch, row: Value) -> None:
        """Write the norm and the rotation of a row's heads of q and k, and the sigmoid of its gates."""
        head = launch["head"]
        # v is neither normalised nor rotated.
        for heads, count, gamma in (("q_heads", "heads", "q_gamma"), ("k_heads", "kv_heads", "k_gamma")):
            with code.loop(0, launch[count]) as number:
                x = launch[heads] + 4 * (row * launch[count] + number) * head
                if self.head_norms:
                    rms_norm(
                        code,
                        x=x,
                        gamma=launch[gamma],
                        width=head,
                        eps=launch.get_float("eps"),
                        y=x,
                        kind=self.norms,
                    )
                if self.rotates:
                    half = launch["half"]
                    angles = 4 * row * half
                    rotate_head(code, x, cos=launch["cos"] + angles, sin=launch["sin"] + angles, half=half)
        if not self.gated:
            return
        gates = launch["gate_heads"] + 4 * row * launch["q_width"]

        def open_gates(index: Value, lanes: int) -> None:
            code.store(gates + 4 * index, sigmoid(code, load(code, gates + 4 * index, lanes)))

        for_each_vector(code, launch["q_width"], open_gates)


def store_layer_sizes(launch: Launch, x: Buffer, q: Buffer, k: Buffer, angles: Buffer | None) -> None:
    """Store the sizes of ``x [rows, D]``, ``q [rows, N, H]``, ``k [rows, K, H]`` and ``angles [rows, F]``."""
    heads, kv_heads, head = q.dim(1), k.dim(1), q.dim(2)
    sizes = {"rows": x.dim(0), "width": x.dim(1), "heads": heads, "kv_heads": kv_heads, "head": head}
    if angles is not None:
        sizes["half"] = angles.dim(1)
    for name, value in {**sizes, "q_width": heads * head, "k_width": kv_heads * head}.items():
        launch.set(name, value)
