"""In-place writes to a KV cache, and results that are left as they are.

``new [B, T, K, H]`` in float32 goes into ``slots [R, K, S, H]`` at the row and slot that are named for each token
``[B, T]``. A token whose row or slot is outside the cache is dropped.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from jllm_core.backends.cpu.kernel_building_blocks import for_each_vector, reduce_sum, store_operand_addresses
from jllm_core.backends.cpu.llvm_builder import F32, LANES, Code, Module, Value, Variable
from jllm_core.backends.cpu.threads import Frame, Launch, write_kernel
from jllm_core.backends.cpu.vector_ops import (
    SIZES,
    STORES,
    fma,
    load,
    maximum,
    reduce_max,
    scalar,
    splat,
    store_int8,
    zeros,
)
from jllm_core.quantization.keys_values import MAX_INT8_VALUE


@dataclass(frozen=True)
class Sizes:
    """The shape of ``slots [R, K, S, H]``: R rows, K kv heads, S slots, H numbers of a head."""

    rows: Value
    kv_heads: Value
    slots: Value
    head: Value


@dataclass(frozen=True)
class Part:
    """Addresses of keys, or of values: the new ones, the slots, and the slots' scales where they have some."""

    new: Value
    slots: Value
    scales: Any = None


WriteHead = Callable[[Code, Value, Part, Value, Value], None]
"""``write_head(code, source, part, slot, head)`` writes ``head`` float32 at the address ``source`` into a slot. Slots
are counted through all rows and heads of the part."""


def write_tokens(
    code: Code,
    sizes: Sizes,
    tokens: tuple[Value, Value],
    places: tuple[Value, Value],
    parts: list[Part],
    write_head: WriteHead,
) -> None:
    """Write some new tokens into their slots.

    Args:
        code: where to.
        sizes: the shape of the cache.
        tokens: the first token, and the one to stop before.
        places: addresses of each token's row and slot, int32.
        parts: keys, values or both.
        write_head: from ``head_writer``.
    """
    with code.loop(*tokens) as token:
        row, slot = (code.load_int32(address + 4 * token) for address in places)
        # Compared as signed numbers: a negative place is outside too.
        inside = (row >= 0) & (row < sizes.rows) & (slot >= 0) & (slot < sizes.slots)
        with code.if_then(inside), code.loop(0, sizes.kv_heads) as kv_head:
            number = (row * sizes.kv_heads + kv_head) * sizes.slots + slot
            for part in parts:
                source = part.new + (token * sizes.kv_heads + kv_head) * sizes.head * 4
                write_head(code, source, part, number, sizes.head)


def head_writer(kind: str) -> WriteHead:
    """The function that converts float32 to the type of the slots and writes it."""
    return _write_int8 if kind == "int8" else partial(_write_float, kind)


def _write_float(kind: str, code: Code, source: Value, part: Part, slot: Value, head: Value) -> None:
    size = SIZES[kind]
    target = part.slots + slot * head * size

    def write(index: Value, lanes: int) -> None:
        numbers = load(code, source + 4 * index, lanes)
        STORES[kind](code, target + size * index, numbers)

    for_each_vector(code, head, write)


def _write_int8(code: Code, source: Value, part: Part, slot: Value, head: Value) -> None:
    """``quantize_slots`` of one head: the scale is the largest magnitude by MAX_INT8_VALUE."""
    end, high = head - head % LANES, Variable(code, zeros(code))
    # The sum of 0 * x is 0, and NaN if an x is infinite or NaN. Added to the scale, it makes such a head NaN as a
    # whole; the comparisons of the maximum below would pass over a NaN.
    nan_or_zero = reduce_sum(
        code,
        head,
        lambda index, lanes, sum_: fma(code, load(code, source + 4 * index, lanes), zeros(code, lanes), sum_),
    )
    with code.loop(0, end, LANES) as index:
        numbers = load(code, source + 4 * index)
        high.value = maximum(code, maximum(code, numbers, 0.0 - numbers), high.value)
    highest = Variable(code, splat(code, reduce_max(code, high.value), 1))
    with code.loop(end, head) as index:
        numbers = load(code, source + 4 * index, 1)
        highest.value = maximum(code, maximum(code, numbers, 0.0 - numbers), highest.value)
    scale = scalar(code, highest.value) / float(MAX_INT8_VALUE) + nan_or_zero
    code.store(part.scales + 4 * slot, scale)
    # A head of zeros has the scale 0. A NaN scale is not above 0 either: its values do not matter, the scale is enough.
    divisor = code.select(scale > 0.0, scale, Value(code.builder, F32(1.0)))

    def write_rounded(index: Value, lanes: int) -> None:
        numbers = load(code, source + 4 * index, lanes) / splat(code, divisor, lanes)
        store_int8(code, part.slots + slot * head + index, numbers)

    for_each_vector(code, head, write_rounded)


@dataclass(frozen=True)
class Write:
    """Kernel: write ``new [B, T, K, H]``, float32, into a cache in place.

    Operands ``slots [R, K, S, H]``, ``scales [R, K, S]`` if the slots are int8, ``new``, and int32 ``rows`` and
    ``positions [B, T]``, the row and the slot of each token. Results ``slots`` and ``scales``, changed in place.

    Attributes:
        kind: the type of the slots, ``float32``, ``bfloat16``, ``float16`` or ``int8``.
    """

    kind: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands, in order."""
        return ["slots", *(["scales"] if self.kind == "int8" else []), "new", "rows", "positions"]

    def write(self, module: Module) -> None:
        """Write the kernel's instructions."""

        def prepare(frame: Frame, launch: Launch) -> None:
            store_operand_addresses(frame, launch, self.operands)
            slots, new = frame.argument(0), frame.argument(len(self.operands) - 3)
            for axis, name in enumerate(("all_rows", "kv_heads", "slot_count", "head")):
                launch.set(name, slots.dim(axis))
            launch.set("tokens", new.dim(0) * new.dim(1))
            # One task: the calling thread alone has written these few kilobytes before another has woken up.
            launch.add_phase(1)

        def write_all(code: Code, launch: Launch, task: Value) -> None:
            sizes = Sizes(launch["all_rows"], launch["kv_heads"], launch["slot_count"], launch["head"])
            part = Part(launch["new"], launch["slots"], launch["scales"] if self.kind == "int8" else None)
            places = (launch["rows"], launch["positions"])
            # The only task has the number 0, which is the first token.
            write_tokens(code, sizes, (task, launch["tokens"]), places, [part], head_writer(self.kind))

        write_kernel(module, prepare, [write_all])


@dataclass(frozen=True)
class Untouched:
    """Kernel that writes nothing: its results hold anything.

    Memory that the system has not given to the process yet is therefore not asked for.
    """

    @property
    def operands(self) -> list[str]:
        """None."""
        return []

    def write(self, module: Module) -> None:
        """Write the kernel's instructions."""
        write_kernel(module, lambda frame, launch: None, [])
