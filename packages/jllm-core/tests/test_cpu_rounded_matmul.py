"""Products of prompts in bfloat16 on a CPU: beside exact sums of rounded numbers, and bit by bit beside themselves."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jllm_core import DeltaNetConfig, ModelConfig, NoCache, Placement, Quantization, Weights
from jllm_core.backends.base import XLA
from jllm_core.backends.cpu import backend as cpu
from jllm_core.backends.cpu import ffi
from jllm_core.backends.cpu.layer_calls import as_matrix, rounds_prompts
from jllm_core.backends.select import select_backend
from jllm_core.model import Call, hidden_states
from jllm_core.quantization.arrays import dequantize
from jllm_core.quantization.grids import quantize

pytest.importorskip("llvmlite")

from jllm_core.backends.cpu.embedding_and_head import Head
from jllm_core.backends.cpu.rounded_matmul import has_bfloat16_products

if not has_bfloat16_products():
    pytest.skip("this processor has no products of bfloat16", allow_module_level=True)

MakeConfig = Callable[..., ModelConfig]
MakeWeights = Callable[..., Weights]
KINDS: list[Any] = [
    *map(jnp.dtype, ("float32", "bfloat16", "float16")),
    Quantization(8),
    Quantization(8, 32),
    Quantization(4, 32),
    Quantization(4, 128, offsets=True),
]
HYBRID = {
    "delta_net": DeltaNetConfig(num_key_heads=2, num_value_heads=4, key_head_dim=32, value_head_dim=64),
    "mixers": ("delta_net", "attention"),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 16,
    "centered_norm": True,
    "output_gate": True,
}


def rounded(array: Any) -> np.ndarray:
    return np.asarray(jnp.asarray(array, jnp.bfloat16).astype(jnp.float32))


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def stored(kind: Any, inputs: int, outs: int) -> tuple[Any, np.ndarray]:
    """A random matrix of a type, and the numbers that the kernel multiplies by."""
    numbers = random(inputs, outs, seed=1)
    if not isinstance(kind, Quantization):
        array = jnp.asarray(numbers, kind)
        return array, rounded(array)
    matrix = jax.tree.map(jnp.asarray, quantize(numbers, kind))
    exact = np.asarray(dequantize(matrix, jnp.float32))
    # A channel's scale multiplies the finished sum, and the integers before it are exact.
    return matrix, rounded(exact) if matrix.group else exact


def multiply(x: np.ndarray, w: Any, rounds: bool = True) -> np.ndarray:
    matrix, operands = as_matrix("w", w)
    kernel = Head(replace(matrix, kind=replace(matrix.kind, rounded=rounds)), transposed=False)
    return np.asarray(ffi.call(kernel, {"x": x, **operands}, [(len(x), w.shape[1])])[0])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize(("rows", "inputs", "outs"), [(17, 128, 80), (300, 640, 49), (40, 1152, 16)])
def test_products_are_exact_sums_of_rounded_numbers(kind: Any, rows: int, inputs: int, outs: int) -> None:
    x, (w, numbers) = random(rows, inputs), stored(kind, inputs, outs)
    whole = outs // 16 * 16  # outputs that fill no vector are not rounded
    expected = rounded(x).astype(np.float64) @ numbers[:, :whole]
    got = multiply(x, w)
    np.testing.assert_allclose(got[:, :whole], expected, rtol=0, atol=3e-6 * inputs)
    np.testing.assert_array_equal(got[:, whole:], multiply(x, w, rounds=False)[:, whole:])


@pytest.mark.parametrize("inputs", [1, 7, 33, 517])
def test_an_odd_number_of_inputs(inputs: int) -> None:
    x, (w, numbers) = random(20, inputs), stored(jnp.dtype("bfloat16"), inputs, 48)
    np.testing.assert_allclose(multiply(x, w), rounded(x).astype(np.float64) @ numbers, rtol=0, atol=3e-6 * inputs)


@pytest.mark.parametrize("kind", KINDS[1:2] + KINDS[3:], ids=lambda kind: kind.name)
def test_a_row_has_the_same_bits_among_others(kind: Any) -> None:
    x, (w, _) = random(300, 640), stored(kind, 640, 48)
    together = multiply(x, w)
    for first, count in ((0, 17), (3, 64), (250, 50)):
        np.testing.assert_array_equal(multiply(x[first : first + count], w), together[first : first + count])


def test_what_is_no_number_stays_in_its_row() -> None:
    x, (w, _) = random(20, 64), stored(jnp.dtype("bfloat16"), 64, 32)
    x[3, 5], x[4, 6] = np.nan, np.inf
    got = multiply(x, w)
    assert np.isnan(got[3]).all()
    assert np.isinf(got[4]).all()
    assert np.isfinite(np.delete(got, [3, 4], axis=0)).all()


def run(tokens: np.ndarray, weights: Weights, config: ModelConfig, backend: Any) -> np.ndarray:
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    states, _ = jax.jit(lambda t, p: hidden_states(t, p, weights, config, NoCache(), backend))(tokens, positions)
    return np.asarray(states, np.float32)


def test_prompts_of_a_hybrid_are_nearer_to_float32_than_those_of_xla(
    make_config: MakeConfig, make_weights: MakeWeights, one_cpu: Placement
) -> None:
    config = make_config(**HYBRID)
    weights = make_weights(config, jnp.bfloat16)
    wide = jax.tree.map(lambda array: array.astype(jnp.float32), weights)
    tokens = np.random.default_rng(0).integers(0, 13, (3, 80))
    backend = select_backend(weights, config, one_cpu)
    assert isinstance(backend, cpu.CPULayerKernels)
    exact, got, xla = (
        run(tokens, *by) for by in ((wide, config, XLA()), (weights, config, backend), (weights, config, XLA()))
    )
    assert np.abs(got - exact).mean() < np.abs(xla - exact).mean()
    np.testing.assert_array_equal(run(tokens[1:2], weights, config, backend)[0], got[1])


@pytest.mark.parametrize(
    ("changes", "dtype", "tokens", "rounds"),
    [
        ({}, jnp.bfloat16, 17, True),
        ({}, jnp.bfloat16, 16, False),
        ({}, jnp.float32, 17, False),
        ({}, jnp.float16, 17, False),
        ({"delta_net": None, "mixers": None, "output_gate": False}, jnp.bfloat16, 17, False),
    ],
    ids=["prompt of a hybrid", "decoding", "float32", "float16", "no delta nets"],
)
def test_what_is_rounded(
    changes: dict[str, Any], dtype: Any, tokens: int, rounds: bool, make_config: MakeConfig, make_weights: MakeWeights
) -> None:
    config = make_config(**{**HYBRID, **changes})
    nothing = jnp.zeros((2, tokens))
    call = Call(config, nothing, (nothing, nothing), cpu.CPULayerKernels())
    assert all(rounds_prompts(layer, call) is rounds for layer in make_weights(config, dtype).layers)
