"""What the CPU kernels are written in: a little language in Python that writes LLVM's.

A kernel is a Python function that runs once, to write the instructions down: its loops over Python lists are unrolled,
its ``with code.loop(...)`` become loops of the machine. There are int64, which addresses are too, floats, and vectors
of floats. llvmlite makes machine code of the instructions, in well under a second and without a compiler on the
machine; it is imported only where a kernel is built.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import binding, ir

BYTE, I16, I32, INT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
F16, F32, NOTHING = ir.HalfType(), ir.FloatType(), ir.VoidType()

LANES = 16
"""Floats of a vector: one register of AVX-512, two of AVX2, four of NEON. The same everywhere, and so the sums too."""


def vector(of: Any, lanes: int = LANES) -> Any:
    return ir.VectorType(of, lanes)


class Value:
    """A number or vector that the machine will hold, with Python's operators.

    Numbers of Python beside it become constants of its type. Of whole numbers, ``//`` and ``%`` are for those that are
    not negative.
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

    def differs(self, other: Any) -> "Value":
        return self._compare("!=", other)


def constant(value: Any, kind: Any) -> Any:
    """A Python number as a constant of LLVM; what is one already stays."""
    if isinstance(value, Value):
        return value.ir
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [value] * kind.count)
    return ir.Constant(kind, value)


class Variable:
    """A number that changes as the machine goes on."""

    def __init__(self, code: "Code", start: Any) -> None:
        self._code = code
        first = start if isinstance(start, Value) else Value(code.builder, constant(start, INT))
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
    """Writes one function of a module.

    Attributes:
        builder: llvmlite's own, for what is not wrapped here.
        arguments: the function's, all int64.
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
        first, before = constant(start, INT), builder.block
        builder.branch(condition)
        builder.position_at_end(condition)
        number = builder.phi(INT)
        number.add_incoming(first, before)
        builder.cbranch(builder.icmp_signed("<", number, constant(stop, INT)), body, after)
        builder.position_at_end(body)
        yield Value(builder, number)
        number.add_incoming(builder.add(number, constant(step, INT)), builder.block)
        builder.branch(condition)
        builder.position_at_end(after)

    @contextmanager
    def repeat_while(self, condition: Callable[[], Value]) -> Iterator[None]:
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
    def when(self, condition: Value) -> Iterator[None]:
        with self.builder.if_then(condition.ir):
            yield

    @contextmanager
    def either(self, condition: Value) -> Iterator[tuple[Any, Any]]:
        """``with code.either(condition) as (then, otherwise):``, and in it ``with then:`` and ``with otherwise:``."""
        with self.builder.if_else(condition.ir) as branches:
            yield branches

    def select(self, condition: Value, a: Any, b: Any) -> Value:
        kind = (a if isinstance(a, Value) else b).type
        return Value(self.builder, self.builder.select(condition.ir, constant(a, kind), constant(b, kind)))

    def least(self, a: Value, b: Any) -> Value:
        return self.select(a < b, a, b)

    def most(self, a: Value, b: Any) -> Value:
        return self.select(a > b, a, b)

    def call(self, function: Any, *values: Any) -> Value:
        """A function of this module."""
        kinds = function.function_type.args
        given = [constant(value, kind) for value, kind in zip(values, kinds, strict=True)]
        return Value(self.builder, self.builder.call(function, given))

    def call_address(self, address: Value, argument: Any) -> Value:
        """The C function ``int64_t f(int64_t)`` at an address."""
        pointer = self.builder.inttoptr(address.ir, ir.FunctionType(INT, [INT]).as_pointer())
        return Value(self.builder, self.builder.call(pointer, [constant(argument, INT)]))

    def intrinsic(self, name: str, result: Any, *values: Any, **options: Any) -> Value:
        """A function of LLVM or of the C library."""
        given = [value.ir if isinstance(value, Value) else value for value in values]
        module = self.builder.module
        kind = ir.FunctionType(result, [value.type for value in given])
        function = module.globals.get(name) or ir.Function(module, kind, name)
        return Value(self.builder, self.builder.call(function, given, **options))

    def finish(self, value: Any = 0) -> None:
        self.builder.ret(constant(value, INT))

    # ---- Memory

    def pointer(self, address: Value, kind: Any) -> Any:
        return self.builder.inttoptr(constant(address, INT), kind.as_pointer())

    def load(self, address: Value, kind: Any = INT) -> Value:
        return Value(self.builder, self.builder.load(self.pointer(address, kind), align=1))

    def store(self, address: Value, value: Any, kind: Any = INT) -> None:
        kind = value.type if isinstance(value, Value) else kind
        self.builder.store(constant(value, kind), self.pointer(address, kind), align=1)

    def load_int32(self, address: Value) -> Value:
        return Value(self.builder, self.builder.sext(self.load(address, I32).ir, INT))

    def store_int32(self, address: Value, value: Any) -> None:
        self.store(address, Value(self.builder, self.builder.trunc(constant(value, INT), I32)))

    def prefetch(self, address: Value) -> None:
        """Ask for a line of memory that will be read soon; any address will do."""
        options = [ir.Constant(I32, number) for number in (0, 3, 1)]
        self.intrinsic("llvm.prefetch.p0", NOTHING, Value(self.builder, self.pointer(address, BYTE)), *options)

    def scratch(self, size: int) -> Value:
        """Memory of the function's own, on the stack."""
        with self.builder.goto_entry_block():
            memory = self.builder.alloca(ir.ArrayType(BYTE, size))
            memory.align = 64
            return Value(self.builder, self.builder.ptrtoint(memory, INT))

    def add_shared(self, address: Value, value: Any) -> Value:
        """Add to a counter that threads share and get what it was. A thread that sees the sum sees what was written
        before."""
        pointer = self.pointer(address, INT)
        return Value(self.builder, self.builder.atomic_rmw("add", pointer, constant(value, INT), ordering="acq_rel"))

    def load_shared(self, address: Value) -> Value:
        return Value(self.builder, self.builder.load_atomic(self.pointer(address, INT), ordering="acquire", align=8))

    def pause(self) -> None:
        """Let a moment pass in a loop that waits."""
        if binding.get_default_triple().startswith(("x86_64", "i686")):
            self.intrinsic("llvm.x86.sse2.pause", NOTHING)


