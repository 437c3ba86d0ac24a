"""How weights lie in memory. A CPU takes any layout, so what is for TPUs is tried on it."""

import dataclasses

import jax
import numpy as np
from jax.experimental.layout import Format
from jllm_core import DeltaNetConfig, ShardingRules, abstract_weights, init_weights
from jllm_core.array_info import named_leaves
from jllm_core.quantization.arrays import Quantization
from jllm_runtime import Model, make_mesh
from jllm_runtime.device_layouts import HEADS_OUTERMOST, device_format, lay_out

RULES = ShardingRules()
HEAD = 128  # a TPU's memory is filled up to so many


def test_on_a_tpu_what_makes_heads_is_laid_out_head_by_head(tiny) -> None:
    mesh, config = make_mesh(), dataclasses.replace(tiny.config, head_dim=HEAD)
    for quantization in (None, Quantization(8)):
        moved = set()
        for name, info in named_leaves(abstract_weights(config, quantization=quantization)).items():
            sharding = RULES.sharding(info, mesh)
            assert device_format(info, sharding, "cpu") == device_format(info, sharding, "gpu") == sharding
            if device_format(info, sharding, "tpu") == Format(HEADS_OUTERMOST, sharding):
                moved.add(name.split(".")[3])
        assert moved == {"q", "k", "v"}
    q = abstract_weights(tiny.config).layers[0].attn.q  # of small heads
    assert device_format(q, RULES.sharding(q, mesh), "tpu") == RULES.sharding(q, mesh)


def test_what_makes_the_heads_of_delta_nets_is_laid_out_too(tiny) -> None:
    net = DeltaNetConfig(num_key_heads=2, num_value_heads=4, key_head_dim=HEAD, value_head_dim=HEAD)
    mixers = ("delta_net",) * tiny.config.num_layers
    config, mesh = dataclasses.replace(tiny.config, mixers=mixers, delta_net=net), make_mesh()
    for quantization in (None, Quantization(8)):
        moved = set()
        for name, info in named_leaves(abstract_weights(config, quantization=quantization)).items():
            if isinstance(device_format(info, RULES.sharding(info, mesh), "tpu"), Format):
                moved.add(name.split(".")[3])
        assert moved == {"q", "k", "v", "z"}


def test_the_answer_is_the_same_in_any_layout(tiny, prompt) -> None:
    mesh, config = make_mesh(), dataclasses.replace(tiny.config, head_dim=HEAD)
    infos = abstract_weights(config)

    def model(platform: str) -> Model:
        weights = init_weights(config, jax.random.key(1), mesh=mesh)
        return Model(config, lay_out(weights, infos, platform), mesh, RULES)

    plain, laid_out = model("cpu"), model("tpu")
    orders = {name: array.format.layout.major_to_minor for name, array in named_leaves(laid_out.weights).items()}
    assert {name.split(".")[-1] for name, order in orders.items() if order == (1, 0, 2)} == {"q", "k", "v"}
    for before, after in zip(jax.tree.leaves(plain.weights), jax.tree.leaves(laid_out.weights), strict=True):
        np.testing.assert_array_equal(before, after)
    np.testing.assert_allclose(plain.logits([prompt(5)]), laid_out.logits([prompt(5)]), atol=1e-4)
