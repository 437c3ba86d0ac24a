"""Bytes and cycles of the single operations of a scheduled HLO program; ``hlo_account`` says by which rules."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from jllm_runtime.planner.hlo_text import Computation, HloArray, HloModule, Instruction

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
KERNELS = frozenset({"tpu_custom_call", "__gpu$xla.gpu.triton", "triton_kernel_call"})
"""Targets of custom calls that are hand-written kernels."""
_NAMES = frozenset({"bitcast", "reshape", "get-tuple-element", "opt-barrier", "copy-done", "slice-done"})
"""Operations that give something another name."""
_FREE = (
    *("parameter", "constant", "tuple", "after-all", "partition-id", "replica-id", "iota", "domain"),
    *("async-update", "async-done", "send", "send-done", "recv", "recv-done"),
)
_FREE_CALLS = frozenset(
    {"AllocateBuffer", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked", "ConcatBitcast", "Sharding"}
)
_LIBRARIES = ("__cublas", "__cudnn")
"""Beginnings of the targets of NVIDIA's libraries, whose last result is scratch space."""
_TAKING = ("gather", "dynamic-slice", "slice")
_PUTTING = {"dynamic-update-slice": 1, "scatter": -1}
"""Operations that update their first operand in place, and which operand has the update."""


@dataclass(frozen=True)
class Operation:
    """An operation's row of the account.

    Attributes:
        name, opcode, scope: as in the HLO; ``scope`` has JAX's named scopes.
        read, written: bytes of HBM, all ``times`` together.
        cycles: by the compiler, all times together.
        times: how often it runs.
        made: the arrays that it makes anew, on chip or not: results that are no update in place, and nothing that is
            only fetched ahead into VMEM.
        kernel: whether it is a hand-written kernel.
        left_out: bytes of a kernel's operands that are not in ``read``.
    """

    name: str
    opcode: str
    scope: str
    read: int = 0
    written: int = 0
    cycles: int = 0
    times: int = 1
    made: tuple[HloArray, ...] = ()
    kernel: bool = False
    left_out: int = 0

    @property
    def collective(self) -> str | None:
        """The kind of communication that it is; None where it is none."""
        return next((kind for kind in COLLECTIVES if self.opcode in (kind, f"{kind}-start")), None)


