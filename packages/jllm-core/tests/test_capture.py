"""What a forward pass gives beside its logits, and how its operations are named in a program."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jllm_core import ModelConfig, MoEConfig, Weights, forward
from jllm_core.backends.base import XLA
from jllm_core.backends.cpu.backend import CPULayerKernels
from jllm_core.kv_cache import NoCache
from jllm_core.model import Capture, Captured, final_norm, hidden_states, unembed
from jllm_core.ops.norm import rms_norm

MakeConfig = Callable[..., ModelConfig]
MakeWeights = Callable[..., Weights]

TOKENS = jnp.array([[1, 5, 2, 12, 0, 7], [3, 3, 9, 0, 11, 4]])
POSITIONS = jnp.broadcast_to(jnp.arange(6), (2, 6))
MIXTURE = MoEConfig(num_experts=5, experts_per_token=2, intermediate_size=8, layers=(False, True, True))

run = jax.jit(forward, static_argnames=("config", "capture", "backend"))


def captured(config: ModelConfig, weights: Weights, **what: Any) -> tuple[jax.Array, Captured]:
    logits, _, found = run(TOKENS, POSITIONS, weights, config=config, capture=Capture(**what))
    return logits, found


@pytest.mark.parametrize("moe", [None, MIXTURE])
def test_the_logits_are_the_same(moe: MoEConfig | None, make_config: MakeConfig, make_weights: MakeWeights) -> None:
    config = make_config(num_layers=3, moe=moe)
    weights = make_weights(config)
    logits, _ = captured(config, weights, hidden=(0, 2), attention=(1,), routing=True)
    np.testing.assert_allclose(logits, run(TOKENS, POSITIONS, weights, config=config)[0], atol=1e-5)


def test_hidden_states_are_those_after_the_layers(make_config: MakeConfig, make_weights: MakeWeights) -> None:
    config = make_config(num_layers=3)
    weights = make_weights(config)
    logits, found = captured(config, weights, hidden=(0, 2))
    assert {number: x.shape for number, x in found.hidden.items()} == {0: (2, 6, 12), 2: (2, 6, 12)}
    assert (found.attention, found.routing) == ({}, {})
    np.testing.assert_allclose(unembed(final_norm(found.hidden[2], weights, config), weights), logits, atol=1e-5)
    first = Weights(weights.layers[:1], weights.embedding, weights.gamma_final, weights.lm_head)
    alone, _ = hidden_states(TOKENS, POSITIONS, first, make_config(num_layers=1), NoCache())
    np.testing.assert_allclose(rms_norm(found.hidden[0], weights.gamma_final, config.rms_norm_eps), alone, atol=1e-5)


def test_attention_probabilities_are_causal_and_sum_to_one(make_config: MakeConfig, make_weights: MakeWeights) -> None:
    config = make_config(num_layers=3, windows=(None, 2, None))
    _, found = captured(config, make_weights(config), attention=(0, 1))
    assert {number: x.shape for number, x in found.attention.items()} == dict.fromkeys((0, 1), (2, 6, 6, 6))
    rows, columns = np.indices((6, 6))
    for number, window in ((0, 6), (1, 2)):
        probabilities = np.asarray(found.attention[number])
        np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-6)
        seen = (columns <= rows) & (columns > rows - window)
        assert (probabilities[..., seen] > 0).all()
        assert not probabilities[..., ~seen].any()
    assert np.ptp(np.asarray(found.attention[0])[:, :, -1], axis=1).max() > 1e-3, "all heads attend alike"


def test_the_routers_choices_are_those_of_layers_with_experts(
    make_config: MakeConfig, make_weights: MakeWeights
) -> None:
    config = make_config(num_layers=3, moe=MIXTURE)
    weights = make_weights(config)
    _, found = captured(config, weights, routing=True, hidden=(1,))
    assert [*found.routing] == [1, 2]
    assert found.routing[1].experts.shape == (12, 2)
    for choice in found.routing.values():
        probabilities = np.asarray(choice.probabilities)
        np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-6)
        np.testing.assert_array_equal(choice.experts, np.argsort(-probabilities)[:, :2])
        chosen = np.take_along_axis(probabilities, np.asarray(choice.experts), axis=-1)
        np.testing.assert_allclose(choice.weights, chosen / chosen.sum(-1, keepdims=True), atol=1e-6)


def test_what_is_captured_has_gradients(make_config: MakeConfig, make_weights: MakeWeights) -> None:
    config = make_config()
    weights = make_weights(config)

    def size(embedding: jax.Array) -> jax.Array:
        own = Weights(weights.layers, embedding, weights.gamma_final, weights.lm_head)
        _, found = captured(config, own, hidden=(0,), attention=(1,))
        return jnp.sum(found.hidden[0] ** 2) + jnp.sum(found.attention[1] ** 2)

    slope = np.asarray(jax.grad(size)(weights.embedding))
    step = 1e-2 * np.random.default_rng(0).standard_normal(slope.shape).astype(np.float32)
    moved = [float(size(weights.embedding + sign * step)) for sign in (1, -1)]
    assert (moved[0] - moved[1]) / 2 == pytest.approx(float(np.sum(slope * step)), rel=2e-2)


def test_a_backend_that_computes_whole_layers_refuses(make_config: MakeConfig, make_weights: MakeWeights) -> None:
    config = make_config()
    with pytest.raises(ValueError, match=r"CPULayerKernels computes layers as a whole.*name the backend XLA"):
        run(TOKENS, POSITIONS, make_weights(config), config=config, backend=CPULayerKernels(), capture=Capture((0,)))


@pytest.mark.parametrize("what", [{"hidden": (2,)}, {"attention": (-1,)}])
def test_a_layer_that_there_is_not(what: Any, make_config: MakeConfig, make_weights: MakeWeights) -> None:
    config = make_config()
    with pytest.raises(ValueError, match=r"there is no layer (2|-1) to capture: the model's are 0 to 1"):
        captured(config, make_weights(config), **what)


def test_a_program_reads_like_the_model(make_config: MakeConfig, make_weights: MakeWeights) -> None:
    config = make_config(moe=MoEConfig(num_experts=4, experts_per_token=2, intermediate_size=8, layers=(False, True)))
    weights = make_weights(config)
    text = run.lower(TOKENS, POSITIONS, weights, config=config, backend=XLA()).compile().as_text()
    names = set(re.findall(r'op_name="jit\(forward\)/([^"]+)"', text))
    scopes = {"/".join(name.split("/")[:2]) for name in names}
    layers = {f"layer_{number}/{scope}" for number in (0, 1) for scope in ("rms_norm", "qkv", "rope", "attention", "o")}
    assert layers | {"layer_0/mlp", "layer_1/moe"} <= scopes
    assert {"embed", "final_norm", "unembed"} <= {name.split("/")[0] for name in names}
