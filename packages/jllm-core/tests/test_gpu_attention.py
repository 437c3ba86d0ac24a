"""Attention on GPUs, by the kernel (interpreted on the CPU) and in blocks, against the attention of ``ops``."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh
from jllm_core import ModelConfig, abstract_weights
from jllm_core.backends import blocked_attention
from jllm_core.backends.base import XLA
from jllm_core.backends.gpu import flash_attention
from jllm_core.backends.gpu.backend import GPU
from jllm_core.backends.select import select_backend
from jllm_core.kv_cache import PagedSlots
from jllm_core.ops.attention import attention
from jllm_core.quantization.keys_values import QuantizedSlots, quantize_slots
from jllm_core.sharding import Placement, ShardingRules

BLOCK = 32
flash = jax.jit(partial(flash_attention.attention, interpret=True), static_argnums=4)
blocks = jax.jit(partial(blocked_attention.attention, block=BLOCK), static_argnums=4)
sums = jax.jit(partial(blocked_attention.attention, block=BLOCK, by_sums=True), static_argnums=4)

FORMS = [
    pytest.param(flash, jnp.bfloat16, id="kernel-bfloat16"),
    pytest.param(flash, jnp.float16, id="kernel-float16"),
    pytest.param(blocks, jnp.float32, id="blocks-float32"),
    pytest.param(
        *(blocks, jnp.bfloat16),
        id="blocks-bfloat16",
        # Nobody attends so on a CPU but these tests.
        marks=pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="older XLA multiplies no bfloat16 so on CPUs"),
    ),
    pytest.param(sums, jnp.float16, id="sums-float16"),
]


class Case(NamedTuple):
    """Queries, and the keys and values of rows of some length, in pages of a pool that others use too."""

    q: jax.Array
    k: PagedSlots
    v: PagedSlots
    positions: jax.Array


def case(
    dtype: Any,
    newest: list[int],
    queries: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 6,
    page: int = 16,
    features: int = 16,
    int8: bool = False,
    stale: float = 0.0,
    seed: int = 0,
) -> Case:
    """Rows whose last query stands at ``newest``; slots behind it, and pages that no row has, hold ``stale``.

    Numbers go by the row and the position alone, not by the other rows or the pages.
    """
    pool = len(newest) * width + 3
    tables = np.random.default_rng(99).permutation(pool)[: len(newest) * width].reshape(len(newest), width)
    keys, values = np.full((2, pool, kv_heads, page, features), stale, np.float32)
    q = np.zeros((len(newest), queries, heads, features), np.float32)
    positions = np.array(newest)[:, None] + np.arange(1 - queries, 1)
    for row, last in enumerate(newest):
        random = np.random.default_rng((seed, last))
        q[row] = random.normal(size=q.shape[1:])
        for at in range(last + 1):
            of_slot = random.normal(size=(2, kv_heads, features))
            keys[tables[row, at // page], :, at % page], values[tables[row, at // page], :, at % page] = of_slot

    def slots(numbers: np.ndarray) -> PagedSlots:
        pages: Any = jnp.asarray(numbers, dtype)
        return PagedSlots(QuantizedSlots(*quantize_slots(pages)) if int8 else pages, jnp.asarray(tables))

    return Case(jnp.asarray(q, dtype), slots(keys), slots(values), jnp.asarray(positions))


def expected(given: Case, window: int | None = None) -> np.ndarray:
    """What the plain attention gives of the same numbers in float32."""

    def wide(slots: PagedSlots) -> PagedSlots:
        if isinstance(slots.pages, QuantizedSlots):
            return slots
        return PagedSlots(jnp.asarray(slots.pages, jnp.float32), slots.tables)

    q, k, v, positions = given
    return np.asarray(attention(q.astype(jnp.float32), wide(k), wide(v), positions, None, window))


def assert_close(found: jax.Array, reference: np.ndarray) -> None:
    # The inputs and the output have so many bits; sums are in float32.
    tolerance = {"bfloat16": 0.03, "float16": 0.004, "float32": 1e-5}[found.dtype.name]
    np.testing.assert_allclose(np.asarray(found, np.float32), reference, atol=tolerance)


# Each of these is a program; lengths and numbers are not.
@pytest.mark.parametrize(
    ("queries", "heads", "pages", "window", "int8", "contiguous"),
    [
        (1, (4, 2), (6, 16), None, False, False),
        (1, (6, 1), (3, 32), 40, True, False),
        (17, (4, 2), (6, 16), 5, False, False),
        (3, (3, 3), (1, 96), None, True, True),
        (1, (2, 1), (6, 16), 1, False, True),
    ],
)
@pytest.mark.parametrize(("attend", "dtype"), FORMS)
@settings(max_examples=5, deadline=None)
@given(newest=st.lists(st.integers(20, 95), min_size=2, max_size=2), seed=st.integers(0, 9))
def test_it_is_the_plain_attention(
    attend: Callable[..., jax.Array],
    dtype: Any,
    newest: list[int],
    queries: int,
    heads: tuple[int, int],
    pages: tuple[int, int],
    window: int | None,
    int8: bool,
    contiguous: bool,
    seed: int,
) -> None:
    given = case(dtype, newest, queries, *heads, *pages, int8=int8, seed=seed)
    k, v = (slots.gathered() if contiguous else slots for slots in (given.k, given.v))
    found = attend(given.q, k, v, given.positions, window)
    assert found.dtype == dtype
    assert_close(found, expected(given, window))


@pytest.mark.parametrize(("queries", "int8"), [(1, False), (16, True)])
@pytest.mark.parametrize(("attend", "dtype"), FORMS[1:4])
def test_neighbours_and_what_pages_held_before_change_no_bit(
    attend: Callable[..., jax.Array], dtype: Any, queries: int, int8: bool
) -> None:
    # Batches of one size, as the engine's programs have: it is the other rows and the pages that differ.
    alone = case(dtype, [37, 15, 15], queries, int8=int8)
    among = case(dtype, [37, 95, 64], queries, int8=int8)
    dirty = case(dtype, [37, 95, 64], queries, stale=np.nan, int8=int8)
    one, two, three = (np.asarray(attend(*each))[0] for each in (alone, among, dirty))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, three)
    # A table of another width has the same pages in front.
    wider = case(dtype, [37, 95, 64], queries, width=20, int8=int8)
    np.testing.assert_array_equal(one, np.asarray(attend(*wider))[0])


@pytest.mark.parametrize(("attend", "dtype"), FORMS[:3])
def test_blank_rows_and_rows_that_have_ended_are_finite(attend: Callable[..., jax.Array], dtype: Any) -> None:
    q, k, v, positions = case(dtype, [37, 40, 50], stale=np.nan)
    pool = k.pages.shape[0]
    k, v = (PagedSlots(slots.pages, slots.tables.at[1].set(pool)) for slots in (k, v))
    found = attend(q, k, v, positions.at[1].set(0))
    assert jnp.isfinite(found).all()
    assert_close(found[::2], expected(Case(q, k, v, positions))[::2])
    # In contiguous slots a row that has ended goes on beyond the last.
    contiguous = [slots.gathered() for slots in case(dtype, [37, 40, 95])[1:3]]
    assert jnp.isfinite(attend(q, *contiguous, jnp.array([[37], [10_000], [95]]))).all()


def test_the_kernel_is_for_16_bits_powers_of_two_and_pages_of_16() -> None:
    def takes(q: Any = jnp.bfloat16, k: Any = None, slots: int = 64, features: int = 128) -> bool:
        return flash_attention.supports(q, q if k is None else k, (10, 2, slots, features))

    assert takes()
    assert takes(jnp.float16, jnp.int8, 4096, 256)
    assert takes(slots=48)  # in blocks of 16
    assert not takes(jnp.float32)  # its products would be rounded to TF32
    assert not takes(jnp.bfloat16, jnp.float32)
    assert not takes(slots=8)
    assert not takes(features=80)


def test_a_long_row_does_not_overflow_float16() -> None:
    """8,192 values of 60 sum up to more than float16 holds; their mean does not."""
    slots = jnp.full((1, 1, 8192, 16), 60.0, jnp.float16)
    keys = jnp.zeros_like(slots)
    for attend in (flash, sums):
        found = attend(jnp.ones((1, 1, 2, 16), jnp.float16), keys, slots, jnp.array([[8191]]))
        np.testing.assert_allclose(np.asarray(found, np.float32), 60.0, rtol=1e-3)


# ---- The backend.


class Absent(NamedTuple):
    """A device that is not there; jax.sharding.AbstractDevice takes other arguments in each release."""

    device_kind: str


def on(kind: str, kernels: bool = True) -> Placement:
    mesh = AbstractMesh((1,), ("tensor",), abstract_device=Absent(kind))
    return Placement(mesh, ShardingRules(), kernels)


@pytest.mark.parametrize(
    ("kind", "triton"),
    [
        ("NVIDIA H100 80GB HBM3", True),
        ("NVIDIA A100-SXM4-80GB", True),
        ("NVIDIA L4", True),
        ("NVIDIA GeForce RTX 4090", True),
        ("NVIDIA GeForce RTX 2080 Ti", False),
        ("Tesla T4", False),
        ("Tesla V100-SXM2-16GB", False),
        ("AMD Instinct MI300X", False),
    ],
)
def test_the_kernel_is_chosen_from_ampere_on(kind: str, triton: bool, make_config: Callable[..., ModelConfig]) -> None:
    config = make_config()
    weights = abstract_weights(config)
    backend = select_backend(weights, config, on(kind))
    assert isinstance(backend, GPU)
    assert backend.triton == triton
    assert ("Pallas" in backend.name) == triton
    assert backend.one_table_width
    assert backend == select_backend(weights, config, on(kind))  # as jit compares it
    assert type(select_backend(weights, config, on(kind, kernels=False))) is XLA
    assert type(select_backend(weights, config, on("Some NPU"))) is XLA


def test_a_real_device_says_its_own_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    from jllm_core.backends.gpu import backend

    capability = backend._capability
    assert capability(Absent("x")) == ()  # says none
    for said, known in {"9.0": (9, 0), "8.6": (8, 6), "7.5": (7, 5), "12.0": (12, 0), "gfx90a": ()}.items():
        device = type("Device", (), {"compute_capability": said})()
        assert capability(device) == known
        assert (capability(device) >= backend.MIN_CAPABILITY) == (known >= (8, 0))


def test_the_backend_takes_the_kernel_where_it_fits_and_blocks_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def note(name: str) -> Callable[..., Any]:
        return lambda q, *_, **__: taken.append(name) or q

    monkeypatch.setattr(flash_attention, "attention", note("kernel"))
    monkeypatch.setattr(blocked_attention, "attention", note("blocks"))
    ampere, turing = GPU(), GPU(triton=False)
    for backend, dtype in [(ampere, jnp.bfloat16), (ampere, jnp.float32), (turing, jnp.float16)]:
        q, k, v, positions = case(dtype, [37])
        backend.attention(q, k, v, positions)
        # Without a cache, each key has a position of its own.
        slots = (k.gathered(), v.gathered())
        backend.attention(q, *slots, positions, jnp.arange(96)[None])
    assert taken == ["kernel", "blocks", "blocks"]


def test_a_plan_counts_no_scores_where_the_kernel_runs() -> None:
    q, k = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((8, 1, 32, 128), (8, 8, 4096, 128)))
    assert GPU().attention_bytes(q, k, 256, k.shape, None) == 0
    blocks = GPU(triton=False).attention_bytes(q, k, 256, k.shape, None)
    block = (8, 8, blocked_attention.BLOCK, 128)
    assert blocks == XLA().attention_bytes(q, k, 256, block, None) > 0
    # The kernel reads keys and values of int8, but none that are wider than the queries.
    kept = [GPU().attention_bytes(q, k.update(dtype=dtype), 256, k.shape, None) for dtype in (jnp.int8, jnp.float32)]
    assert kept == [0, blocks + 2 * math.prod(block) * 2]
