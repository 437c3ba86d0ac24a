"""Delta net kernel: a whole layer with a gated delta net, for tokens that decode and for prompts alike.

The rule goes token by token (``ops.delta_net.recurrent_delta_rule``), also through a prompt: a column of a head's
memory changes by itself, so a task keeps some columns in the processor's first cache while all tokens of a text pass
by. That is less arithmetic than the products of chunks, and a token has the same bits however a text is cut.

Memory is read and written once a call, in place.
"""

from dataclasses import dataclass

from jllm_core.backends.cpu.delta_net_convolution import Convolution, Text, store_gates
from jllm_core.backends.cpu.kernel_building_blocks import (
    Matrix,
    reduce_sum,
    store_operand_addresses,
    store_result_addresses,
)
from jllm_core.backends.cpu.layer_inputs import Projections
from jllm_core.backends.cpu.layer_kernels import Close
from jllm_core.backends.cpu.llvm_builder import F32, LANES, Code, Module, Value, Variable, has_avx512
from jllm_core.backends.cpu.threads import Frame, Launch, WriteTask, write_kernel
from jllm_core.backends.cpu.vector_ops import fma, load, sigmoid, splat, zeros

MAX_KEY_FEATURES = 256
"""Features of a key at most: room for some columns of a head's memory is on the stack."""
PREFETCH_ROWS = 16
"""Rows of memory that are fetched ahead of the one in use."""


@dataclass(frozen=True)
class DeltaNet:
    """Kernel: RMSNorm, a gated delta net and the feed-forward layer, each part added to the residual stream.

    Operands as named, with ``x [B * T, D]``; float32 states ``memory [S, Hv, dk, dv]`` and the last inputs of
    convolutions, ``q_tail`` and ``k_tail [S, W-1, Hk, dk]`` and ``v_tail [S, W-1, Hv, dv]``; for each text, int32
    ``[B]``, the row of its state, ``state_rows`` (outside them it has none), whether it ``begins``, with a state of
    zeros, and how many of its T tokens count, ``counts``; float32 ``a_log`` and ``dt_bias [Hv]`` and ``net_gamma
    [dv]``.
    Results ``y [B * T, D]``; memory and tails again, changed in place; and the workspaces ``normed [B * T, D]``,
    ``q_heads`` and ``k_heads [B * T, Hk * dk]``, ``v_heads`` and ``z_heads [B * T, Hv * dv]``, ``decay`` and ``beta
    [B * T, Hv]``, and those of ``Close``. The attribute ``eps`` is float32. Heads are whole vectors.

    What tokens give that do not count means nothing; it is finite where their ``x`` is.

    Attributes:
        projections: the matrices of q, k, v, z, a and b.
        convolution: the weights of the convolution.
        close: what comes behind.
    """

    projections: tuple[Matrix, ...]
    convolution: Convolution
    close: Close

    state = ("memory", "q_tail", "k_tail", "v_tail")
    outputs = ("q_heads", "k_heads", "v_heads", "z_heads", "decay", "beta")

    @property
    def operands(self) -> list[str]:
        """Names of the operands, in order."""
        matrices = [name for matrix in self.projections for name in matrix.operands]
        own = [
            "state_rows",
            "begins",
            "counts",
            "x",
            "pre_gamma",
            *self.convolution.operands,
            "a_log",
            "dt_bias",
            "net_gamma",
        ]
        return [*self.state, *own, *matrices, *self.close.weights]

    @property
    def results(self) -> list[str]:
        """Names of the results, in order."""
        return ["y", *self.state, "normed", *self.outputs, *self.close.results[1:]]

    def write(self, module: Module) -> None:
        """Write the kernel's instructions."""
        widths = ("key_width", "key_width", "value_width", "value_width", "heads", "heads")
        inputs = Projections(tuple(zip(self.projections, widths, self.outputs, strict=True)), self.close.norms)

        def prepare(frame: Frame, launch: Launch) -> None:
            store_operand_addresses(frame, launch, self.operands)
            store_result_addresses(frame, launch, self.results)
            memory, tail, x = frame.argument(0), frame.argument(1), frame.argument(self.operands.index("x"))
            sizes = {"states": memory.dim(0), "heads": memory.dim(1), "dk": memory.dim(2), "dv": memory.dim(3)}
            sizes["texts"] = frame.argument(self.operands.index("counts")).dim(0)
            sizes |= {"keys": tail.dim(2), "rows": x.dim(0), "width": x.dim(1)}
            sizes |= {"key_width": sizes["keys"] * sizes["dk"], "value_width": sizes["heads"] * sizes["dv"]}
            sizes["tokens"] = sizes["rows"] // sizes["texts"]
            # The columns' tasks leave their results in place of v, from which the output is made in place.
            sizes |= {"q_width": sizes["value_width"], "attended": launch["v_heads"]}
            for name, value in sizes.items():
                launch.set(name, value)
            launch.set_float("eps", frame.attribute(0, F32))
            inputs.add_phases(launch)
            launch.add_phase(sizes["texts"] * sizes["keys"] + sizes["rows"])
            launch.add_phase(sizes["texts"] * sizes["heads"] * _column_blocks(launch))
            launch.add_phase(sizes["rows"])
            self.close.add_phases(launch, frame.result(len(self.results) - 1))

        def convolve_and_gate(code: Code, launch: Launch, task: Value) -> None:
            end = launch["texts"] * launch["keys"]
            with code.if_else(task < end) as (convolve, gate):
                with convolve:
                    self.convolution.write(code, launch, task)
                with gate:
                    store_gates(code, launch, task - end)

        phases: list[WriteTask] = [convolve_and_gate, take_tokens, norm_and_gate]
        write_kernel(module, prepare, [*inputs.phases(module), *phases, *self.close.phases(module)])


