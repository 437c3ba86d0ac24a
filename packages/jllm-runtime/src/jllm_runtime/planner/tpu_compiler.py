"""Ask libtpu's compiler, on a machine without a TPU, what the real steps need on one.

libtpu reads its settings from the environment when it is loaded, and it is slow to load. So it works in a process of
its own, ``planner/compilation.py``; this module starts it and reads what it writes.
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

from jllm_core.config import ModelConfig
from jllm_core.sharding import Placement

from jllm_runtime.errors import PlanError
from jllm_runtime.planner.memory import Memory, Workload
from jllm_runtime.planner.topologies import Topology

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # where the process itself works
    # Else libtpu asks Google's servers which TPU it runs on, and refuses to be loaded by two processes at a time.
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
    """What the compiler says of one program, on each device.

    Attributes:
        arguments, outputs, aliases, temporaries, code: bytes; ``aliases`` are outputs in the place of arguments.
        bytes_accessed, flops: of one run in which the body of each loop runs once.
        kernels: calls of kernels that were written by hand, as XLA cannot look into them.
        collectives: by kind and size.
        compile_s: seconds of compiling.
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

    @property
    def needs(self) -> int:
        """Bytes that the program takes besides its arguments."""
        return self.outputs - self.aliases + self.temporaries + self.code

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Program":
        """Read what ``asdict`` made of one."""
        return cls(**fields | {"collectives": tuple(Collective(**each) for each in fields["collectives"])})


@dataclass(frozen=True)
class Compilation:
    """The compiled programs by name; or, where they are too large for the machine, the compiler's words for that."""

    programs: dict[str, Program]
    too_large: str | None = None

    @property
    def memory(self) -> Memory | None:
        """The programs' bytes in the terms of the estimate; None where they are too large."""
        if self.too_large is not None:
            return None
        decode = self.programs["decode"]
        # What a step changes in place is the cache; of its other arguments all but a few kilobytes are weights.
        kv = decode.aliases
        weights = decode.arguments - kv
        temporaries = {name: program.needs for name, program in self.programs.items()}
        if growth := self.programs.get("growth"):  # which reads another cache than the one it makes
            temporaries["growth"] += growth.arguments - kv
        return Memory(weights, kv, temporaries)


def compile_steps(config: ModelConfig, workload: Workload, topology: Topology, placement: Placement) -> Compilation:
    """Compile the steps of ``steps.py`` for a machine that need not be there.

    Raises:
        PlanError: no compiler knows the machine, libtpu is not installed, or the compiler failed.
    """
    if topology.target is None:
        raise PlanError(
            f"--compile asks the compiler of TPUs, which does not know {topology.name}; without it, plans are estimates"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise PlanError("--compile needs libtpu (but no TPU): pip install 'jllm-runtime[tpu]'")
    job = {
        "config": config.to_json(),
        "workload": asdict(workload),
        "topology": topology.name,
        "mesh": dict(placement.mesh.shape),
        "rules": asdict(placement.rules),
    }
    ended = subprocess.run(
        [sys.executable, "-m", "jllm_runtime.planner.compile_worker"],
        input=json.dumps(job),
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        raise PlanError(f"the compiler failed for {topology.name}:\n{ended.stderr[-2000:]}")
    answer = json.loads(ended.stdout.splitlines()[-1])
    programs = {name: Program.from_json(fields) for name, fields in answer["programs"].items()}
    return Compilation(programs, answer["too_large"])
