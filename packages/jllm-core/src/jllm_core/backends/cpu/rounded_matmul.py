"""Matrix multiplication for many rows in bfloat16: activations are rounded, and pairs of inputs are added at a time.

``y = x w`` as in ``many_row_matmul``, on processors with AVX512_BF16: an instruction multiplies two neighbouring inputs
by their weights and adds both to a float32 sum, which is twice the arithmetic of float32. Rounding what comes in to
bfloat16 is what a model in bfloat16 does everywhere else; sums stay in float32.

Integer weights of whole channels are exact in bfloat16, and their scales multiply the finished sums. Those of groups
are rounded once, after the scale and the offset.

The order of a sum is that of the inputs, so a row has the same bits whoever comes with it. They are not those of
``few_row_matmul``, which does not round.
"""

from typing import Any

from llvmlite import binding, ir

from jllm_core.backends.cpu.few_row_matmul import CACHE_LINE, MATMUL_ARGUMENTS, Kind
from jllm_core.backends.cpu.llvm_builder import I16, I32, LANES, Code, Module, Value, Variable, vector
from jllm_core.backends.cpu.vector_ops import LOADS, fma, load, load_f16, load_int4, round_bf16, shift, splat, zeros

PANEL_INPUTS = 512
"""Inputs of a panel, a multiple of every group; with two vectors of outputs it fills the processor's first cache as
half as many in float32 do."""
MAX_BLOCK_ROWS = 256
"""Rows that are rounded at a time: as many as a prompt's step has, for a panel is filled anew for each block."""
TILE_ROWS, TILE_VECTORS = 8, 2
"""Rows, and vectors of outputs, whose sums are in registers at a time: 16 of AVX-512's 32."""
PREFETCH_ROWS = 12
"""Rows of w that are fetched ahead of the one in use while a panel is filled."""
UNROLL_PAIRS = 4
# A row of rounded x is a cache line longer than its numbers, for rows that are a power of two apart throw each other
# out of the cache.
_X_STRIDE = 2 * PANEL_INPUTS + CACHE_LINE


