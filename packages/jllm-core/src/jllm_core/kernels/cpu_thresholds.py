"""The kernel that searches for the thresholds of top-k and top-p: a row of the vocabulary stays in the processor's
cache, and the search ends as soon as no two numbers are left to decide between."""

from collections.abc import Callable
from dataclasses import dataclass

from jllm_core.kernels.cpu_code import F32, LANES, Code, Module, Value, Variable
from jllm_core.kernels.cpu_steps import each, keep_operands, total_of
from jllm_core.kernels.cpu_threads import Frame, Plan, write_kernel
from jllm_core.kernels.cpu_vectors import exp, largest, load, most, scalar, splat, total, zeros

NOTHING_OUT = float("-inf")
SUMS = 4
"""Sums that grow side by side, so that none waits for the one before."""

Amount = Callable[[Value, int], Value]
"""What the tokens at a place count for, of so many lanes."""


@dataclass(frozen=True)
class Threshold:
    """``kernels.thresholds`` of ``logits [B, V]``, ``k [B]`` and ``p [B]``; besides the result it has room for what
    the tokens weigh, ``[B, V]``."""

    @property
    def operands(self) -> list[str]:
        return ["logits", "k", "p"]

    def write(self, module: Module) -> None:
        def plan(frame: Frame, plan: Plan) -> None:
            keep_operands(frame, plan, self.operands)
            plan.keep("count", frame.argument(0).dim(1))
            plan.keep("thresholds", frame.result(0).data)
            plan.keep("weights", frame.result(1).data)
            plan.add_step(frame.argument(0).dim(0))

        def search(code: Code, plan: Plan, row: Value) -> None:
            count, k = plan["count"], code.load_int32(plan["k"] + 4 * row)
            x, weights = plan["logits"] + 4 * row * count, plan["weights"] + 4 * row * count
            p = code.load(plan["p"] + 4 * row, F32)
            threshold = Variable(code, Value(code.builder, F32(NOTHING_OUT)))
            lowest, highest = extremes(code, x, count)
            with code.when((k > 0) & (k < count)):
                ones = Value(code.builder, F32(1.0))
                goal = Value(code.builder, code.builder.sitofp(k.ir, F32))
                found = bisect(code, x, count, (lowest, highest), goal, lambda place, lanes: splat(code, ones, lanes))
                threshold.value = found
            with code.when(p < 1.0):
                kept = threshold.value

                def weigh(place: Value, lanes: int) -> None:
                    numbers, low = load(code, x + 4 * place, lanes), splat(code, kept, lanes)
                    weight = exp(code, numbers - splat(code, highest, lanes))
                    code.store(weights + 4 * place, code.select(numbers >= low, weight, 0.0))

                each(code, count, weigh)
                all_ = total_of(code, count, lambda place, lanes, sum_: sum_ + load(code, weights + 4 * place, lanes))
                start = code.select(kept > lowest, kept, lowest)
                found = bisect(
                    code,
                    x,
                    count,
                    (start, highest),
                    p * all_,
                    lambda place, lanes: load(code, weights + 4 * place, lanes),
                )
                threshold.value = code.select(found > kept, found, kept)
            code.store(plan["thresholds"] + 4 * row, threshold.value)

        write_kernel(module, plan, [search])


def extremes(code: Code, x: Value, count: Value) -> tuple[Value, Value]:
    """The smallest number that is not minus infinity, and the largest."""
    low, high = (Variable(code, splat(code, Value(code.builder, F32(n)))) for n in (float("inf"), NOTHING_OUT))
    end = count - count % LANES
    with code.loop(0, end, LANES) as place:
        numbers = load(code, x + 4 * place)
        high.value = most(code, numbers, high.value)
        finite = code.select(numbers > NOTHING_OUT, numbers, float("inf"))
        low.value = code.select(finite < low.value, finite, low.value)
    name = f"llvm.vector.reduce.fmin.v{LANES}f32"
    lowest = Variable(code, code.intrinsic(name, F32, low.value))
    highest = Variable(code, largest(code, high.value))
    with code.loop(end, count) as place:
        number = code.load(x + 4 * place, F32)
        highest.value = code.select(number > highest.value, number, highest.value)
        finite = code.select(number > NOTHING_OUT, number, float("inf"))
        lowest.value = code.select(finite < lowest.value, finite, lowest.value)
    return lowest.value, highest.value


def bisect(code: Code, x: Value, count: Value, between: tuple[Value, Value], goal: Value, amount: Amount) -> Value:
    """The largest number among x with ``sum(amount where x >= number) >= goal``; minus infinity where none is.

    Args:
        code: where to.
        x: the address of the numbers.
        count: how many there are.
        between: the smallest and the largest of them.
        goal: what is enough.
        amount: of each.
    """
    low, high = Variable(code, between[0]), Variable(code, between[1])
    at_low, at_high = measure(code, x, count, low.value, amount), measure(code, x, count, high.value, amount)
    result = Variable(code, Value(code.builder, F32(NOTHING_OUT)))
    with code.when(at_low[0] >= goal):
        result.value = low.value
        # Enough is left at low, not at high; so many numbers are in between.
        below = Variable(code, at_low[1])
        above = Variable(code, at_high[1])
        with code.either(at_high[0] >= goal) as (done, going_on):
            with done:
                result.value = high.value
            with going_on:
                going = Variable(code, 1)
                with code.repeat_while(lambda: going.value > 0):
                    middle = low.value * 0.5 + high.value * 0.5
                    inside = (middle > low.value) & (middle < high.value) & ((below.value - above.value) > 1.0)
                    with code.either(inside) as (more, settled):
                        with more:
                            mass, number = measure(code, x, count, middle, amount)
                            enough = mass >= goal
                            low.value = code.select(enough, middle, low.value)
                            below.value = code.select(enough, number, below.value)
                            high.value = code.select(enough, high.value, middle)
                            above.value = code.select(enough, above.value, number)
                        with settled:
                            going.value = 0
                result.value = low.value
    found: Value = result.value
    return found


def measure(code: Code, x: Value, count: Value, bound: Value, amount: Amount) -> tuple[Value, Value]:
    """The amount of all numbers from the bound up, and how many they are, both as float32."""
    masses, numbers = ([Variable(code, zeros(code)) for _ in range(SUMS)] for _ in range(2))

    def add(place: Value, lanes: int, mass: Variable, number: Variable) -> None:
        kept = load(code, x + 4 * place, lanes) >= splat(code, bound, lanes)
        mass.value = mass.value + code.select(kept, amount(place, lanes), 0.0)
        number.value = number.value + code.select(kept, splat(code, Value(code.builder, F32(1.0)), lanes), 0.0)

    block = SUMS * LANES
    whole, end = count - count % block, count - count % LANES
    with code.loop(0, whole, block) as place:
        for at, pair in enumerate(zip(masses, numbers, strict=True)):
            add(place + at * LANES, LANES, *pair)
    with code.loop(whole, end, LANES) as place:
        add(place, LANES, masses[0], numbers[0])
    sums = []
    for parts in (masses, numbers):
        sum_ = (parts[0].value + parts[1].value) + (parts[2].value + parts[3].value)
        sums.append(Variable(code, splat(code, total(code, sum_), 1)))
    with code.loop(end, count) as place:
        add(place, 1, *sums)
    mass, number = (scalar(code, part.value) for part in sums)
    return mass, number
