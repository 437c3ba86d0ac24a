"""Plans: memory, speed and limits of a model on a machine, and alternatives that fit."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from jllm_core.config import ModelConfig
from jllm_core.mesh_axes import default_axes, model_rules, partial_lanes
from jllm_core.quantization.arrays import QuantizationError
from jllm_core.quantization.device_form import form_note
from jllm_core.sharding import Placement

from jllm_runtime.cache.contiguous import cache_capacity
from jllm_runtime.errors import PlanError
from jllm_runtime.mesh import abstract_device, abstract_mesh
from jllm_runtime.planner import engine_memory
from jllm_runtime.planner.assumptions import QUANTIZATIONS
from jllm_runtime.planner.bounds import Bound, program_bound
from jllm_runtime.planner.memory import Memory, Workload, bytes_per_device, estimate_memory, weights_info
from jllm_runtime.planner.roofline import Roofline, decode_roofline
from jllm_runtime.planner.topologies import GIB, TOPOLOGIES, Topology, multiples
from jllm_runtime.planner.tpu_compiler import Compilation, compile_programs
from jllm_runtime.programs.paged_sizes import PagedSizes

MAX_BATCH = 2**16
NARROW = 0.05
"""The share of a device's memory that an estimate should leave."""


@dataclass(frozen=True)
class Plan:
    """A plan of a model for a machine.

    Attributes:
        name: the model, as the user named it.
        config: its config.
        topology: the machine.
        workload: batch, context and types.
        placement: how the model is laid out over the machine.
        memory: bytes on each device, by the compiler where it was asked and has an answer, else estimated.
        roofline: the best decode rate.
        largest_batch: most sequences of this context that fit, a power of two (of an engine as many as its pages
            hold); 0 where not even one does.
        largest_context: most tokens of a sequence in this batch; 0 where not even the smallest cache fits.
        alternatives: options with which the model would fit, where it does not.
        compilation: the compiler's numbers; None where it was not asked.
        engine: sizes of the engine whose programs were compiled, and whose pool ``memory.kv`` is; None where the plan
            is of ``generate``.
        assumed: in words where ``config``, ``dtype`` and ``quantize`` come from (``assumptions.assume``).
    """

    name: str
    config: ModelConfig
    topology: Topology
    workload: Workload
    placement: Placement
    memory: Memory
    roofline: Roofline
    largest_batch: int
    largest_context: int
    alternatives: tuple[str, ...]
    compilation: Compilation | None
    assumed: Mapping[str, str] = field(default_factory=dict)
    engine: PagedSizes | None = None

    @property
    def bounds(self) -> dict[str, Bound]:
        """The least time of a step of each compiled program, by its name."""
        programs = {} if self.compilation is None else self.compilation.programs
        return {name: program_bound(program, self.topology.device) for name, program in programs.items()}

    @property
    def notes(self) -> tuple[str, ...]:
        """What should be known of the machine, and of the model's mesh on it, besides the figures."""
        device, dtype = self.topology.device, self.workload.dtype
        notes = list(device.notes)
        if not self.by_compiler and self.fits and self.spare_bytes < NARROW * device.usable_bytes:
            asks = device.platform != "cpu"
            notes.append(
                f"Only {self.spare_bytes / GIB:.2f} GiB are left, and an estimate can be off by more"
                f"{': ask the compiler, with --compile' if asks else ''}."
            )
        if lost := partial_lanes(self.config, self.placement):
            notes.append(f"{lost[0].upper()}{lost[1:]}.")
        if device.float16_flops_per_s is not None and dtype == "bfloat16":
            notes.append(
                f"A {device.kind} has no arithmetic of bfloat16: numbers stored so take half the bytes, and are "
                "computed with as float32. It computes float16 as it is: plan with --dtype float16."
            )
        if device.platform == "tpu" and dtype == "float16":
            notes.append("TPUs compute in bfloat16, and convert float16: plan with --dtype bfloat16.")
        if note := form_note(device.kind, self.workload.quantization):
            notes.append(f"{note[0].upper()}{note[1:]}.")
        return tuple(notes)

    @property
    def fits(self) -> bool:
        """Whether the model fits on every device."""
        refused = self.compilation is not None and self.compilation.too_large is not None
        return not refused and self.short_bytes == 0

    @property
    def by_compiler(self) -> bool:
        """Whether ``memory`` is the compiler's."""
        return self.compilation is not None and self.compilation.memory is not None

    @property
    def short_bytes(self) -> int:
        """Bytes that each device lacks."""
        return max(0, -self.spare_bytes)

    @property
    def spare_bytes(self) -> int:
        """Bytes that each device has left; negative where it lacks some."""
        return self.topology.device.usable_bytes - self.memory.total


