"""Parser of the text of a scheduled HLO module: what XLA's compilers give back of a program.

Only what an account of the program needs: computations, instructions, their results with layouts, and what calls what.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

_HEADER = re.compile(r"(ENTRY )?(%[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?(%[\w.\-]+) = (.*)$")
_NAME = re.compile(r"%[\w.\-]+")
_OPCODE = re.compile(r" ?([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b(pred|token|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(
    r"\b(?:calls|body|to_apply|true_computation|false_computation)=(%[\w.\-]+)"
    r"|\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}"
)
_BODY = re.compile(r"\bbody=(%[\w.\-]+)")
_TILE = re.compile(r"T\(([\d,]+)\)")
_ELEMENT_BITS = re.compile(r"E\((\d+)\)")
_MEMORY = re.compile(r"S\((\d+)\)")
_SCOPE = re.compile(r'\bop_name="([^"]*)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_TARGET = re.compile(r'\bcustom_call_target="([^"]*)"')


@dataclass(frozen=True)
class HloArray:
    """An array as it lies in memory.

    Attributes:
        dtype: its element type, such as ``bf16``.
        dims: its shape.
        nbytes: the bytes that it takes, with what its tiles are filled up with.
        memory: the number of its memory space; 0 is the device's main memory (HBM).
    """

    dtype: str
    dims: tuple[int, ...]
    nbytes: int
    memory: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)


@dataclass(frozen=True)
class Instruction:
    """One instruction, with the arrays of its result (several for a tuple) and the names of its operands."""

    name: str
    opcode: str
    arrays: tuple[HloArray, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    root: bool = False

    @property
    def scope(self) -> str:
        """Where in the program it is from: JAX's named scopes; empty where the compiler added it."""
        found = _SCOPE.search(self.attributes)
        return found[1] if found else ""

    @property
    def cycles(self) -> int:
        """The compiler's estimate of cycles; 0 where it has none."""
        found = _CYCLES.findall(self.attributes)
        return int(found[-1]) if found else 0

    @property
    def trips(self) -> int | None:
        """How often a loop goes round, where the compiler knows."""
        found = _TRIPS.search(self.attributes)
        return int(found[1]) if found else None

    @property
    def target(self) -> str:
        """The target of a custom call."""
        found = _TARGET.search(self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that it calls: branches in order, the body of a loop without its condition."""
        return tuple(name for one, several in _CALLED.findall(self.attributes) for name in _NAME.findall(one + several))

    @property
    def body(self) -> str:
        """The body of a loop."""
        found = _BODY.search(self.attributes)
        return found[1] if found else ""


@dataclass(frozen=True)
class Computation:
    """A computation: its instructions in the order in which they run."""

    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        """The instructions by their names."""
        return {each.name: each for each in self.instructions}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Who reads each instruction's result."""
        users: dict[str, list[Instruction]] = defaultdict(list)
        for each in self.instructions:
            for operand in dict.fromkeys(each.operands):
                users[operand].append(each)
        return users

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """The parameters by their numbers."""
        return {int(each.arguments): each for each in self.instructions if each.opcode == "parameter"}

    @cached_property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next(each for each in self.instructions if each.root)


@dataclass(frozen=True)
class HloModule:
    """A program: its computations by name, and the name of the one that runs."""

    computations: dict[str, Computation]
    entry: str


def parse_hlo(text: str) -> HloModule:
    """The program of this text.

    Raises:
        ValueError: a text without an entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, name, lines = "", "", list[str]()
    for line in text.splitlines():
        if not name:
            if header := _HEADER.match(line):
                name, lines = header[2], []
                entry = name if header[1] else entry
        elif line.startswith("}") and not line.startswith("}}"):
            computations[name] = Computation(name, tuple(map(_instruction, lines)))
            name = ""
        elif _INSTRUCTION.match(line):
            lines.append(line)
        elif lines:
            # The settings of a kernel may take several lines.
            lines[-1] += line
    if not entry:
        raise ValueError("no entry computation in the text; expected a compiled program's as_text()")
    return HloModule(computations, entry)


def _instruction(line: str) -> Instruction:
    match = _INSTRUCTION.match(line)
    if match is None:
        raise ValueError(f"no instruction in the HLO line {line[:80]!r}")
    root, name, rest = bool(match[1]), match[2], match[3]
    at = _end_of_group(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:at], rest[at:]
    opcode = _OPCODE.match(rest)
    if opcode is None:
        raise ValueError(f"no opcode in the HLO instruction {name}: {rest[:80]!r}")
    end = _end_of_group(rest, opcode.end() - 1)
    arguments, attributes = rest[opcode.end() : end - 1], rest[end:]
    operands = tuple(_NAME.findall(arguments))
    return Instruction(name, opcode[1], tuple(parse_arrays(shape)), operands, arguments, attributes, root)


def _end_of_group(text: str, start: int) -> int:
    """The index behind the parenthesis that closes the one at ``start``."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at + 1
    return len(text)


def parse_arrays(shape: str) -> Iterator[HloArray]:
    """The arrays of a type: one, or those of a tuple."""
    for dtype, bits, dims, layout in _ARRAY.findall(shape):
        sizes = tuple(int(size) for size in dims.split(",") if size)
        memory = _MEMORY.search(layout)
        yield HloArray(dtype, sizes, _nbytes(dtype, bits, sizes, layout), int(memory[1]) if memory else 0)


def _nbytes(dtype: str, bits: str, dims: tuple[int, ...], layout: str) -> int:
    if dtype == "token":
        return 0
    # A type of less than a byte takes a whole one, unless the layout says that it is packed.
    packed = _ELEMENT_BITS.search(layout)
    element = int(packed[1]) if packed else max(int(bits or 8), 8)
    order, _, rest = layout.partition(":")
    sizes = [dims[int(axis)] for axis in order.split(",")] if order and dims else list(reversed(dims))
    if tile := _TILE.search(rest):
        # The tile covers the axes that vary fastest, its own last one the very fastest.
        edges = [int(edge) for edge in reversed(tile[1].split(","))]
        sizes = sizes or [1]
        sizes = [-(-size // edge) * edge for size, edge in zip(sizes, edges, strict=False)] + sizes[len(edges) :]
    return math.prod(sizes) * element // 8
