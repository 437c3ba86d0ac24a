"""One model on one device and on meshes of eight: the same answers. In a process of its own, which has eight."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from jllm_core import DeltaNetConfig, MoEConfig

CHILD = """
import json
import jax, numpy as np
from jllm_core import DeltaNetConfig, ModelConfig, MoEConfig, abstract_weights
from jllm_core.mesh_axes import model_rules
from jllm_core.recurrent_state import STATE_AXES
from jllm_core.sharding import PRESETS
from jllm_runtime import Model, SamplingParams, generate, make_mesh
from jllm_runtime.programs import contiguous_batch
from jllm_runtime.cache.contiguous import LOGICAL_AXES

config = ModelConfig(model_type="tiny", vocab_size=264, intermediate_size=48, head_dim=8,
                     context_length=256, **{sizes})
rng = np.random.default_rng(0)
# Large enough for attention to matter; the vectors are RMSNorm's gammas, around 1.
weights = jax.tree.map(lambda info: np.float32(0.4 * rng.standard_normal(info.shape) + (len(info.shape) == 1)),
                       abstract_weights(config))
prompts = [rng.integers(0, config.vocab_size, length).tolist() for length in (70, 3, 64, 20, 1, 65, 40, 9)]
sampled = dict(temperature=1.0, top_k=40, top_p=0.95, min_p=0.01)
params = [SamplingParams(max_tokens=12, seed=row, **({{}} if row % 2 else sampled)) for row in range(8)]
scored = rng.integers(0, config.vocab_size, (3, 17))


caches, decode = [], contiguous_batch.decode


def place(cache, x):
    placement = cache.backend.placement
    return jax.sharding.NamedSharding(placement.mesh, placement.spec(x.shape, *LOGICAL_AXES))


def record(*arguments):
    cache, made = decode(*arguments)
    states = [
        (x, jax.sharding.NamedSharding(cache.backend.placement.mesh, cache.backend.placement.spec(x.shape, *axes)))
        for state in cache.states.values() for x, axes in zip(vars(state).values(), vars(STATE_AXES).values())
    ]
    placed = [(x, place(cache, x)) for x in cache.keys + cache.values if x.size] + states
    caches.append(all(x.sharding.is_equivalent_to(expected, 4) for x, expected in placed))
    return cache, made


contiguous_batch.decode = record


def run(mesh, size, rules=PRESETS["tensor"]):
    rules = model_rules(config, mesh, rules)
    placed = jax.device_put(weights, rules.tree_shardings(abstract_weights(config), mesh))
    model = Model(config, placed, mesh, rules)
    answers = [output.token_ids for output in generate(model, prompts[:size], params[:size])]
    q, k = (next(iter(x.addressable_shards)).data.shape[1] for x in (placed.layers[0].attn.q, placed.layers[0].attn.k))
    logits = model.logits(scored)
    whole = logits.sharding.is_fully_replicated
    return answers, np.asarray(logits), {{"heads": [q, k], "logits_whole": whole}}


expected, logits, _ = run(make_mesh(devices=jax.devices()[:1]), 8)
report = []
for shape, size, preset in {meshes}:
    caches.clear()
    answers, sharded, layout = run(make_mesh(shape), size, PRESETS[preset])
    report.append({{"same": answers == expected[:size], "difference": float(np.abs(sharded - logits).max()),
                    "caches_in_place": len(caches) > 1 and all(caches), **layout}})
different = len({{tuple(answer) for answer in expected}})
print(json.dumps({{"meshes": report, "different_answers": different, "spread": float(logits.std())}}))
"""

QWEN3_LIKE = {"num_layers": 2, "hidden_size": 32, "num_heads": 8, "num_kv_heads": 4, "qk_norm": True}
# 3 kv heads and 9 query heads divide over none of the meshes: attention is whole on every device.
LLAMA_LIKE = {"num_layers": 1, "hidden_size": 36, "num_heads": 9, "num_kv_heads": 3, "tie_embeddings": True}


# Experts, a window, and a layer without rotation. The devices of a mesh for experts share the query heads out.
MOE_LIKE = {
    **{"num_layers": 2, "hidden_size": 32, "num_heads": 8, "num_kv_heads": 2, "windows": (16, None)},
    **{"rope_layers": (True, False), "moe": MoEConfig(num_experts=4, experts_per_token=2, intermediate_size=24)},
}

# The key heads divide over fewer devices than the value heads.
HYBRID_LIKE = {
    **{"num_layers": 2, "hidden_size": 32, "num_heads": 8, "num_kv_heads": 4, "mixers": ("delta_net", "attention")},
    **{"output_gate": True, "rotary_dim": 4, "qk_norm": True},
    "delta_net": DeltaNetConfig(num_key_heads=4, num_value_heads=8, key_head_dim=8, value_head_dim=4),
}

ALL_TENSOR, MAX_DATA, MAX_TENSOR = {"tensor": 8}, {"data": 4, "tensor": 2}, {"data": 2, "tensor": 4}
EXPERTS, EACH = {"expert": 4, "tensor": 2}, {"data": 2, "expert": 2, "tensor": 2}


# Each mesh with the number of prompts it gets (3 run as 4, so that each device along "data" has a row or two), and the
# query and kv heads that a device then holds.
@pytest.mark.parametrize(
    ("sizes", "meshes", "heads"),
    [
        (
            QWEN3_LIKE,
            [(ALL_TENSOR, 3, "tensor"), (MAX_DATA, 8, "fsdp"), (MAX_TENSOR, 3, "sequence")],
            [[1, 4], [4, 2], [2, 1]],
        ),
        (
            LLAMA_LIKE,
            [(ALL_TENSOR, 8, "sequence"), (MAX_DATA, 3, "data-tensor"), (MAX_TENSOR, 8, "fsdp")],
            [[9, 3]] * 3,
        ),
        (
            MOE_LIKE,
            [(EXPERTS, 3, "expert-tensor"), (EACH, 8, "fsdp"), (ALL_TENSOR, 3, "sequence")],
            [[1, 1], [2, 1], [1, 2]],
        ),
        (
            HYBRID_LIKE,
            [(ALL_TENSOR, 3, "tensor"), (MAX_DATA, 8, "fsdp"), (MAX_TENSOR, 3, "sequence")],
            [[4, 4], [2, 2], [1, 1]],
        ),
        (
            HYBRID_LIKE,
            [(EXPERTS, 3, "expert-tensor"), (EACH, 8, "fsdp"), (MAX_DATA, 3, "data-tensor")],
            [[2, 2], [1, 1], [2, 2]],
        ),
    ],
    ids=["qwen3", "llama", "moe", "hybrid", "hybrid-experts"],
)
def test_every_mesh_gives_the_answers_of_one_device(
    sizes: dict[str, Any],
    meshes: list[tuple[dict[str, int], int, str]],
    heads: list[list[int]],
    run_python: Callable[..., str],
) -> None:
    # Compiling takes nearly all of the time, and optimising half of that.
    printed = run_python(CHILD.format(sizes=sizes, meshes=meshes), devices=8, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    report = json.loads(printed)
    assert report["different_answers"] == 8
    assert report["spread"] > 0.5
    assert [mesh["same"] for mesh in report["meshes"]] == [True] * 3
    assert max(mesh["difference"] for mesh in report["meshes"]) < 1e-4
    assert [mesh["heads"] for mesh in report["meshes"]] == heads
    assert all(mesh["caches_in_place"] and mesh["logits_whole"] for mesh in report["meshes"])
