"""Shared expert of a mixture: the kernel, and its call. XLA computes the experts that tokens are routed to."""

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jllm_core.backends.cpu import ffi
from jllm_core.backends.cpu.kernel_building_blocks import (
    Gamma,
    Matrix,
    for_each_vector,
    reduce_sum,
    store_operand_addresses,
    store_result_addresses,
    task_count,
)
from jllm_core.backends.cpu.layer_calls import gamma_of, matrices_of, rounds_prompts
from jllm_core.backends.cpu.layer_inputs import Matmuls
from jllm_core.backends.cpu.layer_kernels import feed_forward_phases
from jllm_core.backends.cpu.llvm_builder import F32, Code, Module, Value
from jllm_core.backends.cpu.threads import Frame, Launch, WriteTask, write_kernel
from jllm_core.backends.cpu.vector_ops import LOADS, SIZES, fma, load, scalar, sigmoid, splat
from jllm_core.model import Call
from jllm_core.weights import Layer, MoELayer


@dataclass(frozen=True)
class SharedExpert:
    """Kernel: RMSNorm and an expert that every token goes through, as much of it as its gate says.

    Operands as named, with ``x [rows, D]`` and ``shared_gate [D]``. Results ``shared [rows, D]`` and the workspaces
    ``added [rows, D]``, ``shares [rows]``, ``gates`` and ``ups [rows, F]``. The attribute ``eps`` is float32.

    Attributes:
        matrices: of gate, up and down.
        norms: how gamma is stored.
        gate: the type of the expert's gate; None where there is none.
    """

    matrices: tuple[Matrix, Matrix, Matrix]
    norms: Gamma
    gate: str | None

    results = ("shared", "added", "shares", "gates", "ups")

    @property
    def operands(self) -> list[str]:
        """Names of the operands, in order."""
        gate = [] if self.gate is None else ["shared_gate"]
        return ["x", "post_gamma", *gate, *(name for matrix in self.matrices for name in matrix.operands)]

    def write(self, module: Module) -> None:
        """Write the kernel's instructions."""
        matmuls = Matmuls(module, *self.matrices)

        def prepare(frame: Frame, launch: Launch) -> None:
            store_operand_addresses(frame, launch, self.operands)
            store_result_addresses(frame, launch, self.results)
            x, width = frame.argument(0), frame.result(len(self.results) - 1).dim(1)
            # The norm of a feed-forward layer is of what its layer has come to so far, which is x.
            sizes = {"rows": x.dim(0), "width": x.dim(1), "ffw": width, "y": launch["x"]}
            for name, value in sizes.items():
                launch.set(name, value)
            launch.set_float("eps", frame.attribute(0, F32))
            launch.add_phase(launch["rows"])
            launch.add_phase(task_count(launch, launch["ffw"]))
            launch.add_phase(task_count(launch, launch["width"]))

        def multiply_by_share(
            code: Code, launch: Launch, task: Value, matrix: Matrix, x: str, width: str, residual: str
        ) -> None:
            """Outputs of the last product, times each token's share; nothing is added here."""
            stride = 4 * launch["width"]
            first, count = matrix.multiply(
                launch,
                matmuls[matrix],
                x=(launch[x], 4 * launch[width]),
                y=(launch["shared"], stride),
                inputs=launch[width],
                outs=launch["width"],
                task=task,
            )
            if self.gate is None:
                return
            with code.loop(0, launch["rows"]) as row:
                share, start = code.load(launch["shares"] + 4 * row, F32), launch["shared"] + row * stride + 4 * first

                def scale(index: Value, lanes: int) -> None:
                    address = start + 4 * index
                    code.store(address, load(code, address, lanes) * splat(code, share, lanes))

                for_each_vector(code, count, scale)

        norm, *products = feed_forward_phases(self.matrices, self.norms, matmuls, multiply_by_share)
        phases: list[WriteTask] = [self._with_share(norm), *products]
        write_kernel(module, prepare, phases)

    def _with_share(self, norm: WriteTask) -> WriteTask:
        """The norm of a row, and what the gate says of it."""
        kind = self.gate
        if kind is None:
            return norm

        def write(code: Code, launch: Launch, row: Value) -> None:
            norm(code, launch, row)
            normed = launch["added"] + 4 * row * launch["width"]

            def add(index: Value, lanes: int, sum_: Value) -> Value:
                weights = LOADS[kind](code, launch["shared_gate"] + SIZES[kind] * index, lanes)
                return fma(code, load(code, normed + 4 * index, lanes), weights, sum_)

            sum_ = splat(code, reduce_sum(code, launch["width"], add), 1)
            code.store(launch["shares"] + 4 * row, scalar(code, sigmoid(code, sum_)))

        return write


def without_shared(layer: Layer, mixture: MoELayer) -> Layer:
    """The layer with the experts alone that tokens are routed to."""
    return replace(layer, ffw=replace(mixture, shared=None, shared_gate=None))


def shared_expert(x: Float[Array, "B T D"], layer: Layer, call: Call) -> Float[Array, "B T D"]:
    """What a layer's shared expert adds to ``x``, in float32, its norm included."""
    mixture = layer.ffw
    if not isinstance(mixture, MoELayer) or mixture.shared is None:
        raise ValueError("this layer has no shared expert")
    expert, gate = mixture.shared, mixture.shared_gate
    rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    given = (("gate", expert.w_gate, expert.b_gate), ("up", expert.w_up, expert.b_up))
    matrices, operands = matrices_of(
        *given, ("down", expert.w_down, expert.b_down), rounded=rounds_prompts(layer, call)
    )
    operands |= {"x": rows, "post_gamma": layer.attn_post_gamma}
    if gate is not None:
        operands["shared_gate"] = gate
    kernel = SharedExpert(
        (matrices[0], matrices[1], matrices[2]),
        gamma_of(layer.attn_post_gamma, call.config),
        None if gate is None else gate.dtype.name,
    )
    hidden = (len(rows), expert.w_up.shape[1])
    shapes = [rows.shape, rows.shape, (len(rows),), hidden, hidden]
    y: Array = ffi.call(kernel, operands, shapes, eps=np.float32(call.config.rms_norm_eps))[0]
    return y.reshape(x.shape)
