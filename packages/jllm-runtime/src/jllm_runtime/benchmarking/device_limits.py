"""Device limits: memory bandwidth and peak FLOP/s, published or measured."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jllm_core.backends.base import XLA, Backend

from jllm_runtime.planner.topologies import TOPOLOGIES

READ_BYTES = 512 * 2**20
"""Bytes that are read to measure memory: many times what most caches hold."""
MIN_SECONDS, MIN_ROUNDS = 1.0, 7
"""Seconds, and rounds, that each measurement is tried at least. Other work on the machine disturbs many of the tries,
and only the fastest counts."""
_COLUMNS = 16384
_SIZE_STEP = 2**20
_BYTES_OF_TRY = 256 * 2**20
"""Bytes of one try: so many that the time of the call itself hardly counts."""
_STREAMS = (1, 2, 4)
"""Places at which a thread reads by turns. Which number is fastest depends on the processor."""
_ROUNDS = 40_000
"""Rounds of one try of multiplying: some milliseconds."""
# Matrices of the product. Accelerators need larger ones to be busy.
_GEMM_SIZES = {"cpu": 2048}
_GEMM_SIZE = 8192

Way = Callable[[], tuple[jax.Array, int]]
"""A way to do some work: what is to be waited for, and how much work it was."""


@dataclass(frozen=True)
class Limits:
    """Limits of one device: the most that is known of it, so that nothing is faster.

    Attributes:
        bytes_per_s: bandwidth of its memory, reading.
        flops_per_s: peak of products, a multiply-add counted as two.
        source: where the figures are published, or ``measured``.
        reads: bytes, and the rate in bytes per second at which they were read again and again. What fits the
            processor's caches is read faster than memory.
    """

    bytes_per_s: float
    flops_per_s: float
    source: str
    reads: tuple[tuple[int, float], ...] = ()

    def bytes_per_s_of(self, size: int) -> float:
        """The most at which so many bytes are read again and again, in bytes per second.

        Fewer bytes are never slower: a rate that more of them were read at holds too.
        """
        return max([self.bytes_per_s, *(rate for read, rate in self.reads if read >= size)])

    def including(self, reads: Sequence[tuple[int, float]], flops_per_s: float) -> "Limits":
        """These limits, and what the model itself has reached: what was exceeded was no limit.

        Args:
            reads: bytes that were read, and the rate, as in ``Limits.reads``.
            flops_per_s: FLOPs per second that were reached.
        """
        exceeded = flops_per_s > self.flops_per_s or any(rate > self.bytes_per_s_of(size) for size, rate in reads)
        source = f"{self.source}, and the model's own best" if exceeded else self.source
        return Limits(self.bytes_per_s, max(self.flops_per_s, flops_per_s), source, (*self.reads, *reads))


def find_limits(
    device: jax.Device, backend: Backend | None = None, sizes: Sequence[int] = (), dtype: str = "bfloat16"
) -> Limits:
    """The limits of a device: the published ones for an accelerator that the planner knows, else measured.

    Args:
        device: the device.
        backend: what computes on it, whose own ways to read and multiply are tried too.
        sizes: bytes that a decode step reads, for which reading is measured beside that of memory.
        dtype: element type of the activations, of which a published peak is.
    """
    for topology in TOPOLOGIES.values():
        known = topology.device
        if device.platform != "cpu" and (known.platform, known.kind) == (device.platform, device.device_kind):
            return Limits(known.bytes_per_s, known.peak(dtype), known.source)
    return measure_limits(device, backend, sizes)


def measure_limits(device: jax.Device, backend: Backend | None = None, sizes: Sequence[int] = ()) -> Limits:
    """Measure a device by whatever is fastest on it: the best of all tries of several ways counts.

    Reading is that of XLA's matrix-vector product, and of kernels that only read, by all threads. The peak of products
    is that of XLA's product of two matrices, and of a kernel that only multiplies and adds, with the vectors and the
    threads of the other kernels: in float32 on a CPU, in which they compute whatever the weights are stored in, and in
    bfloat16 elsewhere. Arguments as in ``find_limits``.
    """
    backend = backend or XLA()
    with jax.default_device(device):
        memory = _reading(backend, READ_BYTES)
        reads = tuple((size, _reading(backend, size)) for size in _distinct(sizes))
        flops = _multiplying(backend, device.platform)
    return Limits(memory, flops, "measured", reads)


def _distinct(sizes: Sequence[int]) -> list[int]:
    """The sizes to measure for these: rounded up to what every way to read takes, and one for those that are alike.

    READ_BYTES and more need none: so many are read as memory is.
    """
    chosen: list[int] = []
    for size in sorted({-(-size // _SIZE_STEP) * _SIZE_STEP for size in sizes}, reverse=True):
        if size < 0.9 * (chosen[-1] if chosen else READ_BYTES):
            chosen.append(size)
    return chosen


def _reading(backend: Backend, size: int) -> float:
    """Bytes per second of reading so many bytes again and again."""
    matrix, vector = jnp.ones((size // 4 // _COLUMNS, _COLUMNS), jnp.float32), jnp.ones((_COLUMNS,), jnp.float32)
    ways: list[Way] = [lambda: (jnp.dot(matrix, vector), size)]
    if backend.probes is not None:
        read, passes = backend.probes()[0], max(1, _BYTES_OF_TRY // size)
        ways += [partial(read, matrix, passes, streams) for streams in _STREAMS]
    return _highest_rate(ways)


def _multiplying(backend: Backend, platform: str) -> float:
    """FLOPs per second of products."""
    size = _GEMM_SIZES.get(platform, _GEMM_SIZE)
    square = jnp.ones((size, size), jnp.float32 if platform == "cpu" else jnp.bfloat16)
    # A product of two square matrices has size**3 multiply-adds.
    ways: list[Way] = [lambda: (jnp.dot(square, square), 2 * size**3)]
    if backend.probes is not None:
        ways.append(partial(backend.probes()[1], _ROUNDS))
    return _highest_rate(ways)


def _highest_rate(ways: Sequence[Way]) -> float:
    """The highest rate of several ways to do the same, each tried again and again by turns."""
    for work in ways:
        work()[0].block_until_ready()  # compiles
    highest, tried, begin = 0.0, 0, time.perf_counter()
    while tried < MIN_ROUNDS or time.perf_counter() - begin < MIN_SECONDS:
        tried += 1
        for work in ways:
            start = time.perf_counter()
            result, amount = work()
            # JAX returns before the work is done, so each try is waited for.
            result.block_until_ready()
            highest = max(highest, amount / (time.perf_counter() - start))
    return highest
