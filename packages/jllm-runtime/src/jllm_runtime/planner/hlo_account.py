"""Account of a compiled program from its scheduled HLO: bytes that cross the device's memory, cycles, and copies.

XLA's own ``cost_analysis`` counts what is fetched ahead into a TPU's on-chip memory (VMEM) twice, and gives nothing on
GPUs. Here an operand or a result counts where it lies in main memory (HBM), with these rules:

- a gather or slice reads what it takes, a scatter or update in place writes what it puts;
- what an asynchronous copy fetches counts once;
- a loop counts as often as it goes round (once, where neither the compiler nor the caller knows), a conditional one
  branch;
- of a hand-written kernel the operands that outlive the program's step (weights, pages) are left out: only its grid
  says how much of them it reads. They are in ``left_out``, and whoever knows the kernel adds what it reads.

Cycles are the compiler's estimates for the TensorCore, one operation after another: without kernels, collectives and
waiting for transfers. They are a lower bound by the compiler's model, and not validated on a device.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jllm_runtime.planner.hlo_operations import Accountant, Operation
from jllm_runtime.planner.hlo_text import HloModule, parse_hlo


@dataclass(frozen=True)
class Account:
    """What a program, or one step of it, moves and computes on each device.

    Attributes:
        operations: those that move or compute anything, in their order.
    """

    operations: tuple[Operation, ...] = field(repr=False)

    @property
    def read(self) -> int:
        """Bytes read from HBM, without what kernels read of ``left_out``."""
        return sum(each.read for each in self.operations)

    @property
    def written(self) -> int:
        """Bytes written to HBM."""
        return sum(each.written for each in self.operations)

    @property
    def moved(self) -> int:
        """Bytes that cross HBM."""
        return self.read + self.written

    @property
    def cycles(self) -> int:
        """Cycles of the TensorCore, by the compiler."""
        return sum(each.cycles for each in self.operations)

    @property
    def kernels(self) -> int:
        """Runs of hand-written kernels."""
        return sum(each.times for each in self.operations if each.kernel)

    @property
    def largest_made(self) -> int:
        """Elements of the largest array that an operation makes anew."""
        return max((array.size for each in self.operations for array in each.made), default=0)

    @property
    def left_out(self) -> int:
        """Bytes of the arrays that kernels read an unknown part of."""
        return sum(each.left_out for each in self.operations)

    @property
    def collectives(self) -> tuple[Operation, ...]:
        """Communication between devices."""
        return tuple(each for each in self.operations if each.collective)

    def makes(self, elements: int) -> tuple[Operation, ...]:
        """The operations that make an array of at least so many elements: copies, where no result is that large."""
        return tuple(each for each in self.operations if any(array.size >= elements for array in each.made))

    def under(self, scope: str) -> "Account":
        """The part whose scope has this text in it."""
        return Account(tuple(each for each in self.operations if scope in each.scope))


def account(hlo: str, branches: Mapping[str, int] | None = None, trips: Mapping[str, int] | None = None) -> Account:
    """The account of one execution of a compiled program (``Compiled.as_text()``).

    Args:
        hlo: its text.
        branches: which branch a conditional takes, by a part of its scope; others take the one that moves least.
            Branch 0 is that of a false condition.
        trips: how often a loop goes round whose count the compiler does not know, by a part of its scope.
    """
    module = parse_hlo(hlo)
    return _account(module, module.entry, branches, trips)


def step_account(
    hlo: str, branches: Mapping[str, int] | None = None, trips: Mapping[str, int] | None = None
) -> Account:
    """The account of one round of a program's outermost loop: a decode program's step. Of a program without a loop it
    is all of it. A loop whose rounds ``trips`` says is a part of the step.

    Args:
        hlo: the program's text.
        branches, trips: as for ``account``.
    """
    module = parse_hlo(hlo)
    entry = module.computations[module.entry]
    loops = [
        each.body
        for each in entry.instructions
        if each.opcode == "while" and not any(name in each.scope for name in trips or {})
    ]
    longest = max(loops, key=lambda body: len(module.computations[body].instructions), default=module.entry)
    return _account(module, longest, branches, trips)


def _account(
    module: HloModule, name: str, branches: Mapping[str, int] | None, trips: Mapping[str, int] | None
) -> Account:
    return Account(tuple(Accountant(module, branches or {}, trips or {}).rows(name)))
