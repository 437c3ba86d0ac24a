"""Sampling kernels: thresholds of top-k and top-p, greedy choice, and the Gumbel-max draw.

A row of logits ``[V]`` stays in the processor's cache while it is gone through again and again. ``Threshold`` finds
where top-k and top-p cut by bisection, and ends as soon as no two numbers are left to decide between. ``Pick`` takes
the largest logit, or draws by adding Gumbel noise first; noise is made only for tokens that the filters have left.

Sums along a row have PARALLEL_SUMS vectors of partial sums, added in a fixed order that depends on V alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from jllm_core.backends.cpu.kernel_building_blocks import for_each_vector, reduce_sum, store_operand_addresses
from jllm_core.backends.cpu.llvm_builder import F32, I32, LANES, Code, Module, Value, Variable, vector
from jllm_core.backends.cpu.threads import Frame, Launch, write_kernel
from jllm_core.backends.cpu.vector_ops import (
    exp,
    fma,
    load,
    log,
    maximum,
    reduce_add,
    reduce_max,
    scalar,
    shift,
    splat,
    xor,
    zeros,
)

MINUS_INFINITY = float("-inf")
"""The logit of a token that is filtered out, and the threshold that filters none."""
NO_TOKEN = float("inf")
"""In place of a token id where none was found; ids are float32 while they are searched."""
MIN_NORMAL = 1.1754943508222875e-38
"""The smallest normal float32."""
TOKENS_PER_TASK = 8192
PARALLEL_SUMS = 4
"""Sums that grow side by side, so that no addition waits for the one before."""

Mass = Callable[[Value, int], Value]
"""``mass(index, lanes)``: what the tokens from this one on count for, one lane each."""


@dataclass(frozen=True)
class Threshold:
    """Kernel: ``ops.sampling.thresholds`` of ``logits [B, V]``, ``k`` (int32) and ``p [B]``.

    Results ``[B]``, the logit from which on tokens are kept, and the workspace ``[B, V]`` for the tokens' weights.
    """

    @property
    def operands(self) -> list[str]:
        """Names of the operands, in order."""
        return ["logits", "k", "p"]

    def write(self, module: Module) -> None:
        """Write the kernel's instructions."""

        def prepare(frame: Frame, launch: Launch) -> None:
            store_operand_addresses(frame, launch, self.operands)
            launch.set("count", frame.argument(0).dim(1))
            launch.set("thresholds", frame.result(0).data)
            launch.set("weights", frame.result(1).data)
            launch.add_phase(frame.argument(0).dim(0))

        def search(code: Code, launch: Launch, row: Value) -> None:
            count, k = launch["count"], code.load_int32(launch["k"] + 4 * row)
            x, weights = launch["logits"] + 4 * row * count, launch["weights"] + 4 * row * count
            p = code.load(launch["p"] + 4 * row, F32)
            threshold = Variable(code, Value(code.builder, F32(MINUS_INFINITY)))
            lowest, highest = extremes(code, x, count)
            with code.if_then((k > 0) & (k < count)):
                ones = Value(code.builder, F32(1.0))
                goal = Value(code.builder, code.builder.sitofp(k.ir, F32))
                found = bisect(code, x, count, (lowest, highest), goal, lambda index, lanes: splat(code, ones, lanes))
                threshold.value = found
            with code.if_then(p < 1.0):
                kept = threshold.value

                def weigh(index: Value, lanes: int) -> None:
                    numbers, low = load(code, x + 4 * index, lanes), splat(code, kept, lanes)
                    weight = exp(code, numbers - splat(code, highest, lanes))
                    code.store(weights + 4 * index, code.select(numbers >= low, weight, 0.0))

                # top-p is a share of what top-k has left.
                for_each_vector(code, count, weigh)
                total = reduce_sum(
                    code, count, lambda index, lanes, sum_: sum_ + load(code, weights + 4 * index, lanes)
                )
                start = code.select(kept > lowest, kept, lowest)
                found = bisect(
                    code,
                    x,
                    count,
                    between=(start, highest),
                    goal=p * total,
                    mass=lambda index, lanes: load(code, weights + 4 * index, lanes),
                )
                threshold.value = code.select(found > kept, found, kept)
            code.store(launch["thresholds"] + 4 * row, threshold.value)

        write_kernel(module, prepare, [search])


