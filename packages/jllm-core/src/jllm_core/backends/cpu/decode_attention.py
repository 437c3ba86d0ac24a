"""The steps of attention over a KV cache: each query reads the filled slots of its row, in pieces that are put together
afterwards (arXiv:2311.01282)."""

from typing import Any

from jllm_core.backends.cpu.few_row_matmul import Kind, write_product, write_transposed
from jllm_core.backends.cpu.kernel_parts import each
from jllm_core.backends.cpu.llvm_builder import F32, LANES, Code, Module, Value, Variable
from jllm_core.backends.cpu.threads import Plan
from jllm_core.backends.cpu.vectors import SIZES, exp, fma, largest, load, most, splat, total, zeros

SPLIT = 256
"""Slots that a piece sees. Fixed, because the order of the sums goes by it."""
MAX_QUERIES = 16
"""Query heads of a kv head, at most: their scores are on the stack."""
MIN_FLOAT32 = -3.4028234663852886e38
"""What takes a score's place where a query does not see a key: the lowest float32, as in ``ops.attention``."""


def write_attention(module: Module, cache: str, paged: bool) -> list[Any]:
    """Two steps: scores, softmax and sums over some slots of one row and kv head; and the pieces of a row put together.

    Their plan has ``q_heads [rows, N, H]``, ``keys`` and ``values [B, K, S, H]`` whose slot s is for position s,
    ``positions [rows]``, the sizes, ``window`` (0 is none), ``parts [rows, N, splits, H + LANES]`` for what the pieces
    find, and ``attended [rows, N * H]``. Only filled slots are read.

    Args:
        module: where to.
        cache: the type of keys and values; those of int8 have ``key_scales`` and ``value_scales [B, K, S]``.
        paged: whether keys and values are ``[P, K, C, H]`` with C at most SPLIT, and ``tables [B, splits]`` names each
            row's pages in the order of its text.
    """
    transposed, product = write_transposed(module, cache), write_product(module, Kind(cache))

    def attend(code: Code, plan: Plan, number: Value) -> None:
        splits, kv_heads, head, group = plan["splits"], plan["kv_heads"], plan["head"], plan["group"]
        split, kv_head, row = number % splits, number // splits % kv_heads, number // splits // kv_heads
        position, window = code.load_int32(plan["positions"] + 4 * row), plan["window"]
        slots = plan["slots"]
        start = split * (slots if paged else SPLIT)
        stop = start + slots if paged else code.least(start + SPLIT, slots)
        stop = code.most(code.least(stop, position + 1), start)
        behind = code.select(window > 0, code.most(position + 1 - window, start), start)
        first = code.least(behind, stop)
        count = stop - first
        text = row // plan["queries"]
        if paged:  # a number that no page has stands where nothing is filled
            page = code.load_int32(plan["tables"] + 4 * (text * splits + split))
            page = code.least(code.most(page, page * 0), plan["pages"] - 1)
            memory = (page * kv_heads + kv_head) * slots + first - start
        else:
            memory = (text * kv_heads + kv_head) * slots + first
        q_first = row * plan["heads"] + kv_head * group
        part = plan["parts"] + (q_first * splits + split) * plan["part_bytes"]
        part_stride = splits * plan["part_bytes"]
        scores, head_bytes = code.scratch(4 * SPLIT * MAX_QUERIES), 4 * head
        size = SIZES[cache]
        queries, keys = plan["q_heads"] + q_first * head_bytes, plan["keys"] + memory * head * size
        code.call(transposed, queries, head_bytes, group, keys, 0, 0, head, head, scores, 4 * SPLIT, count)
        with code.loop(0, group) as query:
            line = scores + query * (4 * SPLIT)
            if cache == "int8":
                multiply(code, line, plan["key_scales"] + 4 * memory, count)
            softmax(code, line, count, head, part + query * part_stride)
            if cache == "int8":
                multiply(code, line, plan["value_scales"] + 4 * memory, count)
        sums, values = part + 4 * LANES, plan["values"] + memory * head * size
        code.call(product, scores, 4 * SPLIT, group, values, 0, 0, head, count, sums, part_stride, head)

    def merge(code: Code, plan: Plan, row: Value) -> None:
        splits, head = plan["splits"], plan["head"]
        with code.loop(0, plan["heads"]) as query:
            parts = plan["parts"] + (row * plan["heads"] + query) * splits * plan["part_bytes"]
            high = Variable(code, Value(code.builder, F32(MIN_FLOAT32)))
            with code.loop(0, splits) as split:
                high.value = code.most(code.load(parts + split * plan["part_bytes"], F32), high.value)
            weight, out = Variable(code, zeros(code)), plan["attended"] + (row * plan["heads"] + query) * head * 4
            with code.loop(0, head, LANES) as place:
                code.store(out + 4 * place, zeros(code))
            with code.loop(0, splits) as split:
                part = parts + split * plan["part_bytes"]
                # Of an empty piece the sum is 0, and so is all that it found.
                share = exp(code, splat(code, code.load(part, F32) - high.value))
                weight.value = fma(code, share, splat(code, code.load(part + 4, F32)), weight.value)
                with code.loop(0, head, LANES) as place:
                    found = load(code, part + 4 * LANES + 4 * place)
                    code.store(out + 4 * place, fma(code, share, found, load(code, out + 4 * place)))
            # A query that sees no key gets zeros, not 0 / 0.
            seen = code.select(weight.value.equals(0.0), 1.0, weight.value)
            with code.loop(0, head, LANES) as place:
                code.store(out + 4 * place, load(code, out + 4 * place) / seen)

    return [attend, merge]


def multiply(code: Code, numbers: Value, factors: Value, count: Value) -> None:
    """So many floats, each by its own factor, in place."""

    def one(place: Value, lanes: int) -> None:
        here = numbers + 4 * place
        code.store(here, load(code, here, lanes) * load(code, factors + 4 * place, lanes))

    each(code, count, one)


def softmax(code: Code, scores: Value, count: Value, head: Value, part: Value) -> None:
    """Scores, not yet divided by ``sqrt(H)``, to ``exp(score - highest)``; the highest and the sum go to ``part``."""
    root = Value(code.builder, code.builder.uitofp(head.ir, F32))
    factor = Value(code.builder, F32(1.0)) / code.intrinsic("llvm.sqrt.f32", F32, root)
    end = (count + (LANES - 1)) // LANES * LANES
    lowest = splat(code, Value(code.builder, F32(MIN_FLOAT32)))
    # Filled up to whole vectors with what adds nothing.
    with code.loop(count, end) as slot:
        code.store(scores + 4 * slot, MIN_FLOAT32, F32)
    high = Variable(code, lowest)
    with code.loop(0, end, LANES) as slot:
        high.value = most(code, load(code, scores + 4 * slot), high.value)
    highest = largest(code, high.value)
    highest = highest * factor
    sums = Variable(code, zeros(code))
    with code.loop(0, end, LANES) as slot:
        power = exp(code, load(code, scores + 4 * slot) * splat(code, factor) - splat(code, highest))
        code.store(scores + 4 * slot, power)
        sums.value = sums.value + power
    code.store(part, highest)
    code.store(part + 4, total(code, sums.value))
