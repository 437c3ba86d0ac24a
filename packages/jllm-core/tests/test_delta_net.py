"""Gated delta nets, against a loop over tokens in float64 that shares no code with them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jllm_core.ops.delta_net import (
    causal_conv,
    chunked_delta_rule,
    delta_net,
    gated_rms_norm,
    recurrent_delta_rule,
    unit_triangular_inverse,
)
from jllm_core.recurrent_state import RecurrentState
from jllm_core.weights import DeltaNetLayer

D, DK, DV, W = 10, 6, 5, 4
EPS = 1e-6

run_chunked = jax.jit(chunked_delta_rule)
run_recurrent = jax.jit(recurrent_delta_rule)
run_conv = jax.jit(causal_conv)
run_layer = jax.jit(delta_net, static_argnames="eps")


class Inputs(NamedTuple):
    """The arguments of the rule."""

    q: Any
    k: Any
    v: Any
    g: Any
    beta: Any
    memory: Any

    def tokens(self, first: int, last: int) -> "Inputs":
        return Inputs(*(array[:, first:last] for array in self[:-1]), self.memory)


def inputs(rows: int, tokens: int, keys: int, values: int, seed: int = 0, decay: float = 1.0) -> Inputs:
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    q, k = (heads / np.linalg.norm(heads, axis=-1, keepdims=True) for heads in normal(2, rows, tokens, keys, DK))
    g, beta = -decay * np.abs(normal(rows, tokens, values)), 1 / (1 + np.exp(-normal(rows, tokens, values)))
    return Inputs(q * DK**-0.5, k, normal(rows, tokens, values, DV), g, beta, normal(rows, values, DK, DV))


def loop(given: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Token by token and head by head, in float64."""
    q, k, v, g, beta, memory = (np.array(array, np.float64) for array in given)
    y = np.zeros(v.shape)
    for row, token, head in np.ndindex(v.shape[:3]):
        owner = head // (v.shape[2] // k.shape[2])
        at = row, head
        memory[at] *= np.exp(g[row, token, head])
        change = (v[row, token, head] - k[row, token, owner] @ memory[at]) * beta[row, token, head]
        memory[at] += np.outer(k[row, token, owner], change)
        y[row, token, head] = q[row, token, owner] @ memory[at]
    return y, memory


def one_by_one(given: Inputs) -> tuple[np.ndarray, Any]:
    memory, made = given.memory, []
    for token in range(given.v.shape[1]):
        y, memory = run_recurrent(*given.tokens(token, token + 1)._replace(memory=memory))
        made.append(y)
    return np.concatenate(made, axis=1), memory


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 4),
    heads=st.sampled_from([(1, 1), (2, 2), (1, 3), (2, 4)]),
    decay=st.sampled_from([0.0, 1e-3, 1.0, 40.0]),
    seed=st.integers(0, 2**16),
)
def test_both_forms_are_those_of_the_loop(tokens: int, heads: tuple[int, int], decay: float, seed: int) -> None:
    # Few lengths, for each is a program.
    given = inputs(2, (1, 63, 65, 130)[tokens - 1], *heads, seed=seed, decay=decay)
    expected_y, expected_memory = loop(given)
    # A chunk's decays are differences of sums, which reach thousands here and have a few digits less then.
    error = 2e-5 if decay <= 1 else 2e-4
    for y, memory in (run_chunked(*given), one_by_one(given)):
        np.testing.assert_allclose(y, expected_y, atol=error)
        np.testing.assert_allclose(memory, expected_memory, atol=error)


def test_tokens_that_are_all_alike_lose_no_bits() -> None:
    """The same key again and again, and no decay: powers of the system's matrix would be in the billions."""
    given = inputs(1, 130, 1, 2)
    given = given._replace(k=np.repeat(given.k[:, :1], 130, axis=1), g=0 * given.g, beta=0 * given.beta + 0.98)
    y, memory = run_chunked(*given)
    expected_y, expected_memory = loop(given)
    np.testing.assert_allclose(y, expected_y, atol=5e-6)
    np.testing.assert_allclose(memory, expected_memory, atol=5e-6)


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_a_unit_triangular_matrix_times_its_inverse_is_one(size: int) -> None:
    a = np.random.default_rng(0).standard_normal((3, size, size)).astype(np.float32) / size
    # What stands on and above the diagonal says nothing.
    matrix = np.tril(a, -1) + np.eye(size, dtype=np.float32)
    product = matrix @ np.asarray(unit_triangular_inverse(jnp.asarray(a)))
    np.testing.assert_allclose(product, np.broadcast_to(np.eye(size), a.shape), atol=1e-6)


@pytest.mark.parametrize("cut", [64, 128])
def test_a_text_that_is_cut_at_a_chunk_has_the_same_bits(cut: int) -> None:
    whole = inputs(2, 200, 2, 4)
    y, memory = run_chunked(*whole)
    first, between = run_chunked(*whole.tokens(0, cut))
    rest, end = run_chunked(*whole.tokens(cut, 200)._replace(memory=between))
    np.testing.assert_array_equal(np.concatenate([first, rest], axis=1), y)
    np.testing.assert_array_equal(end, memory)


# ---- The convolution


@pytest.mark.parametrize("tokens", [1, 2, 3, 9])
def test_the_convolution_sees_a_token_and_those_before_it(tokens: int) -> None:
    random = np.random.default_rng(0)
    x, kernel, tail = (random.standard_normal(shape) for shape in ((2, tokens, 3, 5), (W, 3, 5), (2, W - 1, 3, 5)))
    seen = np.concatenate([tail, x], axis=1)
    sums = np.array([sum(seen[:, t + w] * kernel[w] for w in range(W)) for t in range(tokens)]).swapaxes(0, 1)
    y, rest = causal_conv(*(jnp.asarray(array, jnp.float32) for array in (x, kernel, tail)))
    np.testing.assert_allclose(y, sums / (1 + np.exp(-sums)), atol=1e-5)
    np.testing.assert_array_equal(rest, seen[:, -(W - 1) :].astype(np.float32))


