"""Matrix multiplication for many rows of activations (prompts): panels of weights are widened once for all rows.

``y = x w`` as in ``few_row_matmul``. The matrix is taken in panels of PANEL_INPUTS inputs by one or two vectors of
outputs. A panel is converted to float32 once, into memory that stays in the cache. Then the rows of x pass by, some at
a time, with their sums in registers (the register tiling of Goto and van de Geijn, "Anatomy of High-Performance Matrix
Multiplication", 2008).

The order of a sum is that of ``few_row_matmul``. So a row has the same bits whether many come with it or none.
"""

from collections.abc import Callable
from typing import Any

from jllm_core.backends.cpu.few_row_matmul import (
    CACHE_LINE,
    MATMUL_ARGUMENTS,
    MAX_ROWS,
    UNROLL,
    Kind,
    write_few_row_matmul,
)
from jllm_core.backends.cpu.llvm_builder import F32, LANES, Code, Module, Value, Variable, has_avx512
from jllm_core.backends.cpu.rounded_matmul import write_rounded_matmul
from jllm_core.backends.cpu.vector_ops import LOADS, fma, load, load_f16, load_int4, splat, zeros

PANEL_INPUTS = 256
"""Inputs of a panel, a multiple of every group."""
PREFETCH_ROWS = 12
"""Rows of w that are fetched ahead of the one in use while a panel is filled."""

Add = Callable[[Value, Any], None]
"""``add(first, positions)`` adds the inputs at these positions from ``first`` on to the sums."""
Order = Callable[[Code, Value, Add], None]
"""``order(code, depth, add)`` calls ``add`` for all of ``depth`` inputs, in the order of the sums."""


def write_matmul(module: Module, kind: Kind) -> Any:
    """Write the function of MATMUL_ARGUMENTS that sets y to x w for any number of rows, without channel scales.

    More than MAX_ROWS rows go through panels; fewer do not repay filling them, nor are they rounded.
    """
    few = write_few_row_matmul(module, kind)
    many = (write_rounded_matmul if kind.rounded else _write_many_row_matmul)(module, kind)

    def matmul(code: Code) -> None:
        x, x_stride, rows, w, scales, offsets, w_stride, inputs, y, y_stride, outs = code.arguments
        with code.if_else(rows > MAX_ROWS) as (many_rows, few_rows):
            with many_rows:
                code.call(many, *code.arguments)
                # Outputs that fill no vector: they are taken one by one, whatever the number of rows.
                end = outs - outs % LANES
                with code.if_then(outs > end):
                    rest = (w + end * kind.size, scales + 2 * end, offsets + 2 * end)
                    code.call(few, x, x_stride, rows, *rest, w_stride, inputs, y + 4 * end, y_stride, outs - end)
            with few_rows:
                code.call(few, *code.arguments)
        code.ret()

    return module.function(f"matmul_{kind}", len(MATMUL_ARGUMENTS), matmul)


