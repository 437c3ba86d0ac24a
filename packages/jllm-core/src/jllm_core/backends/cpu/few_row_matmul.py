"""Products of a few rows with a weight matrix that is read once, for every kind of weight.

A piece of a product is some neighbouring outputs. Weights become float32 in registers. An output's sum has the same
order whatever the number of rows, of threads or of outputs in a piece, so its bits do not depend on them either.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jllm_core.backends.cpu.llvm_builder import F32, LANES, Code, Module, Value, Variable, wide_registers
from jllm_core.backends.cpu.vectors import (
    LOADS,
    SIZES,
    fma,
    load,
    load_f16,
    load_int4,
    load_int8,
    scalar,
    splat,
    total,
    zeros,
)

AHEAD = 24
"""How many rows of a matrix are asked for before they are used."""
CHUNK_BYTES = 32 << 10
"""Of a matrix that is transposed: what lies near the processor, beside some rows of x."""
LINE = 64
"""Bytes of memory that come at once."""
UNROLL = 8
"""Rows of a matrix that are added to a sum at once: so often is a sum read and written."""

MAX_ROWS = 16
"""Up to so many rows, widening in registers costs less than a panel of cpu_panels.py does."""
FEW_ROWS, MAX_OUTS, DEPTH = 8, 768, 256
"""More rows than the first go by copies of x and y, of so many outputs at most, and so many inputs at a time: a
multiple of every group."""

PRODUCT = "x", "x_stride", "rows", "w", "scales", "offsets", "w_stride", "inputs", "y", "y_stride", "outs"
"""The arguments of the functions below: addresses, and strides in bytes, but that of w in elements."""


@dataclass(frozen=True)
class Kind:
    """How a matrix is stored.

    Attributes:
        name: ``float32``, ``bfloat16``, ``int8`` or ``int4``.
        group: inputs that share a scale; 0 is all of them, or no scale.
        offsets: whether groups have offsets.
    """

    name: str
    group: int = 0
    offsets: bool = False

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return SIZES.get(self.name, 1)

    @property
    def bits(self) -> int:
        """Of what lies in a byte, at most 8."""
        return 4 if self.name == "int4" else 8

    @property
    def has_channel_scales(self) -> bool:
        """Whether each output has one scale, which comes after the sum."""
        return self.name == "int8" and not self.group

    def __str__(self) -> str:
        return f"{self.name}{f'-g{self.group}' if self.group else ''}{'-offsets' if self.offsets else ''}"


def write_product(module: Module, kind: Kind) -> Any:
    """The function of ``PRODUCT`` that sets y to x w, for w ``[inputs, outs]``; scales of channels are left out."""
    wide = module.function(f"add_{kind}", len(PRODUCT), lambda code: _add_product(code, kind, LANES))
    narrow = module.function(f"add_{kind}_1", len(PRODUCT), lambda code: _add_product(code, kind, 1))

    def add_all(code: Code, *arguments: Any) -> None:
        x, x_stride, rows, w, scales, offsets, w_stride, inputs, y, y_stride, outs = arguments
        end = outs - outs % LANES
        code.call(wide, x, x_stride, rows, w, scales, offsets, w_stride, inputs, y, y_stride, end)
        with code.when(outs > end):
            rest = (w + end * kind.size, scales + 2 * end, offsets + 2 * end)
            code.call(narrow, x, x_stride, rows, *rest, w_stride, inputs, y + 4 * end, y_stride, outs - end)

    def add_apart(code: Code, *arguments: Any) -> None:
        """With copies of x and y whose rows do not come to lie in the same few lines of the processor's cache, as they
        do where a row is a power of two."""
        x, x_stride, rows, w, scales, offsets, w_stride, inputs, y, y_stride, outs = arguments
        x_apart, y_apart = 4 * (DEPTH + LANES), 4 * (MAX_OUTS + LANES)
        x_copy, y_copy = code.scratch(MAX_ROWS * x_apart), code.scratch(MAX_ROWS * y_apart)
        _copy_rows(code, rows, (y, y_stride), (y_copy, y_apart), outs)
        with code.loop(0, inputs, DEPTH) as first:
            depth = code.least(inputs - first, DEPTH)
            _copy_rows(code, rows, (x + 4 * first, x_stride), (x_copy, x_apart), depth)
            w_now = w + first // (8 // kind.bits) * w_stride * kind.size
            parts = [part + first // (kind.group or 1) * w_stride * 2 for part in (scales, offsets)]
            add_all(code, x_copy, x_apart, rows, w_now, *parts, w_stride, depth, y_copy, y_apart, outs)
        _copy_rows(code, rows, (y_copy, y_apart), (y, y_stride), outs)

    def product(code: Code) -> None:
        rows, y, y_stride, outs = (code.arguments[PRODUCT.index(name)] for name in ("rows", "y", "y_stride", "outs"))
        end = outs - outs % LANES
        with code.loop(0, rows) as row:
            with code.loop(0, end, LANES) as out:
                code.store(y + row * y_stride + 4 * out, zeros(code))
            with code.loop(end, outs) as out:
                code.store(y + row * y_stride + 4 * out, 0.0, F32)
        with code.either((rows > FEW_ROWS) & (rows <= MAX_ROWS) & (outs <= MAX_OUTS)) as (apart, together):
            with apart:
                add_apart(code, *code.arguments)
            with together:
                add_all(code, *code.arguments)
        code.finish()

    return module.function(f"product_{kind}", len(PRODUCT), product)


def _copy_rows(code: Code, rows: Value, source: tuple[Any, Any], to: tuple[Any, Any], count: Value) -> None:
    """Rows of ``count`` float32, by addresses and strides."""
    end = count - count % LANES
    with code.loop(0, rows) as row:
        here, there = (address + row * stride for address, stride in (source, to))
        with code.loop(0, end, LANES) as place:
            code.store(there + 4 * place, load(code, here + 4 * place))
        with code.loop(end, count) as place:
            code.store(there + 4 * place, code.load(here + 4 * place, F32))


def _add_product(code: Code, kind: Kind, lanes: int) -> None:
    """Adds x w to y: rows of w in order, some at a time, each along all outputs."""
    x, x_stride, rows, w, scales, offsets, w_stride, inputs, y, y_stride, outs = code.arguments
    row_bytes = w_stride * kind.size

    def add(vectors: list[Value], places: list[Any], x_now: Value, y_now: Value) -> None:
        """Into each row's sums: vectors of weights, of the inputs at these places."""

        def add_row(x_row: Value, y_row: Value) -> None:
            partial = load(code, y_row, lanes)
            for weights, place in zip(vectors, places, strict=True):
                partial = fma(code, splat(code, code.load(x_row + 4 * place, F32), lanes), weights, partial)
            code.store(y_row, partial)

        with code.loop(0, rows) as row:
            add_row(x_now + row * x_stride, y_now + row * y_stride)

    def ask_ahead(out: Value, here: Value, count: int) -> None:
        if lanes == 1:
            return
        with code.when((out % (64 // kind.size)).equals(0)):
            for n in range(count):
                code.prefetch(here + row_bytes * (AHEAD + n))

    def plain(first: Value, count: int) -> None:
        read = LOADS[kind.name]
        with code.loop(0, outs, lanes) as out:
            here = w + first * row_bytes + out * kind.size
            ask_ahead(out, here, count)
            vectors = [read(code, here + row_bytes * n, lanes) for n in range(count)]
            add(vectors, list(range(count)), x + 4 * first, y + 4 * out)

    def of_group(group: Value, first: Value) -> None:
        """Bytes from ``first`` on; of 4 bits, each has the inputs of two places."""
        with code.loop(0, outs, lanes) as out:
            here = w + (group * group_bytes + first) * row_bytes + out
            ask_ahead(out, here, count)
            place = 2 * (group * w_stride + out)
            scale = load_f16(code, scales + place, lanes)
            if halves == 1:
                vectors = [load_int8(code, here + row_bytes * n, lanes) for n in range(count)]
            else:
                pairs = [load_int4(code, here + row_bytes * n, lanes) for n in range(count)]
                vectors = [low for low, _ in pairs] + [high for _, high in pairs]
            if kind.name == "int4":
                # Without offsets 0 stands for -8; 8 times the scale is exact, so the sum is rounded once and the same.
                offset = load_f16(code, offsets + place, lanes) if kind.offsets else scale * -8.0
                vectors = [fma(code, vector, scale, offset) for vector in vectors]
            else:
                vectors = [vector * scale for vector in vectors]
            places = [n + half * group_bytes for half in range(halves) for n in range(count)]
            add(vectors, places, x + 4 * (group * kind.group + first), y + 4 * out)

    if kind.group:
        halves = 2 if kind.name == "int4" else 1
        group_bytes, count = kind.group // halves, UNROLL // halves
        with code.loop(0, inputs // kind.group) as group, code.loop(0, group_bytes, count) as first:
            of_group(group, first)
    else:
        rounded = inputs - inputs % UNROLL
        with code.loop(0, rounded, UNROLL) as first:
            plain(first, UNROLL)
        with code.loop(rounded, inputs) as first:
            plain(first, 1)
    code.finish()


def write_transposed(module: Module, name: str) -> Any:
    """The function of ``PRODUCT`` that sets y to x w^T, for w ``[outs, inputs]`` without groups; scales are left out.

    The sums of some outputs and rows at a time are in registers, as many lanes each, which are added at the end. All
    rows meet a chunk of the matrix while it is near; the next chunk is asked for meanwhile.
    """
    block = 4 if wide_registers() else 2
    read, size = LOADS[name], SIZES[name]

    def write(code: Code) -> None:
        x, x_stride, rows, w, _, _, w_stride, inputs, y, y_stride, outs = code.arguments
        end = inputs - inputs % LANES

        def sums(first: Value, outs_now: int, row: Value, rows_now: int) -> None:
            pairs = [(n, r) for n in range(outs_now) for r in range(rows_now)]
            parts = {pair: Variable(code, zeros(code)) for pair in pairs}

            def add(place: Value, lanes: int, parts: dict[tuple[int, int], Variable]) -> None:
                weights = [read(code, w + ((first + n) * w_stride + place) * size, lanes) for n in range(outs_now)]
                inputs_now = [load(code, x + (row + r) * x_stride + 4 * place, lanes) for r in range(rows_now)]
                for n, r in pairs:
                    parts[n, r].value = fma(code, weights[n], inputs_now[r], parts[n, r].value)

            with code.loop(0, end, LANES) as place:
                add(place, LANES, parts)
            ends = {pair: Variable(code, splat(code, total(code, part.value), 1)) for pair, part in parts.items()}
            with code.loop(end, inputs) as place:
                add(place, 1, ends)
            for n, r in pairs:
                code.store(y + (row + r) * y_stride + 4 * (first + n), scalar(code, ends[n, r].value))

        def ask(first: Value, some: int) -> None:
            begin = w + first * w_stride * size
            with code.loop(0, w_stride * (some * size), LINE) as line:
                code.prefetch(begin + line)

        chunk = code.most((inputs * 0 + CHUNK_BYTES // size) // inputs // block, 1) * block
        with code.loop(0, outs, chunk) as begin:
            count = code.least(outs - begin, chunk)

            def some_rows(row: Value, few: int) -> None:
                def some_outs(first: Value, some: int) -> None:
                    if size < SIZES["float32"]:  # of which the processor knows in time where it goes on
                        with code.when(row.equals(0)):
                            ask(begin + first + chunk, some)
                    sums(begin + first, some, row, few)

                in_blocks(code, count, block, some_outs)

            in_blocks(code, rows, block, some_rows)
        code.finish()

    return module.function(f"transposed_{name}", len(PRODUCT), write)


def in_blocks(code: Code, count: Value, block: int, write: Callable[[Value, int], None]) -> None:
    """``write(first, size)`` for whole blocks, and what is left one by one."""
    end = count - count % block
    with code.loop(0, end, block) as first:
        write(first, block)
    with code.loop(end, count) as first:
        write(first, 1)