@pytest.mark.parametrize("counts", [(0, 1), (2, 3), (5, 0)])
def test_the_tail_ends_with_the_last_token_that_counts(counts: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    shapes = (2, 5, 1, 2), (W, 1, 2), (2, W - 1, 1, 2)
    x, kernel, tail = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
    _, rest = run_conv(x, kernel, tail, np.array(counts))
    for row, count in enumerate(counts):
        expected = np.concatenate([tail[row], x[row, :count]])[-(W - 1) :]
        np.testing.assert_array_equal(rest[row], expected)


def test_the_norm_of_the_output_is_gated_head_by_head() -> None:
    random = np.random.default_rng(0)
    y, z, gamma = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((2, 3, 4, 5), (2, 3, 4, 5), 5))
    expected = y / np.sqrt((y**2).mean(-1, keepdims=True) + EPS) * gamma * z / (1 + np.exp(-z))
    np.testing.assert_allclose(gated_rms_norm(y, z, gamma, EPS), expected, atol=1e-5)


# ---- The whole layer


def layer(keys: int = 2, values: int = 4, dtype: Any = np.float32) -> DeltaNetLayer:
    random = np.random.default_rng(1)

    def normal(*shape: int, dtype: Any = dtype) -> Any:
        return jnp.asarray(random.normal(0, 0.5, shape), dtype)

    return DeltaNetLayer(
        *(normal(D, keys, DK), normal(D, keys, DK), normal(D, values, DV), normal(D, values, DV)),
        *(normal(D, values), normal(D, values)),
        *(normal(W, keys, DK), normal(W, keys, DK), normal(W, values, DV)),
        *(normal(values, dtype=np.float32), normal(values, dtype=np.float32), normal(DV, dtype=np.float32)),
        normal(values, DV, D),
    )


def activations(rows: int, tokens: int) -> np.ndarray:
    return np.random.default_rng(2).standard_normal((rows, tokens, D)).astype(np.float32)


def equal_bits(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def row(state: RecurrentState, number: int) -> Any:
    return jax.tree.map(lambda array: array[number], state)


@pytest.mark.parametrize("tokens", [1, 64, 70])
def test_tokens_that_do_not_count_leave_no_trace(tokens: int) -> None:
    """Whatever they are, numbers or not; and a row without any that count keeps its state to the bit."""
    w, before = layer(), activations(3, 64)
    _, state = run_layer(before, w, None, None, EPS)
    counts = np.array([0, min(tokens, 5), tokens])
    x = activations(3, tokens)
    y, after = run_layer(x, w, state, counts, EPS)
    dirty = np.where((np.arange(tokens) < counts[:, None])[..., None], x, np.nan)
    y_dirty, after_dirty = run_layer(dirty, w, state, counts, EPS)
    equal_bits(after, after_dirty)
    equal_bits(row(after, 0), row(state, 0))
    for number, count in enumerate(counts):
        np.testing.assert_array_equal(y[number, :count], y_dirty[number, :count])
    # The same as if the others had never been there.
    own, alone = run_layer(x[1:2, : counts[1]], w, jax.tree.map(lambda array: array[1:2], state), None, EPS)
    np.testing.assert_allclose(y[1:2, : counts[1]], own, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b[0], atol=1e-5), after, alone)


@pytest.mark.parametrize(("keys", "values"), [(2, 2), (1, 3), (2, 4)])
def test_steps_of_one_token_go_on_from_a_prompt(keys: int, values: int) -> None:
    w, x = layer(keys, values), activations(2, 70)
    whole, end = run_layer(x, w, None, None, EPS)
    y, state = run_layer(x[:, :64], w, None, None, EPS)
    made = [y]
    for token in range(64, 70):
        y, state = run_layer(x[:, token : token + 1], w, state, None, EPS)
        made.append(y)
    np.testing.assert_allclose(np.concatenate(made, axis=1), whole, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), state, end)


def test_states_are_float32_in_a_model_of_16_bits() -> None:
    w = layer(dtype=jnp.bfloat16)
    y, state = run_layer(jnp.asarray(activations(1, 3), jnp.bfloat16), w, None, None, EPS)
    assert y.dtype == jnp.bfloat16
    assert {array.dtype.name for array in jax.tree.leaves(state)} == {"float32"}


def test_gradients_are_those_of_small_steps() -> None:
    w, x = layer(), activations(1, 66)

    def loss(x: Any, w: DeltaNetLayer) -> Any:
        return jnp.sum(jnp.sin(delta_net(x, w, None, None, EPS)[0]))

    slopes = jax.jit(jax.grad(loss, argnums=1))(x, w)
    run_loss = jax.jit(loss)
    for name in ("q", "b", "a_log", "conv_v"):
        array = np.asarray(getattr(w, name))
        at, step = tuple(np.zeros(array.ndim, int)), 1e-2
        moved = [array.copy() for _ in range(2)]
        moved[0][at] += step
        moved[1][at] -= step
        up, down = (run_loss(x, DeltaNetLayer(**{**vars(w), name: jnp.asarray(each)})) for each in moved)
        np.testing.assert_allclose(getattr(slopes, name)[at], (up - down) / (2 * step), rtol=2e-2, atol=2e-3)
