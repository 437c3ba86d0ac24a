"""The kernels for TPUs against the attention of ``ops``, interpreted on the CPU, and where they are chosen."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, Mesh
from jllm_core import ModelConfig, abstract_weights
from jllm_core.backends.base import XLA
from jllm_core.backends.cpu.backend import XLAOnCPU
from jllm_core.backends.gpu.backend import GPU
from jllm_core.backends.select import select_backend
from jllm_core.backends.tpu import pallas_attention
from jllm_core.backends.tpu.backend import TPU
from jllm_core.ops.attention import attention
from jllm_core.sharding import Placement, ShardingRules

SLOTS, HEAD = 256, 128


@pytest.fixture
def interpreted() -> Iterator[None]:
    with pltpu.force_tpu_interpret_mode():
        yield


def arrays(rows: int, queries: int, heads: int, kv_heads: int, slots: int = SLOTS) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(rows, queries, heads, HEAD), (rows, kv_heads, slots, HEAD), (rows, kv_heads, slots, HEAD)]
    return tuple(jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))


def assert_close(ours: jax.Array, reference: jax.Array) -> None:
    # Both have inputs and outputs of 8 bits, and the queries are scaled before or after the product.
    np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(reference, np.float32), atol=0.03)


@pytest.mark.parametrize(("start", "window"), [(0, None), (128, None), (128, 40)])
def test_splash_attention_gives_what_xla_gives(start: int, window: int | None, interpreted: None) -> None:
    q, k, v = arrays(rows=2, queries=16, heads=4, kv_heads=2)
    positions = jnp.broadcast_to(start + jnp.arange(16), (2, 16))
    ours = pallas_attention.prefill_attention(q, k, v, positions, window)
    assert ours.dtype == q.dtype
    assert_close(ours, attention(q, k, v, positions, None, window))


# The kernel has two ways of holding queries, for groups of 8 heads and for others.
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (8, 1)])
def test_paged_attention_gives_what_xla_gives(
    heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch, interpreted: None
) -> None:
    monkeypatch.setattr(pallas_attention, "BLOCKS", (128,))
    q, k, v = arrays(rows=4, queries=1, heads=heads, kv_heads=kv_heads)
    ours = pallas_attention.decode_attention(q, k, v, jnp.array([[0], [-1], [128], [10_000]]))
    assert ours.dtype == q.dtype
    assert jnp.isfinite(ours).all()  # rows that have ended stand anywhere
    assert_close(ours[::2], attention(q, k, v, jnp.array([[0], [0], [128], [255]]))[::2])


# ---- The choice.


class Absent(NamedTuple):
    """A device that is not there; jax.sharding.AbstractDevice takes other arguments in each release."""

    device_kind: str


def on(kind: str | None = "TPU v5 lite", rules: ShardingRules | None = None, **axes: int) -> Placement:
    """A mesh of devices of some kind that are not there; enough to choose by."""
    device = None if kind is None else Absent(kind)
    mesh = AbstractMesh(tuple(axes.values()) or (1,), tuple(axes) or ("tensor",), abstract_device=device)
    return Placement(mesh, rules or ShardingRules())


def chosen(
    placement: Placement,
    q: tuple[int, ...] = (2, 1, 8, HEAD),
    k: tuple[int, ...] = (2, 4, SLOTS, HEAD),
    dtype: Any = jnp.bfloat16,
    window: int | None = None,
) -> bool:
    return pallas_attention.supports(q, k, dtype, window, placement)


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        (on("TPU v5 lite"), True),
        (on("TPU v6 lite", tensor=4), True),
        (on("TPU v6 lite", data=2, tensor=2), True),
        (on("TPU v2"), False),
        (on("TPU v3"), False),
        (on("NVIDIA H200"), False),
        (on("cpu"), False),
        (on(tensor=8), False),  # 4 kv heads do not divide
        (on(rules=ShardingRules(sequence="data", batch=None), data=2), False),
    ],
)
def test_the_kernels_are_for_tpus_that_have_them_and_heads_that_divide(placement: Placement, expected: bool) -> None:
    assert chosen(placement) == expected


def test_the_kernels_are_for_bfloat16_whole_lanes_and_blocks() -> None:
    assert not chosen(on(), dtype=jnp.float32)
    assert not chosen(on(), q=(2, 1, 8, 64), k=(2, 4, SLOTS, 64))
    assert not chosen(on(), k=(2, 4, 192, HEAD))
    assert not chosen(on(), window=16)  # paged attention knows no window
    assert chosen(on(), q=(2, 4, 8, HEAD), window=16)  # splash attention does


def test_elsewhere_and_in_any_other_order_of_slots_xla_attends(
    make_config: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pallas_attention, "attention", None)
    q, k, v = arrays(rows=2, queries=1, heads=4, kv_heads=2)
    positions, backwards = jnp.array([[3], [200]]), jnp.broadcast_to(jnp.arange(SLOTS)[::-1], (2, SLOTS))
    here = Placement(Mesh(np.array(jax.devices()[:1]), ("tensor",)))
    expected = attention(q, k, v, positions)
    config = make_config()
    for placement, backend in ((here, XLAOnCPU), (on(None), XLA), (on("NVIDIA H200"), GPU), (on(), TPU)):
        selected = select_backend(abstract_weights(config), config, placement)
        assert isinstance(selected, backend)
        attend = selected.attention or attention
        if backend not in (GPU, TPU):
            np.testing.assert_array_equal(attend(q, k, v, positions, None, None), expected)
        np.testing.assert_array_equal(
            attend(q, k, v, positions, backwards, None), attention(q, k, v, positions, backwards)
        )


def test_the_dispatch_runs_the_kernel_over_the_mesh(monkeypatch: pytest.MonkeyPatch, interpreted: None) -> None:
    monkeypatch.setattr(pallas_attention, "DEVICE_KINDS", (jax.devices()[0].device_kind,))
    monkeypatch.setattr("jllm_core.backends.tpu.backend.attention", None)
    placement = Placement(Mesh(np.array(jax.devices()[:1]), ("tensor",)))
    q, k, v = arrays(rows=2, queries=16, heads=4, kv_heads=2)
    positions = jnp.broadcast_to(128 + jnp.arange(16), (2, 16))
    assert_close(TPU(placement).attention(q, k, v, positions), attention(q, k, v, positions))
