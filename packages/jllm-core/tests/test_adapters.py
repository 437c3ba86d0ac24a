"""Low-rank adapters: the maths beside plain and quantised weights, gradients, and merging."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jllm_core import (
    DeltaNetConfig,
    DeltaNetLayer,
    ModelConfig,
    MoEConfig,
    Quantization,
    Weights,
    abstract_weights,
    forward,
    init_adapter,
    merge_adapter,
    with_adapter,
)
from jllm_core.adapters import AdaptedMatrix, Adapter, AdapterError, LowRank, abstract_adapter
from jllm_core.array_info import named_leaves
from jllm_core.backends.cpu.backend import supports_layers
from jllm_core.checkpoint import CheckpointError, save_checkpoint
from jllm_core.quantization.arrays import quantization_of
from jllm_core.quantization.grids import quantize

MakeConfig = Callable[..., ModelConfig]
MakeWeights = Callable[..., Weights]

TOKENS = jnp.array([[1, 5, 2, 12, 0, 7], [3, 3, 9, 0, 11, 4]])
POSITIONS = jnp.broadcast_to(jnp.arange(6), (2, 6))
ALL = ("q", "k", "v", "o", "w_gate", "w_up", "w_down")

run = jax.jit(forward, static_argnames=("config",))


def logits(weights: Weights, config: ModelConfig) -> np.ndarray:
    return np.asarray(run(TOKENS, POSITIONS, weights, config=config)[0])


def trained(adapter: Adapter, seed: int = 3) -> Adapter:
    """The adapter with a ``b`` that is not zero, as after a few steps."""
    random = np.random.default_rng(seed)
    factors = {
        name: LowRank(part.a, jnp.asarray(random.normal(0, 0.2, part.b.shape).astype(part.b.dtype)))
        for name, part in adapter.factors.items()
    }
    return Adapter(factors, adapter.alpha, adapter.rslora)


def test_a_new_adapter_changes_nothing(make_config: MakeConfig, make_weights: MakeWeights) -> None:
    config = make_config()
    weights = make_weights(config)
    adapter = init_adapter(config, jax.random.key(0), rank=3, targets=ALL)
    np.testing.assert_array_equal(logits(with_adapter(weights, adapter), config), logits(weights, config))
    assert all(np.asarray(part.a).std() > 0 for part in adapter.factors.values())


@pytest.mark.parametrize("rslora", [False, True])
def test_the_change_is_the_scaled_product_by_numpy(
    rslora: bool, make_config: MakeConfig, make_weights: MakeWeights
) -> None:
    config = make_config()
    weights = make_weights(config)
    adapter = trained(init_adapter(config, jax.random.key(1), rank=4, alpha=6.0, targets=ALL, rslora=rslora))
    scale = 6 / (2 if rslora else 4)
    merged = named_leaves(merge_adapter(weights, adapter))
    plain = named_leaves(weights)
    assert sorted(adapter.factors) == sorted(name for name in plain if name.rpartition(".")[2] in ALL)
    for name, matrix in plain.items():
        expected = np.asarray(matrix)
        if name in adapter.factors:
            part = adapter.factors[name]
            a, b = np.asarray(part.a).reshape(-1, 4), np.asarray(part.b).reshape(4, -1)
            expected = expected + (scale * a @ b).reshape(expected.shape)
        np.testing.assert_allclose(merged[name], expected, atol=1e-6, err_msg=name)


def test_beside_and_merged_are_the_same_model(make_config: MakeConfig, make_weights: MakeWeights) -> None:
    config = make_config(output_gate=True)
    weights = make_weights(config)
    adapter = trained(init_adapter(config, jax.random.key(1), rank=4, targets=(*ALL, "gate")))
    beside = logits(with_adapter(weights, adapter), config)
    np.testing.assert_allclose(beside, logits(merge_adapter(weights, adapter), config), atol=2e-4)
    assert np.abs(beside - logits(weights, config)).max() > 0.1


def test_delta_nets_and_shared_experts_are_adapted_and_experts_are_not(make_config: MakeConfig) -> None:
    net = DeltaNetConfig(num_key_heads=2, num_value_heads=4, key_head_dim=4, value_head_dim=4, conv_size=3)
    moe = MoEConfig(num_experts=3, experts_per_token=2, intermediate_size=8, shared_size=8, shared_gate=True)
    config = make_config(mixers=("delta_net", "attention"), delta_net=net, moe=moe)
    adapter = init_adapter(config, jax.random.key(1), rank=2, targets=("q", "z", "o", "w_up"))
    assert sorted(adapter.factors) == [
        *("layers.0.attn.o", "layers.0.attn.q", "layers.0.attn.z", "layers.0.ffw.shared.w_up"),
        *("layers.1.attn.o", "layers.1.attn.q", "layers.1.ffw.shared.w_up"),
    ]
    net_layer = with_adapter(abstract_weights(config), adapter).layers[0].attn
    assert isinstance(net_layer, DeltaNetLayer)
    assert isinstance(net_layer.z, AdaptedMatrix)
    with pytest.raises(AdapterError, match="no layer has a matrix 'we_up' to adapt; it has k, o, q, v, w_down"):
        init_adapter(config, jax.random.key(0), targets=["we_up"])


@pytest.mark.parametrize("quantization", [None, Quantization(4, 32)], ids=["float32", "int4"])
def test_gradients_go_to_the_adapter_through_frozen_weights(
    quantization: Quantization | None, make_config: MakeConfig, make_weights: MakeWeights
) -> None:
    config = make_config(hidden_size=32, intermediate_size=64, head_dim=32)
    weights = make_weights(config)
    if quantization is not None:
        attn = replace(weights.layers[1].attn, q=quantize(np.asarray(weights.layers[1].attn.q), quantization))
        weights = replace(weights, layers=[weights.layers[0], replace(weights.layers[1], attn=attn)])
    adapter = trained(init_adapter(config, jax.random.key(1), rank=2, targets=("q", "o", "w_down"), layers=[1]))
    assert {name.split(".")[1] for name in adapter.factors} == {"1"}

    def loss(given: Adapter) -> jax.Array:
        found = forward(TOKENS, POSITIONS, with_adapter(weights, given), config)[0]
        return -jax.nn.log_softmax(found)[:, :-1][..., 3].mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(adapter)
    for name, part in gradient.factors.items():
        assert np.abs(part.a).max() > 0, name
        assert np.abs(part.b).max() > 0, name
    # Along the gradient the loss falls as the gradient says.
    step = 1e-2 / np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(gradient)))
    moved = jax.tree.map(lambda x, g: x - step * g, adapter, gradient)
    slope = sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(gradient)) * step
    assert float(value - loss(moved)) == pytest.approx(slope, rel=0.2)


def test_only_the_layers_from_the_first_adapted_one_on_are_differentiated(
    make_config: MakeConfig, make_weights: MakeWeights
) -> None:
    config = make_config(num_layers=4)
    weights = make_weights(config)

    def operations(layers: list[int]) -> int:
        adapter = init_adapter(config, jax.random.key(1), rank=2, layers=layers)

        def loss(given: Adapter) -> jax.Array:
            return forward(TOKENS, POSITIONS, with_adapter(weights, given), config)[0].sum()

        return len(jax.make_jaxpr(jax.grad(loss))(adapter).eqns)

    assert operations([3]) < 0.7 * operations([0, 3])


def test_bfloat16_weights_stay_bfloat16(make_config: MakeConfig, make_weights: MakeWeights) -> None:
    config = make_config()
    weights = make_weights(config, jnp.bfloat16)
    adapter = trained(init_adapter(config, jax.random.key(1), rank=2))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(adapter)} == {"float32"}
    merged = merge_adapter(weights, adapter)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(merged)} == {"bfloat16"}
    q = with_adapter(weights, adapter).layers[0].attn.q
    assert q.matmul("BTD,DNH->BTNH", jnp.ones((1, 2, 12), jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_quantised_matrix_is_not_merged(make_config: MakeConfig) -> None:
    config = make_config(hidden_size=32, intermediate_size=64, head_dim=32)
    weights = abstract_weights(config, quantization=Quantization(8))
    adapter = init_adapter(config, jax.random.key(1))
    with pytest.raises(AdapterError, match=r"layers\.0\.attn\.q is QuantizedArray.*jllm-convert convert SRC DST"):
        merge_adapter(weights, adapter)


def test_an_adapter_is_not_merged_into_weights_that_have_it_already(make_config: MakeConfig) -> None:
    config = make_config()
    adapter = init_adapter(config, jax.random.key(1))
    with pytest.raises(AdapterError, match=r"layers\.0\.attn\.q is AdaptedMatrix.* already; merge .* without it"):
        merge_adapter(with_adapter(abstract_weights(config), adapter), adapter)


def test_adapted_weights_are_not_saved_as_a_checkpoint(
    make_config: MakeConfig, make_weights: MakeWeights, tmp_path: Path
) -> None:
    config = make_config()
    adapted = with_adapter(make_weights(config), init_adapter(config, jax.random.key(1)))
    with pytest.raises(CheckpointError, match=r"^layers\.0\.attn\.q has an adapter .*merge_adapter.*save_adapter\)$"):
        save_checkpoint(tmp_path / "out", config, adapted)
    assert not list(tmp_path.iterdir())


def test_adapted_weights_are_quantised_as_what_lies_under_the_adapter(make_config: MakeConfig) -> None:
    config = make_config(hidden_size=32, intermediate_size=64, head_dim=32)
    weights = abstract_weights(config, quantization=Quantization(8))
    adapted = with_adapter(weights, init_adapter(config, jax.random.key(1)))
    assert quantization_of(adapted.layers[0].attn.q, adapted.embedding) == Quantization(8)


def test_kernels_that_know_arrays_alone_leave_adapted_layers_to_xla(make_config: MakeConfig) -> None:
    config = make_config(hidden_size=64, head_dim=64, intermediate_size=64)
    weights = abstract_weights(config)
    assert supports_layers(weights, config)
    assert not supports_layers(with_adapter(weights, init_adapter(config, jax.random.key(1))), config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "the rank of an adapter is a whole number from 1 up, got 0"),
        ({"rank": True}, "a whole number from 1 up, got True"),
        ({"alpha": float("nan")}, "the alpha of an adapter is a finite number, got nan"),
        ({"alpha": float("inf")}, "a finite number, got inf"),
        ({"targets": []}, r"the targets of an adapter are names of matrices, such as .*, got \[\]"),
        ({"targets": "qv"}, "names of matrices, such as .*, got 'qv'"),
        ({"layers": []}, r"there is no matrix to adapt: none of the layers \[\] has one of q, v"),
        ({"layers": [0, 2]}, "there is no layer 2 to adapt: the model's are 0 to 1"),
        ({"targets": ["query"]}, "no layer has a matrix 'query' to adapt; it has k, o, q, v, w_down, w_gate, w_up"),
    ],
)
def test_an_impossible_adapter_is_refused(changes: dict[str, Any], message: str, make_config: MakeConfig) -> None:
    with pytest.raises(AdapterError, match=message):
        init_adapter(make_config(), jax.random.key(0), **changes)


def test_an_adapter_of_another_model_is_refused(make_config: MakeConfig, make_weights: MakeWeights) -> None:
    config = make_config()
    weights = make_weights(config)
    wider = abstract_adapter(make_config(hidden_size=24), rank=2, alpha=4.0)
    with pytest.raises(AdapterError, match=r"layers\.0\.attn\.q has shape \[24, 6, 4\], the matrix \[12, 6, 4\]"):
        with_adapter(weights, wider)
    deeper = abstract_adapter(make_config(num_layers=3), rank=2, alpha=4.0)
    with pytest.raises(AdapterError, match=r"no matrix layers\.2\.attn\.q \(2 of the adapter's are missing\)"):
        with_adapter(weights, deeper)


def test_embeddings_have_no_adapter() -> None:
    with pytest.raises(AdapterError, match="an embedding has no adapter"):
        AdaptedMatrix(jnp.ones((4, 2)), jnp.ones((4, 1)), jnp.ones((1, 2)), 1.0).rows(jnp.arange(2), jnp.float32)


def test_targets_of_none_are_all_matrices(make_config: MakeConfig) -> None:
    adapter = abstract_adapter(make_config(), rank=2, alpha=4.0, targets=None)
    assert {name.rpartition(".")[2] for name in adapter.factors} == set(ALL)


def test_descriptions_name_the_axes_for_sharding_and_reprs_are_short(make_config: MakeConfig) -> None:
    config = make_config()
    described = abstract_adapter(config, rank=2, alpha=4.0, targets=["o"])
    part = described.factors["layers.1.attn.o"]
    assert (part.a.shape, part.a.logical_axes) == ((6, 4, 2), ("heads", "head_dim", None))
    assert (part.b.shape, part.b.logical_axes) == ((2, 12), (None, "model"))
    assert repr(described) == "Adapter(2 matrices, rank 2, alpha 4, 144 numbers)"
    weights = with_adapter(abstract_weights(config), abstract_adapter(config, rank=2, alpha=4.0))
    assert "q=AdaptedMatrix([12, 6, 4], rank 2)" in repr(weights)
