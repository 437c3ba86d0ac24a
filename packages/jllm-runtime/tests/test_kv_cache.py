"""The contiguous cache: where keys and values go, and who sees them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jllm_core import Placement
from jllm_core.backends.base import XLA, Backend
from jllm_core.backends.cpu import ffi
from jllm_core.backends.cpu.backend import CPUKernels
from jllm_core.backends.tpu.backend import TPU
from jllm_runtime import make_mesh
from jllm_runtime.cache.contiguous import (
    KV_DTYPES,
    ContiguousCache,
    cache_capacity,
    cache_dtype,
    cache_info,
    empty_slots,
    largest_chunk,
    prefill_chunks,
)
from jllm_runtime.errors import RequestError
from jllm_runtime.programs.contiguous_batch import empty_cache, grow_cache

ROWS, SLOTS, KV_HEADS, HEAD = 2, 8, 3, 2


def filled_cache(value: float = -1.0, layers: int = 2, dtype: type = jnp.float32) -> ContiguousCache:
    def arrays() -> list:
        return [jnp.full((ROWS, KV_HEADS, SLOTS, HEAD), value, dtype) for _ in range(layers)]

    return ContiguousCache(arrays(), arrays())


def tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((ROWS, count, KV_HEADS, HEAD)).astype(np.float32)


def at(*positions: list[int]) -> jnp.ndarray:
    return jnp.array(positions, jnp.int32)


@pytest.mark.parametrize(
    ("count", "context", "capacity"),
    [
        (1, 100_000, 256),
        (256, 100_000, 256),
        (257, 100_000, 512),
        (512, 100_000, 512),
        (513, 100_000, 1024),
        (2049, 100_000, 4096),
        (1, 64, 64),  # a context smaller than the smallest bucket
        (1, 100, 128),  # ... in whole chunks of 64
        (257, 300, 320),  # the last bucket ends with the context
        (300, 300, 320),
        (301, 512, 512),
        (40_000, 40_960, 40_960),
    ],
)
def test_capacities_come_in_buckets_that_end_with_the_context(count: int, context: int, capacity: int) -> None:
    assert cache_capacity(count, context) == capacity


def test_every_count_fits_its_capacity() -> None:
    for context in (1, 63, 64, 65, 255, 256, 257, 300, 1000):
        for count in range(1, context + 1):
            capacity = cache_capacity(count, context)
            assert count <= capacity < context + 64
            assert capacity % 64 == 0


def test_a_chunk_lands_at_its_positions() -> None:
    k, v = tokens(3), tokens(3, seed=1)
    cache, keys, values, _ = filled_cache().append(0, jnp.array(k), jnp.array(v), at([4, 5, 6], [4, 5, 6]))
    np.testing.assert_array_equal(keys[:, :, 4:7], k.swapaxes(1, 2))
    np.testing.assert_array_equal(values[:, :, 4:7], v.swapaxes(1, 2))
    untouched = np.delete(np.asarray(keys), [4, 5, 6], axis=2)
    np.testing.assert_array_equal(untouched, np.full_like(untouched, -1))
    np.testing.assert_array_equal(cache.keys[0], keys)
    np.testing.assert_array_equal(cache.values[0], values)


def test_single_tokens_land_at_each_rows_own_position() -> None:
    k, v = tokens(1), tokens(1, seed=1)
    _, keys, values, _ = filled_cache().append(0, jnp.array(k), jnp.array(v), at([2], [7]))
    expected = np.full((ROWS, KV_HEADS, SLOTS, HEAD), -1, np.float32)
    expected[0, :, 2], expected[1, :, 7] = k[0, 0], k[1, 0]
    np.testing.assert_array_equal(keys, expected)
    expected[0, :, 2], expected[1, :, 7] = v[0, 0], v[1, 0]
    np.testing.assert_array_equal(values, expected)


@pytest.fixture(params=[XLA, TPU, CPUKernels])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param is CPUKernels and not ffi.available():
        pytest.skip("the kernels' compiler is not installed")
    return request.param(Placement(make_mesh(devices=jax.devices()[:1])))


def test_tokens_of_a_ragged_cache_land_at_each_rows_own_positions(backend: Backend) -> None:
    cache = replace(filled_cache(), ragged=True, backend=backend)
    k, v = tokens(3), tokens(3, seed=1)
    cache, keys, values, slots = jax.jit(lambda *new: cache.append(0, *new, at([2, 3, 4], [6, 7, 8])))(k, v)
    for array, new in ((keys, k), (values, v)):
        expected = np.full((ROWS, KV_HEADS, SLOTS, HEAD), -1, np.float32)
        expected[0, :, 2:5], expected[1, :, 6:8] = new[0].swapaxes(0, 1), new[1, :2].swapaxes(0, 1)
        np.testing.assert_array_equal(array, expected)
    if isinstance(backend, TPU):
        # An order that the kernels of TPUs for chunks may not take for their own.
        np.testing.assert_array_equal(slots, np.tile(np.arange(SLOTS), (ROWS, 1)))
    else:
        assert slots is None


def test_keys_and_values_of_8_bits(backend: Backend) -> None:
    """A chunk, then a token a row, then some at places of each row's own."""
    shape = (ROWS, KV_HEADS, SLOTS, HEAD)
    slots = [empty_slots(shape, jnp.dtype("int8"), backend.placement) for _ in range(4)]
    cache = ContiguousCache(slots[:2], slots[2:], backend)
    append = jax.jit(lambda cache, k, v, positions: cache.append(1, k, v, positions)[:3])
    expected = np.zeros((ROWS, KV_HEADS, SLOTS, HEAD), np.float32)
    places = (False, [[0, 1, 2]] * 2), (False, [[3], [7]]), (True, [[4, 5, 6], [6, 7, 8]])
    for seed, (ragged, positions) in enumerate(places):
        new = tokens(len(positions[0]), seed)
        cache, keys, values = append(replace(cache, ragged=ragged), jnp.array(new), -jnp.array(new), at(*positions))
        for row, number in np.ndindex(np.shape(positions)):
            if positions[row][number] < SLOTS:
                expected[row, :, positions[row][number]] = new[row, number]
    for slots, sign in ((keys, 1), (values, -1)):
        found = sign * np.asarray(slots.values) * np.asarray(slots.scales)[..., None]
        np.testing.assert_allclose(found, expected, atol=np.abs(expected).max() / 254 * 1.01)
    grown = grow_cache(cache, 2 * SLOTS)
    assert (grown.capacity, grown.keys[1].scales.shape) == (2 * SLOTS, (ROWS, KV_HEADS, 2 * SLOTS))
    np.testing.assert_array_equal(grown.values[1].scales[:, :, :SLOTS], values.scales)