def _write_many_row_matmul(module: Module, kind: Kind) -> Any:
    """As ``write_matmul``, for many rows, and for outputs that fill vectors."""
    widths = tuple(dict.fromkeys((tile_size()[1], 1)))  # in vectors of outputs: the widest tile, then what is left
    fills = {vectors: _write_fill(module, kind, vectors) for vectors in widths}
    tiles = {
        (vectors, fresh): write_tiles(module, vectors, fresh, kind) for vectors in widths for fresh in (True, False)
    }

    def matmul(code: Code) -> None:
        x, x_stride, rows, w, scales, offsets, w_stride, inputs, y, y_stride, outs = code.arguments
        panel = code.alloca(4 * PANEL_INPUTS * LANES * widths[0])  # 32 KiB at most, one a thread

        def multiply(first: Value, vectors: int, fresh: bool) -> None:
            """The inputs of one panel's height from ``first`` on, for all outputs that panels of this width cover."""
            depth, panel_stride = code.minimum(inputs - first, PANEL_INPUTS), 4 * LANES * vectors
            begin = outs * 0 if vectors == widths[0] else outs // (LANES * widths[0]) * (LANES * widths[0])
            with code.loop(begin, outs // (LANES * vectors) * (LANES * vectors), LANES * vectors) as out:
                code.call(fills[vectors], panel, w, scales, offsets, w_stride, first, depth, out)
                y_now = y + 4 * out
                code.call(
                    tiles[vectors, fresh], x + 4 * first, x_stride, rows, panel, panel_stride, depth, y_now, y_stride
                )

        # Inputs are the outer loop: a panel's height of x, for all rows, stays in the cache while the outputs go by.
        # The first panels set y, the others add to it, so y need not be zeroed.
        for vectors in widths:
            multiply(inputs * 0, vectors, fresh=True)
            with code.loop(PANEL_INPUTS, inputs, PANEL_INPUTS) as first:
                multiply(first, vectors, fresh=False)
        code.ret()

    return module.function(f"many_row_matmul_{kind}", len(MATMUL_ARGUMENTS), matmul)


def _write_fill(module: Module, kind: Kind, vectors: int) -> Any:
    """Write the function that fills a panel ``[depth, vectors * LANES]`` with inputs ``first`` to ``first + depth``."""

    def fill(code: Code) -> None:
        panel, w, scales, offsets, w_stride, first, depth, out = code.arguments
        panel_stride = 4 * LANES * vectors

        def scale_offset(position: Value, n: int) -> Value:
            """The offset, in bytes, of the float16 scales of an input's group, for the nth vector of outputs."""
            return 2 * (position // kind.group * w_stride + out + n * LANES)

        def fill_bytes() -> None:
            """A row of w is a row of the panel."""
            read = LOADS[kind.name]
            with code.loop(0, depth) as position:
                address = w + ((first + position) * w_stride + out) * kind.size
                for line in range(0, LANES * vectors * kind.size, CACHE_LINE):
                    code.prefetch(address + PREFETCH_ROWS * w_stride * kind.size + line)
                for n in range(vectors):
                    numbers = read(code, address + n * LANES * kind.size)
                    if kind.group:
                        numbers = numbers * load_f16(code, scales + scale_offset(first + position, n))
                    code.store(panel + position * panel_stride + n * 4 * LANES, numbers)

        def fill_half_bytes() -> None:
            """A row of w, of 4-bit weights, is two rows of the panel, half a group apart."""
            half = kind.group // 2
            with code.loop(0, depth, kind.group) as position:
                for n in range(vectors):
                    scale = load_f16(code, scales + scale_offset(first + position, n))
                    # As in few_row_matmul: 0 stands for -8 where groups have no offsets.
                    offset = (
                        load_f16(code, offsets + scale_offset(first + position, n)) if kind.offsets else scale * -8.0
                    )
                    source = w + ((first + position) // 2 * w_stride + out + n * LANES)
                    target = panel + position * panel_stride + n * 4 * LANES
                    with code.loop(0, half) as byte:
                        low, high = load_int4(code, source + byte * w_stride)
                        code.store(target + byte * panel_stride, fma(code, low, scale, offset))
                        code.store(target + (half + byte) * panel_stride, fma(code, high, scale, offset))

        fill_half_bytes() if kind.name == "int4" else fill_bytes()
        code.ret()

    return module.function(f"fill_{kind}_{vectors}", 8, fill)


def tile_size() -> tuple[int, int]:
    """Rows, and vectors of outputs, whose sums are in registers at a time.

    With AVX-512 16 of 32 registers hold sums. Without it a vector takes two registers or more: 4 rows by 1 vector.
    """
    return (8, 2) if has_avx512() else (4, 1)


def write_tiles(module: Module, vectors: int, fresh: bool, kind: Kind | None = None) -> Any:
    """Write the function of ``x, x_stride, rows, panel, panel_stride, depth, y, y_stride`` for ``y = x panel``.

    ``x [rows, depth]``, ``panel [depth, vectors * LANES]`` and ``y [rows, vectors * LANES]`` are float32. Addresses and
    strides are in bytes.

    Args:
        module: where to.
        vectors: width of the panel.
        fresh: whether sums begin at 0, or at what y holds.
        kind: what the panel was filled from, whose order of sums is kept; None is the order of the inputs.
    """
    pairs = kind is not None and kind.name == "int4"
    name = f"tiles_{f'g{kind.group}' if kind is not None and pairs else ''}_{vectors}_{'fresh' if fresh else 'on'}"
    order = _halves_in_turn(kind.group) if kind is not None and pairs else _in_order
    functions = [
        (size, _write_tile(module, f"{name}_{size}", size, vectors, fresh, order)) for size in (tile_size()[0], 1)
    ]

    def tiles(code: Code) -> None:
        x, x_stride, rows, panel, panel_stride, depth, y, y_stride = code.arguments
        begin = rows * 0
        for size, function in functions:  # whole tiles, and then row by row
            end = rows // size * size
            with code.loop(begin, end, size) as row:
                code.call(
                    function, x + row * x_stride, x_stride, panel, panel_stride, depth, y + row * y_stride, y_stride
                )
            begin = end
        code.ret()

    return module.function(name, 8, tiles)


def _in_order(code: Code, depth: Value, add: Add) -> None:
    """The order of every kind but int4."""
    end = depth - depth % UNROLL
    with code.loop(0, end, UNROLL) as first:
        add(first, range(UNROLL))
    with code.loop(end, depth) as first:
        add(first, range(1))


def _halves_in_turn(group: int) -> Order:
    """The order of int4: of each group, some of the first half, then as many of the second, as they share bytes."""

    def order(code: Code, depth: Value, add: Add) -> None:
        half, count = group // 2, UNROLL // 2
        with code.loop(0, depth, group) as begin, code.loop(0, half, count) as first:
            add(begin + first, [position + part for part in (0, half) for position in range(count)])

    return order


def _write_tile(module: Module, name: str, rows: int, vectors: int, fresh: bool, order: Order) -> Any:
    """Write the function of one tile: ``rows`` by ``vector_ops`` sums in registers, over all of a panel's inputs."""

    def tile(code: Code) -> None:
        x, x_stride, panel, panel_stride, depth, y, y_stride = code.arguments
        places = [(row, n) for row in range(rows) for n in range(vectors)]

        def address(row: int, n: int) -> Value:
            return y + row * y_stride + 4 * LANES * n

        # The optimiser keeps these in registers: that is what the size of a tile is for.
        sums = {place: Variable(code, zeros(code) if fresh else load(code, address(*place))) for place in places}

        def add(first: Value, positions: Any) -> None:
            for position in positions:
                weights_address = panel + (first + position) * panel_stride
                weights = [load(code, weights_address + 4 * LANES * n) for n in range(vectors)]
                for row in range(rows):
                    # One number of x for all outputs of the tile.
                    number = splat(code, code.load(x + row * x_stride + 4 * (first + position), F32))
                    for n in range(vectors):
                        sums[row, n].value = fma(code, number, weights[n], sums[row, n].value)

        order(code, depth, add)
        for place in places:
            code.store(address(*place), sums[place].value)
        code.ret()

    return module.function(name, 7, tile)
