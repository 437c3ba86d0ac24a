"""Worker process of a compiler: a job in JSON on standard input, the compiler's numbers on standard output.

The programs are lowered from descriptions of their arguments, for devices that are not there: nothing is allocated.
"""

import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jllm_core.array_info import abstract_arrays
from jllm_core.backends.select import select_backend
from jllm_core.config import ModelConfig
from jllm_core.quantization.arrays import Quantization
from jllm_core.sharding import Placement, ShardingRules
from jllm_core.weights import Weights

from jllm_runtime.cache.contiguous import ContiguousCache, largest_chunk
from jllm_runtime.cache.descriptions import described_slots
from jllm_runtime.compile_ahead import TOO_LARGE
from jllm_runtime.device_layouts import device_format
from jllm_runtime.mesh import make_mesh
from jllm_runtime.planner.engine_memory import live_bytes
from jllm_runtime.planner.hlo_account import step_account
from jllm_runtime.planner.hlo_operations import KERNELS
from jllm_runtime.planner.memory import Workload, kv_info, smaller_capacity, states_info, weights_info
from jllm_runtime.planner.roofline import touched_experts
from jllm_runtime.planner.topologies import CompilerTarget, Topology, find_topology
from jllm_runtime.planner.tpu_compiler import Collective, Compilation, Program
from jllm_runtime.programs import contiguous_batch, paged_lowering
from jllm_runtime.programs.paged_sizes import PagedSizes
from jllm_runtime.sampling import SamplingArrays

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_OPERATION = re.compile(rf"= (.+?) ({'|'.join(COLLECTIVES)})(-start)?\(")
_SHAPE = re.compile(r"\b(pred|[a-z]+?(\d+)[a-z0-9]*)\[([\d,]*)\]")
ATTENTION = "attention"
"""JAX's named scope of what reads keys and values."""
ATTENTION_BLOCK = 512
"""Slots that attention takes at a time where it goes through them in a loop. Tests compare it with the backends'."""


def main() -> None:
    """Read a job, compile its programs for TPUs, and print the result."""
    run(slice_devices)


def run(devices: Callable[[Topology], list[jax.Device]]) -> None:
    """Read a job, compile its programs for the devices of its topology, and print the result."""
    job = json.load(sys.stdin)
    config = ModelConfig.from_json(job["config"])
    quantization = job["workload"].pop("quantization")
    workload = Workload(**job["workload"], quantization=Quantization(**quantization) if quantization else None)
    mesh, rules = make_mesh(job["mesh"], devices(find_topology(job["topology"]))), rules_from_json(job["rules"])
    engine = PagedSizes(**job["engine"]) if job["engine"] else None
    print(json.dumps(asdict(compile_all(config, workload, mesh, rules, engine))))


def rules_from_json(fields: dict[str, Any]) -> ShardingRules:
    """The rules whose ``asdict`` this was: JSON has lists for tuples, and what places arrays must be hashable."""
    return ShardingRules(**{name: tuple(axes) if isinstance(axes, list) else axes for name, axes in fields.items()})


def slice_devices(topology: Topology) -> list[jax.Device]:
    """The devices of a topology of TPUs."""
    if topology.target is None:
        raise ValueError(f"{topology.name} has no compiler")
    return tpu_devices(topology.target)


def tpu_devices(target: CompilerTarget) -> list[jax.Device]:
    """The compiler's descriptions of a slice's devices."""
    described = topologies.get_topology_desc(
        platform="tpu",
        topology_name=target.topology_name,
        chips_per_host_bounds=target.chips_per_host,
        chip_config_name=target.chip_config,
    )
    return list(described.devices)


