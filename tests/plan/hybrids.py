"""Models with delta nets (Qwen3.5), compiled for TPUs by libtpu's compiler: memory, states in place, bytes moved and
communication, of ``generate`` and of the engine. No TPU is needed, and none has run them.

``hatch run plan:test``. One period of layers is compiled, three delta nets and an attention, beside embedding and head.
The others are alike: what the program itself takes is counted again for each of them, its temporaries are not.
"""

from dataclasses import replace
from functools import cache

import pytest
from jllm_core.config import ModelConfig
from jllm_core.quantization.arrays import Quantization
from jllm_runtime.planner.catalogue import PUBLISHED
from jllm_runtime.planner.engine_memory import engine_estimate, engine_sizes, live_bytes
from jllm_runtime.planner.memory import (
    Memory,
    Workload,
    bytes_per_device,
    estimate_memory,
    local_size,
    states_info,
    weights_info,
)
from jllm_runtime.planner.plan import default_placement
from jllm_runtime.planner.topologies import TOPOLOGIES
from jllm_runtime.planner.tpu_compiler import Program, compile_programs
from jllm_runtime.programs.paged_sizes import STATE_BYTES

PERIOD = 4
CONTEXT = 4096
GRIDS = {None: None, "int8": Quantization(8), "int4": Quantization(4, group=128)}
# Where each size fits: topology, size, rows, grid of the weights.
FIT: list[tuple[str, str, int, str | None]] = [
    *(("v5e-1", size, 8, None) for size in ("0.8B", "2B", "4B")),
    ("v5e-1", "9B", 8, "int8"),
    *(("v2-8", size, 8, None) for size in ("0.8B", "2B", "4B", "9B")),
    *(("v2-8", size, 8, "int8") for size in ("27B", "35B-A3B")),
    *((topology, size, 16, None) for topology in ("v5e-8", "v6e-8") for size in ("0.8B", "2B", "4B", "9B", "27B")),
    *((topology, "35B-A3B", 16, None) for topology in ("v5e-8", "v6e-8")),
    ("v5e-8", "27B", 16, "int4"),
]
BOTH = [(*fit, kind) for fit in FIT for kind in ("generate", "engine")]
ARGUMENTS = ("topology", "size", "rows", "grid", "kind")
# Ten percent of a period, or of 0.8B on eight chips (813 MiB planned, 707 compiled), is little beside a step's
# temporaries and code: so many bytes may differ there, 2% of the smallest device.
SMALL = 128 * 2**20
# Of weights, live keys and values, and states read and written, a decode step moves at most so much.
MOST_MOVED = 1.16


