"""Vector operations on float32: loads and stores with conversion, reductions, exp and log.

Each function writes instructions to the Code that it gets. With ``lanes`` of 1 it writes the same operations for the
numbers at the end of a row that fill no vector; a number has the same bits either way.
"""

from typing import Any

from llvmlite import ir

from jllm_core.backends.cpu.llvm_builder import F16, F32, I8, I16, I32, LANES, Code, Value, has_avx512, vector


def splat(code: Code, value: Value, lanes: int = LANES) -> Value:
    """A vector with the same number in every lane."""
    builder, position = code.builder, ir.Constant(I32, 0)
    one = builder.insert_element(ir.Constant(vector(value.type, lanes), ir.Undefined), value.ir, position)
    return Value(builder, builder.shuffle_vector(one, one, ir.Constant(vector(I32, lanes), [0] * lanes)))


def zeros(code: Code, lanes: int = LANES) -> Value:
    """A vector of float32 zeros."""
    return Value(code.builder, ir.Constant(vector(F32, lanes), [0.0] * lanes))


def load(code: Code, address: Value, lanes: int = LANES) -> Value:
    """Load float32."""
    return code.load(address, vector(F32, lanes))


def load_bf16(code: Code, address: Value, lanes: int = LANES) -> Value:
    """Load bfloat16 as float32."""
    # bfloat16 is the upper half of a float32.
    builder, ints = code.builder, vector(I32, lanes)
    bits = builder.zext(code.load(address, vector(I16, lanes)).ir, ints)
    return Value(builder, builder.bitcast(builder.shl(bits, ir.Constant(ints, [16] * lanes)), vector(F32, lanes)))


def load_f16(code: Code, address: Value, lanes: int = LANES) -> Value:
    """Load float16 as float32."""
    return Value(code.builder, code.builder.fpext(code.load(address, vector(F16, lanes)).ir, vector(F32, lanes)))


def load_int8(code: Code, address: Value, lanes: int = LANES) -> Value:
    """Load int8 as float32, not yet scaled."""
    whole = code.builder.sext(code.load(address, vector(I8, lanes)).ir, vector(I32, lanes))
    return _floats(code, Value(code.builder, whole))


def load_int4(code: Code, address: Value, lanes: int = LANES) -> tuple[Value, Value]:
    """Load bytes as two vectors of float32: the numbers 0 to 15 of the low halves, and those of the high halves."""
    builder, ints = code.builder, vector(I32, lanes)
    pairs = Value(builder, builder.zext(code.load(address, vector(I8, lanes)).ir, ints))
    high = Value(builder, builder.lshr(pairs.ir, ir.Constant(ints, [4] * lanes)))
    if lanes == LANES == 16 and has_avx512():
        # A table look-up in a register: each lane's four lowest bits choose from it, without a mask or a conversion.
        numbers = Value(builder, ir.Constant(vector(F32, lanes), [float(n) for n in range(16)]))
        choose = "llvm.x86.avx512.permvar.sf.512"
        return code.intrinsic(choose, numbers.type, numbers, pairs), code.intrinsic(choose, numbers.type, numbers, high)
    return _floats(code, pairs & 15), _floats(code, high)


def store_int8(code: Code, address: Value, numbers: Value) -> None:
    """Store numbers from -128 to 127 as int8, rounded to the nearest, half to even; NaN becomes 0."""
    lanes = numbers.type.count
    nearest = code.intrinsic(f"llvm.rint.v{lanes}f32", numbers.type, numbers)
    code.store(address, Value(code.builder, code.builder.trunc(_ints(code, nearest).ir, vector(I8, lanes))))


def _ints(code: Code, numbers: Value) -> Value:
    """Whole numbers in float32 as int32; NaN becomes 0."""
    # fptosi of NaN is undefined. LLVM's fptosi.sat is not, but it is compiled lane by lane.
    known = code.select(numbers.equals(numbers), numbers, 0.0)
    return Value(code.builder, code.builder.fptosi(known.ir, vector(I32, numbers.type.count)))


def _floats(code: Code, whole: Value) -> Value:
    """int32 as float32."""
    return Value(code.builder, code.builder.sitofp(whole.ir, vector(F32, whole.type.count)))


def store_bf16(code: Code, address: Value, numbers: Value) -> None:
    """Store as bfloat16, rounded to the nearest, half to even; NaN stays NaN."""
    rounded = round_bf16(code, numbers)
    code.store(address, Value(code.builder, code.builder.trunc(rounded.ir, vector(I16, numbers.type.count))))


def round_bf16(code: Code, numbers: Value) -> Value:
    """The bits of bfloat16, in the lower half of int32, rounded to the nearest, half to even; NaN stays NaN."""
    builder, ints = code.builder, vector(I32, numbers.type.count)

    def shifted(bits: Value) -> Value:
        return Value(builder, builder.lshr(bits.ir, ir.Constant(ints, [16] * ints.count)))

    bits = Value(builder, builder.bitcast(numbers.ir, ints))
    upper = shifted(bits)
    # Half of the last place, and 1 less of it where the last place is even: what lies in the middle goes to even. With
    # NaN the addition could carry into infinity, so its upper half is kept, with a bit that keeps it NaN.
    return code.select(numbers.equals(numbers), shifted(bits + (upper & 1) + 0x7FFF), upper | 0x40)


def store(code: Code, address: Value, numbers: Value) -> None:
    """Store float32."""
    code.store(address, numbers)


def store_f16(code: Code, address: Value, numbers: Value) -> None:
    """Store as float16, rounded to the nearest, half to even; what is too large becomes infinite, NaN stays NaN."""
    narrow = code.builder.fptrunc(numbers.ir, vector(F16, numbers.type.count))
    code.store(address, Value(code.builder, narrow))