def test_what_keys_and_values_are_kept_as() -> None:
    assert cache_dtype(jnp.dtype("bfloat16"), None) == "bfloat16"
    assert [cache_dtype(jnp.dtype("float32"), asked) for asked in KV_DTYPES] == [
        *("float32", "bfloat16", "float16", "int8")
    ]
    with pytest.raises(
        RequestError, match="kv_dtype must be one of float32, bfloat16, float16, int8, or None, got 'int4'"
    ):
        cache_dtype(jnp.dtype("float32"), "int4")


@pytest.mark.parametrize("beyond", [SLOTS, SLOTS + 1, 10_000])
def test_a_single_token_beyond_the_capacity_is_dropped(beyond: int) -> None:
    k = tokens(1)
    _, keys, _, _ = filled_cache().append(0, jnp.array(k), jnp.array(k), at([beyond], [1]))
    np.testing.assert_array_equal(keys[0], np.full((KV_HEADS, SLOTS, HEAD), -1))
    np.testing.assert_array_equal(keys[1, :, 1], k[1, 0])


def test_the_other_layers_stay_as_they_are() -> None:
    before = filled_cache(layers=3)
    cache, *_ = before.append(1, jnp.array(tokens(1)), jnp.array(tokens(1)), at([0], [0]))
    for layer in (0, 2):
        np.testing.assert_array_equal(cache.keys[layer], before.keys[layer])
        np.testing.assert_array_equal(cache.values[layer], before.values[layer])
    assert not np.array_equal(cache.keys[1], before.keys[1])
    np.testing.assert_array_equal(before.keys[1], filled_cache().keys[1])  # nothing was changed in place


