"""The kernels that choose tokens: a row of the vocabulary stays in the processor's cache.

``Threshold`` searches for where top-k and top-p draw the line, and ends as soon as no two numbers are left to decide
between. ``Pick`` takes the largest, or draws, and makes noise only for the tokens that are left.
"""

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from jllm_core.backends.cpu.kernel_parts import each, keep_operands, total_of
from jllm_core.backends.cpu.llvm_builder import F32, I32, LANES, Code, Module, Value, Variable, vector
from jllm_core.backends.cpu.threads import Frame, Plan, write_kernel
from jllm_core.backends.cpu.vectors import (
    exp,
    fma,
    largest,
    load,
    log,
    most,
    scalar,
    shift,
    splat,
    total,
    xor,
    zeros,
)

NOTHING_OUT = float("-inf")
TINY = 1.1754943508222875e-38
"""The smallest float32 that is normal."""
NOWHERE = float("inf")
PIECE = 8192
"""Tokens that one thread looks at, at a time."""
SUMS = 4
"""Sums that grow side by side, so that none waits for the one before."""

Amount = Callable[[Value, int], Value]
"""What the tokens at a place count for, of so many lanes."""


@dataclass(frozen=True)
class Threshold:
    """``kernels.sampling.thresholds`` of ``logits [B, V]``, ``k [B]`` and ``p [B]``; besides the result there is room
    for what the tokens weigh, ``[B, V]``."""

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


@dataclass(frozen=True)
class Pick:
    """The place of the largest of ``logits [B, V]``, the first where some tie; the result is int32 ``[B]``.

    Besides, there is room for what each piece finds, float32 ``[B, ceil(V / PIECE), 2]``.

    Attributes:
        noisy: whether the noise of ``keys [B, 2]`` is added first: ``kernels.sampling.draw``.
    """

    noisy: bool

    @property
    def operands(self) -> list[str]:
        return ["logits", "keys"] if self.noisy else ["logits"]

    def write(self, module: Module) -> None:
        def plan(frame: Frame, plan: Plan) -> None:
            keep_operands(frame, plan, self.operands)
            rows, found = frame.argument(0).dim(0), frame.result(1)
            sizes = {"count": frame.argument(0).dim(1), "pieces": found.dim(1)}
            for name, value in {**sizes, "tokens": frame.result(0).data, "found": found.data}.items():
                plan.keep(name, value)
            plan.add_step(rows * sizes["pieces"])
            plan.add_step(rows)

        def look(code: Code, plan: Plan, number: Value) -> None:
            row, begin = number // plan["pieces"], number % plan["pieces"] * PIECE
            x, end = plan["logits"] + 4 * row * plan["count"], code.least(begin + PIECE, plan["count"])
            whole = end - (end - begin) % LANES
            best, place = (Variable(code, splat(code, Value(code.builder, F32(n)))) for n in (NOTHING_OUT, NOWHERE))
            with code.loop(begin, whole, LANES) as at:
                self._look(code, plan, row, x, at, LANES, best, place)
            highest = largest(code, best.value)
            first = code.select(best.value.equals(splat(code, highest)), place.value, NOWHERE)
            name = f"llvm.vector.reduce.fmin.v{LANES}f32"
            last = [Variable(code, splat(code, n, 1)) for n in (highest, code.intrinsic(name, F32, first))]
            with code.loop(whole, end) as at:
                self._look(code, plan, row, x, at, 1, *last)
            for n, number_found in enumerate(last):
                code.store(plan["found"] + 8 * number + 4 * n, number_found.value)

        def merge(code: Code, plan: Plan, row: Value) -> None:
            best, place = (Variable(code, Value(code.builder, F32(n))) for n in (NOTHING_OUT, NOWHERE))
            with code.loop(0, plan["pieces"]) as piece:
                here = plan["found"] + 8 * (row * plan["pieces"] + piece)
                with code.when(code.load(here, F32) > best.value):
                    best.value, place.value = code.load(here, F32), code.load(here + 4, F32)
            # Of a row without a number above minus infinity, the first.
            token = code.select(place.value < NOWHERE, place.value, 0.0)
            code.store(plan["tokens"] + 4 * row, Value(code.builder, code.builder.fptosi(token.ir, I32)))

        write_kernel(module, plan, [look, merge])

    def _look(
        self, code: Code, plan: Plan, row: Value, x: Value, at: Value, lanes: int, best: Variable, place: Variable
    ) -> None:
        """At a vector of tokens: keep what is above the best, with its place. Every place is a float32."""

        def keep(numbers: Value, places: Value) -> None:
            # Among those that tie, the first stays.
            better = numbers > best.value
            best.value = code.select(better, numbers, best.value)
            floats = Value(code.builder, code.builder.sitofp(places.ir, numbers.type))
            place.value = code.select(better, floats, place.value)

        logits, places = load(code, x + 4 * at, lanes), count_up(code, at, lanes)
        if not self.noisy:
            keep(logits, places)
            return
        keys = plan["keys"] + 8 * row
        # Most tokens are out where a filter is set, and noise is what costs.
        with code.when(any_lane(code, logits > NOTHING_OUT)):
            keep(logits + gumbel(code, (code.load(keys, I32), code.load(keys + 4, I32)), places), places)


def any_lane(code: Code, mask: Value) -> Value:
    """Whether a condition holds in any lane."""
    return Value(code.builder, code.intrinsic(f"llvm.vector.reduce.or.v{mask.type.count}i1", ir.IntType(1), mask).ir)


def count_up(code: Code, first: Value, lanes: int) -> Value:
    """``first``, ``first + 1`` and so on, as int32."""
    start = splat(code, Value(code.builder, code.builder.trunc(first.ir, I32)), lanes)
    return start + Value(code.builder, ir.Constant(vector(I32, lanes), list(range(lanes))))


def gumbel(code: Code, key: tuple[Value, Value], numbers: Value) -> Value:
    """``kernels.sampling.gumbel_noise`` of a key at these places."""
    lanes = numbers.type.count
    ones, twos = (splat(code, part, lanes) for part in key)
    keys = (ones, twos, xor(code, xor(code, ones, twos), Value(code.builder, ones.type([0x1BD11BDA] * lanes))))
    x0, x1 = keys[0], numbers + keys[1]
    for turn in range(5):
        for bits in ((13, 15, 26, 6), (17, 29, 16, 24))[turn % 2]:
            x0 = x0 + x1
            rotated = Value(code.builder, code.builder.or_(shift(code, x1, bits).ir, shift(code, x1, bits - 32).ir))
            x1 = xor(code, rotated, x0)
        x0, x1 = x0 + keys[(turn + 1) % 3], x1 + keys[(turn + 2) % 3] + (turn + 1)
    mantissa = shift(code, xor(code, x0, x1), -9)
    one = Value(code.builder, code.builder.or_(mantissa.ir, ir.Constant(mantissa.type, [0x3F800000] * lanes)))
    fraction = Value(code.builder, code.builder.bitcast(one.ir, vector(F32, lanes))) - 1.0
    tiny = splat(code, Value(code.builder, F32(TINY)), lanes)
    uniform = most(code, fma(code, fraction, splat(code, Value(code.builder, F32(1.0)), lanes), tiny), tiny)
    return 0.0 - log(code, 0.0 - log(code, uniform))