def extremes(code: Code, x: Value, count: Value) -> tuple[Value, Value]:
    """The smallest of ``count`` numbers that is not minus infinity, and the largest."""
    low, high = (Variable(code, splat(code, Value(code.builder, F32(n)))) for n in (float("inf"), MINUS_INFINITY))
    end = count - count % LANES
    with code.loop(0, end, LANES) as index:
        numbers = load(code, x + 4 * index)
        high.value = maximum(code, numbers, high.value)
        finite = code.select(numbers > MINUS_INFINITY, numbers, float("inf"))
        low.value = code.select(finite < low.value, finite, low.value)
    reduce_min = f"llvm.vector.reduce.fmin.v{LANES}f32"
    lowest = Variable(code, code.intrinsic(reduce_min, F32, low.value))
    highest = Variable(code, reduce_max(code, high.value))
    with code.loop(end, count) as index:
        number = code.load(x + 4 * index, F32)
        highest.value = code.select(number > highest.value, number, highest.value)
        finite = code.select(number > MINUS_INFINITY, number, float("inf"))
        lowest.value = code.select(finite < lowest.value, finite, lowest.value)
    return lowest.value, highest.value


def bisect(code: Code, x: Value, count: Value, between: tuple[Value, Value], goal: Value, mass: Mass) -> Value:
    """A number t with ``sum(mass where x >= t) >= goal`` that keeps as few of x as any; minus infinity if none has.

    Args:
        code: where to.
        x: address of the numbers.
        count: how many there are.
        between: the smallest and the largest of them.
        goal: the mass that is enough.
        mass: of each number.
    """
    low, high = Variable(code, between[0]), Variable(code, between[1])
    at_low, at_high = measure(code, x, count, low.value, mass), measure(code, x, count, high.value, mass)
    result = Variable(code, Value(code.builder, F32(MINUS_INFINITY)))
    with code.if_then(at_low[0] >= goal):
        result.value = low.value
        # Invariant: from low on there is enough, from high on there is not. below and above count the numbers from
        # each on; where they differ by 1 or less, nothing is left between to decide.
        below = Variable(code, at_low[1])
        above = Variable(code, at_high[1])
        with code.if_else(at_high[0] >= goal) as (done, going_on):
            with done:
                result.value = high.value
            with going_on:
                going = Variable(code, 1)
                with code.while_loop(lambda: going.value > 0):
                    # Halved first: the sum of two large numbers may overflow.
                    middle = low.value * 0.5 + high.value * 0.5
                    # The middle of two neighbouring floats is one of them.
                    inside = (middle > low.value) & (middle < high.value) & ((below.value - above.value) > 1.0)
                    with code.if_else(inside) as (more, settled):
                        with more:
                            found, number = measure(code, x, count, middle, mass)
                            enough = found >= goal
                            low.value = code.select(enough, middle, low.value)
                            below.value = code.select(enough, number, below.value)
                            high.value = code.select(enough, high.value, middle)
                            above.value = code.select(enough, above.value, number)
                        with settled:
                            going.value = 0
                result.value = low.value
    threshold: Value = result.value
    return threshold


