"""The engine's promises where the kernel for pages of TPUs attends, interpreted on the CPU."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jllm_core.backends.base import XLA
from jllm_core.backends.tpu import paged_attention
from jllm_core.backends.tpu.backend import TPU
from jllm_core.sharding import Placement
from jllm_runtime import Engine, EngineConfig, Model, SamplingParams
from jllm_runtime.cache.contiguous import empty_slots
from jllm_runtime.cache.paged import PagedCache, Pages
from jllm_runtime.mesh import make_mesh

SIZES = EngineConfig(pages=24, page_size=16, max_batch=4)


@pytest.fixture
def on_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are made as for a v5e."""
    monkeypatch.setattr(Placement, "device_kind", "TPU v5 lite")
    monkeypatch.setattr("jllm_runtime.model.select_backend", lambda weights, config, where: TPU(where, interpret=True))
    # So that a text has several pages and blocks.
    monkeypatch.setattr("jllm_runtime.engine.config.least_page_size", lambda *_: 1)
    monkeypatch.setattr(paged_attention, "DECODE_SLOTS", 32)
    monkeypatch.setattr(paged_attention, "PREFILL_SLOTS", 32)


@pytest.fixture
def model(tiny, on_tpu: None) -> Model:
    model: Model = tiny.random(tiny.config)
    return model


def test_the_same_request_gets_the_same_tokens_whatever_happens(
    model: Model, tiny, prompt: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, with its prefix in the cache, and among others; and those of the plain model."""
    kernels = []
    attend = paged_attention.attention
    monkeypatch.setattr(paged_attention, "attention", lambda *args: kernels.append(args[0].shape) or attend(*args))
    asked = prompt(40)
    greedy, seeded = (SamplingParams(max_tokens=12, temperature=heat, seed=3) for heat in (0.0, 1.0))
    others = [prompt(1 + 23 * number, seed=1) for number in range(3)]
    with Engine(model, SIZES) as engine:
        alone = [engine.submit(asked, params).result() for params in (greedy, seeded)]
        assert alone[0].token_ids == tiny.naive_greedy(tiny.plain, asked, 12)
        assert alone[1].reused_tokens == 32
        beside = [engine.submit(other, SamplingParams(max_tokens=8, seed=1, temperature=1.0)) for other in others]
        again = [engine.submit(asked, params) for params in (greedy, seeded)]
        assert [request.result().token_ids for request in again] == [each.token_ids for each in alone]
        assert all(len(request.result().token_ids) == 8 for request in beside)
    # Of two programs, and both in each layer.
    layers = model.config.num_layers
    assert sorted(kernels) == sorted([(4, 1, 4, 8)] * layers + [(32, 16, 4, 8)] * layers)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_token_is_written_to_its_page_as_a_scatter_writes_it(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of 8 and scales lie otherwise on a TPU than a scatter wants them: there it goes with its whole page."""
    pages, heads, size, features = 5, 2, 16, 8
    placement = Placement(make_mesh(devices=jax.devices()[:1]))
    tables = jnp.array([[3, 1], [pages, pages], [0, pages]], jnp.int32)  # the second is blank
    positions = jnp.array([[20], [0], [15]])
    k, v = jax.random.normal(jax.random.key(0), (2, 3, 1, heads, features))

    def written() -> Pages:
        shape = (pages, heads, size, features)
        slots = [empty_slots(shape, jnp.dtype(dtype), None) for _ in range(2)]
        cache = PagedCache(Pages(slots[:1], slots[1:], XLA(placement)), tables)
        return cache.append_in_place(0, k, v, positions).pages

    expected = written()
    monkeypatch.setattr(Placement, "device_kind", "TPU v5 lite")
    monkeypatch.setattr(Placement, "constrain", lambda self, array, *axes: array)
    for ours, scattered in zip(jax.tree.leaves(written()), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, scattered)
        assert np.count_nonzero(np.any(np.asarray(ours).reshape(pages, -1), axis=1)) == 2


@pytest.mark.parametrize(
    ("head", "kv_dtype", "page"), [(128, None, 64), (256, "bfloat16", 64), (64, None, 128), (128, "int8", 128)]
)
def test_pages_are_as_large_as_a_tpu_reads_them_in_place(
    head: int, kv_dtype: str, page: int, tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dataclasses.replace(tiny.plain, config=dataclasses.replace(tiny.config, head_dim=head))
    assert EngineConfig(kv_dtype=kv_dtype).fitted(model).page_size == 64
    monkeypatch.setattr(Placement, "device_kind", "TPU v5 lite")
    assert EngineConfig(kv_dtype=kv_dtype).fitted(model).page_size == page
    assert EngineConfig(kv_dtype=kv_dtype, page_size=512).fitted(model).page_size == 512
