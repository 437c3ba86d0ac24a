"""The kernels: which operands each takes, and which steps it goes through.

``Attend`` and ``Finish`` are what a layer does before and after its keys and values are in the cache; ``Head`` is the
output head.
"""

from dataclasses import dataclass
from typing import Any

from jllm_core.kernels.cpu_attention import IN_ORDER, PAGED, PLACED, write_attention
from jllm_core.kernels.cpu_code import F32, Code, Module, Value
from jllm_core.kernels.cpu_panels import write_any_product
from jllm_core.kernels.cpu_products import write_transposed
from jllm_core.kernels.cpu_steps import Matrix, each, keep_operands, piece_count, piece_width, rms_norm, rotate
from jllm_core.kernels.cpu_threads import Frame, Plan, write_kernel
from jllm_core.kernels.cpu_vectors import LOADS, SIZES, exp, load


class Products:
    """The product functions of a module, one for each kind of matrix in it."""

    def __init__(self, module: Module, *matrices: Matrix) -> None:
        self._written = {kind: write_any_product(module, kind) for kind in {matrix.kind: None for matrix in matrices}}

    def __getitem__(self, matrix: Matrix) -> Any:
        return self._written[matrix.kind]


@dataclass(frozen=True)
class Attend:
    """Norm, q, k and v with their biases, norms of heads and rotation.

    Operands as named, with ``x [rows, D]``, ``gamma [D]``, ``cos`` and ``sin [rows, H / 2]``. Results
    ``q [rows, N, H]``, ``k`` and ``v [rows, K, H]``, and the workspace ``normed [rows, D]``.
    """

    projections: tuple[Matrix, Matrix, Matrix]
    head_norms: bool
    rotates: bool
    norms: str = "float32"

    @property
    def operands(self) -> list[str]:
        norms = ["q_gamma", "k_gamma"] if self.head_norms else []
        angles = ["cos", "sin"] if self.rotates else []
        return ["x", "gamma", *(name for matrix in self.projections for name in matrix.operands), *norms, *angles]

    def write(self, module: Module) -> None:
        products = Products(module, *self.projections)
        outputs = tuple(zip(self.projections, ("q_width", "k_width", "k_width"), ("to_q", "to_k", "to_v"), strict=True))

        def plan(frame: Frame, plan: Plan) -> None:
            keep_operands(frame, plan, self.operands)
            x, q, k = frame.argument(0), frame.result(0), frame.result(1)
            rows, head = x.dim(0), q.dim(2)
            sizes = {"rows": rows, "width": x.dim(1), "heads": q.dim(1), "kv_heads": k.dim(1), "head": head}
            widths = {"q_width": q.dim(1) * head, "k_width": k.dim(1) * head}
            results = {"to_q": q.data, "to_k": k.data, "to_v": frame.result(2).data, "normed": frame.result(3).data}
            for name, value in {**sizes, **widths, **results}.items():
                plan.keep(name, value)
            plan.keep_float("eps", frame.attribute(0, F32))
            plan.add_step(rows)
            q_pieces, k_pieces = piece_count(plan, widths["q_width"]), piece_count(plan, widths["k_width"])
            plan.keep("q_pieces", q_pieces)
            plan.keep("k_pieces", k_pieces)
            plan.add_step(q_pieces + 2 * k_pieces)
            if self.head_norms or self.rotates:
                plan.add_step(rows)

        def norm(code: Code, plan: Plan, row: Value) -> None:
            place = 4 * row * plan["width"]
            rms_norm(
                code,
                plan["x"] + place,
                plan["gamma"],
                plan["width"],
                plan.float("eps"),
                plan["normed"] + place,
                self.norms,
            )

        def project(code: Code, plan: Plan, number: Value) -> None:
            ends = (plan["q_pieces"], plan["q_pieces"] + plan["k_pieces"], plan["q_pieces"] + 2 * plan["k_pieces"])
            first = Value(code.builder, number.type(0))
            for (matrix, width, to), end in zip(outputs, ends, strict=True):
                with code.when((number >= first) & (number < end)):
                    x, y = (plan["normed"], 4 * plan["width"]), (plan[to], 4 * plan[width])
                    matrix.multiply(plan, products[matrix], x, y, plan["width"], plan[width], number - first)
                first = end

        def turn(code: Code, plan: Plan, row: Value) -> None:
            head = plan["head"]
            for to, count, gamma in (("to_q", "heads", "q_gamma"), ("to_k", "kv_heads", "k_gamma")):
                with code.loop(0, plan[count]) as number:
                    here = plan[to] + 4 * (row * plan[count] + number) * head
                    if self.head_norms:
                        rms_norm(code, here, plan[gamma], head, plan.float("eps"), here, self.norms)
                    if self.rotates:
                        angles = 2 * row * head
                        rotate(code, here, plan["cos"] + angles, plan["sin"] + angles, head // 2)

        write_kernel(module, plan, [norm, project, turn])


@dataclass(frozen=True)
class Close:
    """What a layer does behind attention: its output matrix, and the feed-forward layer, each added to what came in.

    Operands as named, with ``x [rows, D]`` and ``attended [rows, N * H]``. Results ``y [rows, D]`` and the workspaces:
    ``added [rows, D]``, and for a feed-forward layer ``gates`` and ``ups [rows, F]``.

    Attributes:
        o: the output matrix.
        feed_forward: gate, up and down; None ends with attention.
        norms: the type of gamma.
    """

    o: Matrix
    feed_forward: tuple[Matrix, Matrix, Matrix] | None
    norms: str = "float32"

    @property
    def operands(self) -> list[str]:
        matrices = [] if self.feed_forward is None else ["gamma", *(n for m in self.feed_forward for n in m.operands)]
        return ["x", "attended", *self.o.operands, *matrices]

    def write(self, module: Module) -> None:
        def plan(frame: Frame, plan: Plan) -> None:
            keep_operands(frame, plan, self.operands)
            x, attended = frame.argument(0), frame.argument(1)
            for name, value in {"rows": x.dim(0), "width": x.dim(1), "q_width": attended.dim(1)}.items():
                plan.keep(name, value)
            self.add_steps(frame, plan, 0)

        write_kernel(module, plan, self.steps(module))

    def add_steps(self, frame: Frame, plan: Plan, workspaces: int) -> None:
        """Behind those of attention, whose workspaces come between ``y`` and ours."""
        plan.keep_float("eps", frame.attribute(0, F32))
        results = ["y", *[""] * workspaces, "added", *(("gates", "ups") if self.feed_forward else ())]
        for number, name in enumerate(results):
            if name:
                plan.keep(name, frame.result(number).data)
        plan.add_step(piece_count(plan, plan["width"]))
        if self.feed_forward:
            plan.keep("ffw", frame.result(len(results) - 1).dim(1))
            plan.add_step(plan["rows"])
            plan.add_step(piece_count(plan, plan["ffw"]))
            plan.add_step(piece_count(plan, plan["width"]))

    def steps(self, module: Module) -> list[Any]:
        """The output matrix; norm; gate and up with SiLU; down."""
        products = Products(module, self.o, *(self.feed_forward or ()))

        def multiply_and_add(
            code: Code, plan: Plan, number: Value, matrix: Matrix, x: str, width: str, to: str
        ) -> None:
            """``y = to + x w``, for the columns of a piece."""
            stride = 4 * plan["width"]
            first, count = matrix.multiply(
                plan,
                products[matrix],
                (plan[x], 4 * plan[width]),
                (plan["added"], stride),
                plan[width],
                plan["width"],
                number,
            )
            with code.loop(0, plan["rows"]) as row:
                start = row * stride + 4 * first

                def add(place: Value, lanes: int) -> None:
                    sum_ = load(code, plan[to] + start + 4 * place, lanes) + load(
                        code, plan["added"] + start + 4 * place, lanes
                    )
                    code.store(plan["y"] + start + 4 * place, sum_)

                each(code, count, add)

        def project(code: Code, plan: Plan, number: Value) -> None:
            multiply_and_add(code, plan, number, self.o, "attended", "q_width", "x")

        if self.feed_forward is None:
            return [project]
        return [project, *feed_forward_steps(self.feed_forward, self.norms, products, multiply_and_add)]


@dataclass(frozen=True)
class Finish:
    """Attention over the cache, and ``Close``.

    Operands as named, with ``x [rows, D]``, ``q [rows, N, H]``, ``positions [rows]``, ``keys`` and ``values
    [B, K, S, H]``. Results ``y [rows, D]`` and the workspaces: ``parts``, ``attended [rows, N * H]``, and those of
    ``Close``.

    Attributes:
        cache: the type of keys and values; those of int8 have the operands ``key_scales`` and ``value_scales``.
        order: where the slots stand (``cpu_attention.ORDERS``), with the operand that says it, if any.
        close: what comes behind.
    """

    cache: str
    order: str
    close: Close

    @property
    def operands(self) -> list[str]:
        scales = ["key_scales", "value_scales"] if self.cache == "int8" else []
        slots = [*scales, *{IN_ORDER: [], PLACED: ["k_positions"], PAGED: ["tables"]}[self.order]]
        matrices = [name for name in self.close.operands if name not in ("x", "attended")]
        return ["x", "q", "keys", "values", "positions", *slots, *matrices]

    def write(self, module: Module) -> None:
        attention = write_attention(module, self.cache, self.order)

        def plan(frame: Frame, plan: Plan) -> None:
            keep_operands(frame, plan, self.operands)
            x, q, keys = frame.argument(0), frame.argument(1), frame.argument(2)
            rows, heads, kv_heads = x.dim(0), q.dim(1), keys.dim(1)
            sizes = {"rows": rows, "width": x.dim(1), "heads": heads, "head": q.dim(2), "kv_heads": kv_heads}
            texts = frame.argument(self.operands.index("tables") if self.order == PAGED else 2).dim(0)
            ratios = {"group": heads // kv_heads, "queries": rows // texts, "slots": keys.dim(2), "pages": keys.dim(0)}
            splits = frame.result(1).dim(2)
            parts = {"splits": splits, "part_bytes": 4 * frame.result(1).dim(3), "q_width": heads * q.dim(2)}
            results = {"parts": frame.result(1).data, "attended": frame.result(2).data}
            for name, value in {**sizes, **ratios, **parts, **results}.items():
                plan.keep(name, value)
            plan.keep("window", frame.attribute(1))
            plan.add_step(rows * kv_heads * splits)
            plan.add_step(rows)
            self.close.add_steps(frame, plan, workspaces=2)

        write_kernel(module, plan, [*attention, *self.close.steps(module)])


def feed_forward_steps(
    matrices: tuple[Matrix, Matrix, Matrix], norms: str, products: Products, multiply_and_add: Any
) -> list[Any]:
    """Norm; gate and up with SiLU; down. The norm goes where attention's products were, which are added by now."""
    gate, up, down = matrices

    def norm(code: Code, plan: Plan, row: Value) -> None:
        place = 4 * row * plan["width"]
        rms_norm(code, plan["y"] + place, plan["gamma"], plan["width"], plan.float("eps"), plan["added"] + place, norms)

    def gate_and_up(code: Code, plan: Plan, number: Value) -> None:
        x, width, ffw = (plan["added"], 4 * plan["width"]), plan["width"], plan["ffw"]
        stride = 4 * ffw
        first, count = gate.multiply(plan, products[gate], x, (plan["gates"], stride), width, ffw, number)
        up.multiply(plan, products[up], x, (plan["ups"], stride), width, ffw, number)
        with code.loop(0, plan["rows"]) as row:
            start = row * stride + 4 * first

            def silu(place: Value, lanes: int) -> None:
                here = plan["gates"] + start + 4 * place
                gates, ups = load(code, here, lanes), load(code, plan["ups"] + start + 4 * place, lanes)
                code.store(here, gates / (exp(code, -1.0 * gates) + 1.0) * ups)

            each(code, count, silu)

    def finish(code: Code, plan: Plan, number: Value) -> None:
        multiply_and_add(code, plan, number, down, "gates", "ffw", "y")

    return [norm, gate_and_up, finish]


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
