"""Decode attention: a few new tokens of each sequence over the filled slots of the KV cache (flash-decoding).

A row is one new token. The slots of a row and kv head are divided into splits of SPLIT slots (of a page each, where the
cache has pages). A task computes scores, softmax and weighted sum over one split, for all query heads that share the kv
head; a second phase merges the splits of a row by their maxima and sums (https://pytorch.org/blog/flash-decoding/;
Hong et al., FlashDecoding++, arXiv:2311.01282; Milakov and Gimelshein, arXiv:1805.02867).

Splits lie at the same positions whoever asks and are merged in order, so the bits of a row depend neither on other rows
nor on the number of threads.
"""

from typing import Any

from jllm_core.backends.cpu.few_row_matmul import Kind, write_few_row_matmul, write_transposed_matmul
from jllm_core.backends.cpu.kernel_building_blocks import for_each_vector
from jllm_core.backends.cpu.llvm_builder import F32, LANES, Code, Module, Value, Variable
from jllm_core.backends.cpu.threads import Launch
from jllm_core.backends.cpu.vector_ops import SIZES, exp, fma, load, maximum, reduce_add, reduce_max, splat, zeros

SPLIT = 256
"""Slots of a split. A fixed number, because the order of the sums goes by it."""
MAX_QUERIES = 16
"""Query heads of a kv head, at most: their scores are on the stack."""
MIN_FLOAT32 = -3.4028234663852886e38
"""The lowest float32, in place of the score where a query does not see a key, as in ``ops.attention``."""


def write_decode_attention(module: Module, cache: str, paged: bool) -> list[Any]:
    """Write the two phases of decode attention: the splits, and merging them. Only filled slots are read.

    The launch has ``q_heads [rows, N, H]``, ``keys`` and ``values [B, K, S, H]`` whose slot s is for position s,
    ``positions [rows]`` of the new tokens, sizes, ``window`` (0 is none), ``partials [rows, N, splits, H + LANES]`` for
    the results of the splits, and ``attended [rows, N * H]``. The results of a split are the highest score, the sum of
    the weights, room up to a whole vector, and the weighted sum of values.

    Args:
        module: where to.
        cache: the type of keys and values; those of int8 have ``key_scales`` and ``value_scales [B, K, S]``.
        paged: whether keys and values are ``[P, K, C, H]`` with C at most SPLIT, and ``tables [B, splits]`` names each
            sequence's pages in the order of its positions.
    """
    transposed_matmul, matmul = write_transposed_matmul(module, cache), write_few_row_matmul(module, Kind(cache))

    def attend(code: Code, launch: Launch, task: Value) -> None:
        splits, kv_heads, head, group = launch["splits"], launch["kv_heads"], launch["head"], launch["group"]
        split, kv_head, row = task % splits, task // splits % kv_heads, task // splits // kv_heads
        position, window = code.load_int32(launch["positions"] + 4 * row), launch["window"]
        slots = launch["slots"]
        start = split * (slots if paged else SPLIT)
        stop = start + slots if paged else code.minimum(start + SPLIT, slots)
        # A row sees the positions up to its own, of a window only the last; a split may see nothing at all.
        stop = code.maximum(code.minimum(stop, position + 1), start)
        behind_window = code.select(window > 0, code.maximum(position + 1 - window, start), start)
        first = code.minimum(behind_window, stop)
        count = stop - first
        sequence = row // launch["new_tokens"]
        if paged:
            # Where a table is not filled yet it may hold any number; it is brought into range, and nothing is read.
            page = code.load_int32(launch["tables"] + 4 * (sequence * splits + split))
            page = code.minimum(code.maximum(page, page * 0), launch["pages"] - 1)
            first_slot = (page * kv_heads + kv_head) * slots + first - start
        else:
            first_slot = (sequence * kv_heads + kv_head) * slots + first
        first_query = row * launch["heads"] + kv_head * group
        partial = launch["partials"] + (first_query * splits + split) * launch["partial_bytes"]
        partial_stride = splits * launch["partial_bytes"]
        scores, head_bytes = code.alloca(4 * SPLIT * MAX_QUERIES), 4 * head
        size = SIZES[cache]
        queries, keys = launch["q_heads"] + first_query * head_bytes, launch["keys"] + first_slot * head * size
        # Keys and values are weight matrices to the matmuls: the group's queries are the few rows.
        code.call(transposed_matmul, queries, head_bytes, group, keys, 0, 0, head, head, scores, 4 * SPLIT, count)
        with code.loop(0, group) as query:
            query_scores = scores + query * (4 * SPLIT)
            # Each int8 key has one scale, so it multiplies the score; a value's scale multiplies its weight.
            if cache == "int8":
                multiply(code, query_scores, launch["key_scales"] + 4 * first_slot, count)
            softmax(code, query_scores, count, head, partial + query * partial_stride)
            if cache == "int8":
                multiply(code, query_scores, launch["value_scales"] + 4 * first_slot, count)
        sums, values = partial + 4 * LANES, launch["values"] + first_slot * head * size
        code.call(matmul, scores, 4 * SPLIT, group, values, 0, 0, head, count, sums, partial_stride, head)

    def merge(code: Code, launch: Launch, row: Value) -> None:
        splits, head = launch["splits"], launch["head"]
        with code.loop(0, launch["heads"]) as query:
            partials = launch["partials"] + (row * launch["heads"] + query) * splits * launch["partial_bytes"]
            high = Variable(code, Value(code.builder, F32(MIN_FLOAT32)))
            with code.loop(0, splits) as split:
                high.value = code.maximum(code.load(partials + split * launch["partial_bytes"], F32), high.value)
            weight, out = Variable(code, zeros(code)), launch["attended"] + (row * launch["heads"] + query) * head * 4
            with code.loop(0, head, LANES) as index:
                code.store(out + 4 * index, zeros(code))
            with code.loop(0, splits) as split:
                partial = partials + split * launch["partial_bytes"]
                # Each split's sums are relative to its own highest score. Those of a split that sees nothing are 0.
                share = exp(code, splat(code, code.load(partial, F32) - high.value))
                weight.value = fma(code, share, splat(code, code.load(partial + 4, F32)), weight.value)
                with code.loop(0, head, LANES) as index:
                    sums = load(code, partial + 4 * LANES + 4 * index)
                    code.store(out + 4 * index, fma(code, share, sums, load(code, out + 4 * index)))
            # A query that sees no key gets zeros, not 0 / 0.
            divisor = code.select(weight.value.equals(0.0), 1.0, weight.value)
            with code.loop(0, head, LANES) as index:
                code.store(out + 4 * index, load(code, out + 4 * index) / divisor)

    return [attend, merge]


