"""Matrix multiplication for a few rows of activations (decoding): each weight is read once and widened in registers.

``y = x w`` for ``x [rows, inputs]`` and ``y [rows, outs]`` in float32, and a weight matrix ``w`` of any kind. A step of
decoding is bound by the memory that the weights are read from, so w is read in order, some of its rows at a time, and
converted to float32 in registers; no converted copy is made.

Order of sums: an output adds up its inputs in order, UNROLL at a time, one fused multiply-add after another (for int4:
half of them from the first half of a group, half from the second, because these share bytes). Neither the number of
rows nor that of threads, nor the outputs of a task, change it, so a row has the same bits alone and in a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jllm_core.backends.cpu.llvm_builder import F32, LANES, Code, Module, Value, Variable, has_avx512
from jllm_core.backends.cpu.vector_ops import (
    LOADS,
    SIZES,
    fma,
    load,
    load_f16,
    load_int4,
    load_int8,
    reduce_add,
    scalar,
    splat,
    zeros,
)

CACHE_LINE = 64
"""Bytes that come from memory at once."""
PREFETCH_ROWS = 24
"""Rows of w that are fetched ahead of the ones in use. The processor does not follow columns of a matrix itself."""
UNROLL = 8
"""Rows of w that are added to a sum before it is stored again."""
CHUNK_BYTES = 32 << 10
"""Bytes of a transposed w that all rows of x meet one after another: few enough to stay in the cache beside x."""

MAX_ROWS = 16
"""The limit between few and many rows. With so few, converting weights in registers again for each row costs less than
writing a converted panel to memory and reading it back, which ``many_row_matmul`` does."""
MAX_DIRECT_ROWS = 8
"""Up to so many rows, x and y are used where they are; with more, some at a time are copied first."""
MAX_COPIED_OUTS, COPIED_INPUTS = 768, 256
"""Size of these copies: outputs at most, and inputs at a time, a multiple of every group."""

MATMUL_ARGUMENTS = "x", "x_stride", "rows", "w", "scales", "offsets", "w_stride", "inputs", "y", "y_stride", "outs"
"""The arguments of a matmul function: addresses, sizes, and strides from row to row in bytes; that of w in elements."""


@dataclass(frozen=True)
class Kind:
    """Storage format of a weight matrix.

    Attributes:
        name: ``float32``, ``bfloat16``, ``float16``, ``int8`` or ``int4``.
        group: inputs that share a scale; 0 if all share one, or there is none.
        offsets: whether groups have offsets.
        rounded: whether the activations that it meets, where they are many, are rounded to bfloat16.
    """

    name: str
    group: int = 0
    offsets: bool = False
    rounded: bool = False

    @property
    def size(self) -> int:
        """Bytes of a stored element; a byte of int4 holds two weights."""
        return SIZES.get(self.name, 1)

    @property
    def bits(self) -> int:
        """Bits of a weight, 8 for types that are larger."""
        return 4 if self.name == "int4" else 8

    @property
    def has_channel_scales(self) -> bool:
        """Whether each output has one scale, by which its sum is multiplied at the end."""
        return self.name == "int8" and not self.group

    def __str__(self) -> str:
        told = {f"g{self.group}": self.group, "offsets": self.offsets, "rounded": self.rounded}
        return "-".join([self.name, *(word for word, there in told.items() if there)])


def write_few_row_matmul(module: Module, kind: Kind) -> Any:
    """Write the function of MATMUL_ARGUMENTS that sets y to x w, for ``w [inputs, outs]``, without channel scales."""
    wide = module.function(f"add_{kind}", len(MATMUL_ARGUMENTS), lambda code: _add_matmul(code, kind, LANES))
    narrow = module.function(f"add_{kind}_1", len(MATMUL_ARGUMENTS), lambda code: _add_matmul(code, kind, 1))

    def add_all(code: Code, *arguments: Any) -> None:
        """y += x w: whole vectors of outputs, and then those that are left, one by one."""
        x, x_stride, rows, w, scales, offsets, w_stride, inputs, y, y_stride, outs = arguments
        # Two functions, so that the loops over whole vectors have no test for the rest in them.
        end = outs - outs % LANES
        code.call(wide, x, x_stride, rows, w, scales, offsets, w_stride, inputs, y, y_stride, end)
        with code.if_then(outs > end):
            rest = (w + end * kind.size, scales + 2 * end, offsets + 2 * end)
            code.call(narrow, x, x_stride, rows, *rest, w_stride, inputs, y + 4 * end, y_stride, outs - end)

    def add_through_copies(code: Code, *arguments: Any) -> None:
        """y += x w by copies of x and y, some inputs at a time.

        Rows whose stride is a power of two map to the same few sets of the processor's cache and throw each other out.
        The copies have a stride that is a vector longer.
        """
        x, x_stride, rows, w, scales, offsets, w_stride, inputs, y, y_stride, outs = arguments
        x_copy_stride, y_copy_stride = 4 * (COPIED_INPUTS + LANES), 4 * (MAX_COPIED_OUTS + LANES)
        x_copy, y_copy = code.alloca(MAX_ROWS * x_copy_stride), code.alloca(MAX_ROWS * y_copy_stride)
        _copy_rows(code, rows, (y, y_stride), (y_copy, y_copy_stride), outs)
        with code.loop(0, inputs, COPIED_INPUTS) as first:
            depth = code.minimum(inputs - first, COPIED_INPUTS)
            _copy_rows(code, rows, (x + 4 * first, x_stride), (x_copy, x_copy_stride), depth)
            w_now = w + first // (8 // kind.bits) * w_stride * kind.size
            parts = [part + first // (kind.group or 1) * w_stride * 2 for part in (scales, offsets)]
            add_all(code, x_copy, x_copy_stride, rows, w_now, *parts, w_stride, depth, y_copy, y_copy_stride, outs)
        _copy_rows(code, rows, (y_copy, y_copy_stride), (y, y_stride), outs)

    def matmul(code: Code) -> None:
        names = ("rows", "y", "y_stride", "outs")
        rows, y, y_stride, outs = (code.arguments[MATMUL_ARGUMENTS.index(name)] for name in names)
        end = outs - outs % LANES
        # The functions that add are called for one range of inputs after another, so y begins at 0.
        with code.loop(0, rows) as row:
            with code.loop(0, end, LANES) as out:
                code.store(y + row * y_stride + 4 * out, zeros(code))
            with code.loop(end, outs) as out:
                code.store(y + row * y_stride + 4 * out, 0.0, F32)
        # Both ways add in the same order: they differ in where x and y lie, not in a single bit of the result.
        copies = (rows > MAX_DIRECT_ROWS) & (rows <= MAX_ROWS) & (outs <= MAX_COPIED_OUTS)
        with code.if_else(copies) as (through_copies, directly):
            with through_copies:
                add_through_copies(code, *code.arguments)
            with directly:
                add_all(code, *code.arguments)
        code.ret()

    return module.function(f"few_row_matmul_{kind}", len(MATMUL_ARGUMENTS), matmul)


def _copy_rows(code: Code, rows: Value, source: tuple[Any, Any], target: tuple[Any, Any], count: Value) -> None:
    """Copy ``count`` float32 of each row; source and target are addresses with their strides."""
    end = count - count % LANES
    with code.loop(0, rows) as row:
        read, written = (address + row * stride for address, stride in (source, target))
        with code.loop(0, end, LANES) as index:
            code.store(written + 4 * index, load(code, read + 4 * index))
        with code.loop(end, count) as index:
            code.store(written + 4 * index, code.load(read + 4 * index, F32))


def _add_matmul(code: Code, kind: Kind, lanes: int) -> None:
    """y += x w: UNROLL rows of w at a time, from the first to the last, each along all outputs."""
    x, x_stride, rows, w, scales, offsets, w_stride, inputs, y, y_stride, outs = code.arguments
    row_bytes = w_stride * kind.size

    # The weights of UNROLL inputs are in registers when the rows of x pass by: converted once for all of them.
    def add(vectors: list[Value], positions: list[Any], x_now: Value, y_now: Value) -> None:
        """Add to the sums of each row: vectors of weights, times the inputs at these positions from ``x_now`` on."""

        def add_row(x_row: Value, y_row: Value) -> None:
            # One sum, in the order of the inputs, as the tiles for many rows have it.
            partial = load(code, y_row, lanes)
            for weights, position in zip(vectors, positions, strict=True):
                partial = fma(code, splat(code, code.load(x_row + 4 * position, F32), lanes), weights, partial)
            code.store(y_row, partial)

        with code.loop(0, rows) as row:
            add_row(x_now + row * x_stride, y_now + row * y_stride)

    def prefetch(out: Value, address: Value, count: int) -> None:
        if lanes == 1:
            return
        # Once a cache line, not once a vector.
        with code.if_then((out % (CACHE_LINE // kind.size)).equals(0)):
            for n in range(count):
                code.prefetch(address + row_bytes * (PREFETCH_ROWS + n))

    def add_rows(first: Value, count: int) -> None:
        """``count`` rows of w without scales of groups."""
        read = LOADS[kind.name]
        with code.loop(0, outs, lanes) as out:
            address = w + first * row_bytes + out * kind.size
            prefetch(out, address, count)
            vectors = [read(code, address + row_bytes * n, lanes) for n in range(count)]
            add(vectors, list(range(count)), x + 4 * first, y + 4 * out)

    def add_rows_of_group(group: Value, first: Value) -> None:
        """``count`` rows of bytes of a group, from its row ``first`` on; in 4 bits a byte has weights of two inputs."""
        with code.loop(0, outs, lanes) as out:
            address = w + (group * group_bytes + first) * row_bytes + out
            prefetch(out, address, count)
            offset_of_scale = 2 * (group * w_stride + out)
            scale = load_f16(code, scales + offset_of_scale, lanes)
            if halves == 1:
                vectors = [load_int8(code, address + row_bytes * n, lanes) for n in range(count)]
            else:
                pairs = [load_int4(code, address + row_bytes * n, lanes) for n in range(count)]
                vectors = [low for low, _ in pairs] + [high for _, high in pairs]
            if kind.name == "int4":
                # Without offsets 0 stands for -8. Times 8 is exact, so ``v * scale - 8 * scale`` is rounded once, as
                # ``(v - 8) * scale`` would be.
                offset = load_f16(code, offsets + offset_of_scale, lanes) if kind.offsets else scale * -8.0
                vectors = [fma(code, vector, scale, offset) for vector in vectors]
            else:
                vectors = [vector * scale for vector in vectors]
            # The low halves of a group's bytes are the first half of its inputs, the high halves the second.
            positions = [n + half * group_bytes for half in range(halves) for n in range(count)]
            add(vectors, positions, x + 4 * (group * kind.group + first), y + 4 * out)

    if kind.group:
        halves = 2 if kind.name == "int4" else 1
        group_bytes, count = kind.group // halves, UNROLL // halves
        with code.loop(0, inputs // kind.group) as group, code.loop(0, group_bytes, count) as first:
            add_rows_of_group(group, first)
    else:
        # Groups are multiples of UNROLL; without them the last inputs may be fewer.
        rounded = inputs - inputs % UNROLL
        with code.loop(0, rounded, UNROLL) as first:
            add_rows(first, UNROLL)
        with code.loop(rounded, inputs) as first:
            add_rows(first, 1)
    code.ret()


def write_transposed_matmul(module: Module, name: str) -> Any:
    """Write the function of MATMUL_ARGUMENTS that sets y to x w^T, for ``w [outs, inputs]``, without any scales.

    Inputs lie side by side in w, so a vector holds inputs of one output, and a sum is LANES partial sums that are added
    at the end. Some outputs and some rows have their partial sums in registers at a time. All rows of x meet a chunk of
    w while it is in the cache; the next chunk is prefetched meanwhile.

    Args:
        module: where to.
        name: the type of w, a key of LOADS.
    """
    block = 4 if has_avx512() else 2  # block * block vectors of sums: 16 of 32 registers, or 8 of 16 (two to a vector)
    read, size = LOADS[name], SIZES[name]

    def write(code: Code) -> None:
        x, x_stride, rows, w, _, _, w_stride, inputs, y, y_stride, outs = code.arguments
        end = inputs - inputs % LANES

        def write_sums(first: Value, outs_now: int, row: Value, rows_now: int) -> None:
            pairs = [(n, r) for n in range(outs_now) for r in range(rows_now)]
            partials = {pair: Variable(code, zeros(code)) for pair in pairs}

            def add(index: Value, lanes: int, partials: dict[tuple[int, int], Variable]) -> None:
                weights = [read(code, w + ((first + n) * w_stride + index) * size, lanes) for n in range(outs_now)]
                inputs_now = [load(code, x + (row + r) * x_stride + 4 * index, lanes) for r in range(rows_now)]
                for n, r in pairs:
                    partials[n, r].value = fma(code, weights[n], inputs_now[r], partials[n, r].value)

            with code.loop(0, end, LANES) as index:
                add(index, LANES, partials)
            sums = {
                pair: Variable(code, splat(code, reduce_add(code, part.value), 1)) for pair, part in partials.items()
            }
            # What fills no vector is added to the finished sum, one by one.
            with code.loop(end, inputs) as index:
                add(index, 1, sums)
            for n, r in pairs:
                code.store(y + (row + r) * y_stride + 4 * (first + n), scalar(code, sums[n, r].value))

        def prefetch(first: Value, count: int) -> None:
            begin = w + first * w_stride * size
            with code.loop(0, w_stride * (count * size), CACHE_LINE) as line:
                code.prefetch(begin + line)

        # ``inputs * 0`` makes the constant a value of the machine's: what is divided by is known only there.
        chunk = code.maximum((inputs * 0 + CHUNK_BYTES // size) // inputs // block, 1) * block
        with code.loop(0, outs, chunk) as begin:
            count = code.minimum(outs - begin, chunk)

            def write_rows(row: Value, rows_now: int) -> None:
                def write_outs(first: Value, outs_now: int) -> None:
                    if size < SIZES["float32"]:  # float32 is so long that the processor's own prefetching keeps up
                        with code.if_then(row.equals(0)):
                            prefetch(begin + first + chunk, outs_now)
                    write_sums(begin + first, outs_now, row, rows_now)

                for_each_block(code, count, block, write_outs)

            for_each_block(code, rows, block, write_rows)
        code.ret()

    return module.function(f"transposed_matmul_{name}", len(MATMUL_ARGUMENTS), write)


def for_each_block(code: Code, count: Value, block: int, write: Callable[[Value, int], None]) -> None:
    """Write ``write(first, size)`` for whole blocks, and for the rest one by one."""
    end = count - count % block
    with code.loop(0, end, block) as first:
        write(first, block)
    with code.loop(end, count) as first:
        write(first, 1)
