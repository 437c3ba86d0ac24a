"""The kernels of what comes before and behind the layers: rows of the embedding, the last norm, the output head."""

from dataclasses import dataclass

from jllm_core.backends.cpu.few_row_matmul import write_transposed
from jllm_core.backends.cpu.kernel_parts import Matrix, each, keep_operands, piece_count, piece_width, rms_norm
from jllm_core.backends.cpu.layer_kernels import Products
from jllm_core.backends.cpu.llvm_builder import F32, Code, Module, Value
from jllm_core.backends.cpu.threads import Frame, Plan, write_kernel
from jllm_core.backends.cpu.vectors import LOADS, SIZES


@dataclass(frozen=True)
class Head:
    """``x w`` for ``w [D, V]``, or for an embedding ``[V, D]``; the result is ``[rows, V]``.

    Attributes:
        w: the matrix.
        transposed: whether it is an embedding, ``[V, D]``.
    """

    w: Matrix
    transposed: bool

    @property
    def operands(self) -> list[str]:
        return ["x", *self.w.operands]

    def write(self, module: Module) -> None:
        products = None if self.transposed else Products(module, self.w)
        transposed = write_transposed(module, self.w.kind.name) if self.transposed else None

        def plan(frame: Frame, plan: Plan) -> None:
            keep_operands(frame, plan, self.operands)
            x, y = frame.argument(0), frame.result(0)
            sizes = {"rows": x.dim(0), "inputs": x.dim(1), "outs": y.dim(1), "y": y.data}
            for name, value in sizes.items():
                plan.keep(name, value)
            plan.add_step(piece_count(plan, sizes["outs"]))

        def multiply(code: Code, plan: Plan, number: Value) -> None:
            x, y, inputs, outs = (
                (plan["x"], 4 * plan["inputs"]),
                (plan["y"], 4 * plan["outs"]),
                plan["inputs"],
                plan["outs"],
            )
            if products is not None:
                self.w.multiply(plan, products[self.w], x, y, inputs, outs, number)
                return
            cut = piece_width(plan, outs)
            first = number * cut
            w = plan[self.w.name] + first * inputs * SIZES[self.w.kind.name]
            count, y_now = code.least(cut, outs - first), y[0] + 4 * first
            code.call(transposed, *x, plan["rows"], w, 0, 0, inputs, inputs, y_now, y[1], count)
            self.w.scale_and_add(plan, (y_now, y[1]), first, count)

        write_kernel(module, plan, [multiply])


@dataclass(frozen=True)
class Norm:
    """RMSNorm of each row of ``x [rows, D]`` with ``gamma [D]``, of the type ``norms``."""

    norms: str = "float32"

    @property
    def operands(self) -> list[str]:
        return ["x", "gamma"]

    def write(self, module: Module) -> None:
        def plan(frame: Frame, plan: Plan) -> None:
            keep_operands(frame, plan, self.operands)
            plan.keep("width", frame.argument(0).dim(1))
            plan.keep("y", frame.result(0).data)
            plan.keep_float("eps", frame.attribute(0, F32))
            plan.add_step(frame.argument(0).dim(0))

        def norm(code: Code, plan: Plan, row: Value) -> None:
            place = 4 * row * plan["width"]
            rms_norm(
                code, plan["x"] + place, plan["gamma"], plan["width"], plan.float("eps"), plan["y"] + place, self.norms
            )

        write_kernel(module, plan, [norm])


@dataclass(frozen=True)
class Rows:
    """``table[tokens]`` as float32, for ``table [V, D]`` and ``tokens [rows]``; the result is ``[rows, D]``.

    Attributes:
        kind: the type of the table.
    """

    kind: str

    @property
    def operands(self) -> list[str]:
        return ["table", "tokens"]

    def write(self, module: Module) -> None:
        def plan(frame: Frame, plan: Plan) -> None:
            keep_operands(frame, plan, self.operands)
            plan.keep("count", frame.argument(0).dim(0))
            plan.keep("width", frame.argument(0).dim(1))
            plan.keep("y", frame.result(0).data)
            plan.add_step(frame.argument(1).dim(0))

        def take(code: Code, plan: Plan, row: Value) -> None:
            token = code.load_int32(plan["tokens"] + 4 * row)
            token = code.least(code.most(token, 0), plan["count"] - 1)
            source, to = plan["table"] + token * plan["width"] * SIZES[self.kind], plan["y"] + 4 * row * plan["width"]

            def some(place: Value, lanes: int) -> None:
                code.store(to + 4 * place, LOADS[self.kind](code, source + SIZES[self.kind] * place, lanes))

            each(code, plan["width"], some)

        write_kernel(module, plan, [take])
