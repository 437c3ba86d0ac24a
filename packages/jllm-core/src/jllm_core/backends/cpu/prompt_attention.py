"""Attention of many new tokens of a text over the KV cache: prompts.

A piece is some neighbouring queries with all heads that share a kv head. It takes a block of keys after another, up to
the last that any of them sees, and keeps the running maximum and sum of each query's softmax (Milakov and Gimelshein,
arXiv:1805.02867; Dao et al., arXiv:2205.14135). Blocks lie at the same positions whoever asks, and what a query does
not see adds nothing to it, so the bits of a query do not depend on those beside it.
"""

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from jllm_core.backends.cpu.decode_attention import MIN_FLOAT32
from jllm_core.backends.cpu.kernel_parts import keep_operands
from jllm_core.backends.cpu.llvm_builder import F32, I32, LANES, Code, Module, Value, Variable, vector
from jllm_core.backends.cpu.many_row_matmul import tile_size, write_tiles
from jllm_core.backends.cpu.threads import Frame, Plan, write_kernel
from jllm_core.backends.cpu.vectors import LOADS, SIZES, exp, largest, load, most, splat, total, zeros

BLOCK = 128
"""Keys that are taken at a time. Fixed, because the order of the sums goes by it."""
MAX_ROWS, MAX_HEAD = 128, 128
"""Queries of a piece (of all heads), and numbers of a head, at most: they are on the stack."""
PLACES = range(0, BLOCK, LANES)
DEFAULT_ROWS = 96
AT_ONCE = 8
"""Tokens of a piece come in multiples of it."""


