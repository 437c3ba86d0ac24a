"""Products of many rows with a weight matrix: prompts.

The matrix is gone through in panels of a few outputs. A panel is widened to float32 once, into memory that stays near
the processor, and then multiplied with some rows after another, whose sums are in registers. The order of a sum is that
of cpu_products.py, so a row has the same bits whether many come with it or none.
"""

from typing import Any

from jllm_core.backends.cpu.few_row_matmul import MAX_ROWS, PRODUCT, UNROLL, Kind, write_product
from jllm_core.backends.cpu.llvm_builder import F32, LANES, Code, Module, Value, Variable, wide_registers
from jllm_core.backends.cpu.vectors import LOADS, fma, load, load_f16, load_int4, splat, zeros

DEPTH = 256
"""Inputs in a panel, a multiple of every group."""


def write_any_product(module: Module, kind: Kind) -> Any:
    """``write_product``, in panels for many rows."""
    few, panels = write_product(module, kind), _write_panels(module, kind)

    def product(code: Code) -> None:
        with code.either(code.arguments[2] > MAX_ROWS) as (many, not_many):
            with many:
                code.call(panels, *code.arguments)
            with not_many:
                code.call(few, *code.arguments)
        code.finish()

    return module.function(f"any_{kind}", len(PRODUCT), product)


