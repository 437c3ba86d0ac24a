"""GPUs in the terms of XLA's CUDA compiler, which compiles for them where there are none.

The compiler takes a description of a GPU in place of the GPU. Those of OpenXLA are in xla/backends/gpu/target_config of
its repository; these have the same form, and figures from NVIDIA's whitepapers and programming guide. The compiler
itself works in a process of its own, ``planner/cuda_worker.py``.
"""

import importlib.util
from dataclasses import dataclass

from jllm_runtime.errors import PlanError
from jllm_runtime.planner.topologies import Device, Topology

ENVIRONMENT = {"JAX_PLATFORMS": "cpu"}
"""The worker's process has no GPU."""

PLUGIN = "jax_plugins.xla_cuda12"
KIB, MIB = 2**10, 2**20
# Versions that the compiler asks for: those of the packages that jax[cuda12] brings.
CUDA, CUDNN = (12, 9, 0), (9, 10, 0)


@dataclass(frozen=True)
class CudaTarget:
    """The figures of a GPU that the CUDA compiler goes by, besides those of its ``Device``.

    Attributes:
        capability: compute capability.
        multiprocessors: their number.
        lanes: float32 units of each.
        threads: that each can hold.
        shared_kib: shared memory of each, of which a program may use ``usable_kib``.
        usable_kib: see there.
        l2_mib: second-level cache.
        clock_ghz: highest clock.
    """

    capability: tuple[int, int]
    multiprocessors: int
    lanes: int
    threads: int
    shared_kib: int
    usable_kib: int
    l2_mib: int
    clock_ghz: float


_HOPPER = CudaTarget((9, 0), 132, 128, 2048, 228, 227, 50, 1.98)
_A100 = CudaTarget((8, 0), 108, 64, 2048, 164, 163, 40, 1.41)

TARGETS = {
    "NVIDIA H100 80GB HBM3": _HOPPER,
    "NVIDIA H200": _HOPPER,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA L4": CudaTarget((8, 9), 58, 128, 1536, 100, 99, 48, 2.04),
    "NVIDIA A10G": CudaTarget((8, 6), 80, 128, 1536, 100, 99, 6, 1.71),
    "NVIDIA GeForce RTX 3090": CudaTarget((8, 6), 82, 128, 1536, 100, 99, 6, 1.70),
    "NVIDIA GeForce RTX 4090": CudaTarget((8, 9), 128, 128, 1536, 100, 99, 72, 2.52),
    "Tesla T4": CudaTarget((7, 5), 40, 64, 1024, 64, 64, 4, 1.59),
}
"""By JAX's name of the device."""


def check_compiler(topology: Topology) -> None:
    """Refuse a machine that the compiler has no description of, or a process that has no compiler.

    Raises:
        PlanError: either is so.
    """
    if topology.device.kind not in TARGETS:
        raise PlanError(
            f"--compile has no description of {topology.device.kind} for the CUDA compiler; known: "
            f"{', '.join(TARGETS)}; without --compile, plans are estimates"
        )
    try:
        found = importlib.util.find_spec(PLUGIN) is not None
    except ModuleNotFoundError:  # of the package that plugins are in
        found = False
    if not found:
        raise PlanError(
            f"--compile for {topology.name} needs XLA's CUDA compiler (but no GPU): "
            "pip install 'jllm-runtime[cuda-plan]'"
        )


def target_config(device: Device) -> str:
    """The description of the device as the compiler reads it: a GpuTargetConfigProto in text."""
    target = TARGETS[device.kind]
    major, minor = target.capability
    # Of Hopper there are instructions that no later GPU has; the compiler uses them only if it is told so.
    extension = "ACCELERATED_FEATURES" if target.capability == (9, 0) else "NONE"
    cuda, cudnn = (".".join(map(str, version)) for version in (CUDA, CUDNN))
    return f"""
gpu_device_info {{
  name: "{device.kind}"
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {major}.{minor}"
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  core_count: {target.multiprocessors}
  fpus_per_core: {target.lanes}
  threads_per_core_limit: {target.threads}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: {target.shared_kib * KIB}
  shared_memory_per_block: {48 * KIB}
  shared_memory_per_block_optin: {target.usable_kib * KIB}
  l2_cache_size: {target.l2_mib * MIB}
  clock_rate_ghz: {target.clock_ghz}
  memory_bandwidth: {int(device.bytes_per_s)}
  device_memory_size: {device.memory_bytes}
  device_address_bits: 64
  pcie_bandwidth: {32 * 2**30}
  driver_version: "{cuda}" runtime_version: "{cuda}" compile_time_toolkit_version: "{cuda}" dnn_version: "{cudnn}"
}}
platform_name: "CUDA"
device_description_str: "{device.kind}"
runtime_version {{ major: {CUDA[0]} minor: {CUDA[1]} patch: {CUDA[2]} }}
dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} patch: {CUDNN[2]} }}
"""