@dataclass(frozen=True)
class Prompt:
    """Attention of ``q [B * T, N, H]`` at ``positions [B, T]`` over ``keys`` and ``values [B, K, S, H]``.

    The result is ``[B * T, N * H]``. H and S are whole vectors, H is at most MAX_HEAD.

    Attributes:
        cache: the type of keys and values; those of int8 have the operands ``key_scales`` and ``value_scales``.
        paged: whether keys and values are ``[P, K, C, H]``, with C whole vectors, and ``tables [B, n]`` names the pages
            of each row; otherwise slot s is for position s.
    """

    cache: str
    paged: bool

    @property
    def operands(self) -> list[str]:
        scales = ["key_scales", "value_scales"] if self.cache == "int8" else []
        return ["q", "keys", "values", "positions", *scales, *(["tables"] if self.paged else [])]

    def write(self, module: Module) -> None:
        piece = _Piece(self, module)

        def plan(frame: Frame, plan: Plan) -> None:
            code = plan.code
            keep_operands(frame, plan, self.operands)
            q, keys, positions = frame.argument(0), frame.argument(1), frame.argument(3)
            heads, kv_heads, tokens = q.dim(1), keys.dim(1), positions.dim(1)
            group = heads // kv_heads
            some = code.most((group * 0 + DEFAULT_ROWS // AT_ONCE) // group, 1) * AT_ONCE
            sizes = {"heads": heads, "kv_heads": kv_heads, "group": group, "head": q.dim(2), "tokens": tokens}
            blocks = {"some": some, "blocks": (tokens + some - 1) // some, "slots": keys.dim(2), "pages": keys.dim(0)}
            if self.paged:
                blocks["splits"] = frame.argument(len(self.operands) - 1).dim(1)
            for name, value in {**sizes, **blocks, "attended": frame.result(0).data}.items():
                plan.keep(name, value)
            plan.keep("window", frame.attribute(0))
            plan.add_step(positions.dim(0) * kv_heads * blocks["blocks"])

        write_kernel(module, plan, [piece.write])


class _Piece:
    """Writes what is done for one piece."""

    def __init__(self, kernel: Prompt, module: Module) -> None:
        self._cache, self._paged = kernel.cache, kernel.paged
        self._widths = tuple(dict.fromkeys((tile_size()[1], 1)))
        self._tiles = {
            (vectors, fresh): write_tiles(module, vectors, fresh) for vectors in self._widths for fresh in (True, False)
        }

    def write(self, code: Code, plan: Plan, number: Value) -> None:
        blocks, kv_heads = plan["blocks"], plan["kv_heads"]
        block, kv_head, text = number % blocks, number // blocks % kv_heads, number // blocks // kv_heads
        first = block * plan["some"]
        tokens = code.least(plan["some"], plan["tokens"] - first)
        rows, head = tokens * plan["group"], plan["head"]
        queries, sums = code.scratch(4 * MAX_ROWS * MAX_HEAD), code.scratch(4 * MAX_ROWS * MAX_HEAD)
        state = code.scratch(8 * MAX_ROWS)
        positions = plan["positions"] + 4 * (text * plan["tokens"] + first)
        heads_first = (text * plan["tokens"] + first) * plan["heads"] + kv_head * plan["group"]
        self._gather(code, plan, heads_first, tokens, queries)
        with code.loop(0, rows) as row:
            code.store(state + 8 * row, MIN_FLOAT32, F32)
            code.store(state + 8 * row + 4, 0.0, F32)
            with code.loop(0, head, LANES) as place:
                code.store(sums + (row * head + place) * 4, zeros(code))
        begin, end = self._seen(code, plan, positions, tokens)
        with code.loop(begin // BLOCK * BLOCK, end, BLOCK) as key:
            count = code.least(end - key, BLOCK)
            self._take(code, plan, text, kv_head, key, count, positions, rows, queries, sums, state)
        self._scatter(code, plan, heads_first, tokens, sums, state)

    def _seen(self, code: Code, plan: Plan, positions: Value, tokens: Value) -> tuple[Value, Value]:
        """The first slot that a token of the piece sees, and the first behind them all."""
        first, last = Variable(code, plan["slots"] * 0 + 2**31), Variable(code, -1)
        with code.loop(0, tokens) as token:
            position = code.load_int32(positions + 4 * token)
            first.value, last.value = code.least(first.value, position), code.most(last.value, position)
        slots = plan["slots"] * plan["splits"] if self._paged else plan["slots"]
        window = plan["window"]
        behind = code.select(window > 0, code.most(first.value + 1 - window, 0), window * 0)
        return behind, code.least(last.value + 1, slots)

    def _gather(self, code: Code, plan: Plan, heads_first: Value, tokens: Value, queries: Value) -> None:
        """The queries of a piece one after another, divided by ``sqrt(H)``."""
        head, group = plan["head"], plan["group"]
        root = code.intrinsic("llvm.sqrt.f32", F32, Value(code.builder, code.builder.uitofp(head.ir, F32)))
        factor = splat(code, Value(code.builder, F32(1.0)) / root)
        with code.loop(0, tokens) as token:
            source = plan["q"] + (heads_first + token * plan["heads"]) * head * 4
            with code.loop(0, group * head, LANES) as place:
                code.store(queries + (token * group * head + place) * 4, load(code, source + 4 * place) * factor)

    def _scatter(self, code: Code, plan: Plan, heads_first: Value, tokens: Value, sums: Value, state: Value) -> None:
        head, group = plan["head"], plan["group"]
        with code.loop(0, tokens) as token, code.loop(0, group) as n:
            row = token * group + n
            to = plan["attended"] + (heads_first + token * plan["heads"] + n) * head * 4
            weight = code.load(state + 8 * row + 4, F32)
            # A query that sees no key gets zeros, not 0 / 0.
            weight = splat(code, code.select(weight.equals(0.0), 1.0, weight))
            with code.loop(0, head, LANES) as place:
                code.store(to + 4 * place, load(code, sums + (row * head + place) * 4) / weight)

    def _take(
        self,
        code: Code,
        plan: Plan,
        text: Value,
        kv_head: Value,
        key: Value,
        count: Value,
        positions: Value,
        rows: Value,
        queries: Value,
        sums: Value,
        state: Value,
    ) -> None:
        """Add what ``count`` keys from ``key`` on give."""
        head = plan["head"]
        panel, scores = code.scratch(4 * BLOCK * MAX_HEAD), code.scratch(4 * MAX_ROWS * BLOCK)
        vectors = self._widths[0]
        width = LANES * vectors
        with code.loop(0, count, width) as some:
            for n in range(vectors):
                with code.when(some + n * LANES < count):
                    memory = self._memory(code, plan, text, kv_head, key + some + n * LANES)
                    self._turn(code, plan, memory, panel + 4 * LANES * n, 4 * width)
            to = scores + 4 * some
            code.call(self._tiles[vectors, True], queries, 4 * head, rows, panel, 4 * width, head, to, 4 * BLOCK)
        with code.loop(0, rows) as row:
            position = code.load_int32(positions + 4 * (row // plan["group"]))
            self._weigh(code, plan, position - key, count, scores + row * (4 * BLOCK), sums, state, row)
        run = code.least(plan["slots"], BLOCK) if self._paged else plan["slots"] * 0 + BLOCK
        with code.loop(0, count, run) as some:
            memory = self._memory(code, plan, text, kv_head, key + some)
            values, stride = plan["values"] + memory * head * SIZES[self._cache], 4 * head
            depth = code.least(run, count - some)
            if self._cache != "float32":
                values = self._widen(code, plan, memory, values, depth, panel)
            weights = scores + 4 * some
            done = head * 0
            for n in self._widths:
                end = head // (LANES * n) * (LANES * n)
                with code.loop(done, end, LANES * n) as place:
                    column, to = values + 4 * place, sums + 4 * place
                    code.call(self._tiles[n, False], weights, 4 * BLOCK, rows, column, stride, depth, to, stride)
                done = end

    def _memory(self, code: Code, plan: Plan, text: Value, kv_head: Value, key: Value) -> Value:
        """The place of a key among all slots."""
        slots = plan["slots"]
        if not self._paged:
            return (text * plan["kv_heads"] + kv_head) * slots + key
        page = code.load_int32(plan["tables"] + 4 * (text * plan["splits"] + key // slots))
        # A number that no page has stands where nothing is filled.
        page = code.least(code.most(page, page * 0), plan["pages"] - 1)
        return (page * plan["kv_heads"] + kv_head) * slots + key % slots

    def _turn(self, code: Code, plan: Plan, memory: Value, to: Value, stride: Value | int) -> None:
        """LANES keys ``[LANES, H]`` to ``[H, LANES]``."""
        head, size, read = plan["head"], SIZES[self._cache], LOADS[self._cache]
        with code.loop(0, head, LANES) as place:
            lines = [read(code, plan["keys"] + ((memory + n) * head + place) * size) for n in range(LANES)]
            if self._cache == "int8":
                scales = [splat(code, code.load(plan["key_scales"] + 4 * (memory + n), F32)) for n in range(LANES)]
                lines = [line * scale for line, scale in zip(lines, scales, strict=True)]
            for n, line in enumerate(transposed(code, lines)):
                code.store(to + (place + n) * stride, line)

    def _widen(self, code: Code, plan: Plan, memory: Value, values: Value, count: Value, to: Value) -> Value:
        """Values as float32, one key's after another."""
        head, size, read = plan["head"], SIZES[self._cache], LOADS[self._cache]
        with code.loop(0, count) as slot, code.loop(0, head, LANES) as place:
            here = slot * head + place
            numbers = read(code, values + here * size)
            if self._cache == "int8":
                numbers = numbers * splat(code, code.load(plan["value_scales"] + 4 * (memory + slot), F32))
            code.store(to + 4 * here, numbers)
        return to

    def _weigh(
        self, code: Code, plan: Plan, last: Value, count: Value, scores: Value, sums: Value, state: Value, row: Value
    ) -> None:
        """A query's scores to ``exp(score - highest)``, what is not seen to 0; its sums to the new highest.

        Args:
            last: the query's own position, counted from the first key of the block.
        """
        window, at = plan["window"], state + 8 * row
        first = code.select(window > 0, last + 1 - window, last * 0)
        before, weight = code.load(at, F32), code.load(at + 4, F32)
        highest, added = Variable(code, before), Variable(code, zeros(code))
        with code.either((last >= BLOCK - 1) & (first <= 0) & count.equals(BLOCK)) as (all_seen, some_seen):
            with all_seen:
                numbers = [load(code, scores + 4 * place) for place in PLACES]
                highest.value = code.most(largest(code, _in_pairs(code, most, numbers)), before)
                powers = [exp(code, number - splat(code, highest.value)) for number in numbers]
                for number, power in zip(PLACES, powers, strict=True):
                    code.store(scores + 4 * number, power)
                added.value = _in_pairs(code, _sum, powers)
            with some_seen:
                _weigh_seen(code, first, last, count, scores, highest)
                added.value = _in_pairs(code, _sum, [load(code, scores + 4 * place) for place in PLACES])
        code.store(at + 4, weight + total(code, added.value))
        with code.when(highest.value > before):
            kept = exp(code, splat(code, before - highest.value))
            with code.loop(0, plan["head"], LANES) as place:
                here = sums + (row * plan["head"] + place) * 4
                code.store(here, load(code, here) * kept)
            share = Value(code.builder, code.builder.extract_element(kept.ir, ir.Constant(I32, 0)))
            code.store(at, highest.value)
            code.store(at + 4, weight * share + total(code, added.value))


def _weigh_seen(code: Code, first: Value, last: Value, count: Value, scores: Value, highest: Variable) -> None:
    """The same for a block of which the query sees the keys ``first`` to ``last``; what lies behind ``count`` is 0."""
    lanes = Value(code.builder, ir.Constant(vector(I32), list(range(LANES))))

    def seen(place: Value) -> Value:
        low, high = (splat(code, Value(code.builder, code.builder.trunc((x - place).ir, I32))) for x in (first, last))
        return (lanes <= high) & (lanes >= low)

    high = Variable(code, splat(code, Value(code.builder, F32(MIN_FLOAT32))))
    with code.loop(0, count, LANES) as place:
        high.value = most(code, code.select(seen(place), load(code, scores + 4 * place), MIN_FLOAT32), high.value)
    highest.value = code.most(largest(code, high.value), highest.value)
    with code.loop(0, BLOCK, LANES) as place:
        here = scores + 4 * place
        power = exp(code, load(code, here) - splat(code, highest.value))
        # What no product has written yet may be anything.
        code.store(here, code.select(seen(place), power, 0.0))


def _sum(code: Code, a: Value, b: Value) -> Value:
    return a + b


def _in_pairs(code: Code, operation: Any, values: list[Value]) -> Value:
    """One value of a power of two of them, in pairs."""
    while len(values) > 1:
        values = [operation(code, a, b) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def transposed(code: Code, lines: list[Value]) -> list[Value]:
    """As many vectors as a vector has lanes, with rows and columns exchanged: halves of squares, ever smaller ones."""
    lanes, step = range(LANES), LANES // 2
    lines = list(lines)

    def pick(a: Value, b: Value, choice: list[int]) -> Value:
        mask = ir.Constant(vector(I32), choice)
        return Value(code.builder, code.builder.shuffle_vector(a.ir, b.ir, mask))

    while step:
        for n in lanes:
            if not n & step:
                a, b = lines[n], lines[n + step]
                lines[n] = pick(a, b, [LANES + lane - step if lane & step else lane for lane in lanes])
                lines[n + step] = pick(a, b, [LANES + lane if lane & step else lane + step for lane in lanes])
        step //= 2
    return lines
