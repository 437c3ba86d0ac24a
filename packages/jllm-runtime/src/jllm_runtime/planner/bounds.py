"""Bounds of compiled programs: the larger of what their bytes and their cycles take on a device.

They are no measurements. Both are by the compiler's account: the bytes that cross memory at its full bandwidth, the
cycles one operation after another without kernels, communication and waiting.
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
        seconds: the larger of the two.
    """

    memory_s: float
    cycles_s: float | None
    seconds: float


def program_bound(program: Program, device: Device) -> Bound:
    """The bound of a program's step on this device."""
    memory = program.moved / device.bytes_per_s
    cycles = None if device.clock_hz is None or not program.cycles else program.cycles / device.clock_hz
    return Bound(memory, cycles, max(memory, cycles or 0.0))
