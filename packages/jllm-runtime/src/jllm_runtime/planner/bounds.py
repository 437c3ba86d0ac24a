"""Bounds of compiled programs: the largest of what their bytes, their cycles and their arithmetic take on a device.

They are no measurements. All are by the compiler's account: the bytes that cross memory at its full bandwidth, the
cycles one operation after another, the operations at the peak; without kernels, communication and waiting.
"""

from dataclasses import dataclass

from jllm_runtime.planner.topologies import Device
from jllm_runtime.planner.tpu_compiler import Program


@dataclass(frozen=True)
class Bound:
    """Least time of one step of a program.

    Attributes:
        memory_s: bytes by the device's bandwidth.
        cycles_s: the compiler's cycles by its clock; None where either is not known.
        arithmetic_s: operations by the device's peak; 0 where the compiler counts none.
        seconds: the largest of them.
    """

    memory_s: float
    cycles_s: float | None
    arithmetic_s: float
    seconds: float


def program_bound(program: Program, device: Device) -> Bound:
    """The bound of a program's step on this device."""
    memory = program.moved / device.bytes_per_s
    cycles = None if device.clock_hz is None or not program.cycles else program.cycles / device.clock_hz
    arithmetic = program.flops / device.flops_per_s
    return Bound(memory, cycles, arithmetic, max(memory, cycles or 0.0, arithmetic))
