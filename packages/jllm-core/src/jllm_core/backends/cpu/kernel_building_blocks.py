"""Building blocks of layer kernels: RMSNorm, rotary embedding, weight matrices, loops over vectors.

Activations are float32 ``[rows, width]``, in results of the kernel or in its workspace; a row is one token. All sizes
are read when the kernel runs. What a family of models may or may not have is decided when the kernel is written.

Sums along a row have LANES partial sums that are added at the end, and then the numbers that fill no vector, one by
one. The order depends on the length of the row alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jllm_core.backends.cpu.few_row_matmul import Kind
from jllm_core.backends.cpu.llvm_builder import F32, LANES, Code, Value, Variable
from jllm_core.backends.cpu.threads import Frame, Launch
from jllm_core.backends.cpu.vector_ops import LOADS, SIZES, fma, load, reduce_add, scalar, splat, zeros

MIN_TASK_OUTPUTS, MAX_TASK_OUTPUTS = 64, 768
"""Outputs of a matmul that are one task. Fewer are not worth a task of their own; the sums of more leave the cache, and
``few_row_matmul`` has room for copies of so many."""


def store_operand_addresses(frame: Frame, launch: Launch, operands: list[str]) -> None:
    """Store the address of each operand under its name."""
    for number, name in enumerate(operands):
        launch.set(name, frame.argument(number).data)


def store_result_addresses(frame: Frame, launch: Launch, results: Sequence[str]) -> None:
    """Store the address of each result under its name."""
    for number, name in enumerate(results):
        launch.set(name, frame.result(number).data)


def for_each_vector(code: Code, count: Value, write: Callable[[Value, int], None]) -> None:
    """Write ``write(index, lanes)`` along ``count`` floats: whole vectors, and then one by one what is left."""
    end = count - count % LANES
    with code.loop(0, end, LANES) as index:
        write(index, LANES)
    with code.loop(end, count) as index:
        write(index, 1)


def reduce_sum(code: Code, count: Value, add: Callable[[Value, int, Value], Value]) -> Value:
    """A sum along ``count`` floats, by ``sum = add(index, lanes, sum)``."""
    end = count - count % LANES
    # The lanes are added before the rest, so that a width of whole vectors, as nearly all are, has one order only.
    lanes_sum = Variable(code, zeros(code))
    with code.loop(0, end, LANES) as index:
        lanes_sum.value = add(index, LANES, lanes_sum.value)
    sum_ = Variable(code, splat(code, reduce_add(code, lanes_sum.value), 1))
    with code.loop(end, count) as index:
        sum_.value = add(index, 1, sum_.value)
    return scalar(code, sum_.value)


@dataclass(frozen=True)
class Gamma:
    """Storage format of the weights of an RMSNorm.

    Attributes:
        kind: their type.
        centered: whether they say how far a factor is from one.
    """

    kind: str = "float32"
    centered: bool = False

    def load(self, code: Code, address: Value, index: Value, lanes: int) -> Value:
        """Load factors, from number ``index`` on."""
        numbers = LOADS[self.kind](code, address + SIZES[self.kind] * index, lanes)
        return numbers + 1.0 if self.centered else numbers


def rms_norm(code: Code, x: Value, gamma: Value, width: Value, eps: Value, y: Value, kind: Gamma) -> None:
    """``ops.norm.rms_norm`` of one row.

    Args:
        code: where to.
        x: address of the row.
        gamma: address of gamma.
        width: numbers of a row.
        eps: float32.
        y: address of the result, which may be x.
        kind: how gamma is stored.
    """

    def add_square(index: Value, lanes: int, sum_: Value) -> Value:
        numbers = load(code, x + 4 * index, lanes)
        return fma(code, numbers, numbers, sum_)

    # uitofp is exact for any width below 2^24.
    mean = reduce_sum(code, width, add_square) / Value(code.builder, code.builder.uitofp(width.ir, F32))
    # An exact root and division, not the processor's approximate 1 / sqrt: it is once a row, and the same everywhere.
    scale = Value(code.builder, F32(1.0)) / code.intrinsic("llvm.sqrt.f32", F32, mean + eps)

    def write_scaled(index: Value, lanes: int) -> None:
        numbers = load(code, x + 4 * index, lanes) * splat(code, scale, lanes)
        code.store(y + 4 * index, numbers * kind.load(code, gamma, index, lanes))

    for_each_vector(code, width, write_scaled)


def rotate_head(code: Code, x: Value, cos: Value, sin: Value, half: Value) -> None:
    """``ops.rope.apply_rope`` of one head, in place: feature i is paired with feature ``half + i``. What it has more of
    them stays as it is."""

    def rotate(index: Value, lanes: int) -> None:
        first, second = load(code, x + 4 * index, lanes), load(code, x + 4 * (half + index), lanes)
        c, s = load(code, cos + 4 * index, lanes), load(code, sin + 4 * index, lanes)
        # Both halves are in registers by now, so writing over them is safe.
        code.store(x + 4 * index, first * c - second * s)
        code.store(x + 4 * (half + index), second * c + first * s)

    for_each_vector(code, half, rotate)


@dataclass(frozen=True)
class Matrix:
    """A weight matrix among a kernel's operands.

    Attributes:
        name: of its operand; the names of its scales, offsets and bias are made from it.
        kind: how it is stored.
        bias: whether there is a bias.
    """

    name: str
    kind: Kind
    bias: bool = False

    @property
    def operands(self) -> list[str]:
        """The operands that the matrix consists of."""
        parts = {
            "": True,
            "_scales": self.kind.name.startswith("int"),
            "_offsets": self.kind.offsets,
            "_bias": self.bias,
        }
        return [self.name + part for part, there in parts.items() if there]

    def multiply(
        self,
        launch: Launch,
        matmul: Any,
        x: tuple[Value, Value],
        y: tuple[Value, Value],
        inputs: Value,
        outs: Value,
        task: Value,
    ) -> tuple[Value, Value]:
        """Write one task of ``y = x w + bias``.

        Args:
            launch: where the addresses are.
            matmul: the function from ``write_matmul``, for this kind.
            x: address of the input rows, and their stride in bytes.
            y: address of the output rows, and their stride in bytes.
            inputs: rows of the matrix.
            outs: columns of the matrix.
            task: its number; it computes ``task_width`` outputs.

        Returns:
            The first output of the task, and how many there are.
        """
        code, (y_all, y_stride) = launch.code, y
        width = task_width(launch, outs)
        first = task * width
        count, y_now = code.minimum(width, outs - first), y_all + 4 * first
        # Without groups there are no scales to pass; those of channels are applied to the finished sums below.
        none = Value(code.builder, first.type(0))
        scales, offsets = none, none
        if self.kind.group:  # float16, 2 bytes each, [groups, outs]
            scales = launch[f"{self.name}_scales"] + 2 * first
            offsets = launch[f"{self.name}_offsets"] + 2 * first if self.kind.offsets else none
        w = launch[self.name] + first * self.kind.size
        code.call(matmul, *x, launch["rows"], w, scales, offsets, outs, inputs, y_now, y_stride, count)
        self.scale_and_add_bias(launch, (y_now, y_stride), first, count)
        return first, count

    def scale_and_add_bias(self, launch: Launch, y: tuple[Value, Value], first: Value, count: Value) -> None:
        """Finish the sums y of ``count`` outputs from ``first`` on: multiply by channel scales, add the bias."""
        code, (y_now, y_stride) = launch.code, y
        if not self.kind.has_channel_scales and not self.bias:
            return
        # A channel's scale is the same for all inputs, so it multiplies the sum once instead of each weight.
        with code.loop(0, launch["rows"]) as row:

            def finish(index: Value, lanes: int) -> None:
                address = y_now + row * y_stride + 4 * index
                numbers = load(code, address, lanes)
                if self.kind.has_channel_scales:
                    numbers = numbers * load(code, launch[f"{self.name}_scales"] + 4 * (first + index), lanes)
                if self.bias:
                    numbers = numbers + load(code, launch[f"{self.name}_bias"] + 4 * (first + index), lanes)
                code.store(address, numbers)

            for_each_vector(code, count, finish)


def task_width(launch: Launch, outs: Value) -> Value:
    """Outputs of a task: the same number of tasks for each thread, in whole vectors, within the limits."""
    code, threads = launch.code, launch.thread_count
    tasks_per_thread = (outs + (threads * MAX_TASK_OUTPUTS - 1)) // (threads * MAX_TASK_OUTPUTS)
    # Rounded up to whole vectors, so that only the last task has outputs that fill none.
    even = outs // (threads * tasks_per_thread) + (LANES - 1)
    return code.maximum(even // LANES * LANES, MIN_TASK_OUTPUTS)


def task_count(launch: Launch, outs: Value) -> Value:
    """Tasks of a matmul."""
    width = task_width(launch, outs)
    return (outs + width - 1) // width
