"""Mixtures of experts and sampling on a mesh: the engine's decode step, compiled for TPUs by libtpu's compiler.

No TPU is needed. The compiler is loaded in this process, for the texts of its programs: ``hatch run plan:test``.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import jax
import pytest
from jllm_core.backends import threshold_candidates
from jllm_core.config import ModelConfig
from jllm_core.mesh_axes import default_axes, partial_lanes
from jllm_core.quantization.arrays import Quantization
from jllm_core.sharding import Placement
from jllm_runtime.mesh import make_mesh
from jllm_runtime.planner.catalogue import PUBLISHED
from jllm_runtime.planner.compile_worker import find_collectives, lowered_engine, tpu_devices
from jllm_runtime.planner.engine_memory import engine_sizes
from jllm_runtime.planner.hlo_account import Account, step_account
from jllm_runtime.planner.memory import Workload
from jllm_runtime.planner.topologies import TOPOLOGIES
from jllm_runtime.planner.tpu_compiler import ENVIRONMENT

os.environ.update(ENVIRONMENT)

MIB = 2**20
ROWS, LAYERS = 16, 4
MIXTURE, DENSE = "Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-14B"


def config_of(name: str, layers: int | None = LAYERS) -> ModelConfig:
    config = PUBLISHED[name].config
    return config if layers is None else replace(config, num_layers=layers)


def placement_on(topology: str, config: ModelConfig, axes: Mapping[str, int] | None = None) -> Placement:
    machine = TOPOLOGIES[topology]
    assert machine.target is not None
    return Placement(make_mesh(axes or default_axes(config, machine.devices), tpu_devices(machine.target)))


@cache
def decode_step(
    name: str,
    topology: str,
    layers: int | None = LAYERS,
    quantization: Quantization | None = None,
    tensor: int | None = None,
) -> jax.stages.Compiled:
    """The engine's decode program of 16 rows at 1,024 tokens, on the default mesh or on ``tensor`` devices alone."""
    config, workload = config_of(name, layers), Workload(ROWS, 1024, "bfloat16", quantization)
    placement = placement_on(topology, config, None if tensor is None else {"tensor": tensor})
    # All of the pool that fits where the model is whole, for then it is asked whether both fit.
    pages = None if layers is None else 256
    sizes = engine_sizes(config, workload, placement, TOPOLOGIES[topology].device, pages=pages)
    (decode,) = (low for which, low in lowered_engine(config, workload, placement, sizes) if which == "decode")
    return decode.compile()


def account_of(compiled: jax.stages.Compiled, branches: Mapping[str, int] | None = None) -> Account:
    passes = 32 // threshold_candidates.SEARCH_BITS
    return step_account(compiled.as_text() or "", branches, trips={"thresholds": passes})


def temporaries(compiled: jax.stages.Compiled) -> int:
    memory = compiled.memory_analysis()
    assert memory is not None
    return int(memory.temp_size_in_bytes)


@pytest.mark.parametrize("topology", ["v5e-8", "v6e-8"])
@pytest.mark.parametrize(
    "quantization", [None, Quantization(8), Quantization(4, 128)], ids=["bfloat16", "int8", "int4-g128"]
)
def test_a_mixture_decodes_without_a_copy_of_its_experts(topology: str, quantization: Quantization | None) -> None:
    config = config_of(MIXTURE)
    assert config.moe is not None
    assert partial_lanes(config, placement_on(topology, config)) is None
    compiled = decode_step(MIXTURE, topology, quantization=quantization)
    # One layer's experts on a device, in either type, are many times that.
    assert temporaries(compiled) < 48 * MIB
    # Three products a layer, and one kernel that says which rows are whose; beside one for attention. Groups have none:
    # there one expert after another is multiplied.
    kernels = (compiled.as_text() or "").count('custom_call_target="tpu_custom_call"')
    assert kernels == (1 if quantization is not None and quantization.group else 5) * LAYERS
    experts = config.moe.num_experts // 8 * config.hidden_size * config.moe.intermediate_size
    for made in account_of(compiled).makes(experts):
        # Fetched ahead into the on-chip memory as they are.
        assert made.written == 0, made
        assert made.opcode in ("copy-start", "slice-start", "async-start"), made