def compile_all(
    config: ModelConfig, workload: Workload, mesh: Mesh, rules: ShardingRules, engine: PagedSizes | None = None
) -> Compilation:
    """Compile the programs of ``generate``, or those of an engine of these sizes, up to the first that is too large."""
    programs: dict[str, Program] = {}
    placement = Placement(mesh, rules)
    all_lowered = (
        lowered_programs(config, workload, mesh, rules)
        if engine is None
        else lowered_engine(config, workload, placement, engine)
    )
    for name, lowered in all_lowered:
        start = time.perf_counter()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            # libtpu reports it as a general runtime error.
            if TOO_LARGE not in str(error):
                raise
            return Compilation(programs, f"{name}: {str(error).splitlines()[0]}")
        # The engine's prefill takes pages, each with the text before it; the others a piece or a token of each row.
        rows = engine.chunk_pages if engine is not None and name == "prefill" else None
        attended = live_bytes(config, workload, placement, rows)
        blocks = -(-workload.context // ATTENTION_BLOCK)
        programs[name] = _program(
            compiled, time.perf_counter() - start, attended, blocks, _expert_share(config, workload)
        )
    return Compilation(programs)


def _expert_share(config: ModelConfig, workload: Workload) -> float:
    return 1.0 if config.moe is None else touched_experts(config.moe, workload.rows)


def lowered_engine(
    config: ModelConfig, workload: Workload, placement: Placement, sizes: PagedSizes
) -> Iterator[tuple[str, jax.stages.Lowered]]:
    """The engine's programs by name, lowered from descriptions of their arguments."""
    infos, weights = describe_weights(config, workload, placement)
    backend = select_backend(infos, config, placement)
    programs = paged_lowering.lowered_programs(weights, config, sizes, workload.cache_dtype, backend)
    for name, lower in programs.items():
        yield name, lower()


def describe_weights(config: ModelConfig, workload: Workload, placement: Placement) -> tuple[Weights, Weights]:
    """The weights by description, and as arrays that lie on the mesh as they would once they are loaded."""
    infos, mesh = weights_info(config, workload, placement), placement.mesh
    platform = mesh.devices.flat[0].platform
    formats = jax.tree.map(lambda info: device_format(info, placement.rules.sharding(info, mesh), platform), infos)
    # The layouts matter: the compiler adds copies where an argument does not lie as it reads it.
    return infos, abstract_arrays(infos, formats)


def lowered_programs(
    config: ModelConfig, workload: Workload, mesh: Mesh, rules: ShardingRules
) -> Iterator[tuple[str, jax.stages.Lowered]]:
    """The programs by name, lowered from descriptions of their arguments."""
    placement = Placement(mesh, rules)
    infos, weights = describe_weights(config, workload, placement)
    backend = select_backend(infos, config, placement)
    info = kv_info(config, workload, placement)
    replicated = NamedSharding(mesh, PartitionSpec())
    rows, heads, capacity, width = info.shape

    def array_of(sharding: NamedSharding, dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    array = partial(array_of, replicated)

    def described(tree: Any) -> Any:
        return jax.tree.map(lambda info: array_of(rules.sharding(info, mesh), info.dtype, *info.shape), tree)

    states = {
        layer: described(state)
        for layer, state in zip(config.layers_with("delta_net"), states_info(config, rows), strict=True)
    }

    def cache(slots: int) -> ContiguousCache:
        # Keys and values of all layers have the same description; delta nets have none, as in ``zero_cache``.
        kept, none = (
            described(described_slots(replace(info, shape=(rows, count, slots, width)))) for count in (heads, 0)
        )
        arrays: list[Any] = [kept if config.mixer(layer) == "attention" else none for layer in range(config.num_layers)]
        return ContiguousCache(arrays, arrays, backend, states=states)

    whole, number = array(jnp.int32, rows), array(jnp.int32)
    chances = array(jnp.float32, rows)
    sampling = SamplingArrays(chances, whole, chances, chances, array(jnp.uint32, rows, 2))
    hidden = array(jnp.dtype(workload.dtype), rows, config.hidden_size)
    eos_ids = array(jnp.int32, rows, 4)
    done = array(jnp.bool_, rows)

    yield (
        "decode",
        contiguous_batch.decode.lower(
            weights, cache(capacity), whole, whole, done, whole, eos_ids, sampling, number, config
        ),
    )
    tokens = array(jnp.int32, rows, capacity)
    yield (
        "prefill",
        contiguous_batch.prefill.lower(
            weights,
            cache(capacity),
            tokens,
            whole,
            hidden,
            (number, number),
            config,
            largest_chunk(workload.batch, backend),
        ),
    )
    # Growing needs the old and the new cache at once, which is often the most of all.
    if smaller := smaller_capacity(config, workload):
        yield "growth", contiguous_batch.grow_cache.lower(cache(smaller), capacity)


def _program(compiled: jax.stages.Compiled, seconds: float, attended: int, blocks: int, expert_share: float) -> Program:
    """The compiler's numbers.

    Args:
        compiled: the program.
        seconds: what compiling took.
        attended: bytes of keys and values that its attention sees.
        blocks: blocks of slots that blocked attention goes through.
        expert_share: share of the experts that its tokens are expected to go to.
    """
    # The CUDA compiler has no account of cost.
    memory, cost, hlo = compiled.memory_analysis(), compiled.cost_analysis() or {}, compiled.as_text() or ""
    if memory is None:
        raise RuntimeError("the compiler gives no account of the program's memory")
    step = step_account(hlo, trips={ATTENTION: blocks})
    attention = step.under(ATTENTION)
    others = step.left_out - attention.left_out
    return Program(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliases=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        bytes_accessed=cost.get("bytes accessed", 0.0),
        flops=cost.get("flops", 0.0),
        # A custom call is opaque to cost_analysis.
        kernels=sum(hlo.count(f'custom_call_target="{target}"') for target in KERNELS),
        collectives=find_collectives(hlo),
        compile_s=seconds,
        hbm_read=step.read,
        hbm_written=step.written,
        kernel_reads=(attended if attention.left_out else 0) + int(others * expert_share),
        cycles=step.cycles,
        largest_made=step.largest_made,
    )


def find_collectives(hlo: str) -> tuple[Collective, ...]:
    """The collective operations in the text of a compiled program, the largest first."""
    counts: Counter[tuple[str, int]] = Counter()
    for shapes, kind, started in _OPERATION.findall(hlo):
        sizes = [
            math.prod(map(int, dims.split(",") if dims else [])) * _bytes(bits)
            for _, bits, dims in _SHAPE.findall(shapes)
        ]
        # The type of an asynchronous start is a tuple of its operands and results; of others, the results alone.
        counts[kind, max(sizes) if started else sum(sizes)] += 1
    ordered = sorted(counts.items(), key=lambda item: -item[0][1])
    return tuple(Collective(kind, size, count) for (kind, size), count in ordered)


def _bytes(bits: str) -> int:
    # "pred" has no digits and takes a byte; types of less than 8 bits are counted as one.
    return max(int(bits or 8) // 8, 1)


if __name__ == "__main__":
    main()
