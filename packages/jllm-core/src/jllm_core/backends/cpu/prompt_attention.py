"""Prompt attention: many new tokens of a sequence over the KV cache (FlashAttention on a CPU).

A task is some neighbouring tokens with all query heads that share a kv head; a row of it is one query: a token and a
head. The task goes through the keys in blocks of BLOCK, up to the last that any of its rows sees, and keeps the running
maximum and sum of each row's softmax (Milakov and Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135).

Blocks begin at the same positions whoever asks, and what a row does not see adds exactly nothing to it. So the bits of
a row depend neither on the rows beside it, nor on how a prompt is cut into chunks, nor on the size of pages.
"""

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from jllm_core.backends.cpu.decode_attention import MIN_FLOAT32
from jllm_core.backends.cpu.kernel_building_blocks import store_operand_addresses
from jllm_core.backends.cpu.llvm_builder import F32, I32, LANES, Code, Module, Value, Variable, vector
from jllm_core.backends.cpu.many_row_matmul import tile_size, write_tiles
from jllm_core.backends.cpu.threads import Frame, Launch, write_kernel
from jllm_core.backends.cpu.vector_ops import (
    LOADS,
    SIZES,
    exp,
    load,
    maximum,
    reduce_add,
    reduce_max,
    scalar,
    splat,
    zeros,
)

BLOCK = 128
"""Keys of a block. A fixed number, because the order of the sums goes by it."""
MAX_HEAD = 256
"""Numbers of a head at most: room for a block of keys is on the stack."""
MAX_ROWS, QUERY_ROOM = 128, 128 * 128
"""Rows of a task, and numbers of their queries, at most, for the same reason."""
DEFAULT_ROWS = 96
"""Rows of a task that are aimed at."""
TOKEN_MULTIPLE = 8
"""Tokens of a task come in multiples of it where there is room for as many, so that whole register tiles
(``many_row_matmul.tile_size``) cover them."""
BLOCK_VECTORS = range(0, BLOCK, LANES)


