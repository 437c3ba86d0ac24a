"""The engine's programs, compiled for TPUs by libtpu's compiler: what a decode step and a chunk of prefill move and
compute, against what they must. No TPU is needed, and none has run them: these are bounds, not measurements.

``hatch run plan:test``. Programs are compiled with two and four layers side by side, and what a layer adds is added for
the rest: full depth differs by less than 6% and takes ten times as long.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
from jllm_core.backends.select import select_backend
from jllm_core.config import ModelConfig
from jllm_core.mesh_axes import default_axes
from jllm_core.quantization.arrays import Quantization
from jllm_core.sharding import Placement
from jllm_runtime.planner.bounds import program_bound
from jllm_runtime.planner.catalogue import PUBLISHED
from jllm_runtime.planner.engine_memory import engine_estimate, engine_sizes, live_bytes
from jllm_runtime.planner.memory import Workload, bytes_per_device, weights_info
from jllm_runtime.planner.plan import make_placement
from jllm_runtime.planner.roofline import decode_roofline, multiplied_elements
from jllm_runtime.planner.topologies import TOPOLOGIES, Topology
from jllm_runtime.planner.tpu_compiler import Collective, Program, compile_programs
from jllm_runtime.programs.paged_sizes import PagedSizes

# Where each size fits with its pages.
FIT = [
    *(("v2-8", size) for size in ("0.6B", "4B", "8B", "14B")),
    *(("v5e-1", size) for size in ("0.6B", "4B")),
    *(("v5e-8", size) for size in ("0.6B", "4B", "8B", "14B", "32B")),
    *(("v6e-1", size) for size in ("0.6B", "4B", "8B")),
    *(("v6e-8", size) for size in ("0.6B", "4B", "8B", "14B", "32B")),
]
ROWS, CONTEXTS = (16, 64), (1024, 8192, 32768)
CASES = [(*fit, rows) for fit in FIT for rows in ROWS]
# A matrix is moved in the bits that it is stored in, and nothing besides: at most so many times weights and live KV.
MOST_MOVED = 1.15
# Of the roofline of a chunk of prefill: bytes at full bandwidth or operations at the peak. A model of 1,024 numbers a
# token is too small to be split over eight devices: its matrices fill no matrix unit.
MOST_PREFILL = {("v5e-1", "4B"): 2.0, ("v5e-8", "14B"): 2.0, ("v6e-8", "14B"): 2.0, ("v5e-8", "0.6B"): 5.0}
# Bits of the weights, the fewest last: fewer must not take longer. Groups of 128: of 32 a TPU's tiles are half empty.
GRIDS = {None: None, "int8": Quantization(8), "int4": Quantization(4, group=128)}
QUANTIZED = [("v5e-1", "4B")]
# Milliseconds of a decode step in published measurements of others (docs/planning.md has the sources): topology, size,
# rows, context of the texts on average, what was measured, and the most of it that the bound may be. With 16 rows of
# the largest the weights alone take more than half of it.
PUBLISHED_MS = [
    ("v6e-4", "8B", 64, 1536, 11.1, 0.5),
    ("v6e-4", "32B", 64, 1536, 29.5, 0.5),
    ("v6e-4", "32B", 16, 1536, 16.9, 0.7),
]


@dataclass(frozen=True)
class Steps:
    """The engine's programs of a model at full depth, by what a layer adds."""

    config: ModelConfig
    workload: Workload
    topology: Topology
    placement: Placement
    sizes: PagedSizes
    programs: dict[str, Program]

    def at(self, name: str, context: int) -> Program:
        """A program whose rows all reach this context; where kernels read the pages nothing else depends on it."""
        program, rows = self.programs[name], self.sizes.chunk_pages if name == "prefill" else None
        if not program.kernel_reads:
            return program
        reads = live_bytes(self.config, replace(self.workload, context=context), self.placement, rows)
        return replace(program, kernel_reads=reads)


def extrapolated(layers: int, two: Program, four: Program) -> Program:
    def number(a: float, b: float) -> Any:
        return type(b)(b + (b - a) / 2 * (layers - 4))

    counts = {(each.kind, each.bytes): each.count for each in two.collectives}
    names = [name for name, value in vars(four).items() if isinstance(value, (int, float)) and name != "largest_made"]
    grown = {name: number(getattr(two, name), getattr(four, name)) for name in names}
    collectives = tuple(
        Collective(each.kind, each.bytes, number(counts.get((each.kind, each.bytes), 0), each.count))
        for each in four.collectives
    )
    return replace(four, **grown, collectives=collectives)


