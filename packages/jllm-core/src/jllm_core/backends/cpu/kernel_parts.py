"""The steps of a layer, each as pieces for threads to share: norm, products, rotation, attention.

Activations are float32 ``[rows, width]``, in results of the kernel or in its workspace. All sizes are read when the
kernel runs; what a family may or may not have is decided when it is written.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jllm_core.backends.cpu.few_row_matmul import Kind
from jllm_core.backends.cpu.llvm_builder import F32, LANES, Code, Value, Variable
from jllm_core.backends.cpu.threads import Frame, Plan
from jllm_core.backends.cpu.vectors import LOADS, SIZES, fma, load, scalar, splat, total, zeros

MIN_PIECE, MAX_PIECE = 64, 768
"""Outputs of a product that are one thread's at a time."""


def keep_operands(frame: Frame, plan: Plan, operands: list[str]) -> None:
    for number, name in enumerate(operands):
        plan.keep(name, frame.argument(number).data)


def keep_results(frame: Frame, plan: Plan, results: Sequence[str]) -> None:
    for number, name in enumerate(results):
        plan.keep(name, frame.result(number).data)


def each(code: Code, count: Value, write: Callable[[Value, int], None]) -> None:
    """``write(place, lanes)`` along so many floats, vector by vector, and what is left one by one."""
    end = count - count % LANES
    with code.loop(0, end, LANES) as place:
        write(place, LANES)
    with code.loop(end, count) as place:
        write(place, 1)


def total_of(code: Code, count: Value, term: Callable[[Value, int, Value], Value]) -> Value:
    """``sum = term(place, lanes, sum)`` along so many floats."""
    end = count - count % LANES
    lanes_sum = Variable(code, zeros(code))
    with code.loop(0, end, LANES) as place:
        lanes_sum.value = term(place, LANES, lanes_sum.value)
    sum_ = Variable(code, splat(code, total(code, lanes_sum.value), 1))
    with code.loop(end, count) as place:
        sum_.value = term(place, 1, sum_.value)
    return scalar(code, sum_.value)


def rms_norm(code: Code, x: Value, gamma: Value, width: Value, eps: Value, y: Value, kind: str) -> None:
    """``ops.norm.rms_norm`` of one row; y may be x; ``kind`` is the type of gamma."""

    def square(place: Value, lanes: int, sum_: Value) -> Value:
        numbers = load(code, x + 4 * place, lanes)
        return fma(code, numbers, numbers, sum_)

    mean = total_of(code, width, square) / Value(code.builder, code.builder.uitofp(width.ir, F32))
    scale = Value(code.builder, F32(1.0)) / code.intrinsic("llvm.sqrt.f32", F32, mean + eps)

    def scaled(place: Value, lanes: int) -> None:
        numbers = load(code, x + 4 * place, lanes) * splat(code, scale, lanes)
        code.store(y + 4 * place, numbers * LOADS[kind](code, gamma + SIZES[kind] * place, lanes))

    each(code, width, scaled)


def rotate(code: Code, x: Value, cos: Value, sin: Value, half: Value) -> None:
    """``ops.rope.apply_rope`` of one head, in place."""

    def pair(place: Value, lanes: int) -> None:
        first, second = load(code, x + 4 * place, lanes), load(code, x + 4 * (half + place), lanes)
        c, s = load(code, cos + 4 * place, lanes), load(code, sin + 4 * place, lanes)
        code.store(x + 4 * place, first * c - second * s)
        code.store(x + 4 * (half + place), second * c + first * s)

    each(code, half, pair)


@dataclass(frozen=True)
class Matrix:
    """A weight matrix among a kernel's operands.

    Attributes:
        name: of its operand; its scales, offsets and bias have names made of it.
        kind: how it is stored.
        bias: whether there is one.
    """

    name: str
    kind: Kind
    bias: bool = False

    @property
    def operands(self) -> list[str]:
        """What it is made of."""
        parts = {
            "": True,
            "_scales": self.kind.name.startswith("int"),
            "_offsets": self.kind.offsets,
            "_bias": self.bias,
        }
        return [self.name + part for part, there in parts.items() if there]

    def multiply(
        self,
        plan: Plan,
        product: Any,
        x: tuple[Value, Value],
        y: tuple[Value, Value],
        inputs: Value,
        outs: Value,
        number: Value,
    ) -> tuple[Value, Value]:
        """Do a piece of ``y = x w + bias``.

        Args:
            plan: where the addresses are.
            product: from ``write_product``, for this kind.
            x: address and stride in bytes of the rows that come in.
            y: of those that go out.
            inputs: of the matrix.
            outs: of the matrix.
            number: of the piece.

        Returns:
            The first output of the piece, and how many there are.
        """
        code, (y_all, y_stride) = plan.code, y
        cut = piece_width(plan, outs)
        first = number * cut
        count, y_now = code.least(cut, outs - first), y_all + 4 * first
        none = Value(code.builder, first.type(0))
        scales, offsets = none, none
        if self.kind.group:
            scales = plan[f"{self.name}_scales"] + 2 * first
            offsets = plan[f"{self.name}_offsets"] + 2 * first if self.kind.offsets else none
        w = plan[self.name] + first * self.kind.size
        code.call(product, *x, plan["rows"], w, scales, offsets, outs, inputs, y_now, y_stride, count)
        self.scale_and_add(plan, (y_now, y_stride), first, count)
        return first, count

    def scale_and_add(self, plan: Plan, y: tuple[Value, Value], first: Value, count: Value) -> None:
        """What comes after the sums ``y`` of ``count`` outputs from ``first`` on: scales of channels, and the bias."""
        code, (y_now, y_stride) = plan.code, y
        if not self.kind.has_channel_scales and not self.bias:
            return
        with code.loop(0, plan["rows"]) as row:

            def after(place: Value, lanes: int) -> None:
                here = y_now + row * y_stride + 4 * place
                numbers = load(code, here, lanes)
                if self.kind.has_channel_scales:
                    numbers = numbers * load(code, plan[f"{self.name}_scales"] + 4 * (first + place), lanes)
                if self.bias:
                    numbers = numbers + load(code, plan[f"{self.name}_bias"] + 4 * (first + place), lanes)
                code.store(here, numbers)

            each(code, count, after)


def piece_width(plan: Plan, outs: Value) -> Value:
    """Outputs of a piece: as many for each thread, in whole vectors, and few enough that their sums stay near."""
    code, threads = plan.code, plan.threads
    rounds = (outs + (threads * MAX_PIECE - 1)) // (threads * MAX_PIECE)
    even = outs // (threads * rounds) + (LANES - 1)
    return code.most(even // LANES * LANES, MIN_PIECE)


def piece_count(plan: Plan, outs: Value) -> Value:
    cut = piece_width(plan, outs)
    return (outs + cut - 1) // cut
