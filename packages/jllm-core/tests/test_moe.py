"""The mixture of experts, against a loop over tokens that shares no code with it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh
from jllm_core import (
    ModelConfig,
    MoEConfig,
    MoELayer,
    Placement,
    Quantization,
    Weights,
    abstract_weights,
    expert_load,
)
from jllm_core.array_info import abstract_arrays
from jllm_core.backends.base import XLA
from jllm_core.backends.grouped_experts import mlp_by_blocks, mlp_by_ragged_dot
from jllm_core.backends.select import select_backend
from jllm_core.ops.moe import moe, route
from jllm_core.quantization.arrays import dequantize
from jllm_core.quantization.grids import quantize

MakeConfig = Callable[..., ModelConfig]
MakeWeights = Callable[..., Weights]

E, X, D, F = 6, 2, 12, 10
MIXTURE = MoEConfig(num_experts=E, experts_per_token=X, intermediate_size=F)

run = jax.jit(moe, static_argnums=2)
run_load = jax.jit(expert_load, static_argnames="config")


def random(*shape: int, seed: int = 0, size: float = 0.5) -> np.ndarray:
    return (size * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def make_layer(e: int = E, d: int = D, f: int = F, seed: int = 0) -> MoELayer:
    return MoELayer(
        random(d, e, seed=seed), random(e, d, f, seed=seed + 1), random(e, d, f, seed=seed + 2), random(e, f, d, seed=3)
    )


def reference(x: np.ndarray, layer: MoELayer, config: MoEConfig) -> np.ndarray:
    """Token by token in float64, experts by a full sort."""
    w: Any = jax.tree.map(lambda array: np.asarray(array, np.float64), layer)
    out = np.zeros(x.shape)
    for index in np.ndindex(x.shape[:-1]):
        token = x[index].astype(np.float64)
        scores = token @ w.w_router
        probabilities = np.exp(scores - scores.max())
        probabilities /= probabilities.sum()
        chosen = np.argsort(-probabilities)[: config.experts_per_token]
        total = probabilities[chosen].sum() if config.normalize_weights else 1.0
        for expert in chosen:
            gate, up = token @ w.we_gate[expert], token @ w.we_up[expert]
            hidden = gate / (1 + np.exp(-gate)) * up
            out[index] += probabilities[expert] / total * (hidden @ w.we_down[expert])
    return out


# One token; few tokens, one row a block; many, in blocks of several rows.
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (2, 40)], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_each_token_goes_through_its_own_experts(shape: tuple[int, int], normalize: bool) -> None:
    config = MoEConfig(num_experts=E, experts_per_token=X, intermediate_size=F, normalize_weights=normalize)
    x, layer = random(*shape, D, size=2.0), make_layer()
    np.testing.assert_allclose(run(jnp.asarray(x), layer, config), reference(x, layer, config), atol=1e-5)


def test_no_token_is_dropped_when_all_want_the_same_experts() -> None:
    x, layer = random(1, 64, D), make_layer()
    x[..., 0], layer.w_router[0] = 50.0, np.arange(E)
    assert set(np.asarray(route(jnp.asarray(x[0]), jnp.asarray(layer.w_router), MIXTURE).experts).ravel()) == {
        E - 1,
        E - 2,
    }
    np.testing.assert_allclose(run(jnp.asarray(x), layer, MIXTURE), reference(x, layer, MIXTURE), rtol=1e-4, atol=1e-3)


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    """Wide enough that a product of another number of rows adds in another order."""
    mixture = MoEConfig(num_experts=16, experts_per_token=2, intermediate_size=192)
    x, layer = random(3, 40, 256), make_layer(e=16, d=256, f=192)
    others = x.copy()
    others[1:] = random(1, 1, 256, seed=9)  # all to the same experts
    both, changed = (np.asarray(run(jnp.asarray(rows), layer, mixture)) for rows in (x, others))
    np.testing.assert_array_equal(both[0], changed[0])
    np.testing.assert_allclose(run(jnp.asarray(x[:1]), layer, mixture)[0], both[0], atol=1e-5 * np.abs(both).max())


BY_BLOCKS, BY_RAGGED_DOT = jax.jit(mlp_by_blocks), jax.jit(mlp_by_ragged_dot)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 32), min_size=3, max_size=3))
def test_blocks_and_grouped_products_agree(sizes: list[int]) -> None:
    """Experts without a row among them, and rows that belong to no expert."""
    layer, x = jax.tree.map(jnp.asarray, make_layer(e=3)), jnp.asarray(random(100, D))
    by_blocks = np.asarray(BY_BLOCKS(x, jnp.array(sizes), layer))
    np.testing.assert_allclose(by_blocks, BY_RAGGED_DOT(x, jnp.array(sizes), layer), atol=1e-4)
    assert by_blocks[: sum(sizes)].all(1).all()
    assert not by_blocks[sum(sizes) :].any()


@pytest.mark.parametrize("quantization", [Quantization(8), Quantization(4, 32)], ids=lambda q: q.name)
@pytest.mark.parametrize("product", [mlp_by_blocks, mlp_by_ragged_dot])
def test_experts_may_be_quantised(product: Callable[..., jax.Array], quantization: Quantization) -> None:
    layer = make_layer(e=3, d=32, f=64)
    stored = {
        name: jax.tree.map(jnp.asarray, quantize(getattr(layer, name), quantization, batch=1))
        for name in ("we_gate", "we_up", "we_down")
    }
    numbers = MoELayer(layer.w_router, **{name: dequantize(array) for name, array in stored.items()})
    x, sizes = jnp.asarray(random(40, 32)), jnp.array([3, 30, 7])
    got = product(x, sizes, MoELayer(layer.w_router, **stored))
    np.testing.assert_allclose(got, product(x, sizes, numbers), atol=1e-4)


# ---- The choice.


@pytest.mark.parametrize(
    ("kind", "rows", "dtype", "quantization", "grouped"),
    [
        ("TPU v5 lite", 32, "bfloat16", None, True),
        ("TPU v6 lite", 32, "float32", None, True),
        ("TPU v4", 32, "bfloat16", None, True),
        ("TPU v5 lite", 31, "bfloat16", None, False),  # rows for fewer than a quarter of the experts
        ("TPU v2", 4096, "bfloat16", None, False),
        ("TPU v3", 4096, "bfloat16", None, False),
        ("NVIDIA H100 80GB HBM3", 4096, "bfloat16", None, False),
        ("cpu", 4096, "float32", None, False),
        (None, 4096, "bfloat16", None, False),
        ("TPU v5 lite", 32, "float16", None, False),
        ("TPU v5 lite", 32, "bfloat16", Quantization(8), True),
        ("TPU v4", 32, "bfloat16", Quantization(8), False),  # its compiler makes a copy in bfloat16
        ("TPU v5 lite", 32, "bfloat16", Quantization(8, 32), False),
        ("TPU v5 lite", 32, "bfloat16", Quantization(4, 32), False),
    ],
)
def test_the_compilers_grouped_product_is_taken_where_it_is_a_kernel(
    kind: str | None, rows: int, dtype: str, quantization: Quantization | None, grouped: bool, make_config: MakeConfig
) -> None:
    mixture = MoEConfig(num_experts=125, experts_per_token=2, intermediate_size=32)
    config = make_config(hidden_size=32, head_dim=32, intermediate_size=32, moe=mixture)
    layer = abstract_weights(config, dtype, quantization).layers[0].ffw
    device = NamedTuple("Device", [("device_kind", str)])(kind) if kind else None
    placement = Placement(AbstractMesh((1,), ("tensor",), abstract_device=device))
    # The kernels for CPUs are those of the processor at hand.
    backend = XLA(placement) if kind == "cpu" else select_backend(abstract_weights(config), config, placement)

    def experts(x: Any, sizes: Any, layer: MoELayer) -> Any:
        return backend.experts(x, sizes, layer)

    arguments = jax.ShapeDtypeStruct((rows, 32), dtype), jax.ShapeDtypeStruct((125,), "int32"), abstract_arrays(layer)
    assert ("ragged_dot" in str(jax.make_jaxpr(experts)(*arguments))) == grouped


def test_gradients_are_those_of_the_reference() -> None:
    x, layer = random(1, 3, D), make_layer()

    def loss(layer: MoELayer) -> jax.Array:
        return jnp.sum(moe(jnp.asarray(x), layer, MIXTURE) ** 2)

    slopes = jax.jit(jax.grad(loss))(jax.tree.map(jnp.asarray, layer))
    for name in ("w_router", "we_gate", "we_up", "we_down"):
        matrix, slope = getattr(layer, name), np.asarray(getattr(slopes, name))
        at = np.unravel_index(np.abs(slope).argmax(), slope.shape)
        ends = []
        for step in (1e-3, -1e-3):
            moved = matrix.copy()
            moved[at] += step
            ends.append(np.sum(reference(x, MoELayer(**{**vars(layer), name: moved}), MIXTURE) ** 2))
        assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(float(slope[at]), rel=0.02), name


def test_the_load_counts_every_choice(make_config: MakeConfig, make_weights: MakeWeights) -> None:
    mixture = MoEConfig(num_experts=4, experts_per_token=2, intermediate_size=8, layers=(False, True, True))
    config = make_config(num_layers=3, moe=mixture)
    weights = make_weights(config)
    tokens, positions = jnp.array([[1, 5, 2, 12], [3, 3, 9, 0]]), jnp.broadcast_to(jnp.arange(4), (2, 4))
    load = run_load(tokens, positions, weights, config=config)
    assert load.tokens.shape == (2, 4)
    np.testing.assert_array_equal(load.tokens.sum(1), [16, 16])
    assert (load.balance > 0.5).all()
    assert (load.balance < 4).all()


def test_what_fills_a_row_up_is_not_counted(make_config: MakeConfig, make_weights: MakeWeights) -> None:
    config = make_config(num_layers=2, moe=MoEConfig(num_experts=4, experts_per_token=2, intermediate_size=8))
    weights, positions = make_weights(config), jnp.arange(5)[None]
    alone = run_load(jnp.array([[1, 5, 2]]), positions[:, :3], weights, config=config)
    filled = run_load(jnp.array([[1, 5, 2, 7, 7]]), positions, weights, config=config, lengths=jnp.array([3]))
    np.testing.assert_array_equal(filled.tokens, alone.tokens)
    np.testing.assert_allclose(filled.balance, alone.balance, rtol=1e-5)


def test_an_even_router_has_a_balance_of_one(make_config: MakeConfig, make_weights: MakeWeights) -> None:
    config = make_config(num_layers=1, moe=MoEConfig(num_experts=4, experts_per_token=4, intermediate_size=8))
    tokens, positions = jnp.array([[1, 5, 2]]), jnp.arange(3)[None]
    weights = make_weights(config)
    assert float(run_load(tokens, positions, weights, config=config).balance[0]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no mixture of experts"):
        expert_load(tokens, positions, weights, make_config())
