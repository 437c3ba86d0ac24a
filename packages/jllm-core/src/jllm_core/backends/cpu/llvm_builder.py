"""LLVM IR builder: a small language in Python, on llvmlite, in which the CPU kernels are written.

A kernel is a Python function that runs once and writes instructions. A loop of Python is unrolled; ``with
code.loop(...)`` becomes a loop of the machine. There are int64 (addresses are int64 too), floats, and vectors of
floats. llvmlite compiles the instructions in well under a second, and no compiler has to be installed. It is imported
only where a kernel is built.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import binding, ir

I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
F16, F32, VOID = ir.HalfType(), ir.FloatType(), ir.VoidType()

LANES = 16
"""Floats of a vector: one register of AVX-512, two of AVX2, four of NEON. It is the same number on every machine, so
sums have the same order everywhere."""


def vector(of: Any, lanes: int = LANES) -> Any:
    """The type of a vector."""
    return ir.VectorType(of, lanes)


class Value:
    """A number or vector that the machine computes, with Python's operators.

    A Python number beside it becomes a constant of its type. ``//`` and ``%`` of integers are unsigned, so the operands
    must not be negative. Comparisons give masks, one bit a lane; any comparison with NaN is false.
    """

    __slots__ = ("builder", "ir")

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.ir = builder, value

    @property
    def type(self) -> Any:
        return self.ir.type

    def _operate(self, name: str, other: Any, swap: bool = False) -> "Value":
        a, b = self.ir, constant(other, self.type)
        kind = self.type.element if isinstance(self.type, ir.VectorType) else self.type
        operation = ("f" if kind in (F16, F32) else "") + name
        operation = {"div": "udiv", "rem": "urem"}.get(operation, operation)
        return Value(self.builder, getattr(self.builder, operation)(*((b, a) if swap else (a, b))))

    def __add__(self, other: Any) -> "Value":
        return self._operate("add", other)

    def __radd__(self, other: Any) -> "Value":
        return self._operate("add", other)

    def __sub__(self, other: Any) -> "Value":
        return self._operate("sub", other)

    def __rsub__(self, other: Any) -> "Value":
        return self._operate("sub", other, swap=True)

    def __mul__(self, other: Any) -> "Value":
        return self._operate("mul", other)

    def __rmul__(self, other: Any) -> "Value":
        return self._operate("mul", other)

    def __truediv__(self, other: Any) -> "Value":
        return self._operate("div", other)

    def __rtruediv__(self, other: Any) -> "Value":
        return self._operate("div", other, swap=True)

    def __floordiv__(self, other: Any) -> "Value":
        return self._operate("div", other)

    def __mod__(self, other: Any) -> "Value":
        return self._operate("rem", other)

    def __and__(self, other: Any) -> "Value":
        return Value(self.builder, self.builder.and_(self.ir, constant(other, self.type)))

    def __or__(self, other: Any) -> "Value":
        return Value(self.builder, self.builder.or_(self.ir, constant(other, self.type)))

    def _compare(self, sign: str, other: Any) -> "Value":
        kind = self.type.element if isinstance(self.type, ir.VectorType) else self.type
        compare = self.builder.fcmp_ordered if kind == F32 else self.builder.icmp_signed
        return Value(self.builder, compare(sign, self.ir, constant(other, self.type)))

    def __lt__(self, other: Any) -> "Value":
        return self._compare("<", other)

    def __le__(self, other: Any) -> "Value":
        return self._compare("<=", other)

    def __gt__(self, other: Any) -> "Value":
        return self._compare(">", other)

    def __ge__(self, other: Any) -> "Value":
        return self._compare(">=", other)

    def equals(self, other: Any) -> "Value":
        return self._compare("==", other)

    def not_equals(self, other: Any) -> "Value":
        return self._compare("!=", other)


def constant(value: Any, kind: Any) -> Any:
    """A Python number as an LLVM constant of this type; a Value as its LLVM value."""
    if isinstance(value, Value):
        return value.ir
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [value] * kind.count)
    return ir.Constant(kind, value)


class Variable:
    """A number or vector that changes while the kernel runs: read and assign ``value``.

    It is a place on the stack; LLVM's optimiser turns it into a register.
    """

    def __init__(self, code: "Code", start: Any) -> None:
        self._code = code
        first = start if isinstance(start, Value) else Value(code.builder, constant(start, I64))
        # Allocated in the entry block: an alloca inside a loop would take more stack with every round.
        with code.builder.goto_entry_block():
            self._slot = code.builder.alloca(first.type)
        self.value = first

    @property
    def value(self) -> Value:
        return Value(self._code.builder, self._code.builder.load(self._slot))

    @value.setter
    def value(self, new: Any) -> None:
        self._code.builder.store(constant(new, self._slot.type.pointee), self._slot)


class Code:
    """Writer of one function's instructions.

    Attributes:
        builder: llvmlite's IRBuilder, for what has no method here.
        arguments: the function's arguments, all int64.
    """

    def __init__(self, function: Any) -> None:
        self.builder = ir.IRBuilder(function.append_basic_block())
        self.arguments = [Value(self.builder, argument) for argument in function.args]

    # ---- Control

    @contextmanager
    def loop(self, start: Any, stop: Any, step: Any = 1) -> Iterator[Value]:
        """``for i in range(start, stop, step)``"""
        builder = self.builder
        condition, body, after = (builder.append_basic_block(name) for name in ("loop", "body", "after"))
        first, before = constant(start, I64), builder.block
        builder.branch(condition)
        builder.position_at_end(condition)
        number = builder.phi(I64)
        number.add_incoming(first, before)
        builder.cbranch(builder.icmp_signed("<", number, constant(stop, I64)), body, after)
        builder.position_at_end(body)
        yield Value(builder, number)
        number.add_incoming(builder.add(number, constant(step, I64)), builder.block)
        builder.branch(condition)
        builder.position_at_end(after)

    @contextmanager
    def while_loop(self, condition: Callable[[], Value]) -> Iterator[None]:
        """``while condition():``"""
        builder = self.builder
        check, body, after = (builder.append_basic_block(name) for name in ("while", "body", "after"))
        builder.branch(check)
        builder.position_at_end(check)
        builder.cbranch(condition().ir, body, after)
        builder.position_at_end(body)
        yield
        builder.branch(check)
        builder.position_at_end(after)

    @contextmanager
    def if_then(self, condition: Value) -> Iterator[None]:
        """``if condition:``"""
        with self.builder.if_then(condition.ir):
            yield

    @contextmanager
    def if_else(self, condition: Value) -> Iterator[tuple[Any, Any]]:
        """``if condition: ... else: ...``

        ``with code.if_else(condition) as (then, otherwise):``, and in it ``with then:`` and ``with otherwise:``.
        """
        with self.builder.if_else(condition.ir) as branches:
            yield branches

    def select(self, condition: Value, a: Any, b: Any) -> Value:
        """``a if condition else b``, lane by lane for a mask. Both are computed."""
        kind = (a if isinstance(a, Value) else b).type
        return Value(self.builder, self.builder.select(condition.ir, constant(a, kind), constant(b, kind)))

    def minimum(self, a: Value, b: Any) -> Value:
        """The smaller of two numbers; b where either is NaN."""
        return self.select(a < b, a, b)

    def maximum(self, a: Value, b: Any) -> Value:
        """The larger of two numbers; b where either is NaN."""
        return self.select(a > b, a, b)

    def call(self, function: Any, *values: Any) -> Value:
        """Call a function of this module; its result."""
        kinds = function.function_type.args
        given = [constant(value, kind) for value, kind in zip(values, kinds, strict=True)]
        return Value(self.builder, self.builder.call(function, given))

    def call_address(self, address: Value, argument: Any) -> Value:
        """Call the C function ``int64_t f(int64_t)`` at an address; its result."""
        pointer = self.builder.inttoptr(address.ir, ir.FunctionType(I64, [I64]).as_pointer())
        return Value(self.builder, self.builder.call(pointer, [constant(argument, I64)]))

    def intrinsic(self, name: str, result: Any, *values: Any, **options: Any) -> Value:
        """Call a function of LLVM (an intrinsic) or of the C library by its name; its result."""
        given = [value.ir if isinstance(value, Value) else value for value in values]
        module = self.builder.module
        kind = ir.FunctionType(result, [value.type for value in given])
        function = module.globals.get(name) or ir.Function(module, kind, name)
        return Value(self.builder, self.builder.call(function, given, **options))

    def ret(self, value: Any = 0) -> None:
        """Return from the function."""
        self.builder.ret(constant(value, I64))

    # ---- Memory

    def pointer(self, address: Value, kind: Any) -> Any:
        """An address as LLVM's pointer to this type."""
        return self.builder.inttoptr(constant(address, I64), kind.as_pointer())

    # Alignment 1: a row of a matrix may begin anywhere, and unaligned loads cost nothing within a cache line.

    def load(self, address: Value, kind: Any = I64) -> Value:
        """Load a number or vector of this type."""
        return Value(self.builder, self.builder.load(self.pointer(address, kind), align=1))

    def store(self, address: Value, value: Any, kind: Any = I64) -> None:
        """Store a Value, or a Python number as this type."""
        kind = value.type if isinstance(value, Value) else kind
        self.builder.store(constant(value, kind), self.pointer(address, kind), align=1)

    def load_int32(self, address: Value) -> Value:
        """Load an int32 as int64."""
        return Value(self.builder, self.builder.sext(self.load(address, I32).ir, I64))

    def store_int32(self, address: Value, value: Any) -> None:
        """Store an int64 as int32."""
        self.store(address, Value(self.builder, self.builder.trunc(constant(value, I64), I32)))

    def prefetch(self, address: Value) -> None:
        """Fetch the cache line at an address that will be read soon. An address outside memory does no harm."""
        # llvm.prefetch's arguments: to read, keep in all cache levels, data.
        options = [ir.Constant(I32, number) for number in (0, 3, 1)]
        self.intrinsic("llvm.prefetch.p0", VOID, Value(self.builder, self.pointer(address, I8)), *options)

    def alloca(self, size: int) -> Value:
        """So many bytes on the stack, at a multiple of 64; their address."""
        with self.builder.goto_entry_block():
            memory = self.builder.alloca(ir.ArrayType(I8, size))
            memory.align = 64
            return Value(self.builder, self.builder.ptrtoint(memory, I64))

    def atomic_add(self, address: Value, value: Any) -> Value:
        """Add to a counter that threads share; what it was before.

        Acquire and release: a thread that sees the sum sees all that was written before the addition.
        """
        pointer = self.pointer(address, I64)
        return Value(self.builder, self.builder.atomic_rmw("add", pointer, constant(value, I64), ordering="acq_rel"))

    def atomic_load(self, address: Value) -> Value:
        """Load a counter that threads share, and see all that was written before it got this value (acquire)."""
        return Value(self.builder, self.builder.load_atomic(self.pointer(address, I64), ordering="acquire", align=8))

    def pause(self) -> None:
        """Tell the processor that this loop only waits (PAUSE on x86; nothing elsewhere)."""
        if binding.get_default_triple().startswith(("x86_64", "i686")):
            self.intrinsic("llvm.x86.sse2.pause", VOID)