def _column_vectors() -> int:
    """Vectors of columns of a task: with two sums for each, as many as keep the multiply-adds from waiting."""
    return 2 if has_avx512() else 1


def _column_blocks(launch: Launch) -> Value:
    """Tasks of a head: whole blocks of columns, and those of one vector that are left."""
    count = _column_vectors()
    return (launch["dv"] // LANES + (count - 1)) // count


def take_tokens(code: Code, launch: Launch, task: Value) -> None:
    """Write a task of the delta rule: some columns of one head's memory, and all tokens of a text that count."""
    vectors, blocks = _column_vectors(), _column_blocks(launch)
    block, head, number = task % blocks, task // blocks % launch["heads"], task // blocks // launch["heads"]
    first = block * (vectors * LANES)
    whole = launch["dv"] - first >= vectors * LANES
    if vectors == 1:
        _take_tokens(code, launch, number, head, first, 1)
        return
    with code.if_else(whole) as (many, one):
        with many:
            _take_tokens(code, launch, number, head, first, vectors)
        with one:
            _take_tokens(code, launch, number, head, first, 1)


def _take_tokens(code: Code, launch: Launch, number: Value, head: Value, first: Value, vectors: int) -> None:
    dk, dv, heads, tokens = launch["dk"], launch["dv"], launch["heads"], launch["tokens"]
    key_stride, value_stride = 4 * launch["key_width"], 4 * launch["value_width"]
    text = Text.of(code, launch, number)
    count = text.count
    key_offset = number * tokens * key_stride + head // (heads // launch["keys"]) * dk * 4
    q, k = (launch[name] + key_offset for name in ("q_heads", "k_heads"))
    v = launch["v_heads"] + number * tokens * value_stride + (head * dv + first) * 4
    memory, stride = launch["memory"] + (((text.row * heads + head) * dk) * dv + first) * 4, 4 * dv
    # Rows of a head's memory are a power of two apart, and would throw each other out of the cache.
    width = 4 * LANES * vectors
    copy = code.alloca(4 * MAX_KEY_FEATURES * LANES * _column_vectors())
    places = range(0, width, 4 * LANES)

    # What the first key finds, before the decay.
    found = [Variable(code, zeros(code)) for _ in places]
    with code.if_then((count > 0) & text.begins.equals(0)), code.loop(0, dk) as feature:
        row = memory + feature * stride
        for line in range(0, width, 64):
            code.prefetch(row + PREFETCH_ROWS * stride + line)
        key = splat(code, code.load(k + 4 * feature, F32))
        for place, sum_ in zip(places, found, strict=True):
            numbers = load(code, row + place)
            code.store(copy + feature * width + place, numbers)
            sum_.value = fma(code, numbers, key, sum_.value)

    # A text that begins finds nothing. Without a token that counts, its memory is zeros already.
    with code.if_then(text.begins), code.loop(0, dk) as feature:
        for place in places:
            zeroed = code.select(count > 0, copy + feature * width, memory + feature * stride)
            code.store(zeroed + place, zeros(code))

    with code.loop(0, count) as token:
        gates = ((number * tokens + token) * heads + head) * 4
        decay, beta = (splat(code, code.load(launch[name] + gates, F32)) for name in ("decay", "beta"))
        values = v + token * value_stride
        changes = [
            (load(code, values + place) - decay * sum_.value) * beta for place, sum_ in zip(places, found, strict=True)
        ]
        # One pass over the memory: the change of this token, what its query reads, and what the next key finds.
        is_last = (token + 1).equals(count)
        target, target_stride = code.select(is_last, memory, copy), code.select(is_last, stride, width)
        query, key = q + token * key_stride, k + token * key_stride
        next_key = code.select(is_last, key, key + key_stride)
        read = [Variable(code, zeros(code)) for _ in places]
        for sum_ in found:
            sum_.value = zeros(code)
        with code.loop(0, dk) as feature:
            key_now, query_now, key_then = (
                splat(code, code.load(address + 4 * feature, F32)) for address in (key, query, next_key)
            )
            for n, place in enumerate(places):
                numbers = fma(code, key_now, changes[n], load(code, copy + feature * width + place) * decay)
                code.store(target + feature * target_stride + place, numbers)
                read[n].value = fma(code, numbers, query_now, read[n].value)
                found[n].value = fma(code, numbers, key_then, found[n].value)
        for place, sum_ in zip(places, read, strict=True):
            code.store(values + place, sum_.value)

    with code.loop(count, tokens) as token:
        for place in places:
            code.store(v + token * value_stride + place, zeros(code))


def norm_and_gate(code: Code, launch: Launch, row: Value) -> None:
    """Write a token's ``ops.delta_net.gated_rms_norm``, in place of what the memory gave."""
    dv, eps = launch["dv"], launch.get_float("eps")
    with code.loop(0, launch["heads"]) as head:
        offset = (row * launch["value_width"] + head * dv) * 4
        y, z = launch["v_heads"] + offset, launch["z_heads"] + offset

        def add_square(index: Value, lanes: int, sum_: Value, y: Value = y) -> Value:
            numbers = load(code, y + 4 * index, lanes)
            return fma(code, numbers, numbers, sum_)

        mean = reduce_sum(code, dv, add_square) / Value(code.builder, code.builder.uitofp(dv.ir, F32))
        scale = Value(code.builder, F32(1.0)) / code.intrinsic("llvm.sqrt.f32", F32, mean + eps)
        with code.loop(0, dv, LANES) as index:
            gate, gamma = load(code, z + 4 * index), load(code, launch["net_gamma"] + 4 * index)
            numbers = load(code, y + 4 * index) * splat(code, scale) * gamma
            code.store(y + 4 * index, numbers * (gate * sigmoid(code, gate)))