def make_plan(
    name: str,
    config: ModelConfig,
    topology: Topology,
    workload: Workload,
    placement: Placement | None = None,
    ask_compiler: bool = False,
    assumed: Mapping[str, str] | None = None,
    engine: PagedSizes | None = None,
) -> Plan:
    """Plan a model for a machine, from the description of its arrays; nothing is allocated.

    Args:
        name: a name for the model.
        config: its config.
        topology: the machine.
        workload: batch, context and types.
        placement: how the model is laid out; None for the mesh that suits it (``mesh_axes.default_axes``).
        ask_compiler: compile the real programs, and take the bytes from there.
        assumed: where config and types come from, in words, for the report.
        engine: sizes of an engine (``engine_memory.engine_sizes``), to plan that in place of ``generate``.

    Raises:
        PlanError: a context longer than the model's, activations that these weights do not take, or no compiler.
        QuantizationError: activations that the machine does not take.
    """
    if workload.context > config.context_length:
        raise PlanError(f"a context of {workload.context} is more than the {config.context_length} of {name}")
    if workload.activations and (workload.quantization is None or workload.quantization.name != "int8"):
        grid = "not quantised" if workload.quantization is None else workload.quantization.name
        raise PlanError(
            f"activations in int8 are for weights of int8 with a scale a channel, these are {grid}; plan with "
            "--quantize int8, or leave the activations as they are"
        )
    placement = for_model(placement or default_placement(config, topology), config)
    # First, because it may fail.
    compilation = compile_programs(config, workload, topology, placement, engine) if ask_compiler else None
    compiled = None if compilation is None else compilation.memory
    estimate = estimate_memory(config, workload, placement)
    if engine is None:
        largest = (
            _largest_batch(config, workload, topology, placement),
            _largest_context(config, workload, topology, placement),
        )
    else:
        estimate = engine_memory.engine_estimate(config, workload, placement, engine)
        # Any rows share the pool, whatever the length of each.
        tokens = engine.pages * engine.page_size
        largest = (
            engine_memory.largest_batch(config, workload, placement, engine),
            min(tokens // workload.batch, config.context_length),
        )
    if compiled is not None:
        # The programs have both in one: what is written in place.
        states, snapshots = estimate.states, estimate.snapshots
        compiled = dataclasses.replace(compiled, kv=compiled.kv - states, states=states, snapshots=snapshots)
    plan = Plan(
        name=name,
        config=config,
        topology=topology,
        workload=workload,
        placement=placement,
        memory=compiled or estimate,
        roofline=decode_roofline(config, workload, placement, topology.device),
        largest_batch=largest[0],
        largest_context=largest[1],
        alternatives=(),
        compilation=compilation,
        assumed=assumed or {},
        engine=engine,
    )
    return (
        plan if plan.fits or engine is not None else dataclasses.replace(plan, alternatives=tuple(_alternatives(plan)))
    )


def make_placement(topology: Topology, mesh: Mapping[str, int] | None = None) -> Placement:
    """The placement on a machine's devices, along these axes of the mesh; None for all on the tensor axis.

    Raises:
        MeshError: a mesh that these devices cannot make.
    """
    device = abstract_device(topology.device.kind, topology.device.platform)
    return Placement(abstract_mesh(mesh, topology.devices, device))


def default_placement(config: ModelConfig, topology: Topology) -> Placement:
    """The placement on a machine's devices that ``load_model`` takes where nobody names a mesh."""
    return for_model(make_placement(topology, default_axes(config, topology.devices)), config)


def for_model(placement: Placement, config: ModelConfig) -> Placement:
    """The placement with the rules that ``load_model`` takes for this model."""
    return dataclasses.replace(placement, rules=model_rules(config, placement.mesh, placement.rules))


def _fits(config: ModelConfig, workload: Workload, topology: Topology, placement: Placement) -> bool:
    try:
        return estimate_memory(config, workload, placement).total <= topology.device.usable_bytes
    except QuantizationError:  # groups that do not divide the model's axes, or activations that are for other devices
        return False


def _largest_batch(config: ModelConfig, workload: Workload, topology: Topology, placement: Placement) -> int:
    largest, batch = 0, 1
    # Powers of two, because programs are compiled for these.
    while batch <= MAX_BATCH and _fits(config, dataclasses.replace(workload, batch=batch), topology, placement):
        largest, batch = batch, 2 * batch
    return largest


def _largest_context(config: ModelConfig, workload: Workload, topology: Topology, placement: Placement) -> int:
    largest, tokens = 0, 1
    while tokens <= config.context_length:
        # The cache grows in steps: try the largest context of each capacity.
        context = min(cache_capacity(tokens, config.context_length), config.context_length)
        if not _fits(config, dataclasses.replace(workload, context=context), topology, placement):
            break
        largest, tokens = context, context + 1
    return largest


def _alternatives(plan: Plan) -> list[str]:
    """Options with which the model would fit, one change each: the batch, context and types, then larger machines.
    Where none will do, larger machines with weights in fewer bits."""
    found = [*_smaller_workloads(plan), *_larger_machines(plan, plan.workload)]
    if found:
        return found
    for name, smaller in _fewer_bits(plan.workload):
        if machines := _larger_machines(plan, smaller):
            return [f"{machine} --quantize {name}" for machine in machines]
    return []


def _smaller_workloads(plan: Plan) -> Iterator[str]:
    workload = plan.workload

    def fits(smaller: Workload) -> bool:
        return _fits(plan.config, smaller, plan.topology, plan.placement)

    if 0 < plan.largest_batch < workload.batch:
        yield f"--batch {plan.largest_batch}"
    if 0 < plan.largest_context < workload.context:
        yield f"--context {plan.largest_context}"
    if workload.dtype == "float32" and fits(dataclasses.replace(workload, dtype="bfloat16")):
        yield "--dtype bfloat16"
    if workload.kv_dtype is None and fits(dataclasses.replace(workload, kv_dtype="int8")):
        yield "--kv-dtype int8"
    for name, smaller in _fewer_bits(workload):
        if fits(smaller):
            yield f"--quantize {name}"


def _fewer_bits(workload: Workload) -> Iterator[tuple[str, Workload]]:
    """The workload with weights in fewer bits, by the names of ``QUANTIZATIONS``."""
    if workload.activations:  # those of 8 bits are for weights of 8 bits
        return
    # int8 before int4: the one that loses less.
    for name, quantization in QUANTIZATIONS.items():
        if workload.quantization is None or workload.quantization.bits > quantization.bits:
            yield name, dataclasses.replace(workload, quantization=quantization)


def _larger_machines(plan: Plan, workload: Workload) -> list[str]:
    """Machines that hold the model, the smallest first; of each kind of GPU the fewest."""
    found: dict[str, int] = {}
    alone = make_placement(dataclasses.replace(plan.topology, devices=1))
    weights = bytes_per_device(weights_info(plan.config, workload, alone), alone)
    for one in TOPOLOGIES.values():
        for machine in multiples(one):
            # However they are spread out, they take no less; to lay them out takes a while.
            if machine == plan.topology or machine.total_bytes < weights:
                continue
            if _fits(plan.config, workload, machine, default_placement(plan.config, machine)):
                found[machine.name] = machine.total_bytes
                break
    return [f"--topology {name}" for name in sorted(found, key=found.__getitem__)]