def measure(code: Code, x: Value, count: Value, bound: Value, mass: Mass) -> tuple[Value, Value]:
    """The mass of all numbers from the bound up, and how many they are, both as float32."""
    masses, numbers = ([Variable(code, zeros(code)) for _ in range(PARALLEL_SUMS)] for _ in range(2))

    def add(index: Value, lanes: int, mass_sum: Variable, number_sum: Variable) -> None:
        kept = load(code, x + 4 * index, lanes) >= splat(code, bound, lanes)
        mass_sum.value = mass_sum.value + code.select(kept, mass(index, lanes), 0.0)
        number_sum.value = number_sum.value + code.select(kept, splat(code, Value(code.builder, F32(1.0)), lanes), 0.0)

    block = PARALLEL_SUMS * LANES
    whole_blocks, end = count - count % block, count - count % LANES
    with code.loop(0, whole_blocks, block) as index:
        for n, pair in enumerate(zip(masses, numbers, strict=True)):
            add(index + n * LANES, LANES, *pair)
    with code.loop(whole_blocks, end, LANES) as index:
        add(index, LANES, masses[0], numbers[0])
    sums = []
    for parts in (masses, numbers):
        sum_ = (parts[0].value + parts[1].value) + (parts[2].value + parts[3].value)
        sums.append(Variable(code, splat(code, reduce_add(code, sum_), 1)))
    with code.loop(end, count) as index:
        add(index, 1, *sums)
    total_mass, number = (scalar(code, part.value) for part in sums)
    return total_mass, number


@dataclass(frozen=True)
class Pick:
    """Kernel: the index of the largest of ``logits [B, V]``, int32 ``[B]``; the first of several that are equal.

    The second result is a workspace, float32 ``[B, ceil(V / TOKENS_PER_TASK), 2]``: what each task finds.

    Attributes:
        noisy: whether the Gumbel noise of ``keys [B, 2]`` (uint32) is added first: ``ops.sampling.draw``.
    """

    noisy: bool

    @property
    def operands(self) -> list[str]:
        """Names of the operands, in order."""
        return ["logits", "keys"] if self.noisy else ["logits"]

    def write(self, module: Module) -> None:
        """Write the kernel's instructions."""

        def prepare(frame: Frame, launch: Launch) -> None:
            store_operand_addresses(frame, launch, self.operands)
            rows, found = frame.argument(0).dim(0), frame.result(1)
            sizes = {"count": frame.argument(0).dim(1), "tasks_per_row": found.dim(1)}
            for name, value in {**sizes, "tokens": frame.result(0).data, "found": found.data}.items():
                launch.set(name, value)
            launch.add_phase(rows * sizes["tasks_per_row"])
            launch.add_phase(rows)

        def search(code: Code, launch: Launch, task: Value) -> None:
            row, begin = task // launch["tasks_per_row"], task % launch["tasks_per_row"] * TOKENS_PER_TASK
            x, end = (
                launch["logits"] + 4 * row * launch["count"],
                code.minimum(begin + TOKENS_PER_TASK, launch["count"]),
            )
            vectors_end = end - (end - begin) % LANES
            best, token = (Variable(code, splat(code, Value(code.builder, F32(n)))) for n in (MINUS_INFINITY, NO_TOKEN))
            with code.loop(begin, vectors_end, LANES) as index:
                self._update_best(code, launch, row, x, index, LANES, best, token)
            highest = reduce_max(code, best.value)
            # Each lane has kept its first; of the lanes that share the highest, the lowest token is the first of all.
            first = code.select(best.value.equals(splat(code, highest)), token.value, NO_TOKEN)
            reduce_min = f"llvm.vector.reduce.fmin.v{LANES}f32"
            last = [Variable(code, splat(code, n, 1)) for n in (highest, code.intrinsic(reduce_min, F32, first))]
            with code.loop(vectors_end, end) as index:
                self._update_best(code, launch, row, x, index, 1, *last)
            for n, found in enumerate(last):
                code.store(launch["found"] + 8 * task + 4 * n, found.value)

        def merge(code: Code, launch: Launch, row: Value) -> None:
            best, token = (Variable(code, Value(code.builder, F32(n))) for n in (MINUS_INFINITY, NO_TOKEN))
            with code.loop(0, launch["tasks_per_row"]) as task:
                address = launch["found"] + 8 * (row * launch["tasks_per_row"] + task)
                with code.if_then(code.load(address, F32) > best.value):
                    best.value, token.value = code.load(address, F32), code.load(address + 4, F32)
            # Token 0 of a row without a number above minus infinity.
            chosen = code.select(token.value < NO_TOKEN, token.value, 0.0)
            code.store(launch["tokens"] + 4 * row, Value(code.builder, code.builder.fptosi(chosen.ir, I32)))

        write_kernel(module, prepare, [search, merge])

    def _update_best(
        self,
        code: Code,
        launch: Launch,
        row: Value,
        x: Value,
        index: Value,
        lanes: int,
        best: Variable,
        token: Variable,
    ) -> None:
        """Of a vector of tokens keep what is above the best, with its id. Ids below 2^24 are exact in float32."""

        def keep(numbers: Value, ids: Value) -> None:
            # Strictly above: among equals the first stays.
            better = numbers > best.value
            best.value = code.select(better, numbers, best.value)
            float_ids = Value(code.builder, code.builder.sitofp(ids.ir, numbers.type))
            token.value = code.select(better, float_ids, token.value)

        logits, ids = load(code, x + 4 * index, lanes), count_up(code, index, lanes)
        if not self.noisy:
            keep(logits, ids)
            return
        keys = launch["keys"] + 8 * row
        # With a filter most tokens are out, and the noise is what takes time.
        with code.if_then(any_lane(code, logits > MINUS_INFINITY)):
            keep(logits + gumbel(code, (code.load(keys, I32), code.load(keys + 4, I32)), ids), ids)