def multiply(code: Code, numbers: Value, factors: Value, count: Value) -> None:
    """Multiply ``count`` floats by factors, one each, in place."""

    def multiply_vector(index: Value, lanes: int) -> None:
        address = numbers + 4 * index
        code.store(address, load(code, address, lanes) * load(code, factors + 4 * index, lanes))

    for_each_vector(code, count, multiply_vector)


def softmax(code: Code, scores: Value, count: Value, head: Value, partial: Value) -> None:
    """Turn ``count`` scores ``q k`` into weights ``exp(q k / sqrt(H) - highest)``, in place.

    The highest score and the sum of the weights go to ``partial``; the weights are divided by their sum when splits are
    merged.
    """
    root = Value(code.builder, code.builder.uitofp(head.ir, F32))
    factor = Value(code.builder, F32(1.0)) / code.intrinsic("llvm.sqrt.f32", F32, root)
    end = (count + (LANES - 1)) // LANES * LANES
    lowest = splat(code, Value(code.builder, F32(MIN_FLOAT32)))
    # Fill up to whole vectors with a score whose weight is 0.
    with code.loop(count, end) as slot:
        code.store(scores + 4 * slot, MIN_FLOAT32, F32)
    high = Variable(code, lowest)
    with code.loop(0, end, LANES) as slot:
        high.value = maximum(code, load(code, scores + 4 * slot), high.value)
    highest = reduce_max(code, high.value)
    highest = highest * factor
    sums = Variable(code, zeros(code))
    with code.loop(0, end, LANES) as slot:
        weights = exp(code, load(code, scores + 4 * slot) * splat(code, factor) - splat(code, highest))
        code.store(scores + 4 * slot, weights)
        sums.value = sums.value + weights
    code.store(partial, highest)
    code.store(partial + 4, reduce_add(code, sums.value))
