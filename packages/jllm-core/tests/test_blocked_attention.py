"""Attention in blocks of keys, against the plain one."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jllm_core import ModelConfig, ShardingRules, abstract_weights
from jllm_core.backends.base import XLA
from jllm_core.backends.cpu import blocked_attention
from jllm_core.backends.select import select_backend
from jllm_core.ops.attention import attention
from jllm_core.sharding import Placement

SHAPES = st.tuples(
    st.integers(1, 2),  # B
    st.sampled_from([16, 17, 40]),  # T
    st.sampled_from([(1, 1), (2, 1), (6, 3)]),  # N, K
    st.sampled_from([64, 128, 192, 512]),  # S
    st.sampled_from([4, 16]),  # H
)


def arrays(shape: tuple[int, int, tuple[int, int], int, int], seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    batch, queries, (heads, kv_heads), slots, width = shape
    random = np.random.default_rng(seed)
    q = random.standard_normal((batch, queries, heads, width), np.float32)
    k, v = random.standard_normal((2, batch, kv_heads, slots, width), np.float32)
    return jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)


def positions_of(batch: int, queries: int, starts: list[int]) -> jax.Array:
    return jnp.asarray(starts[:batch])[:, None] + jnp.arange(queries)


def placement(devices: int = 1, kernels: bool = True) -> Placement:
    mesh = jax.make_mesh((devices,), ("tensor",), devices=jax.devices("cpu")[:devices])
    return Placement(mesh, ShardingRules(), kernels)


@settings(max_examples=12, deadline=None)
@given(
    SHAPES,
    st.lists(st.integers(0, 512), min_size=2, max_size=2),
    st.sampled_from([None, 1, 5, 100]),
    st.integers(0, 9),
)
def test_it_is_the_plain_attention(
    shape: tuple[int, int, tuple[int, int], int, int], starts: list[int], window: int | None, seed: int
) -> None:
    q, k, v = arrays(shape, seed)
    positions = positions_of(
        *q.shape[:2], [min(start, k.shape[2] - q.shape[1]) if k.shape[2] > 64 else 0 for start in starts]
    )
    expected = attention(q, k, v, positions, window=window)
    found = blocked_attention.attention(q, k, v, positions, window)
    np.testing.assert_allclose(found, expected, atol=2e-6, rtol=1e-5)


def test_slots_behind_the_queries_do_not_count_and_are_not_read() -> None:
    q, k, v = arrays((1, 16, (2, 1), 512, 8), 0)
    positions = positions_of(1, 16, [100])
    expected = blocked_attention.attention(q, k, v, positions)
    beyond = jnp.arange(512)[:, None] >= 256
    k, v = (jnp.where(beyond, jnp.nan, x) for x in (k, v))
    np.testing.assert_array_equal(blocked_attention.attention(q, k, v, positions), expected)


def test_a_prompt_has_the_same_bits_in_a_cache_of_any_size() -> None:
    q, k, v = arrays((1, 32, (4, 2), 1024, 8), 1)
    positions = positions_of(1, 32, [200])
    run = jax.jit(blocked_attention.attention)
    np.testing.assert_array_equal(run(q, k[:, :, :256], v[:, :, :256], positions), run(q, k, v, positions))


def test_bfloat16_is_computed_in_float32() -> None:
    q, k, v = (x.astype(jnp.bfloat16) for x in arrays((1, 16, (2, 1), 128, 16), 2))
    positions = positions_of(1, 16, [90])
    found = blocked_attention.attention(q, k, v, positions)
    exact = attention(*(x.astype(jnp.float32) for x in (q, k, v)), positions)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("queries", "slots", "where", "taken"),
    [
        (16, 64, placement(), True),
        (15, 64, placement(), False),
        (16, 100, placement(), False),
        (16, 64, placement(kernels=False), False),
        (16, 64, None, False),
    ],
)
def test_which_calls_it_takes(
    queries: int, slots: int, where: Placement | None, taken: bool, make_config: Callable[..., ModelConfig]
) -> None:
    config = make_config()
    backend = XLA() if where is None else select_backend(abstract_weights(config), config, where)
    attend = backend.attention or attention
    q, k, v = arrays((1, queries, (1, 1), slots, 4), 0)
    positions = positions_of(1, queries, [slots - queries])
    expected = blocked_attention.attention if taken else attention
    np.testing.assert_array_equal(
        attend(q, k, v, positions, None, None), expected(q, k, v, positions, *([] if taken else [None]))
    )
