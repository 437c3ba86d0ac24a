"""Machines that `jllm plan` knows: their published figures, with sources.

A *device* is what JAX calls one: a core of a TPU v2 or v3 (two to a chip, each with half of the chip's memory and
bandwidth), but a whole chip of v4, whose two cores work as one ("megacore"), and of v5e and v6e, which have one.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from jllm_runtime.errors import PlanError
from jllm_runtime.planner.suggestions import suggest

GIB, GB, TERA = 2**30, 10**9, 10**12
MAX_GPUS = 16
"""GPUs of one machine, for names such as 2xt4; more are a mistake, or the memory of one (``a100-80``)."""
_SEVERAL = re.compile(r"(?P<before>\d+)\s*[x*]\s*(?P<kind>\S+)|(?P<kind_first>\S+?)\s*[x*-]\s*(?P<after>\d+)")


@dataclass(frozen=True)
class Device:
    """The figures of one device.

    Attributes:
        platform, kind: JAX's ``platform`` and ``device_kind``.
        memory_bytes: its memory.
        usable_bytes: the part of it that a program may fill.
        bytes_per_s: bandwidth of the memory.
        flops_per_s: peak of dense bfloat16 arithmetic (float32 for a device without), a multiply-add counted as two.
        source: where the figures are published.
        notes: what somebody who plans for it should know.
        clock_hz: cycles of the compiler in a second; None where the compiler tells none or nobody says how long they
            are.
        fed_per_cycle: elements of a matrix that its matrix units take in a cycle when few rows are multiplied, by the
            bits of an element; where a width is missing, the memory is slower than they are.
        float16_flops_per_s: the same of float16, for a device without bfloat16; None where the two are alike.
    """

    platform: str
    kind: str
    memory_bytes: int
    usable_bytes: int
    bytes_per_s: float
    flops_per_s: float
    source: str
    notes: tuple[str, ...] = ()
    clock_hz: float | None = None
    fed_per_cycle: Mapping[int, int] = field(default_factory=dict, hash=False)
    float16_flops_per_s: float | None = None

    def peak(self, dtype: str) -> float:
        """``flops_per_s`` of this element type."""
        return self.float16_flops_per_s or self.flops_per_s if dtype == "float16" else self.flops_per_s


@dataclass(frozen=True)
class CompilerTarget:
    """A slice of TPUs in the terms of libtpu's compiler.

    Attributes:
        topology_name: generation and chips along each axis.
        chips_per_host: chips of one host along each axis.
        chip_config: ``megacore`` where two cores are one device.
    """

    topology_name: str
    chips_per_host: tuple[int, int, int]
    chip_config: str = "default"


@dataclass(frozen=True)
class Topology:
    """A machine: devices of one kind, and the target of the compiler that knows them (None where none does)."""

    name: str
    device: Device
    devices: int
    target: CompilerTarget | None = None

    @property
    def total_bytes(self) -> int:
        """The memory that programs may fill, of all devices together."""
        return self.devices * self.device.usable_bytes


def _tpu(
    kind: str,
    memory: int,
    usable_gib: float,
    gb_per_s: float,
    tera_flops: float,
    source: str,
    ghz: float | None = None,
    fed: Mapping[int, int] | None = None,
) -> Device:
    # The usable part is from libtpu 0.0.42's error for a program that is too large: "exceeds available HBM (7.48G)".
    figures = memory, int(usable_gib * GIB), gb_per_s * GB, tera_flops * TERA
    return Device("tpu", kind, *figures, source, (), None if ghz is None else ghz * 1e9, fed or {})


def _gpu(
    kind: str,
    memory_gb: int,
    gb_per_s: float,
    tera_flops: float,
    source: str,
    *notes: str,
    float16_tera_flops: float | None = None,
) -> Device:
    # The usable part is the share that JAX takes at its start, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
    # (https://docs.jax.dev/en/latest/gpu_memory_allocation.html).
    memory = memory_gb * GB
    half = None if float16_tera_flops is None else float16_tera_flops * TERA
    figures = memory, memory * 3 // 4, gb_per_s * GB, tera_flops * TERA
    return Device("gpu", kind, *figures, source, notes, float16_flops_per_s=half)


_DOCS = "https://cloud.google.com/tpu/docs/"
# Of a core that feeds its matrix units more slowly than its memory reads: elements a cycle. A matrix unit of v2 and v3
# takes 128 x 128 weights in 128 cycles, however few rows are multiplied with them and however few bits they have, and
# a core has one (v2) or two (v3) of them. Newer ones are as fast as their memory but for 4 bits: there it is what
# libtpu 0.0.42 estimates for a product of 8 rows, [2560, 9728] in groups of 128, rounded up.
_FED_V2, _FED_V3 = (dict.fromkeys((16, 8, 4), 128 * units) for units in (1, 2))
# A v2 chip has 16 GiB, 700 GB/s and 46 TFLOP/s, a v3 chip 32 GiB, 900 GB/s and 123 TFLOP/s; a device is half of one.
# Their clocks are in the same table, v4's in Jouppi et al., TPU v4, ISCA 2023, table 4.
_NORRIE = "Norrie et al., Google's Training Chips, IEEE Micro 41(2), 2021, table 1"
_V2 = _tpu("TPU v2", 8 * GIB, 7.48, 350, 23, _NORRIE, 0.7, _FED_V2)
_V3 = _tpu("TPU v3", 16 * GIB, 15.48, 450, 61.5, _DOCS + "v3", 0.94, _FED_V3)
_V4 = _tpu("TPU v4", 32 * GIB, 30.75, 1200, 275, _DOCS + "v4", 1.05, {4: 620})
# The clock follows from the peak of four matrix units of 128 x 128.
_V5E = _tpu("TPU v5 lite", 16 * GIB, 15.75, 819, 197, _DOCS + "v5e", 1.5, {4: 800})
# By its documentation v6e has two matrix units of 256 x 256, which would make 3.5 GHz of its peak: so how long a cycle
# of the compiler is, is not known.
_V6E = _tpu("TPU v6 lite", 32 * GIB, 31.25, 1638, 918, _DOCS + "v6e")
_NVIDIA = "https://www.nvidia.com/en-us/"
# Without sparsity; of bfloat16, where there is any, with sums in float32.
_P100 = _gpu(
    *("Tesla P100-PCIE-16GB", 16, 732, 9.3, _NVIDIA + "data-center/tesla-p100/ (datasheet, 16 GB for PCIe, float32)"),
    "JAX for CUDA 13 runs on GPUs from Turing on; a P100 needs the one for CUDA 12: pip install 'jax[cuda12]'.",
    float16_tera_flops=18.7,
)
_T4 = _gpu(
    *("Tesla T4", 16, 320, 8.1, _NVIDIA + "data-center/tesla-t4/ (product brief PB-09256-001, float32)"),
    "In the environment, XLA_FLAGS=--xla_gpu_dot_merger_threshold_mb=0 saves a copy of most matrices in every step.",
    float16_tera_flops=65,
)
_L4 = _gpu("NVIDIA L4", 24, 300, 121, _NVIDIA + "data-center/l4/")
_A10G = _gpu("NVIDIA A10G", 24, 600, 70, "NVIDIA A10G Tensor Core GPU, datasheet, February 2022 (EC2 G5)")
_RTX_3090 = _gpu("NVIDIA GeForce RTX 3090", 24, 936, 71, "NVIDIA Ampere GA102 GPU Architecture, whitepaper, appendix A")
_RTX_4090 = _gpu("NVIDIA GeForce RTX 4090", 24, 1008, 165.2, "NVIDIA Ada GPU Architecture, whitepaper, appendix A")
_RTX_5090 = _gpu(
    "NVIDIA GeForce RTX 5090", 32, 1792, 209.5, "NVIDIA RTX Blackwell GPU Architecture, whitepaper, appendix A"
)
# The SXM versions.
_H100 = _gpu("NVIDIA H100 80GB HBM3", 80, 3350, 989.5, "https://www.nvidia.com/en-us/data-center/h100/")
_H200 = _gpu("NVIDIA H200", 141, 4800, 989.5, "https://www.nvidia.com/en-us/data-center/h200/")
_A100 = _gpu("NVIDIA A100-SXM4-80GB", 80, 2039, 312, "https://www.nvidia.com/en-us/data-center/a100/")
_A100_40 = _gpu("NVIDIA A100-SXM4-40GB", 40, 1555, 312, "https://www.nvidia.com/en-us/data-center/a100/")


def _this_cpu() -> Device:
    """The speed of a desktop (8 Zen 3 cores at 3.8 GHz, two channels of DDR4-3200) and the memory of this machine."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 32 * GIB
    # 2 channels x 8 bytes x 3.2 GHz; 8 cores x 3.8 GHz x 2 units x 8 lanes x 2 operations.
    return Device("cpu", "cpu", memory, memory, 51.2 * GB, 0.9728 * TERA, "AMD Ryzen 7 5800X, https://www.amd.com")