@pytest.mark.parametrize("topology", ["v5e-8", "v6e-8"])
def test_a_mixture_talks_twice_a_layer(topology: str) -> None:
    compiled = decode_step(MIXTURE, topology)
    stream = ROWS * config_of(MIXTURE).hidden_size * 2
    collectives = find_collectives(compiled.as_text() or "")
    # After o and after the experts, and once for the embedding. The others compare and count a token's choice.
    assert sum(each.count for each in collectives if each.bytes >= stream) == 2 * LAYERS + 1
    assert all(each.kind == "all-reduce" for each in collectives if each.bytes >= stream)


def test_a_mesh_that_cuts_lanes_copies_all_experts() -> None:
    """Why the default is another: 96 of the 768 columns on each device, filled up to 128."""
    assert temporaries(decode_step(MIXTURE, "v5e-8", tensor=8)) > LAYERS * 90 * MIB


def test_a_whole_mixture_runs_beside_its_pool() -> None:
    """Compiling it is the test: the pool takes its share of the memory, and the program must find room beside it."""
    assert temporaries(decode_step(MIXTURE, "v5e-8", layers=None)) < 192 * MIB


# ---- Sampling

# Which way the conditionals go, by their scopes, of a step that draws tokens. The candidates decide; the sum over the
# vocabulary is asked for, which it is not where there is a top-k.
DECIDED = {"thresholds/cond": 1, "cond": 1}
# They do not, and both filters are searched, which stands in a scope of its own.
SEARCHED = {"branch_0_fun/shard_map/cond": 1, "branch_0_fun/cond": 1, "thresholds/cond": 0, "cond": 1}


@pytest.mark.parametrize(("name", "topology"), [(DENSE, "v5e-8"), (MIXTURE, "v5e-8"), (DENSE, "v2-8")])
def test_nothing_as_large_as_the_vocabulary_is_gathered(name: str, topology: str) -> None:
    collectives = find_collectives(decode_step(name, topology).as_text() or "")
    gathered = [each for each in collectives if each.kind != "all-reduce"]
    # Candidates of top-k and top-p: 64 numbers of each device. The best 20 of each for log-probabilities.
    assert max(each.bytes for each in gathered) == ROWS * 64 * 8 * 4
    assert sum(each.count for each in gathered) <= 3


@pytest.mark.parametrize("topology", ["v5e-8", "v2-8"])
def test_top_k_and_top_p_are_two_exchanges_instead_of_64(topology: str) -> None:
    compiled = decode_step(DENSE, topology)
    found = account_of(compiled, DECIDED).under("thresholds").collectives
    assert [(each.collective, each.times) for each in found] == [("all-gather", 1), ("all-reduce", 1)]
    # Where they do not: eight passes for each filter, a maximum and a sum.
    searched = account_of(compiled, SEARCHED).under("thresholds").collectives
    assert sum(each.times for each in searched) == 1 + 2 * 8 + 2


def test_on_one_device_the_best_are_found_without_a_sort() -> None:
    compiled = decode_step("Qwen/Qwen3-4B", "v5e-1")
    text = compiled.as_text() or ""
    vocabulary = config_of("Qwen/Qwen3-4B").vocab_size
    assert f"f32[{ROWS},{vocabulary}]" in text
    assert not [line for line in text.splitlines() if " sort(" in line and f"[{ROWS},{vocabulary}]" in line]
    decided, searched = (account_of(compiled, way).under("thresholds") for way in (DECIDED, SEARCHED))
    # A search bit by bit has 64 passes, of about 60,000 cycles each by the same account.
    assert decided.cycles < 400_000 < searched.cycles < 1_800_000