class Steps:
    """The programs of one period of a model, and what is planned for the period and for the model."""

    def __init__(self, topology: str, size: str, rows: int, grid: str | None, kind: str) -> None:
        self.machine, self.whole = TOPOLOGIES[topology], PUBLISHED[f"Qwen/Qwen3.5-{size}"].config
        self.config = shortened(self.whole, PERIOD)
        self.workload = Workload(rows, CONTEXT, "bfloat16", GRIDS[grid])
        self.placement = default_placement(self.whole, self.machine)
        self.sizes = (
            engine_sizes(self.whole, self.workload, self.placement, self.machine.device) if kind == "engine" else None
        )
        compiled = compile_programs(self.config, self.workload, self.machine, self.placement, self.sizes)
        assert compiled.too_large is None, compiled.too_large
        self.programs = compiled.programs

    def estimate(self, config: ModelConfig) -> Memory:
        if self.sizes is None:
            return estimate_memory(config, self.workload, self.placement)
        return engine_estimate(config, self.workload, self.placement, self.sizes)

    def grown(self, program: Program) -> int:
        """What the program of the whole model needs besides its arguments: with the code of all periods."""
        return program.needs + program.code * (self.whole.num_layers // PERIOD - 1)


steps = cache(Steps)


def mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def shortened(config: ModelConfig, layers: int) -> ModelConfig:
    assert config.mixers is not None
    return replace(config, num_layers=layers, mixers=config.mixers[:layers])


@pytest.mark.parametrize(ARGUMENTS, BOTH)
def test_it_fits_and_takes_what_is_planned(topology: str, size: str, rows: int, grid: str | None, kind: str) -> None:
    made = steps(topology, size, rows, grid, kind)
    for config, needs in ((made.config, lambda program: program.needs), (made.whole, made.grown)):
        planned = made.estimate(config)
        resident = planned.weights + planned.kv + planned.states
        for name in ("decode", "prefill"):
            program, temporaries = made.programs[name], planned.temporaries[name]
            compiled = resident + needs(program)
            print(
                f"\n{topology} {size} {grid} {kind} {config.num_layers} layers, {name}: {mib(resident + temporaries)} "
                f"planned, {mib(compiled)} compiled (temporaries {mib(program.temporaries)}, code {mib(program.code)}, "
                f"planned {mib(temporaries)}; {program.compile_s:.0f} s)",
                end="",
            )
            assert compiled == pytest.approx(resident + temporaries, rel=0.1, abs=SMALL), name
    # Prefill has no output head. Decode has all, and of one period it is what was compiled.
    planned_period = made.estimate(made.config)
    resident = planned_period.weights + planned_period.kv + planned_period.states
    assert made.programs["decode"].arguments == pytest.approx(resident, rel=0.02)
    assert planned.total <= made.machine.device.usable_bytes


@pytest.mark.parametrize(ARGUMENTS, BOTH)
def test_keys_values_and_states_are_changed_in_place(
    topology: str, size: str, rows: int, grid: str | None, kind: str
) -> None:
    made = steps(topology, size, rows, grid, kind)
    planned = made.estimate(made.config)
    for name in ("decode", "prefill"):
        kept = planned.kv + planned.states
        if made.sizes is not None and name == "decode":
            kept += STATE_BYTES * made.sizes.state_rows * local_size(made.config.vocab_size, "vocab", made.placement)
        assert made.programs[name].aliases == pytest.approx(kept, rel=0.02), name
    if growth := made.programs.get("growth"):
        assert growth.outputs == pytest.approx(planned.kv, rel=0.02)  # the states stay where they are


@pytest.mark.parametrize(ARGUMENTS, BOTH)
def test_a_decode_step_moves_weights_keys_values_and_states_and_little_else(
    topology: str, size: str, rows: int, grid: str | None, kind: str
) -> None:
    made = steps(topology, size, rows, grid, kind)
    if topology == "v2-8":
        pytest.skip("without kernels for attention, and with little room on the chip")
    weights, decode = weights_info(made.config, made.workload, made.placement), made.programs["decode"]
    looked_up = 0 if weights.lm_head is None else bytes_per_device(weights.embedding, made.placement)
    states = 2 * bytes_per_device(states_info(made.config, made.workload.rows), made.placement)
    live = live_bytes(made.config, made.workload, made.placement)
    ideal = bytes_per_device(weights, made.placement) - looked_up + live + states
    print(f"\n{topology} {size} {kind}: {decode.moved / ideal:.2f} of {ideal / 1e6:,.0f} MB", end="")
    if (topology, kind) == ("v6e-8", "generate") and decode.moved > MOST_MOVED * ideal:
        pytest.xfail(
            "keys and values are moved once more, 135 MB a period; to VMEM or as a copy has not been found out"
        )
    assert decode.moved <= MOST_MOVED * ideal


@pytest.mark.parametrize(ARGUMENTS, BOTH)
def test_a_layer_talks_twice_and_the_embedding_once(
    topology: str, size: str, rows: int, grid: str | None, kind: str
) -> None:
    made = steps(topology, size, rows, grid, kind)
    hidden = made.workload.rows * made.config.hidden_size * 2
    collectives = made.programs["decode"].collectives
    whole = [each for each in collectives if each.kind == "all-reduce" and each.bytes >= hidden]
    expected = 2 * PERIOD + 1 if made.machine.devices > 1 else 0
    assert sum(each.count for each in whole) == expected
    # What draws a token compares parts of the vocabulary. Nothing as large as a head's state is moved.
    others = [each for each in collectives if each not in whole]
    assert all(each.bytes <= 64 * 2**10 for each in others), others