def any_lane(code: Code, mask: Value) -> Value:
    """Whether a condition holds in any lane."""
    return Value(code.builder, code.intrinsic(f"llvm.vector.reduce.or.v{mask.type.count}i1", ir.IntType(1), mask).ir)


def count_up(code: Code, first: Value, lanes: int) -> Value:
    """The vector ``first``, ``first + 1`` and so on, as int32."""
    start = splat(code, Value(code.builder, code.builder.trunc(first.ir, I32)), lanes)
    return start + Value(code.builder, ir.Constant(vector(I32, lanes), list(range(lanes))))


def gumbel(code: Code, key: tuple[Value, Value], numbers: Value) -> Value:
    """``ops.sampling.gumbel_noise`` of a key for these token ids, ``-log(-log(uniform))``.

    The uniform numbers are JAX's: Threefry-2x32 with 20 rounds (Salmon et al., "Parallel Random Numbers: As Easy as 1,
    2, 3", SC11) of the counter (0, id).
    """
    lanes = numbers.type.count
    ones, twos = (splat(code, part, lanes) for part in key)
    # The parity constant of Threefry's key schedule.
    keys = (ones, twos, xor(code, xor(code, ones, twos), Value(code.builder, ones.type([0x1BD11BDA] * lanes))))
    x0, x1 = keys[0], numbers + keys[1]
    for group in range(5):
        for bits in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x0 = x0 + x1
            rotated = Value(code.builder, code.builder.or_(shift(code, x1, bits).ir, shift(code, x1, bits - 32).ir))
            x1 = xor(code, rotated, x0)
        x0, x1 = x0 + keys[(group + 1) % 3], x1 + keys[(group + 2) % 3] + (group + 1)
    # 23 random bits as the mantissa of a float from 1 to 2.
    mantissa = shift(code, xor(code, x0, x1), -9)
    one = Value(code.builder, code.builder.or_(mantissa.ir, ir.Constant(mantissa.type, [0x3F800000] * lanes)))
    fraction = Value(code.builder, code.builder.bitcast(one.ir, vector(F32, lanes))) - 1.0
    tiny = splat(code, Value(code.builder, F32(MIN_NORMAL)), lanes)
    # Never 0, whose logarithm is minus infinity.
    uniform = maximum(code, fma(code, fraction, splat(code, Value(code.builder, F32(1.0)), lanes), tiny), tiny)
    return 0.0 - log(code, 0.0 - log(code, uniform))
