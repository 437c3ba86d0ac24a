"""What writes to a KV cache, in place.

``new [B, T, K, H]``, float32, goes into ``slots [R, K, S, H]`` at ``rows`` and ``positions [B, T]``; what is outside is
dropped.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from jllm_core.backends.cpu.kernel_parts import each, keep_operands, total_of
from jllm_core.backends.cpu.llvm_builder import F32, LANES, Code, Module, Value, Variable
from jllm_core.backends.cpu.threads import Frame, Plan, write_kernel
from jllm_core.backends.cpu.vectors import SIZES, fma, largest, load, most, scalar, splat, store_bf16, store_int8, zeros
from jllm_core.quantization.keys_values import MAX_INT8_VALUE


@dataclass(frozen=True)
class Sizes:
    """Of ``slots [R, K, S, H]``."""

    rows: Value
    kv_heads: Value
    count: Value
    head: Value


@dataclass(frozen=True)
class Part:
    """Addresses: of what is new, of the slots, and of their scales, where they have some."""

    new: Value
    slots: Value
    scales: Any = None


Put = Callable[[Code, Value, Part, Value, Value], None]
"""``put(code, source, part, place, head)``: the float32 of a head at the address ``source``, ``head`` of them, into the
slot ``place`` of all that the part has."""


def put_tokens(
    code: Code, slots: Sizes, tokens: tuple[Value, Value], places: tuple[Value, Value], parts: list[Part], put: Put
) -> None:
    """Put those of some new tokens that are inside.

    Args:
        code: where to.
        slots: how large the cache is.
        tokens: the first, and the one to stop before.
        places: the addresses of each token's row and slot.
        parts: keys, values or both.
        put: from ``put_of``.
    """
    with code.loop(*tokens) as token:
        row, at = (code.load_int32(address + 4 * token) for address in places)
        inside = (row >= 0) & (row < slots.rows) & (at >= 0) & (at < slots.count)
        with code.when(inside), code.loop(0, slots.kv_heads) as head:
            place = (row * slots.kv_heads + head) * slots.count + at
            for part in parts:
                source = part.new + (token * slots.kv_heads + head) * slots.head * 4
                put(code, source, part, place, slots.head)


def put_of(kind: str) -> Put:
    """How float32 becomes what slots of this type hold."""
    return _quantize if kind == "int8" else partial(_copy, kind)


def _copy(kind: str, code: Code, source: Value, part: Part, place: Value, head: Value) -> None:
    size = SIZES[kind]
    to = part.slots + place * head * size

    def some(at: Value, lanes: int) -> None:
        numbers = load(code, source + 4 * at, lanes)
        if kind == "bfloat16":
            store_bf16(code, to + size * at, numbers)
        else:
            code.store(to + size * at, numbers)

    each(code, head, some)


def _quantize(code: Code, source: Value, part: Part, place: Value, head: Value) -> None:
    """``quantize_slots``."""
    end, high = head - head % LANES, Variable(code, zeros(code))
    # Stays 0, unless something is infinite or not a number.
    wrong = total_of(
        code, head, lambda at, lanes, sum_: fma(code, load(code, source + 4 * at, lanes), zeros(code, lanes), sum_)
    )
    with code.loop(0, end, LANES) as offset:
        numbers = load(code, source + 4 * offset)
        high.value = most(code, most(code, numbers, 0.0 - numbers), high.value)
    highest = Variable(code, splat(code, largest(code, high.value), 1))
    with code.loop(end, head) as offset:
        numbers = load(code, source + 4 * offset, 1)
        highest.value = most(code, most(code, numbers, 0.0 - numbers), highest.value)
    scale = scalar(code, highest.value) / float(MAX_INT8_VALUE) + wrong
    code.store(part.scales + 4 * place, scale)
    divisor = code.select(scale > 0.0, scale, Value(code.builder, F32(1.0)))

    def round_(offset: Value, lanes: int) -> None:
        numbers = load(code, source + 4 * offset, lanes) / splat(code, divisor, lanes)
        store_int8(code, part.slots + place * head + offset, numbers)

    each(code, head, round_)


@dataclass(frozen=True)
class Write:
    """``new`` of float32 in the type of the slots; the result is ``slots``, and ``scales [R, K, S]`` if they have some.

    Attributes:
        kind: of that type, ``float32``, ``bfloat16`` or ``int8``.
    """

    kind: str

    @property
    def operands(self) -> list[str]:
        return ["slots", *(["scales"] if self.kind == "int8" else []), "new", "rows", "positions"]

    def write(self, module: Module) -> None:
        def plan(frame: Frame, plan: Plan) -> None:
            keep_operands(frame, plan, self.operands)
            slots, new = frame.argument(0), frame.argument(len(self.operands) - 3)
            for axis, name in enumerate(("all_rows", "kv_heads", "count", "head")):
                plan.keep(name, slots.dim(axis))
            plan.keep("tokens", new.dim(0) * new.dim(1))
            plan.add_step(1)

        def write(code: Code, plan: Plan, first: Value) -> None:
            sizes = Sizes(plan["all_rows"], plan["kv_heads"], plan["count"], plan["head"])
            part = Part(plan["new"], plan["slots"], plan["scales"] if self.kind == "int8" else None)
            places = (plan["rows"], plan["positions"])
            put_tokens(code, sizes, (first, plan["tokens"]), places, [part], put_of(self.kind))

        write_kernel(module, plan, [write])


@dataclass(frozen=True)
class Untouched:
    """Results as they come: nothing is written, so memory that the system has not given yet is not asked for."""

    @property
    def operands(self) -> list[str]:
        return []

    def write(self, module: Module) -> None:
        write_kernel(module, lambda frame, plan: None, [])
