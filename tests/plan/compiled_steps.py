"""The real steps, compiled for TPUs by libtpu's compiler, and what the planner says of them. No TPU is needed.

Slow, and libtpu slows every other test, so this runs in an environment of its own: ``hatch run plan:test``. The name
keeps it out of the ordinary suite.
"""

from functools import cache

import pytest
from jllm_runtime.planner.catalogue import PUBLISHED
from jllm_runtime.planner.memory import Workload, estimate_memory
from jllm_runtime.planner.plan import Plan, make_plan
from jllm_runtime.planner.topologies import TOPOLOGIES
from jllm_runtime.planner.tpu_compiler import Program

GIB = 2**30
WORKLOAD = Workload(batch=8, context=4096, dtype="bfloat16")
SIZES = ["0.6B", "1.7B", "4B", "8B", "14B"]
FIT = [
    *(("v2-8", size) for size in SIZES),
    *(("v5e-8", size) for size in SIZES),
    *(("v5e-1", size) for size in SIZES[:3]),
    ("v6e-1", "8B"),
    ("v6e-8", "14B"),
]


@cache
def compiled(topology: str, size: str) -> Plan:
    """The plan of Qwen3 of that size, with the bytes of the compiler."""
    model = PUBLISHED[f"Qwen/Qwen3-{size}"]
    return make_plan(model.name, model.config, TOPOLOGIES[topology], WORKLOAD, ask_compiler=True)


def programs(plan: Plan) -> dict[str, Program]:
    assert plan.compilation is not None
    assert plan.compilation.too_large is None
    return plan.compilation.programs


@pytest.mark.parametrize(("topology", "size"), FIT)
def test_it_fits_and_the_estimate_agrees(topology: str, size: str) -> None:
    plan = compiled(topology, size)
    assert set(programs(plan)) == {"decode", "prefill", "growth"}
    assert plan.by_compiler
    assert plan.fits
    if topology == "v2-8":
        assert plan.memory.total <= 8 * GIB
    estimate = estimate_memory(plan.config, WORKLOAD, plan.placement)
    assert plan.memory.weights == pytest.approx(estimate.weights, rel=0.01)
    assert plan.memory.kv == pytest.approx(estimate.kv, rel=0.01)
    assert plan.memory.total == pytest.approx(estimate.total, rel=0.1)
    for name in ("decode", "prefill"):
        resident = estimate.weights + estimate.kv
        assert resident + plan.memory.temporaries[name] == pytest.approx(
            resident + estimate.temporaries[name], rel=0.1
        ), name


@pytest.mark.parametrize("size", SIZES)
def test_a_decode_step_on_v2_moves_weights_and_cache_and_little_else(size: str) -> None:
    """On v5e and later the compiler's account counts what is fetched ahead into VMEM twice, so it shows nothing."""
    plan = compiled("v2-8", size)
    ratio = programs(plan)["decode"].bytes_accessed / (plan.memory.weights + plan.memory.kv)
    print(f"\n{plan.name}: {ratio:.3f} of weights and cache")
    assert ratio <= 1.15


@pytest.mark.parametrize("size", SIZES)
def test_our_account_of_the_bytes_agrees_with_the_compilers_where_that_counts_them_once(size: str) -> None:
    for name in ("decode", "prefill"):
        program = programs(compiled("v2-8", size))[name]
        assert program.hbm_read + program.hbm_written == pytest.approx(program.bytes_accessed, rel=0.05), name


@pytest.mark.parametrize(("topology", "size"), FIT)
def test_a_decode_step_talks_twice_a_layer(topology: str, size: str) -> None:
    plan = compiled(topology, size)
    rows, devices = WORKLOAD.rows, plan.topology.devices
    of_hidden_states, others = [], []
    for collective in programs(plan)["decode"].collectives:
        whole = collective.kind == "all-reduce" and collective.bytes >= rows * plan.config.hidden_size * 2
        (of_hidden_states if whole else others).append(collective)
    # After o and after w_down; and one for the embedding, which is split by vocabulary.
    expected = 2 * plan.config.num_layers + 1 if devices > 1 else 0
    assert sum(collective.count for collective in of_hidden_states) == expected
    # Sampling compares the best of each device's part of the vocabulary. Nothing as large as a weight is moved.
    assert all(collective.bytes <= 8 * rows * devices for collective in others)


@pytest.mark.parametrize(("topology", "size"), FIT)
def test_the_kernels_are_used_where_there_are_any(topology: str, size: str) -> None:
    plan = compiled(topology, size)
    expected = 0 if topology == "v2-8" else plan.config.num_layers
    assert {name: programs(plan)[name].kernels for name in ("decode", "prefill")} == {
        "decode": expected,
        "prefill": expected,
    }


def test_what_the_estimate_refuses_the_compiler_refuses_too() -> None:
    plan = compiled("v5e-1", "8B")
    assert estimate_memory(plan.config, WORKLOAD, plan.placement).total > plan.topology.device.usable_bytes
    assert plan.compilation is not None
    assert plan.compilation.too_large is not None
    assert not plan.fits
    assert "--quantize int4" in plan.alternatives