LOADS = {"float32": load, "bfloat16": load_bf16, "float16": load_f16, "int8": load_int8}
"""The load function of each type; int8 is still to be scaled."""
STORES = {"float32": store, "bfloat16": store_bf16, "float16": store_f16}
"""The store function of each type that needs no scale."""
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
"""Bytes of an element of each type."""


def fma(code: Code, a: Value, b: Value, c: Value) -> Value:
    """``a * b + c``, rounded once where the processor has such an instruction."""
    return code.intrinsic(f"llvm.fmuladd.v{a.type.count}f32", a.type, a, b, c)


def reduce_add(code: Code, value: Value) -> Value:
    """The sum of the lanes, added in pairs."""
    # With "reassoc" LLVM halves the vector again and again instead of adding lane after lane. -0.0 changes no sum.
    name = f"llvm.vector.reduce.fadd.v{value.type.count}f32"
    return code.intrinsic(name, F32, F32(-0.0), value, fastmath=("reassoc",))


def maximum(code: Code, a: Value, b: Value) -> Value:
    """The larger number of each lane; b where either is NaN."""
    return code.select(a > b, a, b)


def reduce_max(code: Code, value: Value) -> Value:
    """The largest lane."""
    return code.intrinsic(f"llvm.vector.reduce.fmax.v{value.type.count}f32", F32, value)


def exp(code: Code, x: Value) -> Value:
    """e to the power of each lane, within 2 units in the last place; NaN stays NaN, and below -87.3 the result is 0.

    ``exp(x) = 2^n exp(r)`` with ``n = round(x / log 2)``; ``exp(r)`` is a polynomial (``expf`` of Cephes).
    """
    lanes, builder = x.type.count, code.builder
    ints = vector(I32, lanes)

    def of(number: float) -> Value:
        return Value(builder, ir.Constant(x.type, [number] * lanes))

    inside = code.select(x > 89.0, 89.0, x)
    inside = code.select(inside < -87.3, -87.3, inside)
    n = code.intrinsic(f"llvm.rint.v{lanes}f32", x.type, inside * 1.4426950408889634)
    # log 2 in two parts (0.693359375 - 2.12194440e-4): n times the first is exact, so r keeps its last bits.
    rest = fma(code, n, of(2.12194440e-4), fma(code, n, of(-0.693359375), inside))
    series = of(1.9875691500e-4)
    for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        series = fma(code, series, rest, of(factor))
    power = fma(code, rest * rest, series, rest) + 1.0
    # 2^n comes in two factors: 2^128 alone is more than a float32 holds.
    whole = _ints(code, n)
    half = Value(builder, builder.ashr(whole.ir, ir.Constant(ints, [1] * lanes)))
    for exponent in (half, whole - half):
        bits = builder.shl((exponent + 127).ir, ir.Constant(ints, [23] * lanes))
        power = power * Value(builder, builder.bitcast(bits, x.type))
    return code.select(x < -87.3, 0.0, power)


def log(code: Code, x: Value) -> Value:
    """Natural logarithm of each lane, within 2 units in the last place; lanes are positive normal numbers.

    ``log(x) = n log 2 + log(1 + f)`` with ``1 + f`` from ``sqrt(1/2)`` to ``sqrt(2)``; ``log(1 + f)`` is a polynomial
    (``logf`` of Cephes).
    """
    lanes, builder = x.type.count, code.builder
    ints = vector(I32, lanes)

    def of(number: Any, kind: Any = x.type) -> Value:
        return Value(builder, ir.Constant(kind, [number] * lanes))

    bits = Value(builder, builder.bitcast(x.ir, ints))
    # 0x3F3504F3 is sqrt(1/2). Exponents are counted from there, so that 1 + f lies between it and its double.
    shifted = bits - 0x3F3504F3
    exponent = Value(builder, builder.ashr(shifted.ir, of(23, ints).ir))
    rest = (shifted & 0x7FFFFF) + 0x3F3504F3
    f = Value(builder, builder.bitcast(rest.ir, x.type)) - 1.0
    n = _floats(code, exponent)
    series = of(7.0376836292e-2)
    for factor in (
        *(-1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
        *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
    ):
        series = fma(code, series, f, of(factor))
    square = f * f
    small = fma(code, n, of(-2.12194440e-4), square * f * series)
    return fma(code, n, of(0.693359375), f + fma(code, square, of(-0.5), small))


def log1p(code: Code, x: Value) -> Value:
    """``log(1 + x)`` of each lane, which is 0 or more, to the last places of small numbers too."""
    rounded = x + 1.0
    # What rounding adds to 1 + x makes the logarithm as much too large (Kahan).
    added = rounded - 1.0
    is_lost = added.equals(0.0)
    return code.select(is_lost, x, log(code, rounded) * (x / code.select(is_lost, 1.0, added)))


def sigmoid(code: Code, x: Value) -> Value:
    """``1 / (1 + exp(-x))`` of each lane."""
    one = Value(code.builder, ir.Constant(x.type, [1.0] * x.type.count))
    return one / (exp(code, -1.0 * x) + 1.0)


def xor(code: Code, a: Value, b: Value) -> Value:
    """Bitwise exclusive or of integers."""
    return Value(code.builder, code.builder.xor(a.ir, b.ir))


def shift(code: Code, a: Value, bits: int) -> Value:
    """Integers shifted left by ``bits``, or right (logically) by ``-bits``."""
    by = ir.Constant(a.type, [abs(bits)] * a.type.count)
    return Value(code.builder, (code.builder.shl if bits > 0 else code.builder.lshr)(a.ir, by))


def scalar(code: Code, value: Value) -> Value:
    """Lane 0 of a vector as a number."""
    return Value(code.builder, code.builder.extract_element(value.ir, ir.Constant(I32, 0)))