def shortened(config: ModelConfig, layers: int) -> ModelConfig:
    per_layer = {name: getattr(config, name) for name in ("windows", "rope_layers")}
    return replace(
        config,
        num_layers=layers,
        **{name: values[:layers] for name, values in per_layer.items() if values is not None},  # type: ignore[arg-type]
    )


def steps(topology: str, size: str, rows: int, context: int = 32768, quantize: str | None = None) -> Steps:
    """The steps, compiled once for all contexts where the width of the tables does not go by them."""
    placement = default_placement(topology, size)
    wide = has_paged_attention(topology, size)
    return _steps(topology, size, rows, 32768 if wide else context, quantize, placement)


@cache
def _steps(topology: str, size: str, rows: int, context: int, quantize: str | None, placement: Placement) -> Steps:
    config, machine = PUBLISHED[f"Qwen/Qwen3-{size}"].config, TOPOLOGIES[topology]
    workload = Workload(rows, context, "bfloat16", GRIDS[quantize])
    sizes = engine_sizes(config, workload, placement, machine.device)

    def compiled(layers: int) -> dict[str, Program]:
        answer = compile_programs(shortened(config, layers), workload, machine, placement, sizes)
        assert answer.too_large is None, answer.too_large
        return answer.programs

    with ThreadPoolExecutor(2) as threads:
        two, four = threads.map(compiled, (2, 4))
    programs = {name: extrapolated(config.num_layers, two[name], four[name]) for name in four}
    return Steps(config, workload, machine, placement, sizes, programs)


def default_placement(topology: str, size: str) -> Placement:
    config, machine = PUBLISHED[f"Qwen/Qwen3-{size}"].config, TOPOLOGIES[topology]
    return make_placement(machine, default_axes(config, machine.devices))


@cache
def has_paged_attention(topology: str, size: str) -> bool:
    config, placement = PUBLISHED[f"Qwen/Qwen3-{size}"].config, default_placement(topology, size)
    return select_backend(weights_info(config, Workload(), placement), config, placement).one_table_width


def needs_paged_attention(topology: str, size: str) -> None:
    if not has_paged_attention(topology, size):
        pytest.skip(f"attention gathers every page of a table on {topology}")


def weights_moved(made: Steps) -> int:
    """Bytes of the weights that a step must read: all but an untied embedding."""
    weights = weights_info(made.config, made.workload, made.placement)
    looked_up = 0 if weights.lm_head is None else bytes_per_device(weights.embedding, made.placement)
    return bytes_per_device(weights, made.placement) - looked_up


def reachable(rows: int) -> Iterator[int]:
    """The contexts that are asked for with so many rows. 64 texts of 32k are more than any of these machines holds."""
    yield from (context for context in CONTEXTS if rows * context <= 64 * 8192)


@pytest.mark.parametrize(("topology", "size", "rows"), CASES)
def test_a_decode_step_moves_weights_and_live_pages_and_little_else(topology: str, size: str, rows: int) -> None:
    needs_paged_attention(topology, size)
    for context in reachable(rows):
        made = steps(topology, size, rows, context)
        decode = made.at("decode", context)
        ideal = weights_moved(made) + live_bytes(made.config, replace(made.workload, context=context), made.placement)
        bound = program_bound(decode, made.topology.device)
        print(f"\n{topology} {size} {rows}x{context}: {decode.moved / ideal:.2f} of {ideal / 1e6:,.0f} MB, {bound}")
        assert decode.moved <= MOST_MOVED * ideal


@pytest.mark.parametrize(("topology", "size", "rows"), CASES)
def test_no_program_copies_the_pool(topology: str, size: str, rows: int) -> None:
    needs_paged_attention(topology, size)
    made = steps(topology, size, rows)
    layer = made.sizes.pages * made.sizes.page_size * made.config.num_kv_heads * made.config.head_dim
    for name, program in made.programs.items():
        assert program.largest_made < layer // made.topology.devices, name


