"""The kernels of layers: which operands each takes, and which steps it goes through.

``Step`` is a whole layer, for tokens that decode. Of prompts ``Project`` and ``Close`` are what a layer does before its
keys and values are in the cache and after attention.
"""

from dataclasses import dataclass
from typing import Any

from jllm_core.backends.cpu.cache_writes import Part, Sizes, put_of, put_tokens
from jllm_core.backends.cpu.decode_attention import write_attention
from jllm_core.backends.cpu.kernel_parts import (
    Matrix,
    each,
    keep_operands,
    keep_results,
    piece_count,
    rms_norm,
    rotate,
)
from jllm_core.backends.cpu.llvm_builder import F32, Code, Module, Value
from jllm_core.backends.cpu.many_row_matmul import write_any_product
from jllm_core.backends.cpu.threads import Buffer, Frame, Plan, write_kernel
from jllm_core.backends.cpu.vectors import exp, load


class Products:
    """The product functions of a module, one for each kind of matrix in it."""

    def __init__(self, module: Module, *matrices: Matrix) -> None:
        self._written = {kind: write_any_product(module, kind) for kind in {matrix.kind: None for matrix in matrices}}

    def __getitem__(self, matrix: Matrix) -> Any:
        return self._written[matrix.kind]


@dataclass(frozen=True)
class Project:
    """Norm, q, k and v with their biases, norms of heads and rotation.

    Operands as named, with ``x [rows, D]``, ``pre_gamma [D]``, ``cos`` and ``sin [rows, H / 2]``. Results
    ``q_heads [rows, N, H]``, ``k_heads`` and ``v_heads [rows, K, H]``, and the workspace ``normed [rows, D]``.
    """

    projections: tuple[Matrix, Matrix, Matrix]
    head_norms: bool
    rotates: bool
    norms: str = "float32"

    results = ("q_heads", "k_heads", "v_heads", "normed")

    @property
    def operands(self) -> list[str]:
        norms = ["q_gamma", "k_gamma"] if self.head_norms else []
        angles = ["cos", "sin"] if self.rotates else []
        return ["x", "pre_gamma", *(name for matrix in self.projections for name in matrix.operands), *norms, *angles]

    def write(self, module: Module) -> None:
        def plan(frame: Frame, plan: Plan) -> None:
            keep_operands(frame, plan, self.operands)
            keep_results(frame, plan, self.results)
            keep_sizes(plan, frame.argument(0), frame.result(0), frame.result(1))
            plan.keep_float("eps", frame.attribute(0, F32))
            self.add_steps(plan)
            if self.head_norms or self.rotates:
                plan.add_step(plan["rows"])

        write_kernel(module, plan, [*self.steps(module), self.turn])

    def add_steps(self, plan: Plan) -> None:
        """Of ``steps``; behind them the heads are still to be turned."""
        plan.add_step(plan["rows"])
        q_pieces, k_pieces = piece_count(plan, plan["q_width"]), piece_count(plan, plan["k_width"])
        plan.keep("q_pieces", q_pieces)
        plan.keep("k_pieces", k_pieces)
        plan.add_step(q_pieces + 2 * k_pieces)

    def steps(self, module: Module) -> list[Any]:
        """Norm; and the products."""
        products = Products(module, *self.projections)
        widths = ("q_width", "k_width", "k_width")
        outputs = tuple(zip(self.projections, widths, self.results[:3], strict=True))

        def norm(code: Code, plan: Plan, row: Value) -> None:
            place = 4 * row * plan["width"]
            rms_norm(
                code,
                plan["x"] + place,
                plan["pre_gamma"],
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

        return [norm, project]

    def turn(self, code: Code, plan: Plan, row: Value) -> None:
        """The norms of a row's heads, and their rotation."""
        head = plan["head"]
        for to, count, gamma in (("q_heads", "heads", "q_gamma"), ("k_heads", "kv_heads", "k_gamma")):
            with code.loop(0, plan[count]) as number:
                here = plan[to] + 4 * (row * plan[count] + number) * head
                if self.head_norms:
                    rms_norm(code, here, plan[gamma], head, plan.float("eps"), here, self.norms)
                if self.rotates:
                    angles = 2 * row * head
                    rotate(code, here, plan["cos"] + angles, plan["sin"] + angles, head // 2)


def keep_sizes(plan: Plan, x: Buffer, q: Buffer, k: Buffer) -> None:
    """Those of ``x [rows, D]``, ``q [rows, N, H]`` and ``k [rows, K, H]``."""
    heads, kv_heads, head = q.dim(1), k.dim(1), q.dim(2)
    sizes = {"rows": x.dim(0), "width": x.dim(1), "heads": heads, "kv_heads": kv_heads, "head": head}
    for name, value in {**sizes, "q_width": heads * head, "k_width": kv_heads * head}.items():
        plan.keep(name, value)


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
        return ["x", "attended", *self.weights]

    @property
    def weights(self) -> list[str]:
        """Those of the operands that do not come from what is behind."""
        feed_forward = (
            [] if self.feed_forward is None else ["post_gamma", *(n for m in self.feed_forward for n in m.operands)]
        )
        return [*self.o.operands, *feed_forward]

    @property
    def results(self) -> list[str]:
        return ["y", "added", *(("gates", "ups") if self.feed_forward else ())]

    def write(self, module: Module) -> None:
        def plan(frame: Frame, plan: Plan) -> None:
            keep_operands(frame, plan, self.operands)
            keep_results(frame, plan, self.results)
            x, attended = frame.argument(0), frame.argument(1)
            for name, value in {"rows": x.dim(0), "width": x.dim(1), "q_width": attended.dim(1)}.items():
                plan.keep(name, value)
            plan.keep_float("eps", frame.attribute(0, F32))
            self.add_steps(plan, frame.result(len(self.results) - 1))

        write_kernel(module, plan, self.steps(module))

    def add_steps(self, plan: Plan, last: Buffer) -> None:
        """Of ``steps``; ``last`` is the last of the results."""
        plan.add_step(piece_count(plan, plan["width"]))
        if self.feed_forward:
            plan.keep("ffw", last.dim(1))
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
class Step:
    """A layer, for a few new tokens of each text: ``Project``, into the cache, attention over it, and ``Close``.

    Operands as named, with ``x [rows, D]``, ``keys`` and ``values [R, K, S, H]``, ``positions [rows]``, and for each
    token the row and slot of the cache that it goes to, ``at_rows`` and ``at_slots [rows]``. Results ``y [rows, D]``,
    keys and values again (and their scales), changed in place, and the workspaces of ``Project``, ``parts``,
    ``attended [rows, N * H]`` and those of ``Close``.

    Attributes:
        project: what comes before attention.
        cache: the type of keys and values; those of int8 have the operands ``key_scales`` and ``value_scales``.
        paged: whether keys and values are in pages, that the operand ``tables [B, n]`` names.
        close: what comes behind.
    """

    project: Project
    cache: str
    paged: bool
    close: Close

    @property
    def slots(self) -> list[str]:
        """What the cache is made of."""
        return ["keys", "values", *(["key_scales", "value_scales"] if self.cache == "int8" else [])]

    @property
    def operands(self) -> list[str]:
        places = ["positions", "at_rows", "at_slots", *(["tables"] if self.paged else [])]
        return [*self.slots, *places, *self.project.operands, *self.close.weights]

    @property
    def results(self) -> list[str]:
        return ["y", *self.slots, *self.project.results, "parts", "attended", *self.close.results[1:]]

    def write(self, module: Module) -> None:
        attention, put = write_attention(module, self.cache, self.paged), put_of(self.cache)

        def plan(frame: Frame, plan: Plan) -> None:
            keep_operands(frame, plan, self.operands)
            keep_results(frame, plan, self.results)
            keys, x = frame.argument(0), frame.argument(self.operands.index("x"))
            q, k, parts = (frame.result(self.results.index(name)) for name in ("q_heads", "k_heads", "parts"))
            keep_sizes(plan, x, q, k)
            texts = frame.argument(self.operands.index("tables")).dim(0) if self.paged else keys.dim(0)
            ratios = {"group": plan["heads"] // plan["kv_heads"], "queries": plan["rows"] // texts}
            slots = {"slots": keys.dim(2), "pages": keys.dim(0)}
            sizes = {**ratios, **slots, "splits": parts.dim(2), "part_bytes": 4 * parts.dim(3)}
            for name, value in {**sizes, "window": frame.attribute(1)}.items():
                plan.keep(name, value)
            plan.keep_float("eps", frame.attribute(0, F32))
            self.project.add_steps(plan)
            plan.add_step(plan["rows"])
            plan.add_step(plan["rows"] * plan["kv_heads"] * plan["splits"])
            plan.add_step(plan["rows"])
            self.close.add_steps(plan, frame.result(len(self.results) - 1))

        def turn_and_put(code: Code, plan: Plan, row: Value) -> None:
            self.project.turn(code, plan, row)
            sizes = Sizes(plan["pages"], plan["kv_heads"], plan["slots"], plan["head"])
            key_scales, value_scales = [plan[name] for name in self.slots[2:]] or (None, None)
            parts = [
                Part(plan["k_heads"], plan["keys"], key_scales),
                Part(plan["v_heads"], plan["values"], value_scales),
            ]
            put_tokens(code, sizes, (row, row + 1), (plan["at_rows"], plan["at_slots"]), parts, put)

        write_kernel(module, plan, [*self.project.steps(module), turn_and_put, *attention, *self.close.steps(module)])


def feed_forward_steps(
    matrices: tuple[Matrix, Matrix, Matrix], norms: str, products: Products, multiply_and_add: Any
) -> list[Any]:
    """Norm; gate and up with SiLU; down. The norm goes where attention's products were, which are added by now."""
    gate, up, down = matrices

    def norm(code: Code, plan: Plan, row: Value) -> None:
        place = 4 * row * plan["width"]
        rms_norm(
            code, plan["y"] + place, plan["post_gamma"], plan["width"], plan.float("eps"), plan["added"] + place, norms
        )

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
