"""Device limits: memory bandwidth and peak FLOP/s, published or measured."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jllm_runtime.planner.topologies import TOPOLOGIES

READ_BYTES = 512 * 2**20
"""Bytes of the matrix that is read: many times what CPU caches hold."""
_COLUMNS = 16384
_REPEATS = 7
# Matrices of the product. Accelerators need larger ones to be busy.
_GEMM_SIZES = {"cpu": 2048}
_GEMM_SIZE = 8192


@dataclass(frozen=True)
class Limits:
    """Limits of one device.

    Attributes:
        bytes_per_s: bandwidth of its memory, reading.
        flops_per_s: peak of matrix products, a multiply-add counted as two.
        source: where the figures are published, or ``measured``.
    """

    bytes_per_s: float
    flops_per_s: float
    source: str


def find_limits(device: jax.Device) -> Limits:
    """The limits of a device: the published ones for an accelerator that the planner knows, else measured."""
    for topology in TOPOLOGIES.values():
        known = topology.device
        if device.platform != "cpu" and (known.platform, known.kind) == (device.platform, device.device_kind):
            return Limits(known.bytes_per_s, known.flops_per_s, known.source)
    return measure_limits(device)


def measure_limits(device: jax.Device) -> Limits:
    """Measure a device by what XLA does best there; the fastest of some repetitions counts.

    The bandwidth is that of a matrix-vector product, which reads each number once. The peak is that of a product of two
    matrices, in float32 on a CPU and in bfloat16 elsewhere.
    """
    with jax.default_device(device):
        matrix = jnp.ones((READ_BYTES // 4 // _COLUMNS, _COLUMNS), jnp.float32)
        vector = jnp.ones((_COLUMNS,), jnp.float32)
        reading = _shortest(lambda: jnp.dot(matrix, vector))
        # Before the other matrices are made, for devices with little memory.
        del matrix
        size = _GEMM_SIZES.get(device.platform, _GEMM_SIZE)
        square = jnp.ones((size, size), jnp.float32 if device.platform == "cpu" else jnp.bfloat16)
        computing = _shortest(lambda: jnp.dot(square, square))
    # A product of two square matrices has size**3 multiply-adds.
    return Limits(READ_BYTES / reading, 2 * size**3 / computing, "measured")


def _shortest(work: Callable[[], jax.Array]) -> float:
    work().block_until_ready()
    # The first run, above, compiles. JAX returns before the work is done, so each run is waited for.
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work().block_until_ready()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
