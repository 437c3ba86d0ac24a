"""Compilation of the real programs for TPUs and GPUs, on a machine without them.

libtpu reads its settings from the environment when it is loaded, and it is slow to load. So it works in a process of
its own, ``planner/compile_worker.py``; this module starts it and reads its output. The CUDA compiler has one too,
``planner/cuda_worker.py``.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jllm_core.config import ModelConfig
from jllm_core.sharding import Placement

from jllm_runtime.errors import PlanError
from jllm_runtime.planner import cuda_compiler
from jllm_runtime.planner.memory import Memory, Workload
from jllm_runtime.planner.topologies import Topology
from jllm_runtime.programs.paged_sizes import PagedSizes

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # the process itself has no TPU
    # Without these, libtpu asks Google's metadata servers for its TPU, and two processes cannot load it at a time.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Collective:
    """Communication between devices: ``count`` operations of one kind, each giving ``bytes`` on every device."""

    kind: str
    bytes: int
    count: int


@dataclass(frozen=True)
class Program:
    """The compiler's numbers for one program, on each device.

    Attributes:
        arguments, outputs, aliases, temporaries, code: bytes; ``aliases`` are outputs in the memory of arguments.
        bytes_accessed, flops: of one run, with the body of each loop counted once; 0 where the compiler tells neither.
        kernels: calls of hand-written kernels, which XLA's other numbers leave out.
        collectives: by kind and size.
        compile_s: seconds of compiling.
        hbm_read, hbm_written: bytes that cross the device's memory in one step of the program's loop, or in all of it
            where it has none, by ``hlo_account``.
        kernel_reads: bytes that kernels read of cache and weights, by formula: the text only shows that they may.
        cycles: the compiler's estimate for the same step.
        largest_made: elements of the largest array that it makes anew, in memory or on the chip.
    """

    arguments: int
    outputs: int
    aliases: int
    temporaries: int
    code: int
    bytes_accessed: float
    flops: float
    kernels: int
    collectives: tuple[Collective, ...]
    compile_s: float
    hbm_read: int = 0
    hbm_written: int = 0
    kernel_reads: int = 0
    cycles: int = 0
    largest_made: int = 0

    @property
    def moved(self) -> int:
        """Bytes that cross the device's memory in a step."""
        return self.hbm_read + self.hbm_written + self.kernel_reads

    @property
    def needs(self) -> int:
        """Bytes that the program needs beside its arguments."""
        return self.outputs - self.aliases + self.temporaries + self.code

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Program":
        """The program whose ``asdict`` this is."""
        return cls(**fields | {"collectives": tuple(Collective(**each) for each in fields["collectives"])})


@dataclass(frozen=True)
class Compilation:
    """The compiled programs by name. ``too_large`` is the compiler's error for one that does not fit on the machine."""

    programs: dict[str, Program]
    too_large: str | None = None

    @property
    def memory(self) -> Memory | None:
        """The programs' bytes in the terms of the estimate; None where one is too large."""
        if self.too_large is not None:
            return None
        decode = self.programs["decode"]
        # Decode updates the cache in place, and nothing else. Its other arguments are weights and a few kilobytes.
        kv = decode.aliases
        weights = decode.arguments - kv
        temporaries = {name: program.needs for name, program in self.programs.items()}
        if growth := self.programs.get("growth"):  # the old keys and values beside the new, which are in kv
            temporaries["growth"] += growth.arguments - growth.outputs
        return Memory(weights, kv, temporaries)


def compile_programs(
    config: ModelConfig,
    workload: Workload,
    topology: Topology,
    placement: Placement,
    engine: PagedSizes | None = None,
) -> Compilation:
    """Compile programs for a machine that need not be there.

    Args:
        config: the model.
        workload: rows, context and types.
        topology: the machine.
        placement: how the model is laid out over it.
        engine: sizes of an engine, whose programs (``programs/paged_batch.py``) are compiled; None for those of
            ``generate`` (``programs/contiguous_batch.py``).

    Raises:
        PlanError: a machine that no compiler knows, no such compiler, or a failure of it.
    """
    worker, environment = _worker(topology)
    job = {
        "config": config.to_json(),
        "workload": asdict(workload),
        "topology": topology.name,
        "mesh": dict(placement.mesh.shape),
        "rules": asdict(placement.rules),
        "engine": None if engine is None else asdict(engine),
    }
    finished = subprocess.run(
        [sys.executable, "-m", f"jllm_runtime.planner.{worker}"],
        input=json.dumps(job),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode:
        raise PlanError(f"the compiler failed for {topology.name}:\n{finished.stderr[-2000:]}")
    # libtpu may print before the result.
    answer = json.loads(finished.stdout.splitlines()[-1])
    programs = {name: Program.from_json(fields) for name, fields in answer["programs"].items()}
    return Compilation(programs, answer["too_large"])


def _worker(topology: Topology) -> tuple[str, Mapping[str, str]]:
    """The module of the compiler's process, and its environment."""
    if topology.device.platform == "gpu":
        cuda_compiler.check_compiler(topology)
        return "cuda_worker", cuda_compiler.ENVIRONMENT
    if topology.target is None:
        raise PlanError(
            f"--compile asks the compilers of TPUs and of CUDA, which do not know {topology.name}; "
            "without it, plans are estimates"
        )
    # The spec alone: loading libtpu here would make this process its owner.
    if importlib.util.find_spec("libtpu") is None:
        raise PlanError(
            "--compile and --engine ask libtpu, which is not installed (no TPU is needed): pip install "
            "'jllm-runtime[tpu]'"
        )
    return "compile_worker", ENVIRONMENT