def _write_panels(module: Module, kind: Kind) -> Any:
    widths = tuple(dict.fromkeys((tile_size()[1], 1)))
    fills = {vectors: _write_fill(module, kind, vectors) for vectors in widths}
    tiles = {
        (vectors, fresh): write_tiles(module, vectors, fresh, kind) for vectors in widths for fresh in (True, False)
    }
    few = write_product(module, kind)

    def product(code: Code) -> None:
        x, x_stride, rows, w, scales, offsets, w_stride, inputs, y, y_stride, outs = code.arguments
        panel = code.scratch(4 * DEPTH * LANES * widths[0])

        def multiply(first: Value, vectors: int, fresh: bool) -> None:
            depth, width = code.least(inputs - first, DEPTH), 4 * LANES * vectors
            begin = outs * 0 if vectors == widths[0] else outs // (LANES * widths[0]) * (LANES * widths[0])
            with code.loop(begin, outs // (LANES * vectors) * (LANES * vectors), LANES * vectors) as out:
                code.call(fills[vectors], panel, w, scales, offsets, w_stride, first, depth, out)
                to = y + 4 * out
                code.call(tiles[vectors, fresh], x + 4 * first, x_stride, rows, panel, width, depth, to, y_stride)

        for vectors in widths:
            multiply(inputs * 0, vectors, fresh=True)
            with code.loop(DEPTH, inputs, DEPTH) as first:
                multiply(first, vectors, fresh=False)
        end = outs - outs % LANES
        with code.when(outs > end):
            rest = (w + end * kind.size, scales + 2 * end, offsets + 2 * end)
            code.call(few, x, x_stride, rows, *rest, w_stride, inputs, y + 4 * end, y_stride, outs - end)
        code.finish()

    return module.function(f"panels_{kind}", len(PRODUCT), product)


def _write_fill(module: Module, kind: Kind, vectors: int) -> Any:
    """Widens inputs ``first`` to ``first + depth`` of some vectors of outputs, one input after another."""

    def fill(code: Code) -> None:
        panel, w, scales, offsets, w_stride, first, depth, out = code.arguments
        row_bytes = 4 * LANES * vectors

        def group_of(place: Value, n: int) -> Value:
            return 2 * (place // kind.group * w_stride + out + n * LANES)

        def plain() -> None:
            read = LOADS[kind.name]
            with code.loop(0, depth) as place:
                here = w + ((first + place) * w_stride + out) * kind.size
                for line in range(0, LANES * vectors * kind.size, 64):
                    code.prefetch(here + 12 * w_stride * kind.size + line)
                for n in range(vectors):
                    numbers = read(code, here + n * LANES * kind.size)
                    if kind.group:
                        numbers = numbers * load_f16(code, scales + group_of(first + place, n))
                    code.store(panel + place * row_bytes + n * 4 * LANES, numbers)

        def halves() -> None:
            half = kind.group // 2
            with code.loop(0, depth, kind.group) as place:
                for n in range(vectors):
                    scale = load_f16(code, scales + group_of(first + place, n))
                    offset = load_f16(code, offsets + group_of(first + place, n)) if kind.offsets else scale * -8.0
                    source = w + ((first + place) // 2 * w_stride + out + n * LANES)
                    to = panel + place * row_bytes + n * 4 * LANES
                    with code.loop(0, half) as byte:
                        low, high = load_int4(code, source + byte * w_stride)
                        code.store(to + byte * row_bytes, fma(code, low, scale, offset))
                        code.store(to + (half + byte) * row_bytes, fma(code, high, scale, offset))

        halves() if kind.name == "int4" else plain()
        code.finish()

    return module.function(f"fill_{kind}_{vectors}", 8, fill)


def tile_size() -> tuple[int, int]:
    """Rows and vectors of outputs whose sums are in registers at a time."""
    return (8, 2) if wide_registers() else (4, 1)


def write_tiles(module: Module, vectors: int, fresh: bool, kind: Kind | None = None) -> Any:
    """The function of ``x, x_stride, rows, panel, panel_stride, depth, y, y_stride`` for ``y = x panel``.

    The panel has ``depth`` rows of some vectors of float32. Addresses and strides are in bytes.

    Args:
        module: where to.
        vectors: how many.
        fresh: whether sums begin at 0, or at what y holds.
        kind: what the panel was filled from, whose sums have the order of cpu_products.py.
    """
    pairs = kind is not None and kind.name == "int4"
    name = f"tiles_{f'g{kind.group}' if kind is not None and pairs else ''}_{vectors}_{'fresh' if fresh else 'on'}"
    order = _pairs(kind.group) if kind is not None and pairs else _in_order
    functions = [
        (size, _write_tile(module, f"{name}_{size}", size, vectors, fresh, order)) for size in (tile_size()[0], 1)
    ]

    def tiles(code: Code) -> None:
        x, x_stride, rows, panel, panel_stride, depth, y, y_stride = code.arguments
        begin = rows * 0
        for size, function in functions:
            end = rows // size * size
            with code.loop(begin, end, size) as row:
                code.call(
                    function, x + row * x_stride, x_stride, panel, panel_stride, depth, y + row * y_stride, y_stride
                )
            begin = end
        code.finish()

    return module.function(name, 8, tiles)


def _in_order(code: Code, depth: Value, add: Any) -> None:
    end = depth - depth % UNROLL
    with code.loop(0, end, UNROLL) as first:
        add(first, range(UNROLL))
    with code.loop(end, depth) as first:
        add(first, range(1))


def _pairs(group: int) -> Any:
    """Of each group, as many of the first half as of the second: they come out of the same bytes."""

    def go(code: Code, depth: Value, add: Any) -> None:
        half, some = group // 2, UNROLL // 2
        with code.loop(0, depth, group) as begin, code.loop(0, half, some) as first:
            add(begin + first, [place + part for part in (0, half) for place in range(some)])

    return go


def _write_tile(module: Module, name: str, rows: int, vectors: int, fresh: bool, order: Any) -> Any:
    def tile(code: Code) -> None:
        x, x_stride, panel, panel_stride, depth, y, y_stride = code.arguments
        places = [(row, n) for row in range(rows) for n in range(vectors)]

        def address(row: int, n: int) -> Value:
            return y + row * y_stride + 4 * LANES * n

        sums = {place: Variable(code, zeros(code) if fresh else load(code, address(*place))) for place in places}

        def add(first: Value, some: Any) -> None:
            for place in some:
                here = panel + (first + place) * panel_stride
                weights = [load(code, here + 4 * LANES * n) for n in range(vectors)]
                for row in range(rows):
                    number = splat(code, code.load(x + row * x_stride + 4 * (first + place), F32))
                    for n in range(vectors):
                        sums[row, n].value = fma(code, number, weights[n], sums[row, n].value)

        order(code, depth, add)
        for place in places:
            code.store(address(*place), sums[place].value)
        code.finish()

    return module.function(name, 7, tile)
