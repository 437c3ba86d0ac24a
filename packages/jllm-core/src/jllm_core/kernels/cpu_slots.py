"""The kernels that write to a KV cache, in place.

``new [B, T, K, H]``, float32, goes into ``slots [R, K, S, H]`` at ``rows`` and ``positions [B, T]``; what is outside is
dropped.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jllm_core.kernels.cpu_code import F32, LANES, Code, Module, Value, Variable
from jllm_core.kernels.cpu_steps import each, keep_operands, total_of
from jllm_core.kernels.cpu_threads import Frame, Plan, write_kernel
from jllm_core.kernels.cpu_vectors import SIZES, fma, largest, load, most, scalar, splat, store_bf16, store_int8, zeros
from jllm_core.quantized_slots import LARGEST


def write_tokens(module: Module, operands: list[str], put: Callable[[Code, Plan, Value, Value], None]) -> None:
    """A kernel that calls ``put(code, plan, source, place)`` for each head of each new token that is inside.

    Args:
        module: where to.
        operands: the kernel's; ``slots`` comes first, ``new`` last but two, before ``rows`` and ``positions``.
        put: gets the address of the head in ``new`` and its number among the heads of ``slots``.
    """

    def plan(frame: Frame, plan: Plan) -> None:
        keep_operands(frame, plan, operands)
        slots, new = frame.argument(0), frame.argument(len(operands) - 3)
        for axis, name in enumerate(("all_rows", "kv_heads", "count", "head")):
            plan.keep(name, slots.dim(axis))
        plan.keep("tokens", new.dim(0) * new.dim(1))
        plan.add_step(1)

    def write(code: Code, plan: Plan, _: Value) -> None:
        with code.loop(0, plan["tokens"]) as number:
            row, at = (code.load_int32(plan[name] + 4 * number) for name in ("rows", "positions"))
            inside = (row >= 0) & (row < plan["all_rows"]) & (at >= 0) & (at < plan["count"])
            with code.when(inside), code.loop(0, plan["kv_heads"]) as head:
                source = plan["new"] + (number * plan["kv_heads"] + head) * plan["head"] * 4
                put(code, plan, source, (row * plan["kv_heads"] + head) * plan["count"] + at)

    write_kernel(module, plan, [write])


@dataclass(frozen=True)
class Write:
    """``new`` of float32 in the type of the slots; the result is ``slots``.

    Attributes:
        name: of that type, ``float32`` or ``bfloat16``.
    """

    name: str

    @property
    def operands(self) -> list[str]:
        return ["slots", "new", "rows", "positions"]

    def write(self, module: Module) -> None:
        def copy(code: Code, plan: Plan, source: Value, place: Value) -> None:
            size = SIZES[self.name]
            to = plan["slots"] + place * plan["head"] * size

            def some(at: Value, lanes: int) -> None:
                numbers = load(code, source + 4 * at, lanes)
                if self.name == "bfloat16":
                    store_bf16(code, to + size * at, numbers)
                else:
                    code.store(to + size * at, numbers)

            each(code, plan["head"], some)

        write_tokens(module, self.operands, copy)


@dataclass(frozen=True)
class Quantize:
    """``new`` of float32 as int8 and ``scales [R, K, S]``, as ``quantize_slots`` does it; the results are both."""

    @property
    def operands(self) -> list[str]:
        return ["slots", "scales", "new", "rows", "positions"]

    def write(self, module: Module) -> None:
        def quantize(code: Code, plan: Plan, source: Value, place: Value) -> None:
            head = plan["head"]
            end, high = head - head % LANES, Variable(code, zeros(code))
            # Stays 0, unless something is infinite or not a number.
            wrong = total_of(
                code,
                head,
                lambda at, lanes, sum_: fma(code, load(code, source + 4 * at, lanes), zeros(code, lanes), sum_),
            )
            with code.loop(0, end, LANES) as offset:
                numbers = load(code, source + 4 * offset)
                high.value = most(code, most(code, numbers, 0.0 - numbers), high.value)
            highest = Variable(code, splat(code, largest(code, high.value), 1))
            with code.loop(end, head) as offset:
                numbers = load(code, source + 4 * offset, 1)
                highest.value = most(code, most(code, numbers, 0.0 - numbers), highest.value)
            scale = scalar(code, highest.value) / float(LARGEST) + wrong
            code.store(plan["scales"] + 4 * place, scale)
            divisor = code.select(scale > 0.0, scale, Value(code.builder, F32(1.0)))

            def round_(offset: Value, lanes: int) -> None:
                numbers = load(code, source + 4 * offset, lanes) / splat(code, divisor, lanes)
                store_int8(code, plan["slots"] + place * head + offset, numbers)

            each(code, head, round_)

        write_tokens(module, self.operands, quantize)


@dataclass(frozen=True)
class Untouched:
    """Results as they come: nothing is written, so memory that the system has not given yet is not asked for."""

    @property
    def operands(self) -> list[str]:
        return []

    def write(self, module: Module) -> None:
        write_kernel(module, lambda frame, plan: None, [])
