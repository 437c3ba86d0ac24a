"""The kernels that only read or multiply: that they do what is counted."""

import jax.numpy as jnp
import numpy as np
import pytest
from jllm_core.backends.base import XLA
from jllm_core.backends.cpu.backend import CPUKernels

pytest.importorskip("llvmlite")


@pytest.mark.parametrize("streams", [1, 2, 4])
@pytest.mark.parametrize("shape", [(2**18,), (48, 2**14)])  # 1 MiB, 3 MiB
def test_every_number_is_read(streams: int, shape: tuple[int, ...]) -> None:
    numbers = np.random.default_rng(0).integers(0, 2**31, shape, np.int32)
    read, _ = CPUKernels().probes()
    sums, size = read(jnp.asarray(numbers.view(np.float32)), 3, streams)
    assert size == 3 * numbers.nbytes
    # A chunk is of so many vectors; their sums are those of its bits, whatever the order.
    chunks = numbers.reshape(*sums.shape[:1], -1, sums.shape[1])
    np.testing.assert_array_equal(sums, chunks.sum(1, dtype=np.int32))


def test_every_product_is_made() -> None:
    _, multiply = CPUKernels().probes()
    sums, flops = multiply(5)
    # Each of a vector's multiply-adds has added a half to one of the sums, which began at 0, 1, 2 ...
    fmas = flops / 2 / sums.size
    begun = np.asarray(sums)[0, 0] - fmas / 2
    assert begun in (sum(range(6)), sum(range(12)))
    np.testing.assert_array_equal(sums, fmas / 2 + begun)


def test_without_kernels_there_are_no_probes() -> None:
    assert XLA().probes is None