class Module:
    """An LLVM module: functions that are compiled together."""

    def __init__(self) -> None:
        self.ir = ir.Module()
        self.ir.triple = binding.get_default_triple()

    def function(
        self, name: str, arguments: int, write: Callable[[Code], None] | None = None, export: bool = False
    ) -> Any:
        """A function of so many int64 that returns one; ``write`` writes its instructions and ends with ``code.ret()``.

        If the module has a function of this name already, that one is returned and nothing is written.
        """
        if name in self.ir.globals:
            return self.ir.globals[name]
        function = ir.Function(self.ir, ir.FunctionType(I64, [I64] * arguments), name)
        if not export:
            function.linkage = "internal"
        if write is not None:
            write(Code(function))
        return function

    def object_code(self) -> bytes:
        """Object code (ELF, Mach-O or COFF) for this processor; it needs nothing but the C library."""
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        target = binding.Target.from_default_triple()
        machine = target.create_target_machine(
            cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=3, reloc="pic"
        )
        module = binding.parse_assembly(str(self.ir))
        module.verify()
        tuning = binding.create_pipeline_tuning_options(speed_level=2)
        # The kernels are vectors already. LLVM's own vectorisers would only change orders of sums and compile longer.
        tuning.loop_vectorization = tuning.slp_vectorization = False
        passes = binding.create_pass_builder(machine, tuning)
        passes.getModulePassManager().run(module, passes)
        code: bytes = machine.emit_object(module)
        return code


def instruction_set() -> str:
    """The vector instructions of this processor by the name that people know: ``AVX-512``, ``NEON``."""
    machine = binding.get_default_triple().partition("-")[0]
    if machine in ("aarch64", "arm64"):
        return "NEON"
    features = binding.get_host_cpu_features()
    known = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX", "sse2": "SSE2"}
    return next((name for feature, name in known.items() if features.get(feature)), machine)


def has_avx512() -> bool:
    """Whether this processor has AVX-512: 32 registers of 16 floats."""
    return bool(binding.get_host_cpu_features().get("avx512f"))