@dataclass(frozen=True)
class Accountant:
    """The rows of a program's operations, computation by computation."""

    module: HloModule
    branches: Mapping[str, int]
    trips: Mapping[str, int]

    def rows(self, name: str, times: int = 1) -> Iterator[Operation]:
        """The rows of a computation that runs so often, those of what it calls in their places."""
        computation = self.module.computations[name]
        for each in computation.instructions:
            if each.opcode == "conditional":
                yield from self._branch(each, times)
            elif each.opcode == "while":
                yield from self.rows(each.body, times * (each.trips or self._named(self.trips, each) or 1))
            elif each.opcode in ("call", "async-start"):
                for called in each.called:
                    yield from self.rows(called, times)
            else:
                row = self._row(computation, each)
                if row.read or row.written or row.cycles or row.kernel or row.collective or row.made:
                    parts = {part: getattr(row, part) * times for part in ("read", "written", "cycles", "left_out")}
                    yield replace(row, times=times, **parts)

    def _branch(self, conditional: Instruction, times: int) -> list[Operation]:
        taken = self._named(self.branches, conditional)
        if taken is not None:
            return list(self.rows(conditional.called[taken], times))
        accounts = [list(self.rows(name, times)) for name in conditional.called]
        return min(accounts, key=lambda rows: sum(each.read + each.written for each in rows))

    @staticmethod
    def _named(known: Mapping[str, int], each: Instruction) -> int | None:
        """What the caller knows of an instruction, by a part of its scope."""
        return next((number for part, number in known.items() if part in each.scope), None)

    def _row(self, computation: Computation, each: Instruction) -> Operation:
        row = Operation(each.name, each.opcode, each.scope, cycles=each.cycles)
        if each.opcode in _NAMES or each.opcode in _FREE or each.opcode.endswith("-done"):
            return row
        operands = [computation.by_name[name] for name in each.operands]
        if each.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
            return _fetch(row, each)
        if each.opcode == "fusion":
            return self._fusion(row, each, operands)
        if each.opcode == "custom-call":
            return _custom_call(row, each, operands, [self._lasts(computation, operand) for operand in operands])
        if each.opcode in _TAKING:
            taken = sum(array.nbytes for array in each.arrays) if _hbm(operands[0]) else 0
            indices = sum(map(_hbm, operands[1:]))
            return replace(row, read=taken + indices, written=_hbm(each), made=each.arrays)
        if each.opcode in _PUTTING:
            update = operands[_PUTTING[each.opcode]]
            put = sum(array.nbytes for array in update.arrays) if _hbm(each) else 0
            return replace(row, read=_hbm(update), written=put)
        if row.collective:
            # Of an asynchronous start the type has the operands, too.
            moved = sum(map(_hbm, operands))
            results = _hbm(each) - moved if each.opcode.endswith("-start") else _hbm(each)
            return replace(row, read=moved, written=max(results, 0))
        return replace(row, read=sum(map(_hbm, operands)), written=_hbm(each), made=each.arrays)

    def _fusion(self, row: Operation, each: Instruction, operands: list[Instruction]) -> Operation:
        fused = self.module.computations[each.called[0]]
        read = 0
        for number, operand in enumerate(operands):
            if whole := _hbm(operand):
                read += self._taken(fused, fused.parameters[number].name, whole)
        root = fused.root
        results = [fused.by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
        written, made = 0, []
        for array, result in zip(each.arrays, results, strict=False):
            update = self._update(fused, result)
            if update is None:
                made.append(array)
            if array.memory == 0:
                written += array.nbytes if update is None else min(array.nbytes, update)
        return replace(row, read=read, written=written, made=tuple(made))

    def _taken(self, computation: Computation, name: str, whole: int) -> int:
        """Bytes that are read of a value of that many: all, unless it is only sliced, gathered from, or updated."""
        most = 0
        for user in computation.users[name]:
            first = user.operands[0] == name and name not in user.operands[1:]
            if user.opcode in _NAMES:
                most = max(most, self._taken(computation, user.name, whole))
            elif user.opcode in _TAKING and first:
                most = max(most, min(whole, sum(array.nbytes for array in user.arrays)))
            elif user.opcode in _PUTTING and first:
                continue
            elif user.opcode == "fusion":
                inner = self.module.computations[user.called[0]]
                if _only_names(inner):
                    most = max(most, self._taken(computation, user.name, whole))
                    continue
                for number, operand in enumerate(user.operands):
                    if operand == name:
                        most = max(most, self._taken(inner, inner.parameters[number].name, whole))
            else:
                return whole
        return most

    def _lasts(self, computation: Computation, value: Instruction) -> bool:
        """Whether a value was there before the computation began, and has at most been updated in place since."""
        while value.opcode != "parameter":
            if value.opcode in _NAMES or value.opcode in _PUTTING:
                into = value.operands[0] if value.operands else ""
            elif value.opcode == "fusion":
                into = self._updated(value)
            else:
                into = ""
            if not into:
                return False
            value = computation.by_name[into]
        return True

    def _updated(self, fusion: Instruction) -> str:
        """The operand that a fusion with one result updates in place; empty where it makes something anew."""
        inner = self.module.computations[fusion.called[0]]
        at = inner.root
        while at.opcode != "parameter":
            if (at.opcode not in _NAMES and at.opcode not in _PUTTING) or not at.operands:
                return ""
            at = inner.by_name[at.operands[0]]
        return fusion.operands[int(at.arguments)]

    def _update(self, computation: Computation, result: Instruction) -> int | None:
        """Bytes that a result in place puts into an array that was there; None for one that is made anew."""
        while result.opcode in _NAMES and result.operands:
            result = computation.by_name[result.operands[0]]
        if result.opcode == "fusion":
            inner = self.module.computations[result.called[0]]
            return None if inner.root.opcode == "tuple" else self._update(inner, inner.root)
        if result.opcode not in _PUTTING:
            # A parameter that is passed on is no array of its own.
            return 0 if result.opcode == "parameter" else None
        update = computation.by_name[result.operands[_PUTTING[result.opcode]]]
        return sum(array.nbytes for array in update.arrays)


def _hbm(each: Instruction) -> int:
    return sum(array.nbytes for array in each.arrays if array.memory == 0)


def _only_names(computation: Computation) -> bool:
    return all(each.opcode in _NAMES or each.opcode == "parameter" for each in computation.instructions)


def _fetch(row: Operation, each: Instruction) -> Operation:
    """An asynchronous copy; its type has both ends, of a whole copy the new one first."""
    new, old = each.arrays[:2] if each.opcode == "copy-start" else each.arrays[1::-1]
    nbytes = min(new.nbytes, old.nbytes)
    read = nbytes if old.memory == 0 else 0
    return replace(row, read=read, written=nbytes, made=(new,)) if new.memory == 0 else replace(row, read=read)


def _custom_call(row: Operation, each: Instruction, operands: list[Instruction], lasting: list[bool]) -> Operation:
    if each.target in _FREE_CALLS:
        return row
    kernel = each.target in KERNELS
    sizes = [0 if operand.opcode == "constant" else _hbm(operand) for operand in operands]
    left_out = sum(size for size, lasts in zip(sizes, lasting, strict=True) if kernel and lasts)
    results = each.arrays[:-1] if each.target.startswith(_LIBRARIES) and len(each.arrays) > 1 else each.arrays
    # What a kernel updates in place it does not make anew.
    updates = "output_to_operand_aliasing" in each.attributes
    return replace(
        row,
        read=sum(sizes) - left_out,
        written=0 if updates else sum(array.nbytes for array in results if array.memory == 0),
        made=() if updates else results,
        kernel=kernel,
        left_out=left_out,
    )