@dataclass(frozen=True)
class Prompt:
    """Kernel: attention of ``q [B * T, N, H]`` at ``positions [B, T]`` over ``keys`` and ``values [B, K, S, H]``.

    The result is ``[B * T, N * H]``, float32. H and S are multiples of LANES, H is at most MAX_HEAD. The attribute
    ``window`` is int64, 0 for none.

    Attributes:
        cache: the type of keys and values; those of int8 have the operands ``key_scales`` and ``value_scales``.
        paged: whether keys and values are ``[P, K, C, H]``, with C a multiple of LANES, and ``tables [B, n]`` names the
            pages of each sequence; otherwise slot s is for position s.
    """

    cache: str
    paged: bool

    @property
    def operands(self) -> list[str]:
        """Names of the operands, in order."""
        scales = ["key_scales", "value_scales"] if self.cache == "int8" else []
        return ["q", "keys", "values", "positions", *scales, *(["tables"] if self.paged else [])]

    def write(self, module: Module) -> None:
        """Write the kernel's instructions."""
        writer = _TaskWriter(self, module)

        def prepare(frame: Frame, launch: Launch) -> None:
            code = launch.code
            store_operand_addresses(frame, launch, self.operands)
            q, keys, positions = frame.argument(0), frame.argument(1), frame.argument(3)
            heads, kv_heads, tokens = q.dim(1), keys.dim(1), positions.dim(1)
            group = heads // kv_heads
            # ``group * 0`` makes the constant a value of the machine's.
            task_tokens = code.maximum((group * 0 + DEFAULT_ROWS // TOKEN_MULTIPLE) // group, 1) * TOKEN_MULTIPLE
            # There is room for fewer of wide heads.
            task_tokens = code.minimum(task_tokens, (group * 0 + QUERY_ROOM) // (group * q.dim(2)))
            sizes = {"heads": heads, "kv_heads": kv_heads, "group": group, "head": q.dim(2), "tokens": tokens}
            cuts = {
                "task_tokens": task_tokens,
                "cuts": (tokens + task_tokens - 1) // task_tokens,
                "slots": keys.dim(2),
                "pages": keys.dim(0),
            }
            if self.paged:
                cuts["table_width"] = frame.argument(len(self.operands) - 1).dim(1)
            for name, value in {**sizes, **cuts, "attended": frame.result(0).data}.items():
                launch.set(name, value)
            launch.set("window", frame.attribute(0))
            launch.add_phase(positions.dim(0) * kv_heads * cuts["cuts"])

        write_kernel(module, prepare, [writer.write])


@dataclass(frozen=True)
class _Rows:
    """The rows of a task.

    Attributes:
        sequence: number of the sequence in the batch.
        kv_head: number of the kv head.
        count: how many rows there are: tokens by heads of the group.
        positions: address of the tokens' positions.
        queries: address of the scaled queries ``[rows, H]``.
        sums: address of the weighted sums of values ``[rows, H]``, relative to the highest score so far.
        softmax: address of the highest score so far and the sum of the weights, ``[rows, 2]``.
    """

    sequence: Value
    kv_head: Value
    count: Value
    positions: Value
    queries: Value
    sums: Value
    softmax: Value


class _TaskWriter:
    """Writer of the instructions of one task."""

    def __init__(self, kernel: Prompt, module: Module) -> None:
        self._cache, self._paged = kernel.cache, kernel.paged
        self._widths = tuple(dict.fromkeys((tile_size()[1], 1)))
        self._tiles = {
            (vectors, fresh): write_tiles(module, vectors, fresh) for vectors in self._widths for fresh in (True, False)
        }

    def write(self, code: Code, launch: Launch, task: Value) -> None:
        cuts, kv_heads = launch["cuts"], launch["kv_heads"]
        cut, kv_head, sequence = task % cuts, task // cuts % kv_heads, task // cuts // kv_heads
        first = cut * launch["task_tokens"]
        tokens = code.minimum(launch["task_tokens"], launch["tokens"] - first)
        count, head = tokens * launch["group"], launch["head"]
        queries, sums = code.alloca(4 * QUERY_ROOM), code.alloca(4 * QUERY_ROOM)
        softmax = code.alloca(8 * MAX_ROWS)
        positions = launch["positions"] + 4 * (sequence * launch["tokens"] + first)
        first_head = (sequence * launch["tokens"] + first) * launch["heads"] + kv_head * launch["group"]
        rows = _Rows(sequence, kv_head, count, positions, queries, sums, softmax)
        self._copy_queries(code, launch, first_head, tokens, queries)
        # The running softmax of each row, nothing seen yet. Minus infinity would not do: infinity - infinity is NaN.
        with code.loop(0, count) as row:
            code.store(softmax + 8 * row, MIN_FLOAT32, F32)
            code.store(softmax + 8 * row + 4, 0.0, F32)
            with code.loop(0, head, LANES) as index:
                code.store(sums + (row * head + index) * 4, zeros(code))
        begin, end = self._visible_range(code, launch, positions, tokens)
        # Rounded down to the grid of blocks, so that a window does not move where blocks begin.
        with code.loop(begin // BLOCK * BLOCK, end, BLOCK) as key:
            keys = code.minimum(end - key, BLOCK)
            self._attend_to_block(code, launch, rows, key, keys)
        self._write_results(code, launch, first_head, tokens, rows)

    def _visible_range(self, code: Code, launch: Launch, positions: Value, tokens: Value) -> tuple[Value, Value]:
        """The first position that a token of the task sees, and the one after the last."""
        # 2^31 is beyond any int32 position.
        first, last = Variable(code, launch["slots"] * 0 + 2**31), Variable(code, -1)
        with code.loop(0, tokens) as token:
            position = code.load_int32(positions + 4 * token)
            first.value, last.value = code.minimum(first.value, position), code.maximum(last.value, position)
        slots = launch["slots"] * launch["table_width"] if self._paged else launch["slots"]
        window = launch["window"]
        behind_window = code.select(window > 0, code.maximum(first.value + 1 - window, 0), window * 0)
        return behind_window, code.minimum(last.value + 1, slots)

    def _copy_queries(self, code: Code, launch: Launch, first_head: Value, tokens: Value, queries: Value) -> None:
        """Copy the task's queries one after another, divided by ``sqrt(H)``."""
        # Queries are scaled once, instead of every score.
        head, group = launch["head"], launch["group"]
        root = code.intrinsic("llvm.sqrt.f32", F32, Value(code.builder, code.builder.uitofp(head.ir, F32)))
        factor = splat(code, Value(code.builder, F32(1.0)) / root)
        with code.loop(0, tokens) as token:
            source = launch["q"] + (first_head + token * launch["heads"]) * head * 4
            with code.loop(0, group * head, LANES) as index:
                code.store(queries + (token * group * head + index) * 4, load(code, source + 4 * index) * factor)

    def _write_results(self, code: Code, launch: Launch, first_head: Value, tokens: Value, rows: _Rows) -> None:
        """Divide the sums by the sums of the weights, and write them to where their heads are in the result."""
        head, group = launch["head"], launch["group"]
        with code.loop(0, tokens) as token, code.loop(0, group) as n:
            row = token * group + n
            result = launch["attended"] + (first_head + token * launch["heads"] + n) * head * 4
            weight = code.load(rows.softmax + 8 * row + 4, F32)
            # A query that sees no key gets zeros, not 0 / 0.
            divisor = splat(code, code.select(weight.equals(0.0), 1.0, weight))
            with code.loop(0, head, LANES) as index:
                code.store(result + 4 * index, load(code, rows.sums + (row * head + index) * 4) / divisor)

    def _attend_to_block(self, code: Code, launch: Launch, rows: _Rows, key: Value, count: Value) -> None:
        """Add what ``count`` keys from position ``key`` on contribute: scores, softmax, weighted sums of values."""
        head = launch["head"]
        panel, scores = code.alloca(4 * BLOCK * MAX_HEAD), code.alloca(4 * MAX_ROWS * BLOCK)
        vectors = self._widths[0]
        width = LANES * vectors
        # scores = queries keys^T: the keys are transposed into panels [H, width], as the matmul's tiles take them.
        with code.loop(0, count, width) as first:
            for n in range(vectors):
                # Beyond count the panel keeps what it held: scores of such keys are computed and not used.
                with code.if_then(first + n * LANES < count):
                    slot = self._slot(code, launch, rows, key + first + n * LANES)
                    self._transpose_keys(code, launch, slot, panel + 4 * LANES * n, 4 * width)
            to = scores + 4 * first
            code.call(
                self._tiles[vectors, True], rows.queries, 4 * head, rows.count, panel, 4 * width, head, to, 4 * BLOCK
            )
        with code.loop(0, rows.count) as row:
            position = code.load_int32(rows.positions + 4 * (row // launch["group"]))
            self._update_softmax(code, launch, rows, row, position - key, count, scores + row * (4 * BLOCK))
        # sums += weights values. Values of one page, or of the whole block, lie one after another.
        run = code.minimum(launch["slots"], BLOCK) if self._paged else launch["slots"] * 0 + BLOCK
        with code.loop(0, count, run) as first:
            slot = self._slot(code, launch, rows, key + first)
            values, stride = launch["values"] + slot * head * SIZES[self._cache], 4 * head
            depth = code.minimum(run, count - first)
            # The panel is free again: the scores are done. float32 values are used where they lie.
            if self._cache != "float32":
                values = self._widen_values(code, launch, slot, values, depth, panel)
            weights = scores + 4 * first
            done = head * 0
            for n in self._widths:
                end = head // (LANES * n) * (LANES * n)
                with code.loop(done, end, LANES * n) as index:
                    column, to = values + 4 * index, rows.sums + 4 * index
                    code.call(self._tiles[n, False], weights, 4 * BLOCK, rows.count, column, stride, depth, to, stride)
                done = end

    def _slot(self, code: Code, launch: Launch, rows: _Rows, position: Value) -> Value:
        """The slot of a position, counted through all rows (or pages) and heads of the cache."""
        slots = launch["slots"]
        if not self._paged:
            return (rows.sequence * launch["kv_heads"] + rows.kv_head) * slots + position
        page = code.load_int32(launch["tables"] + 4 * (rows.sequence * launch["table_width"] + position // slots))
        # Where a table is not filled yet it may hold any number; it is brought into range, and its keys are not seen.
        page = code.minimum(code.maximum(page, page * 0), launch["pages"] - 1)
        return (page * launch["kv_heads"] + rows.kv_head) * slots + position % slots

    def _transpose_keys(self, code: Code, launch: Launch, slot: Value, to: Value, stride: Value | int) -> None:
        """Copy LANES keys ``[LANES, H]``, from a slot on, as float32 ``[H, LANES]``."""
        head, size, read = launch["head"], SIZES[self._cache], LOADS[self._cache]
        with code.loop(0, head, LANES) as index:
            lines = [read(code, launch["keys"] + ((slot + n) * head + index) * size) for n in range(LANES)]
            if self._cache == "int8":
                scales = [splat(code, code.load(launch["key_scales"] + 4 * (slot + n), F32)) for n in range(LANES)]
                lines = [line * scale for line, scale in zip(lines, scales, strict=True)]
            for n, line in enumerate(transpose(code, lines)):
                code.store(to + (index + n) * stride, line)

    def _widen_values(self, code: Code, launch: Launch, slot: Value, values: Value, count: Value, to: Value) -> Value:
        """Copy ``count`` values from a slot on as float32 ``[count, H]``; the address of the copy."""
        head, size, read = launch["head"], SIZES[self._cache], LOADS[self._cache]
        with code.loop(0, count) as n, code.loop(0, head, LANES) as index:
            offset = n * head + index
            numbers = read(code, values + offset * size)
            if self._cache == "int8":
                numbers = numbers * splat(code, code.load(launch["value_scales"] + 4 * (slot + n), F32))
            code.store(to + 4 * offset, numbers)
        return to

    def _update_softmax(
        self, code: Code, launch: Launch, rows: _Rows, row: Value, last: Value, count: Value, scores: Value
    ) -> None:
        """Turn a row's scores into weights ``exp(score - highest)``, those of unseen keys into 0; rescale its sums.

        Args:
            last: the row's own position, counted from the first key of the block.
            count: keys of the block.
            scores: address of the row's scores ``[BLOCK]``.
        """
        window, state = launch["window"], rows.softmax + 8 * row
        first = code.select(window > 0, last + 1 - window, last * 0)
        before, weight = code.load(state, F32), code.load(state + 4, F32)
        highest, added = Variable(code, before), Variable(code, zeros(code))
        # Most blocks are seen as a whole: then there is nothing to mask. Both ways add the weights in the same order.
        with code.if_else((last >= BLOCK - 1) & (first <= 0) & count.equals(BLOCK)) as (all_seen, some_seen):
            with all_seen:
                numbers = [load(code, scores + 4 * start) for start in BLOCK_VECTORS]
                highest.value = code.maximum(reduce_max(code, _in_pairs(code, maximum, numbers)), before)
                weights = [exp(code, number - splat(code, highest.value)) for number in numbers]
                for start, weights_now in zip(BLOCK_VECTORS, weights, strict=True):
                    code.store(scores + 4 * start, weights_now)
                added.value = _in_pairs(code, _add, weights)
            with some_seen:
                _weigh_seen_keys(code, first, last, count, scores, highest)
                added.value = _in_pairs(code, _add, [load(code, scores + 4 * start) for start in BLOCK_VECTORS])
        code.store(state + 4, weight + reduce_add(code, added.value))
        # A new highest score makes all that was summed before smaller, by the same factor.
        with code.if_then(highest.value > before):
            factor = exp(code, splat(code, before - highest.value))
            with code.loop(0, launch["head"], LANES) as index:
                address = rows.sums + (row * launch["head"] + index) * 4
                code.store(address, load(code, address) * factor)
            share = scalar(code, factor)
            code.store(state, highest.value)
            code.store(state + 4, weight * share + reduce_add(code, added.value))


def _weigh_seen_keys(code: Code, first: Value, last: Value, count: Value, scores: Value, highest: Variable) -> None:
    """The same for a block of which the row sees the keys ``first`` to ``last``; weights from ``count`` on are 0."""
    lanes = Value(code.builder, ir.Constant(vector(I32), list(range(LANES))))

    def seen(index: Value) -> Value:
        low, high = (splat(code, Value(code.builder, code.builder.trunc((x - index).ir, I32))) for x in (first, last))
        return (lanes <= high) & (lanes >= low)

    high = Variable(code, splat(code, Value(code.builder, F32(MIN_FLOAT32))))
    with code.loop(0, count, LANES) as index:
        high.value = maximum(code, code.select(seen(index), load(code, scores + 4 * index), MIN_FLOAT32), high.value)
    highest.value = code.maximum(reduce_max(code, high.value), highest.value)
    with code.loop(0, BLOCK, LANES) as index:
        address = scores + 4 * index
        weights = exp(code, load(code, address) - splat(code, highest.value))
        # Selected, not multiplied by 0: scores that no matmul has written may be NaN.
        code.store(address, code.select(seen(index), weights, 0.0))


def _add(code: Code, a: Value, b: Value) -> Value:
    return a + b


def _in_pairs(code: Code, operation: Callable[[Code, Value, Value], Value], values: list[Value]) -> Value:
    """Reduce a power of two of values to one, pair by pair: a chain as short as can be."""
    while len(values) > 1:
        values = [operation(code, a, b) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def transpose(code: Code, lines: list[Value]) -> list[Value]:
    """Transpose a square of LANES vectors, by exchanging off-diagonal halves of ever smaller squares."""
    lanes, step = range(LANES), LANES // 2
    lines = list(lines)

    def shuffle(a: Value, b: Value, choice: list[int]) -> Value:
        mask = ir.Constant(vector(I32), choice)
        return Value(code.builder, code.builder.shuffle_vector(a.ir, b.ir, mask))

    while step:
        for n in lanes:
            if not n & step:
                a, b = lines[n], lines[n + step]
                lines[n] = shuffle(a, b, [LANES + lane - step if lane & step else lane for lane in lanes])
                lines[n + step] = shuffle(a, b, [LANES + lane if lane & step else lane + step for lane in lanes])
        step //= 2
    return lines