def test_a_slot_stands_at_its_own_number() -> None:
    for positions in (at([3, 4, 5], [3, 4, 5]), at([0], [7])):
        new = jnp.array(tokens(positions.shape[1]))
        *_, slots = filled_cache().append(0, new, new, positions)
        assert slots is None  # by the protocol, slot s is for position s


def test_the_cache_keeps_its_own_type() -> None:
    cache, keys, values, _ = filled_cache(dtype=jnp.bfloat16).append(
        0, jnp.array(tokens(1)), jnp.array(tokens(1)), at([0], [0])
    )
    assert {x.dtype for x in (keys, values, *cache.keys, *cache.values)} == {jnp.dtype(jnp.bfloat16)}


def test_growing_keeps_what_is_there() -> None:
    small = filled_cache(value=3.0)
    grown = grow_cache(small, 2 * SLOTS)
    assert grown.capacity == 2 * SLOTS
    for before, after in zip(small.keys + small.values, grown.keys + grown.values, strict=True):
        np.testing.assert_array_equal(after[:, :, :SLOTS], before)


def test_an_empty_cache_has_the_described_shape_in_the_described_place(tiny) -> None:
    mesh = make_mesh()
    info = cache_info(tiny.config, batch=2, capacity=64, dtype=jnp.dtype(jnp.bfloat16))
    cache = empty_cache(info.shape, info.dtype, tiny.config, XLA(Placement(mesh)))
    assert len(cache.keys) == len(cache.values) == tiny.config.num_layers
    for array in cache.keys + cache.values:
        assert array.shape == (2, tiny.config.num_kv_heads, 64, tiny.config.head_dim)
        assert array.dtype == jnp.bfloat16
        assert array.sharding.mesh == mesh


@pytest.mark.parametrize(
    ("batch", "tokens", "chunks"),
    [
        (1, 1, [(64, 0, 1)]),
        (1, 255, [(64, 0, 4)]),
        (1, 256, [(256, 0, 1)]),
        (1, 600, [(256, 0, 2), (64, 8, 10)]),
        (2, 600, [(128, 0, 4), (64, 8, 10)]),
        (3, 600, [(64, 0, 9), (64, 9, 10)]),
        (16, 64, [(64, 0, 1)]),
    ],
)
def test_prompts_are_taken_in_large_chunks_and_then_in_small_ones(
    batch: int, tokens: int, chunks: list[tuple[int, int, int]]
) -> None:
    assert prefill_chunks(batch, tokens, capacity=1024) == chunks
    assert largest_chunk(batch) == max(size for size, _, _ in prefill_chunks(batch, 1024, capacity=1024))


class Accelerator(XLA):
    """A device on which 1 to 512 tokens take as long."""

    prefill_tokens, min_step_tokens = 1024, 512


@pytest.mark.parametrize(
    ("batch", "tokens", "capacity", "chunks"),
    [
        (1, 100, 256, [(64, 0, 2)]),
        (1, 500, 512, [(64, 0, 8)]),  # a large chunk would not fit
        (1, 128, 1024, [(64, 0, 2)]),  # takes as long
        (1, 129, 1024, [(1024, 0, 1)]),
        (1, 1025, 2048, [(1024, 0, 1), (64, 16, 17)]),
        (1, 1300, 2048, [(1024, 0, 2)]),
        (4, 450, 512, [(256, 0, 2)]),
        (4, 260, 512, [(256, 0, 1), (64, 4, 5)]),
        (16, 1000, 1024, [(64, 0, 15), (64, 15, 16)]),
    ],
)
def test_an_accelerator_takes_the_rest_in_one_large_chunk_where_that_is_faster(
    batch: int, tokens: int, capacity: int, chunks: list[tuple[int, int, int]]
) -> None:
    assert prefill_chunks(batch, tokens, capacity, Accelerator()) == chunks
    assert all(size * end <= capacity for size, _, end in chunks)