class _BFloat(ir.Type):  # type: ignore[misc]  # llvmlite has no such type
    """LLVM's ``bfloat``."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def has_bfloat16_products() -> bool:
    """Whether this processor multiplies bfloat16 (AVX512_BF16)."""
    return bool(binding.get_host_cpu_features().get("avx512bf16"))


def write_rounded_matmul(module: Module, kind: Kind) -> Any:
    """Write the function of MATMUL_ARGUMENTS that sets y to x w for many rows, without channel scales, for outputs
    that fill vectors."""
    widths = (TILE_VECTORS, 1)
    fills = {vectors: _write_fill(module, kind, vectors) for vectors in widths}
    tiles = {(vectors, fresh): _write_tiles(module, vectors, fresh) for vectors in widths for fresh in (True, False)}
    round_rows = _write_round_rows(module)

    def matmul(code: Code) -> None:
        x, x_stride, rows, w, scales, offsets, w_stride, inputs, y, y_stride, outs = code.arguments
        panel = code.alloca(2 * PANEL_INPUTS * LANES * TILE_VECTORS)
        rounded = code.alloca(MAX_BLOCK_ROWS * _X_STRIDE)

        def multiply(first: Value, row: Value, count: Value, fresh: bool) -> None:
            """The inputs of one panel's height from ``first`` on, for all outputs of some rows."""
            depth = code.minimum(inputs - first, PANEL_INPUTS)
            code.call(round_rows, x + row * x_stride + 4 * first, x_stride, count, depth, rounded)
            begin = outs * 0
            for vectors in widths:
                width = LANES * vectors
                end = outs // width * width
                with code.loop(begin, end, width) as out:
                    code.call(fills[vectors], panel, w, scales, offsets, w_stride, first, depth, out)
                    y_now = y + row * y_stride + 4 * out
                    code.call(tiles[vectors, fresh], rounded, count, panel, (depth + 1) // 2, y_now, y_stride)
                begin = end

        with code.loop(0, rows, MAX_BLOCK_ROWS) as row:
            count = code.minimum(rows - row, MAX_BLOCK_ROWS)
            multiply(inputs * 0, row, count, fresh=True)
            with code.loop(PANEL_INPUTS, inputs, PANEL_INPUTS) as first:
                multiply(first, row, count, fresh=False)
        code.ret()

    return module.function(f"rounded_matmul_{kind}", len(MATMUL_ARGUMENTS), matmul)


def _write_round_rows(module: Module) -> Any:
    """Write the function that copies rows as bfloat16, with a zero behind an odd number of inputs."""

    def round_rows(code: Code) -> None:
        x, x_stride, rows, depth, to = code.arguments
        end = depth - depth % LANES
        with code.loop(0, rows) as row:
            source, target = x + row * x_stride, to + row * _X_STRIDE
            with code.loop(0, end, LANES) as index:
                code.store(target + 2 * index, _narrow(code, round_bf16(code, load(code, source + 4 * index))))
            with code.loop(end, depth) as index:
                code.store(target + 2 * index, _narrow(code, round_bf16(code, load(code, source + 4 * index, 1))))
            with code.if_then((depth % 2).not_equals(0)):
                code.store(target + 2 * depth, Value(code.builder, ir.Constant(I16, 0)))
        code.ret()

    return module.function("round_rows", 5, round_rows)


def _write_fill(module: Module, kind: Kind, vectors: int) -> Any:
    """Write the function that fills a panel ``[pairs, vectors * LANES]`` with inputs ``first`` to ``first + depth``,
    the first of a pair in the lower half of 32 bits."""

    def fill(code: Code) -> None:
        panel, w, scales, offsets, w_stride, first, depth, out = code.arguments
        panel_stride = 4 * LANES * vectors

        def group_numbers(address: Value, position: Value, n: int) -> Value:
            """The float16 scales, or offsets, of an input's group, for the nth vector of outputs."""
            return load_f16(code, address + 2 * (position // kind.group * w_stride + out + n * LANES))

        def store_pair(position: Value, n: int, low: Value, high: Value) -> None:
            """Two inputs, the first ``position`` inputs into the panel."""
            at = panel + position // 2 * panel_stride + n * 4 * LANES
            code.store(at, _paired(code, low, high, exact=kind.name == "bfloat16" or kind.has_channel_scales))

        def fill_bytes() -> None:
            def read(position: Value, n: int) -> Value:
                address = w + ((first + position) * w_stride + out + n * LANES) * kind.size
                numbers = LOADS[kind.name](code, address)
                return numbers * group_numbers(scales, first + position, n) if kind.group else numbers

            end = depth - depth % 2
            with code.loop(0, end, 2) as position:
                ahead = w + ((first + position + PREFETCH_ROWS) * w_stride + out) * kind.size
                for row in range(2):
                    for line in range(0, LANES * vectors * kind.size, CACHE_LINE):
                        code.prefetch(ahead + row * w_stride * kind.size + line)
                for n in range(vectors):
                    store_pair(position, n, read(position, n), read(position + 1, n))
            with code.if_then(depth > end):
                for n in range(vectors):
                    store_pair(end, n, read(end, n), zeros(code))

        def fill_half_bytes() -> None:
            half = kind.group // 2
            with code.loop(0, depth, kind.group) as position:
                for n in range(vectors):
                    scale = group_numbers(scales, first + position, n)
                    offset = group_numbers(offsets, first + position, n) if kind.offsets else scale * -8.0
                    source = w + ((first + position) // 2 * w_stride + out + n * LANES)
                    with code.loop(0, half, 2) as byte:
                        both = [load_int4(code, source + (byte + row) * w_stride) for row in range(2)]
                        for start, numbers in zip((0, half), zip(*both, strict=True), strict=True):
                            pair = [fma(code, number, scale, offset) for number in numbers]
                            store_pair(position + start + byte, n, *pair)

        fill_half_bytes() if kind.name == "int4" else fill_bytes()
        code.ret()

    return module.function(f"fill_pairs_{kind}_{vectors}", 8, fill)


def _write_tiles(module: Module, vectors: int, fresh: bool) -> Any:
    """Write the function of ``x, rows, panel, pairs, y, y_stride`` for ``y = x panel``, x being rounded rows."""
    name = f"pair_tiles_{vectors}_{'fresh' if fresh else 'on'}"
    functions = [(size, _write_tile(module, f"{name}_{size}", size, vectors, fresh)) for size in (TILE_ROWS, 1)]

    def tiles(code: Code) -> None:
        x, rows, panel, pairs, y, y_stride = code.arguments
        begin = rows * 0
        for size, function in functions:
            end = rows // size * size
            with code.loop(begin, end, size) as row:
                code.call(function, x + row * _X_STRIDE, panel, pairs, y + row * y_stride, y_stride)
            begin = end
        code.ret()

    return module.function(name, 6, tiles)


def _write_tile(module: Module, name: str, rows: int, vectors: int, fresh: bool) -> Any:
    def tile(code: Code) -> None:
        x, panel, pairs, y, y_stride = code.arguments
        places = [(row, n) for row in range(rows) for n in range(vectors)]

        def address(row: int, n: int) -> Value:
            return y + row * y_stride + 4 * LANES * n

        sums = {place: Variable(code, zeros(code) if fresh else load(code, address(*place))) for place in places}

        def add(first: Value, count: int) -> None:
            for pair in range(count):
                at = panel + (first + pair) * (4 * LANES * vectors)
                weights = [code.load(at + 4 * LANES * n, vector(I32)) for n in range(vectors)]
                for row in range(rows):
                    numbers = splat(code, code.load(x + row * _X_STRIDE + 4 * (first + pair), I32))
                    for n in range(vectors):
                        sums[row, n].value = _add_products(code, sums[row, n].value, numbers, weights[n])

        end = pairs - pairs % UNROLL_PAIRS
        with code.loop(0, end, UNROLL_PAIRS) as first:
            add(first, UNROLL_PAIRS)
        with code.loop(end, pairs) as first:
            add(first, 1)
        for place in places:
            code.store(address(*place), sums[place].value)
        code.ret()

    return module.function(name, 5, tile)


def _add_products(code: Code, sums: Value, a: Value, b: Value) -> Value:
    """Each lane's sum, and the products of its two pairs of bfloat16."""
    pairs = vector(_BFloat(), 2 * LANES)
    a, b = (Value(code.builder, code.builder.bitcast(x.ir, pairs)) for x in (a, b))
    return code.intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", sums.type, sums, a, b)


def _paired(code: Code, low: Value, high: Value, exact: bool) -> Value:
    """Two vectors of float32 as one of pairs of bfloat16; ``exact`` numbers need no rounding."""
    if exact:
        bits = [Value(code.builder, code.builder.bitcast(numbers.ir, vector(I32))) for numbers in (low, high)]
        low, high = shift(code, bits[0], -16), bits[1] & -(1 << 16)
    else:
        low, high = round_bf16(code, low), shift(code, round_bf16(code, high), 16)
    return low | high


def _narrow(code: Code, bits: Value) -> Value:
    return Value(code.builder, code.builder.trunc(bits.ir, vector(I16, bits.type.count)))
