"""Prompt attention on a CPU: beside the reference, and the same bits however a prompt is cut and cached."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jllm_core.backends.cpu import ffi
from jllm_core.quantization.keys_values import QuantizedSlots, quantize_slots

pytest.importorskip("llvmlite")

TYPES = ("float32", "bfloat16", "float16", "int8")


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def kept(numbers: np.ndarray, name: str) -> Any:
    """Keys or values as a cache of this type has them."""
    if name == "int8":
        return QuantizedSlots(*quantize_slots(jnp.asarray(numbers)))
    return jnp.asarray(numbers).astype(name)


def attend(
    q: np.ndarray, keys: Any, values: Any, positions: np.ndarray, window: int = 0, tables: np.ndarray | None = None
) -> np.ndarray:
    """The kernel's answer, in the shape of q."""
    from jllm_core.backends.cpu.prompt_attention import Prompt

    operands = {"q": jnp.asarray(q.reshape(-1, *q.shape[2:])), "positions": jnp.asarray(positions, jnp.int32)}
    if isinstance(keys, QuantizedSlots):
        operands |= {"keys": keys.values, "key_scales": keys.scales}
        operands |= {"values": values.values, "value_scales": values.scales}
    else:
        operands |= {"keys": keys, "values": values}
    if tables is not None:
        operands["tables"] = jnp.asarray(tables, jnp.int32)
    kernel = Prompt(operands["keys"].dtype.name, tables is not None)
    rows = q.shape[0] * q.shape[1]
    [found] = ffi.call(kernel, operands, [(rows, q.shape[2] * q.shape[3])], window=np.int64(window))
    return np.asarray(found).reshape(q.shape)


def reference(q: np.ndarray, keys: Any, values: Any, positions: np.ndarray, window: int) -> np.ndarray:
    """``ops.attention.attention`` in float64. (XLA would compile each shape anew.)"""

    def numbers(slots: Any) -> np.ndarray:
        wide = slots.values * slots.scales[..., None] if isinstance(slots, QuantizedSlots) else slots
        return np.repeat(np.asarray(wide, np.float64), q.shape[2] // slots.shape[1], axis=1)

    keys, values = numbers(keys), numbers(values)
    scores = np.einsum("BTNH,BNSH->BNTS", q.astype(np.float64), keys) / np.sqrt(q.shape[-1])
    slots, stands = np.arange(keys.shape[2]), positions[:, None, :, None]
    seen = (slots <= stands) & (slots > stands - (window or len(slots)))
    weights = np.where(seen, np.exp(scores - np.where(seen, scores, -np.inf).max(-1, keepdims=True)), 0)
    return np.einsum("BNTS,BNSH->BTNH", weights / weights.sum(-1, keepdims=True), values)


def in_pages(slots: Any, size: int, order: np.ndarray) -> Any:
    """``[B, K, S, ...]`` as pages in this order, behind one that nobody uses, full of what must not be read."""

    def cut(array: jax.Array) -> jax.Array:
        rows, kv_heads, count, *rest = array.shape
        pages = np.asarray(array).reshape(rows, kv_heads, count // size, size, *rest).swapaxes(1, 2)
        nothing = 99 if array.dtype == np.int8 else np.nan
        pool = np.full((len(order) + 1, kv_heads, size, *rest), nothing, pages.dtype)
        pool[order + 1] = pages.reshape(len(order), kv_heads, size, *rest)
        return jnp.asarray(pool)

    return jax.tree.map(cut, slots)


@pytest.mark.parametrize("name", TYPES)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_it_is_the_reference(name: str, data: st.DataObject) -> None:
    texts, kv_heads, group = (data.draw(st.integers(1, most)) for most in (3, 3, 16))
    tokens, start = data.draw(st.integers(1, 150), "tokens"), data.draw(st.integers(0, 150), "start")
    head, slots = 16 * data.draw(st.integers(1, 8), "head / 16"), 16 * data.draw(st.integers(19, 24), "slots / 16")
    window = data.draw(st.sampled_from([0, 1, 7, 100, 200]), "window")
    q = random(texts, tokens, kv_heads * group, head)
    keys, values = (kept(random(texts, kv_heads, slots, head, seed=seed), name) for seed in (1, 2))
    positions = start * np.arange(texts)[:, None] // max(1, texts - 1) + np.arange(tokens)
    got = attend(q, keys, values, positions, window)
    np.testing.assert_allclose(got, reference(q, keys, values, positions, window), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
def test_pages_give_the_same_bits(name: str, size: int) -> None:
    q, positions = random(2, 70, 6, 32), np.array([[50], [400]]) + np.arange(70)
    keys, values = (kept(random(2, 2, 512, 32, seed=seed), name) for seed in (1, 2))
    order = np.random.default_rng(5).permutation(2 * 512 // size)
    tables = (order + 1).reshape(2, -1)
    # What stands behind the text in a table is not a page.
    tables = np.where(np.arange(tables.shape[1]) * size > positions[:, -1:], len(order) + 9, tables)
    paged = [in_pages(slots, size, order) for slots in (keys, values)]
    np.testing.assert_array_equal(
        attend(q, *paged, positions, tables=tables), attend(q, keys, values, positions), strict=True
    )


@pytest.mark.parametrize("window", [0, 90])
def test_a_token_has_the_same_bits_in_any_piece(window: int) -> None:
    q, positions = random(1, 150, 9, 64), 100 + np.arange(150)[None]
    keys, values = (kept(random(1, 3, 256, 64, seed=seed), "float32") for seed in (1, 2))
    whole = attend(q, keys, values, positions, window)
    for start, stop in ((0, 1), (0, 17), (17, 60), (60, 150), (149, 150)):
        part = attend(q[:, start:stop], keys, values, positions[:, start:stop], window)
        np.testing.assert_array_equal(part, whole[:, start:stop])


def test_what_no_token_sees_is_not_read() -> None:
    q, positions = random(1, 20, 4, 16), 40 + np.arange(20)[None]
    keys, values = random(1, 2, 128, 16, seed=1), random(1, 2, 128, 16, seed=2)
    expected = attend(q, jnp.asarray(keys), jnp.asarray(values), positions)
    keys[:, :, 60:], values[:, :, 60:] = np.nan, np.nan
    got = attend(q, jnp.asarray(keys), jnp.asarray(values), positions)
    np.testing.assert_array_equal(got, expected)


def test_a_token_that_sees_nothing_is_finite() -> None:
    keys, values = (jnp.asarray(random(1, 1, 64, 16, seed=seed)) for seed in (1, 2))
    positions = np.concatenate([np.full((1, 3), -1), np.arange(17)[None]], axis=1)
    got = attend(random(1, 20, 2, 16), keys, values, positions)
    np.testing.assert_array_equal(got[:, :3], 0)
    assert np.abs(got[:, 3:]).min(axis=-1).all()


def test_a_number_that_is_none_shows() -> None:
    q, positions = random(1, 30, 2, 16), np.arange(30)[None]
    q[0, 3, 1, 5] = np.nan
    keys, values = (jnp.asarray(random(1, 2, 64, 16, seed=seed)) for seed in (1, 2))
    bad = np.isnan(attend(q, keys, values, positions)).any(axis=-1)
    assert bad[0, 3, 1]
    assert bad.sum() == 1