TOPOLOGIES = {
    topology.name: topology
    for topology in (
        Topology("v2-8", _V2, 8, CompilerTarget("v2:2x2", (2, 2, 1))),
        Topology("v3-8", _V3, 8, CompilerTarget("v3:2x2", (2, 2, 1))),
        Topology("v4-8", _V4, 4, CompilerTarget("v4:2x2x1", (2, 2, 1), "megacore")),
        Topology("v4-16", _V4, 8, CompilerTarget("v4:2x2x2", (2, 2, 1), "megacore")),
        Topology("v5e-1", _V5E, 1, CompilerTarget("v5e:1x1", (1, 1, 1))),
        Topology("v5e-4", _V5E, 4, CompilerTarget("v5e:2x2", (2, 2, 1))),
        Topology("v5e-8", _V5E, 8, CompilerTarget("v5e:2x4", (2, 4, 1))),
        Topology("v5e-16", _V5E, 16, CompilerTarget("v5e:4x4", (2, 2, 1))),
        Topology("v6e-1", _V6E, 1, CompilerTarget("v6e:1x1", (1, 1, 1))),
        Topology("v6e-4", _V6E, 4, CompilerTarget("v6e:2x2", (2, 2, 1))),
        Topology("v6e-8", _V6E, 8, CompilerTarget("v6e:2x4", (2, 4, 1))),
        Topology("p100", _P100, 1),
        Topology("t4", _T4, 1),
        Topology("2xt4", _T4, 2),
        Topology("l4", _L4, 1),
        Topology("a10g", _A10G, 1),
        Topology("rtx-3090", _RTX_3090, 1),
        Topology("rtx-4090", _RTX_4090, 1),
        Topology("rtx-5090", _RTX_5090, 1),
        Topology("a100-40", _A100_40, 1),
        Topology("a100", _A100, 1),
        Topology("h100", _H100, 1),
        Topology("h200", _H200, 1),
        Topology("cpu", _this_cpu(), 1),
    )
}


