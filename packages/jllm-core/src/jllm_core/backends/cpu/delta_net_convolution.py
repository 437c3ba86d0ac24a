"""Convolution, unit length and gates of a delta net: what its kernel does to the projections before the delta rule."""

from dataclasses import dataclass

from jllm_core.backends.cpu.kernel_building_blocks import for_each_vector, reduce_sum
from jllm_core.backends.cpu.llvm_builder import F32, LANES, Code, Value, Variable
from jllm_core.backends.cpu.threads import Launch
from jllm_core.backends.cpu.vector_ops import LOADS, SIZES, exp, fma, load, log1p, maximum, sigmoid, splat, zeros


@dataclass(frozen=True)
class Text:
    """One text of a call, as a task finds it.

    Attributes:
        row: where its state is, if it is somewhere.
        stands: whether it is.
        begins: whether what lies there is another text's, and this one's state is zeros.
        count: how many of its tokens count; none without a state.
    """

    row: Value
    stands: Value
    begins: Value
    count: Value

    @classmethod
    def of(cls, code: Code, launch: Launch, number: Value) -> "Text":
        """The text of this number."""
        row = code.load_int32(launch["state_rows"] + 4 * number)
        stands = (row >= 0) & (row < launch["states"])
        begins = stands & code.load_int32(launch["begins"] + 4 * number).not_equals(0)
        count = code.minimum(code.load_int32(launch["counts"] + 4 * number), launch["tokens"])
        return cls(row, stands, begins, code.select(stands, code.maximum(count, 0), 0))


@dataclass(frozen=True)
class Convolution:
    """``ops.delta_net.causal_conv`` with its SiLU, in place, and queries and keys made as long as one.

    Attributes:
        size: tokens that it sees [W].
        kind: the type of its weights ``conv_q`` and ``conv_k [W, Hk, dk]`` and ``conv_v [W, Hv, dv]``.
    """

    size: int
    kind: str

    operands = ("conv_q", "conv_k", "conv_v")

    def write(self, code: Code, launch: Launch, task: Value) -> None:
        """Write a task: of one text, the query and key of a head, and the values that go with them."""
        number, head = task // launch["keys"], task % launch["keys"]
        text, dk = Text.of(code, launch, number), launch["dk"]
        values = launch["heads"] // launch["keys"] * launch["dv"]
        # Nothing is read or written of a text without a state: another one may have the row that stands for nowhere.
        with code.if_then(text.stands):
            self._convolve(code, launch, "q", number, text, head * dk, dk)
            self._convolve(code, launch, "k", number, text, head * dk, dk)
            self._convolve(code, launch, "v", number, text, head * values, values)
        root = code.intrinsic("llvm.sqrt.f32", F32, Value(code.builder, code.builder.uitofp(dk.ir, F32)))
        one = Value(code.builder, F32(1.0))
        stride = 4 * launch["key_width"]
        for name, length in (("q_heads", one / root), ("k_heads", one)):
            start = launch[name] + number * launch["tokens"] * stride + 4 * head * dk
            with code.loop(0, text.count) as token:
                _set_length(code, start + token * stride, dk, length)

    def _convolve(
        self,
        code: Code,
        launch: Launch,
        name: str,
        number: Value,
        text: Text,
        first: Value,
        channels: Value,
    ) -> None:
        """Convolve some channels from ``first`` on; the inputs that the next token sees go to the tail."""
        width = launch["value_width" if name == "v" else "key_width"]
        stride, size = 4 * width, SIZES[self.kind]
        x = launch[f"{name}_heads"] + number * launch["tokens"] * stride + 4 * first
        tail = launch[f"{name}_tail"] + text.row * stride * (self.size - 1) + 4 * first
        weights_address = launch[f"conv_{name}"] + size * first
        with code.loop(0, channels, LANES) as index:
            weights = [
                LOADS[self.kind](code, weights_address + size * (place * width + index)) for place in range(self.size)
            ]
            # The inputs before the one in use move along in registers, so that x can be written over.
            kept = [load(code, tail + place * stride + 4 * index) for place in range(self.size - 1)]
            before = [Variable(code, code.select(text.begins, zeros(code), numbers)) for numbers in kept]
            with code.loop(0, text.count) as token:
                address = x + token * stride + 4 * index
                inputs = [*(variable.value for variable in before), load(code, address)]
                sum_ = zeros(code)
                for number, weight in zip(inputs, weights, strict=True):
                    sum_ = fma(code, number, weight, sum_)
                code.store(address, sum_ * sigmoid(code, sum_))
                for variable, number in zip(before, inputs[1:], strict=True):
                    variable.value = number
            for place, variable in enumerate(before):
                code.store(tail + place * stride + 4 * index, variable.value)


def _set_length(code: Code, x: Value, width: Value, length: Value) -> None:
    """``ops.delta_net.unit_length`` of one head, times ``length``, in place."""

    def add_square(index: Value, lanes: int, sum_: Value) -> Value:
        numbers = load(code, x + 4 * index, lanes)
        return fma(code, numbers, numbers, sum_)

    square = reduce_sum(code, width, add_square) + 1e-6
    scale = splat(code, length / code.intrinsic("llvm.sqrt.f32", F32, square))
    with code.loop(0, width, LANES) as index:
        code.store(x + 4 * index, load(code, x + 4 * index) * scale)


def store_gates(code: Code, launch: Launch, row: Value) -> None:
    """Write a token's decay and beta, for each head, in place of its projections ``a`` and ``b``."""
    offset = 4 * row * launch["heads"]
    decays, betas = launch["decay"] + offset, launch["beta"] + offset

    def write(index: Value, lanes: int) -> None:
        at = 4 * index
        a = load(code, decays + at, lanes) + load(code, launch["dt_bias"] + at, lanes)
        # softplus(a) = log(1 + exp(a)), of what is at most 1.
        positive = maximum(code, a, a * 0.0)
        softplus = positive + log1p(code, exp(code, a - positive - positive))
        code.store(decays + at, exp(code, -1.0 * exp(code, load(code, launch["a_log"] + at, lanes)) * softplus))
        code.store(betas + at, sigmoid(code, load(code, betas + at, lanes)))

    for_each_vector(code, launch["heads"], write)
