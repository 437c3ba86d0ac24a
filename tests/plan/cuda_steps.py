"""The real steps, compiled for GPUs by XLA's CUDA compiler, and what they move. No GPU is needed.

Models of two layers: what a layer costs does not depend on how many there are. The compiler is 2.5 GB, so this runs in
an environment of its own: ``hatch run cuda-plan:test``. The name keeps it out of the ordinary suite.
"""

import dataclasses
from functools import cache

import pytest
from jllm_runtime.planner.catalogue import PUBLISHED
from jllm_runtime.planner.engine_memory import engine_sizes, live_bytes
from jllm_runtime.planner.memory import Workload
from jllm_runtime.planner.plan import Plan, make_placement, make_plan
from jllm_runtime.planner.topologies import find_topology

LAYERS, PAGE = 2, 64
AMPERE_AND_LATER = ["h100", "h200", "a100", "l4", "a10g", "rtx-4090"]


@cache
def compiled(topology: str, size: str, dtype: str, batch: int, context: int, engine: bool) -> Plan:
    """The plan of Qwen3 of that size, with two layers, and a pool that holds every row at full length."""
    machine, model = find_topology(topology), PUBLISHED[f"Qwen/Qwen3-{size}"]
    config = dataclasses.replace(model.config, num_layers=LAYERS)
    workload, placement = Workload(batch, context, dtype), make_placement(machine)
    sizes = engine_sizes(config, workload, placement, machine.device, PAGE, pages=batch * context // PAGE)
    plan = make_plan(model.name, config, machine, workload, placement, True, engine=sizes if engine else None)
    assert plan.compilation is not None
    assert plan.compilation.too_large is None
    return plan


def ideal(plan: Plan) -> int:
    """Bytes of the weights, and of the keys and values that a step attends to, on each device."""
    return plan.memory.weights + live_bytes(plan.config, plan.workload, plan.placement)


def report(plan: Plan, name: str) -> float:
    assert plan.compilation is not None
    program = plan.compilation.programs[name]
    ratio = program.moved / ideal(plan)
    print(
        f"\n{plan.topology.name} {name}: {program.moved / 1e6:,.0f} MB, {ratio:.3f} of weights and live keys and "
        f"values; {program.kernels} kernels, temporaries {program.temporaries / 1e6:,.0f} MB"
    )
    return ratio


# In `generate` it is the same kernel over other places of memory: three GPUs show it.
@pytest.mark.parametrize(
    ("topology", "engine"),
    [*((name, True) for name in AMPERE_AND_LATER), *((name, False) for name in ("h100", "a100", "l4"))],
)
def test_a_decode_step_moves_weights_and_live_cache_and_little_else(topology: str, engine: bool) -> None:
    plan = compiled(topology, "4B", "bfloat16", 16, 8192, engine)
    assert report(plan, "decode") <= 1.15
    assert plan.compilation is not None
    for program in plan.compilation.programs.values():
        assert program.kernels in (0, LAYERS)  # growing the cache attends to nothing
    assert plan.compilation.programs["decode"].kernels == LAYERS


@pytest.mark.parametrize("topology", ["h100", "a100", "l4"])
def test_a_prefill_writes_no_scores(topology: str) -> None:
    plan = compiled(topology, "4B", "bfloat16", 16, 8192, True)
    report(plan, "prefill")
    assert plan.compilation is not None
    assert plan.engine is not None
    prefill, config = plan.compilation.programs["prefill"], plan.config
    assert prefill.kernels == LAYERS
    queries = plan.engine.chunk_pages * PAGE * config.num_heads
    # The scores of the chunk in one layer, in 16 bits; what all layers write is less than half of what theirs are.
    scores = 2 * queries * plan.workload.context
    assert prefill.hbm_written < LAYERS * scores / 2
    assert prefill.temporaries < scores / 4


@pytest.mark.parametrize("engine", [True, False], ids=["engine", "generate"])
@pytest.mark.parametrize(("size", "context"), [("0.6B", 8192), ("4B", 8192)])
def test_a_t4_in_float16_moves_little_more(
    size: str, context: int, engine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As docs/planning.md says of it: else XLA copies matrices together in every step.
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_dot_merger_threshold_mb=0")
    plan = compiled("t4", size, "float16", 16, context, engine)
    assert report(plan, "decode") <= 1.4
    assert plan.compilation is not None
    # Triton knows no GPU before Ampere.
    assert all(program.kernels == 0 for program in plan.compilation.programs.values())


def test_two_gpus_share_a_step() -> None:
    plan = compiled("2xh100", "4B", "bfloat16", 16, 8192, True)
    assert report(plan, "decode") <= 1.15
    assert plan.compilation is not None
    collectives = plan.compilation.programs["decode"].collectives
    whole = [each for each in collectives if each.bytes >= plan.workload.rows * plan.config.hidden_size * 2]
    # After o and after w_down, and one for the embedding, which is split by vocabulary.
    assert sum(each.count for each in whole if each.kind == "all-reduce") == 2 * LAYERS + 1