_ALIASES = {
    **{f"rtx{number}": f"rtx-{number}" for number in (3090, 4090, 5090)},
    **{f"{number}": f"rtx-{number}" for number in (3090, 4090, 5090)},
    **{"a100-80": "a100", "a100-80gb": "a100", "a100-40gb": "a100-40"},
}


def find_topology(name: str) -> Topology:
    """The machine of this name, in any case; of GPUs also several: ``2xt4``, ``t4x2`` and ``t4-2`` are two T4.

    Raises:
        PlanError: an unknown name; the message suggests some.
    """
    found = _one(name) or _several(name)
    if found is None:
        raise PlanError(f"unknown topology {name!r}; {suggest(name, TOPOLOGIES)}")
    return found


def _one(name: str) -> Topology | None:
    short = name.strip().lower().removeprefix("nvidia-").replace(" ", "-")
    return TOPOLOGIES.get(_ALIASES.get(short, short))


def _several(name: str) -> Topology | None:
    match = _SEVERAL.fullmatch(name.strip().lower())
    if match is None:
        return None
    kind = _one(match["kind"] or match["kind_first"])
    count = int(match["before"] or match["after"])
    # A slice of TPUs has the devices that its name says.
    if kind is None or kind.device.platform != "gpu" or kind.devices != 1:
        return None
    if not 1 <= count <= MAX_GPUS:
        raise PlanError(f"unknown topology {name!r}: expected 1 to {MAX_GPUS} GPUs of one machine, got {count}")
    return _times(kind, count)


def _times(kind: Topology, count: int) -> Topology:
    return kind if count == 1 else replace(kind, name=f"{count}x{kind.name}", devices=count)


def multiples(machine: Topology) -> list[Topology]:
    """The machine, and of a single GPU powers of two up to MAX_GPUS."""
    if machine.device.platform != "gpu" or machine.devices > 1:
        return [machine]
    return [_times(machine, 1 << power) for power in range(MAX_GPUS.bit_length())]
