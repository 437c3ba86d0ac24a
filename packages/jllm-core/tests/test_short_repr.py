"""What a notebook shows of weights and of what is captured: a screen, and no numbers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh
from jllm_core import Capture, ModelConfig, MoEConfig, Quantization, ShardingRules, Weights, abstract_weights, forward

MakeConfig = Callable[..., ModelConfig]
MakeWeights = Callable[..., Weights]

WEIGHTS = """\
Weights(
  layers=[80 x Layer(
    ffw=MLPLayer(w_gate=float32[12, 10], w_up=float32[12, 10], w_down=float32[10, 12]),
    attn=AttentionLayer(q=float32[12, 6, 4], k=float32[12, 2, 4], v=float32[12, 2, 4], o=float32[6, 4, 12]),
    attn_pre_gamma=float32[12],
    attn_post_gamma=float32[12]
  )],
  embedding=float32[13, 12],
  gamma_final=float32[12],
  lm_head=float32[12, 13]
)"""


def test_weights_are_shown_by_types_and_shapes(make_config: MakeConfig) -> None:
    config = make_config(num_layers=80)
    assert repr(abstract_weights(config)) == WEIGHTS
    zeros = jax.tree.map(lambda info: jnp.zeros(info.shape, info.dtype), abstract_weights(config))
    assert repr(zeros) == WEIGHTS


def test_layers_of_each_kind_are_shown_once(make_config: MakeConfig) -> None:
    moe = MoEConfig(num_experts=4, experts_per_token=2, intermediate_size=6, layers=(True, False) * 24)
    text = repr(abstract_weights(make_config(num_layers=48, moe=moe)))
    assert text.count("24 x Layer(") == 2
    assert len(text) < 1500


def test_quantised_matrices_are_named(make_config: MakeConfig) -> None:
    config = make_config(hidden_size=64, intermediate_size=64, head_dim=32)
    weights = abstract_weights(config, quantization=Quantization(4, 32, offsets=True, embedding=8))
    assert repr(weights.layers[0].attn.q) == "QuantizedArray(int4-g32-offsets[64, 6, 32])"
    assert repr(weights.embedding) == "QuantizedArray(int8[13, 64])"
    assert "w_up=QuantizedArray(int4-g32-offsets[64, 64])" in repr(weights)


@pytest.mark.parametrize("quantization", [None, Quantization(8)])
def test_trees_of_anything_can_be_shown(make_config: MakeConfig, quantization: Quantization | None) -> None:
    infos = abstract_weights(make_config(), quantization=quantization)
    shardings = ShardingRules().tree_shardings(infos, Mesh(jax.devices()[:1], ("tensor",)))
    assert "NamedSharding" in repr(shardings)
    for tree in (jax.tree.map(lambda info: None, infos), jax.tree.map(lambda info: object(), infos)):
        assert isinstance(tree, Weights)
        assert repr(tree).startswith("Weights(")


def test_what_was_captured_is_shown_by_layers(make_config: MakeConfig, make_weights: MakeWeights) -> None:
    config, tokens = make_config(), jnp.arange(5)[None]
    *_, captured = forward(tokens, tokens, make_weights(config), config, capture=Capture(hidden=(0, 1), attention=(1,)))
    assert repr(captured) == (
        "Captured(\n  hidden=layers [0, 1]: [2 x float32[1, 5, 12]],\n"
        "  attention=layers [1]: [1 x float32[1, 6, 5, 5]],\n  routing={}\n)"
    )