class Module:
    """Functions that become machine code together."""

    def __init__(self) -> None:
        self.ir = ir.Module()
        self.ir.triple = binding.get_default_triple()

    def function(
        self, name: str, arguments: int, write: Callable[[Code], None] | None = None, export: bool = False
    ) -> Any:
        """A function of so many int64, which gives one; ``write`` writes it down and ends with ``code.finish()``.

        Under a name that is there already, the function that has it.
        """
        if name in self.ir.globals:
            return self.ir.globals[name]
        function = ir.Function(self.ir, ir.FunctionType(INT, [INT] * arguments), name)
        if not export:
            function.linkage = "internal"
        if write is not None:
            write(Code(function))
        return function

    def object_code(self) -> bytes:
        """Machine code for this machine that needs nothing but the C library."""
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        target = binding.Target.from_default_triple()
        machine = target.create_target_machine(
            cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=3, reloc="pic"
        )
        module = binding.parse_assembly(str(self.ir))
        module.verify()
        tuning = binding.create_pipeline_tuning_options(speed_level=2)
        tuning.loop_vectorization = tuning.slp_vectorization = False
        passes = binding.create_pass_builder(machine, tuning)
        passes.getModulePassManager().run(module, passes)
        code: bytes = machine.emit_object(module)
        return code


def wide_registers() -> bool:
    """Whether this machine has AVX-512: registers of 16 floats, and 32 of them."""
    return bool(binding.get_host_cpu_features().get("avx512f"))