@pytest.mark.parametrize(("topology", "size", "rows"), CASES)
def test_attention_is_a_kernel_in_every_layer_where_the_chip_has_them(topology: str, size: str, rows: int) -> None:
    needs_paged_attention(topology, size)
    made = steps(topology, size, rows)
    expected = 0 if topology.startswith("v2") else made.config.num_layers
    assert {name: program.kernels for name, program in made.programs.items()} == dict.fromkeys(
        ("decode", "prefill"), expected
    )


@pytest.mark.parametrize(("topology", "size", "rows"), CASES)
def test_layers_talk_twice_and_the_embedding_once(topology: str, size: str, rows: int) -> None:
    made = steps(topology, size, rows, context=1024)
    whole = [
        each
        for each in made.programs["decode"].collectives
        if each.kind == "all-reduce" and each.bytes == made.workload.rows * made.config.hidden_size * 2
    ]
    expected = 2 * made.config.num_layers + 1 if made.topology.devices > 1 else 0
    assert sum(each.count for each in whole) == expected


@pytest.mark.parametrize(("topology", "size", "rows"), CASES)
def test_it_fits_and_the_temporaries_are_as_planned(topology: str, size: str, rows: int) -> None:
    needs_paged_attention(topology, size)
    made = steps(topology, size, rows)
    estimate = engine_estimate(made.config, made.workload, made.placement, made.sizes)
    for name, program in made.programs.items():
        together = program.arguments + program.needs
        assert together <= made.topology.device.usable_bytes, name
        assert together == pytest.approx(estimate.weights + estimate.kv + estimate.temporaries[name], rel=0.1), name


@pytest.mark.parametrize(("topology", "size"), MOST_PREFILL)
def test_a_chunk_of_prefill_is_near_its_roofline(topology: str, size: str) -> None:
    needs_paged_attention(topology, size)
    for context in (1024, 8192):
        made = steps(topology, size, 16, context)
        prefill, device = made.at("prefill", context), made.topology.device
        tokens = made.sizes.chunk_pages * made.sizes.page_size
        products = 2 * tokens * multiplied_elements(made.config, made.placement) / device.flops_per_s
        bound = program_bound(prefill, device)
        roofline = max((weights_moved(made) + prefill.kernel_reads) / device.bytes_per_s, products)
        print(f"\n{topology} {size} {context}: {tokens / bound.seconds:,.0f} tokens/s of {tokens / roofline:,.0f}")
        assert bound.seconds <= MOST_PREFILL[topology, size] * roofline


@pytest.mark.parametrize(("topology", "size", "rows", "context", "measured", "share"), PUBLISHED_MS)
def test_the_bound_is_well_below_what_others_have_measured(
    topology: str, size: str, rows: int, context: int, measured: float, share: float
) -> None:
    needs_paged_attention(topology, size)
    made = steps(topology, size, rows, 2048)
    bound = program_bound(made.at("decode", context), made.topology.device)
    print(f"\n{topology} {size} {rows}x{context}: {1e3 * bound.seconds:.1f} ms; measured {measured} ms")
    assert 1e3 * bound.seconds <= share * measured


@pytest.mark.parametrize(("topology", "size"), QUANTIZED)
def test_fewer_bits_take_no_longer(topology: str, size: str) -> None:
    bounds = []
    needs_paged_attention(topology, size)
    for quantize in GRIDS:
        made = steps(topology, size, 16, 1024, quantize)
        decode = made.at("decode", 1024)
        bounds.append(program_bound(decode, made.topology.device).seconds)
        live = live_bytes(made.config, replace(made.workload, context=1024), made.placement)
        print(f"\n{topology} {size} {quantize}: {1e3 * bounds[-1]:.1f} ms, {decode.cycles:,} cycles")
        assert decode.moved <= MOST_MOVED * (weights_moved(made) + live)
    # Where the matrix units are what takes longest, bits change nothing but rounding.
    assert bounds[1] <= 1.02 * bounds[0]
    assert bounds[2] <= 1.02 * bounds[1]


def test_the_roofline_of_a_plan_is_no_faster_than_what_is_compiled() -> None:
    made = steps("v2-8", "14B", 16, 1024)
    roofline = decode_roofline(made.config, replace(made.workload, context=1024), made.placement, made.topology.device)
    bound = program_bound(made.at("decode", 1024), made.topology.device)
    print(f"\nroofline {1e3 * roofline.seconds_per_step:.1f} ms, compiled {1e3 * bound.seconds:.1f} ms")
    assert roofline.seconds_per_step <= bound.seconds <= 1.5 * roofline.seconds_per_step
