"""The engine on meshes of eight devices: the answers of one device. In a process of its own, which has eight."""

import json
from collections.abc import Callable

CHILD = """
import json
from dataclasses import replace
import jax, numpy as np
from jax.sharding import NamedSharding
from jllm_core import DeltaNetConfig, ModelConfig, MoEConfig, ShardingRules, abstract_weights
from jllm_runtime import Engine, EngineConfig, Model, SamplingParams, make_mesh
from jllm_runtime.cache.paged import LOGICAL_AXES
from jllm_runtime.cache.state_pool import state_pool_info

dense = ModelConfig(model_type="tiny", vocab_size=264, intermediate_size=48, head_dim=8, num_layers=2, hidden_size=32,
                    num_heads=8, num_kv_heads=4, qk_norm=True, context_length=256)
mixture = replace(dense, moe=MoEConfig(num_experts=8, experts_per_token=2, intermediate_size=24))
hybrid = replace(dense, mixers=("delta_net", "attention"), delta_net=DeltaNetConfig(
    num_key_heads=8, num_value_heads=16, key_head_dim=4, value_head_dim=8))
rng = np.random.default_rng(0)
weights = {config: jax.tree.map(lambda info: np.float32(0.4 * rng.standard_normal(info.shape) + (len(info.shape) == 1)),
                                abstract_weights(config)) for config in (dense, mixture, hybrid)}
prompts = [rng.integers(0, dense.vocab_size, length).tolist() for length in (70, 3, 64, 20, 1)]
prompts.append(prompts[0])
drawn, penalized = {"temperature": 1.0, "top_p": 0.9, "top_k": 20}, {"presence_penalty": 1.0, "logit_bias": {3: 2.0}}
wishes = [{}, drawn, {"logprobs": 2}, penalized]
params = [SamplingParams(max_tokens=12, seed=row, **wishes[row % 4]) for row in range(6)]


def run(config, mesh):
    rules = ShardingRules()
    placed = jax.device_put(weights[config], rules.tree_shardings(abstract_weights(config), mesh))
    model = Model(config, placed, mesh, rules)
    with Engine(model, EngineConfig(pages=16, max_batch=4)) as engine:
        outputs = engine.generate(prompts, params)
        pages = engine._executor._runner._pages
        wanted = NamedSharding(mesh, model.placement.spec(pages.keys[1].shape, *LOGICAL_AXES))
        in_place = all(x.sharding.is_equivalent_to(wanted, 4) for x in pages.keys[1:] + pages.values[1:])
        state = engine._executor._runner._state
        wanted = NamedSharding(mesh, model.placement.spec(state.bias.shape, None, "vocab"))
        in_place &= all(x.sharding.is_equivalent_to(wanted, 2) for x in jax.tree.leaves(state))
        places = rules.tree_shardings(state_pool_info(config, 4), mesh)
        split = [x.sharding.is_equivalent_to(where, x.ndim)
                 for pool in (pages.states, engine._executor._runner._snapshots)
                 for x, where in zip(jax.tree.leaves(pool), jax.tree.leaves(places), strict=True)]
        in_place &= all(split)
        heads = pages.keys[1].addressable_shards[0].data.shape[1]
        assert engine.stats().pages_in_use == 0
    return [output.token_ids for output in outputs], in_place, heads, outputs[5].reused_tokens


shapes = {dense: ({"tensor": 8}, {"data": 2, "tensor": 4}), mixture: ({"expert": 4, "tensor": 2}, {"expert": 8}),
          hybrid: ({"tensor": 8}, {"data": 2, "tensor": 4})}
print(json.dumps([{
    "expected": run(config, make_mesh(devices=jax.devices()[:1])),
    "meshes": [run(config, make_mesh(shape)) for shape in shapes[config]],
} for config in shapes]))
"""


def test_every_mesh_gives_the_answers_of_one_device(run_python: Callable[..., str]) -> None:
    reports = json.loads(run_python(CHILD, devices=8, JAX_DISABLE_MOST_OPTIMIZATIONS="1"))
    for report in reports:
        answers, _, heads, reused = report["expected"]
        assert (heads, reused) == (4, 64)
        assert len({tuple(answer) for answer in answers}) == 6
        for sharded, in_place, _, found in report["meshes"]:
            assert sharded == answers
            assert in_place
            assert found == 64
        # Over eight devices, each of the four heads is kept twice.
        assert [mesh[2] for mesh in report["meshes"]] == [1, 1]
