"""``Model.inspect``: the logits, and what a model computes on the way to them."""

from dataclasses import replace

import numpy as np
import pytest
from jllm_core import MoEConfig
from jllm_runtime import RequestError

TOKENS = [[5, 9, 200, 3], [7, 7, 1, 0]]


def test_it_gives_what_is_asked_for_beside_the_logits(tiny) -> None:
    model = tiny.plain
    logits, found = model.inspect(TOKENS, hidden=[0, 1], attention=[1])
    np.testing.assert_allclose(logits, model.logits(TOKENS), atol=1e-5)
    config = model.config
    assert {n: x.shape for n, x in found.hidden.items()} == dict.fromkeys((0, 1), (2, 4, config.hidden_size))
    assert {n: x.shape for n, x in found.attention.items()} == {1: (2, config.num_heads, 4, 4)}
    assert found.routing == {}
    np.testing.assert_allclose(np.asarray(found.attention[1]).sum(-1), 1, atol=1e-6)


def test_it_tells_the_routers_choices(tiny) -> None:
    mixture = MoEConfig(num_experts=4, experts_per_token=2, intermediate_size=16)
    model = tiny.random(replace(tiny.config, moe=mixture))
    _, found = model.inspect(TOKENS, routing=True)
    assert [*found.routing] == [*range(model.config.num_layers)]
    assert found.routing[0].experts.shape == (8, 2)


def test_a_layer_that_the_model_has_not(tiny) -> None:
    last = tiny.plain.config.num_layers
    with pytest.raises(RequestError, match=rf"there is no layer {last} to inspect: the model's are 0 to {last - 1}"):
        tiny.plain.inspect(TOKENS, hidden=[last])
    with pytest.raises(RequestError, match=r"whole numbers \[B, T\]"):
        tiny.plain.inspect([1, 2])
