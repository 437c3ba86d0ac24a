"""Models that are not attention alone, or attention with a difference: what they compute, and who computes them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jllm_core import (
    Capture,
    DeltaNetConfig,
    ModelConfig,
    MoEConfig,
    NoCache,
    Placement,
    Quantization,
    Weights,
    abstract_weights,
    forward,
    init_weights,
)
from jllm_core.array_info import named_leaves
from jllm_core.backends.base import Backend
from jllm_core.backends.select import select_backend
from jllm_core.ops.moe import moe, shared_expert
from jllm_core.ops.norm import rms_norm
from jllm_core.ops.rope import apply_rope, rope_angles
from jllm_core.quantization.arrays import QuantizedArray
from jllm_core.quantization.grids import quantize
from jllm_core.recurrent_state import StateCache
from jllm_core.weights import DeltaNetLayer, MLPLayer

MakeConfig = Callable[..., ModelConfig]
MakeWeights = Callable[..., Weights]
NET = DeltaNetConfig(num_key_heads=2, num_value_heads=4, key_head_dim=4, value_head_dim=6)
HYBRID: dict[str, Any] = {
    "mixers": ("delta_net", "attention"),
    "delta_net": NET,
    "rotary_dim": 2,
    "output_gate": True,
    "centered_norm": True,
    "qk_norm": True,
}
SHARED = MoEConfig(num_experts=4, experts_per_token=2, intermediate_size=8, shared_size=10, shared_gate=True)

run = jax.jit(forward, static_argnames=("config", "capture", "backend"))


def tokens(rows: int = 2, length: int = 5) -> tuple[np.ndarray, np.ndarray]:
    given = np.random.default_rng(0).integers(0, 13, (rows, length))
    return given, np.broadcast_to(np.arange(length), given.shape)


def test_a_hybrid_has_the_arrays_of_its_layers(make_config: MakeConfig) -> None:
    weights = abstract_weights(make_config(**HYBRID, moe=SHARED), jnp.bfloat16)
    arrays = named_leaves(weights)
    shapes = {name.removeprefix("layers.0.attn."): info.shape for name, info in arrays.items() if "0.attn." in name}
    assert shapes == {
        **{"q": (12, 2, 4), "k": (12, 2, 4), "v": (12, 4, 6), "z": (12, 4, 6), "a": (12, 4), "b": (12, 4)},
        **{"conv_q": (4, 2, 4), "conv_k": (4, 2, 4), "conv_v": (4, 4, 6), "a_log": (4,), "dt_bias": (4,)},
        **{"gamma": (6,), "o": (4, 6, 12)},
    }
    in_float32 = {name.split(".")[-1] for name, info in arrays.items() if info.dtype == np.float32}
    assert in_float32 == {"a_log", "dt_bias", "gamma"}
    assert arrays["layers.1.attn.gate"].shape == (12, 6, 4)
    assert arrays["layers.1.ffw.shared.w_down"].shape == (10, 12)
    assert arrays["layers.1.ffw.shared_gate"].shape == (12,)


def test_random_weights_begin_where_a_training_would(make_config: MakeConfig) -> None:
    weights = init_weights(make_config(**HYBRID), jax.random.key(0))
    net = weights.layers[0].attn
    assert isinstance(net, DeltaNetLayer)
    assert ((net.a_log >= 0) & (net.a_log <= np.log(16))).all()
    assert len({*np.asarray(net.a_log).tolist()}) == 4
    assert (net.dt_bias == 1).all()
    # A factor of one.
    assert (weights.gamma_final == 0).all()
    assert (net.gamma == 1).all()


def test_what_is_quantised_of_a_hybrid_are_its_matrices(make_config: MakeConfig) -> None:
    weights = abstract_weights(make_config(**HYBRID, moe=SHARED), jnp.float32, Quantization(8))
    leaves = jax.tree_util.tree_leaves_with_path(weights, is_leaf=lambda leaf: isinstance(leaf, QuantizedArray))
    plain = {path[-1].name for path, leaf in leaves if not isinstance(leaf, QuantizedArray)}
    gammas = {"attn_pre_gamma", "attn_post_gamma", "gamma_final", "q_gamma", "k_gamma", "gamma"}
    small = {"a", "b", "conv_q", "conv_k", "conv_v", "a_log", "dt_bias", "w_router", "shared_gate"}
    assert plain == {*gammas, *small, "embedding"}


def test_a_quantised_hybrid_is_near_the_plain_one(make_config: MakeConfig, make_weights: MakeWeights) -> None:
    config = make_config(**HYBRID, moe=SHARED)
    weights = make_weights(config)
    expected, _ = run(*tokens(), weights, config)

    def part(path: Any, info: Any, array: Any) -> Any:
        if not isinstance(info, QuantizedArray):
            return array
        metadata = info.values.metadata
        return quantize(np.asarray(array), Quantization(8), metadata["inputs"], metadata["batch"])

    abstract = abstract_weights(config, jnp.float32, Quantization(8))
    is_leaf = lambda leaf: isinstance(leaf, QuantizedArray)  # noqa: E731
    quantised = jax.tree_util.tree_map_with_path(part, abstract, weights, is_leaf=is_leaf)
    got, _ = run(*tokens(), quantised, config)
    np.testing.assert_allclose(got, expected, atol=0.05 * float(jnp.abs(expected).max()))


def test_a_centered_norm_rounds_once_behind_its_factor() -> None:
    x, gamma = (jax.random.normal(jax.random.key(seed), (7, 12), jnp.bfloat16) for seed in (0, 1))
    x32, factor = np.asarray(x, np.float32), 1 + np.asarray(gamma[0], np.float32)
    exact = x32 / np.sqrt((x32**2).mean(-1, keepdims=True) + 1e-6) * factor
    got = rms_norm(x, gamma[0], 1e-6, centered=True)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, jnp.asarray(exact).astype(jnp.bfloat16))


def test_the_first_features_are_rotated_as_a_head_of_them_alone(make_config: MakeConfig) -> None:
    part, whole = make_config(head_dim=8, rotary_dim=4), make_config(head_dim=4)
    positions, x = np.arange(6)[None], jax.random.normal(jax.random.key(0), (1, 6, 3, 8))
    rotated = apply_rope(x, rope_angles(positions, part))
    np.testing.assert_array_equal(rotated[..., :4], apply_rope(x[..., :4], rope_angles(positions, whole)))
    np.testing.assert_array_equal(rotated[..., 4:], x[..., 4:])


@pytest.mark.parametrize("gated", [True, False])
def test_every_token_goes_through_the_shared_expert(gated: bool, make_config: MakeConfig, make_weights: MakeWeights):
    mixture = MoEConfig(**{**vars(SHARED), "shared_gate": gated})
    layer = make_weights(make_config(moe=mixture)).layers[0].ffw
    x = jax.random.normal(jax.random.key(1), (2, 3, 12))
    alone = MoEConfig(**{**vars(SHARED), "shared_gate": False, "shared_size": None})
    without = moe(x, type(layer)(**{**vars(layer), "shared": None, "shared_gate": None}), alone)
    gate, up = x @ layer.shared.w_gate, x @ layer.shared.w_up
    expected = (gate / (1 + np.exp(-gate)) * up) @ layer.shared.w_down
    if gated:
        expected = expected / (1 + np.exp(-(x @ layer.shared_gate)))[..., None]
    np.testing.assert_allclose(moe(x, layer, mixture) - without, expected, atol=1e-4)
    np.testing.assert_allclose(shared_expert(x, layer.shared, layer.shared_gate), expected, atol=1e-4)


def test_attention_of_a_delta_net_cannot_be_captured(make_config: MakeConfig, make_weights: MakeWeights) -> None:
    config = make_config(**HYBRID)
    weights = make_weights(config)
    _, _, captured = run(*tokens(), weights, config, capture=Capture(hidden=(0, 1), attention=(1,)))
    assert captured.attention.keys() == {1}
    assert captured.hidden.keys() == {0, 1}
    with pytest.raises(ValueError, match=r"layer 0 is a delta net and has no attention to capture.*that do are 1"):
        run(*tokens(), weights, config, capture=Capture(attention=(0,)))


class KeysAndValues:
    """A cache from before there were states."""

    def append(self, layer: int, k: Any, v: Any, positions: Any) -> Any:
        return NoCache().append(layer, k, v, positions)


def test_a_cache_without_states_is_refused_by_name(make_config: MakeConfig, make_weights: MakeWeights) -> None:
    config = make_config(**HYBRID)
    assert isinstance(NoCache(), StateCache)
    assert not isinstance(KeysAndValues(), StateCache)
    with pytest.raises(ValueError, match="KeysAndValues keeps keys and values alone, and layer 0 is a delta net"):
        forward(*map(jnp.asarray, tokens()), make_weights(config), config, KeysAndValues())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kernels_for_layers_do_not_take_what_they_do_not_know(
    make_config: MakeConfig, make_weights: MakeWeights, one_cpu: Placement, dtype: Any
) -> None:
    """The heads of delta nets, as those of attention, fill whole vectors."""
    sizes = {"head_dim": 16, "num_heads": 4, "hidden_size": 16, "intermediate_size": 16}
    plain = make_config(**sizes)
    config = make_config(**sizes, mixers=("delta_net", "attention"), delta_net=NET)
    if "CPU kernels" not in select_backend(make_weights(plain), plain, one_cpu).name:
        pytest.skip("this machine has no kernels")
    assert select_backend(make_weights(plain), plain, one_cpu).layer is not None
    weights = make_weights(config, dtype)
    backend = select_backend(weights, config, one_cpu)
    assert backend.layer is None
    assert backend.name.startswith("XLA for the layers, CPU kernels")
    expected, _ = run(*tokens(), weights, config)
    got, _ = run(*tokens(), weights, config, backend=backend)
    np.testing.assert_allclose(got, expected, atol=1e-4 if dtype == jnp.float32 else 0.1)


def test_a_shared_expert_is_computed_where_kernels_compute_the_rest(
    make_config: MakeConfig, make_weights: MakeWeights, one_cpu: Placement
) -> None:
    config = make_config(head_dim=16, num_heads=4, moe=SHARED)
    weights = make_weights(config)
    backend: Backend = select_backend(weights, config, one_cpu)
    expected, _ = run(*tokens(), weights, config)
    got, _ = run(*tokens(), weights, config, backend=backend)
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["TPU v5 lite", "NVIDIA H100 80GB HBM3"])
def test_backends_of_accelerators_leave_layers_as_they_are_written(make_config: MakeConfig, kind: str) -> None:
    # jax.sharding.AbstractDevice takes other arguments in each release.
    device = NamedTuple("Device", [("device_kind", str)])(kind)
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    config = make_config(**HYBRID)
    backend = select_backend(abstract_weights(config), config, Placement(mesh))
    assert (backend.layer, backend.final_norm, backend.embed) == (None, None, None)


def test_gradients_of_a_hybrid_are_numbers(make_config: MakeConfig) -> None:
    """Also at the start of a training, where a state is zero and norms have a factor of one."""
    config = make_config(**HYBRID, moe=SHARED)
    weights = init_weights(config, jax.random.key(0))

    def loss(weights: Weights) -> jax.Array:
        return jnp.mean(forward(*map(jnp.asarray, tokens()), weights, config)[0] ** 2)

    slopes = named_leaves(jax.jit(jax.grad(loss))(weights))
    assert all(np.isfinite(slope).all() for slope in slopes.values())
    assert {name for name, slope in slopes.items() if not np.abs(slope).max()} == set()


def test_the_ffw_of_a_layer_is_told_by_its_type(make_config: MakeConfig) -> None:
    moe_of_second = MoEConfig(**{**vars(SHARED), "layers": (False, True)})
    weights = abstract_weights(make_config(**HYBRID, moe=moe_of_second))
    assert isinstance(weights.layers[0].ffw, MLPLayer)
    assert not isinstance(weights.layers[1].ffw, MLPLayer)
