"""Multi-process runs (``jax.distributed``): several processes run one model together, each with its own devices.

Every process runs the same program, and holds its devices' part of every array. For ``generate`` each has the same
requests; for an ``Engine`` the first one has them and sends orders to the others (``engine/protocol.py``). What is read
back is whole on every device, so each process sees every token; only the first one prints.
"""

import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TextIO

import jax

from jllm_runtime.distributed.peers import Peers, exit_now
from jllm_runtime.distributed.rendezvous import meet
from jllm_runtime.errors import DistributedError

JOIN_TIMEOUT_S = 60
"""Seconds that a process waits for the others at the start."""

HEARTBEAT_TIMEOUT_S = 20
"""Seconds without a sign of life after which JAX takes a process for lost. Its own default is 100."""

SHUTDOWN_TIMEOUT_S = 10
"""Seconds that JAX waits for the others at the end. Its own default is 300, for which a user would see nothing."""

SLURM_NUMBERS = ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
"""Variables of a Slurm step that JAX reads as numbers. It reads SLURM_STEP_NODELIST, too."""


@dataclass(frozen=True)
class Processes:
    """Processes of a run, as a user names them.

    Attributes:
        coordinator: ``host:port`` of the first process.
        count: number of processes.
        index: this process, from 0.

    Raises:
        DistributedError: a value that is impossible.
    """

    coordinator: str
    count: int
    index: int

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise DistributedError(f"the coordinator is HOST:PORT, such as 10.0.0.1:1234, got {self.coordinator!r}")
        if self.count < 1:
            raise DistributedError(f"the number of processes must be at least 1, got {self.count}")
        if not 0 <= self.index < self.count:
            raise DistributedError(
                f"the process id must be from 0 to {self.count - 1} for {self.count} processes, got {self.index}"
            )


def is_cluster(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment variables say that this is one of several processes: a Slurm step, or a TPU slice."""
    # On a TPU of one host the list has one name.
    return _slurm_tasks(environ) > 1 or "," in environ.get("TPU_WORKER_HOSTNAMES", "")


def _slurm_tasks(environ: Mapping[str, str]) -> int:
    """Tasks of the Slurm step; 1 outside of Slurm."""
    # Of the step and not of the job: a script that starts one process in a job of many tasks is alone.
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "")
    return int(tasks) if tasks.isdecimal() else 1


def join(processes: Processes | None) -> Peers:
    """Join the other processes. Call it before anything else of JAX.

    Args:
        processes: None finds them as JAX does: on Cloud TPU, Slurm and Open MPI.

    Returns:
        Connections to the others; without any where JAX has found the processes, until an Engine makes some.

    Raises:
        DistributedError: they cannot be found, or do not come in time.
    """
    if processes is None:
        _check_slurm(os.environ)
        peers = Peers()
    else:
        peers = meet(processes.coordinator, count=processes.count, index=processes.index, timeout_s=JOIN_TIMEOUT_S)
    # Collective operations between CPU processes need it; other platforms ignore it.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator_address=None if processes is None else processes.coordinator,
            num_processes=None if processes is None else processes.count,
            process_id=None if processes is None else processes.index,
            initialization_timeout=JOIN_TIMEOUT_S,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            **_shutdown_timeout(),
        )
    except (RuntimeError, ValueError, LookupError) as error:
        where = "the processes of this run" if processes is None else f"the coordinator {processes.coordinator}"
        # JAX looks for an address, and does not say that nothing in the environment has one.
        if "coordinator_address should be defined" in str(error):
            reason = "the environment names none; name them with --coordinator, --num-processes and --process-id"
        else:
            missing = isinstance(error, KeyError)
            reason = f"{error.args[0]} is not set" if missing else str(error).splitlines()[0]
        raise DistributedError(f"could not join {where}: {reason}") from error
    return peers


def _shutdown_timeout() -> dict[str, Any]:
    # The oldest JAX that this package runs with has no such option.
    known = inspect.signature(jax.distributed.initialize).parameters
    return {"shutdown_timeout_seconds": SHUTDOWN_TIMEOUT_S} if "shutdown_timeout_seconds" in known else {}


def _check_slurm(environ: Mapping[str, str]) -> None:
    """Refuse variables of a Slurm step that are not whole, which JAX would pass over or not understand.

    Raises:
        DistributedError: some are missing, or no numbers.
    """
    if (tasks := _slurm_tasks(environ)) == 1:
        return
    wrong = [name for name in SLURM_NUMBERS if not environ.get(name, "").isdecimal()]
    wrong += [] if environ.get("SLURM_STEP_NODELIST") else ["SLURM_STEP_NODELIST"]
    if wrong:
        got = ", ".join(f"{name} is {repr(environ[name]) if name in environ else 'not set'}" for name in wrong)
        raise DistributedError(
            f"the environment is only in part that of a Slurm step of {tasks} tasks: {got}; start the command with "
            "srun, or unset SLURM_STEP_NUM_TASKS to run alone"
        )


def is_alone() -> bool:
    """Whether this process has joined no others."""
    return not jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process is the one that prints."""
    return jax.process_index() == 0


def output_of_first() -> TextIO | None:
    """Stream for the results of the first process; None in the others.

    The libraries that connect processes write notes to file descriptor 1, in the middle of an answer. From here on that
    is the standard error, and the returned stream is the standard output as it was.
    """
    if jax.process_count() == 1:
        return sys.stdout
    # The libraries write to the file descriptor from C++, so to replace `sys.stdout` alone would not be enough.
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(own, "w", encoding="utf-8") if is_first() else None


def run_together(work: Callable[[], None], peers: Peers) -> None:
    """Do the work, and end the process with a message where another one is lost meanwhile.

    Args:
        work: may compute with the other processes.
        peers: get a farewell at the end, also where the work raises: all of them fail for the same reason then.
    """
    try:
        work()
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        # A collective operation may fail before a connection is seen to end.
        exit_now(
            f"process {jax.process_index()} of {jax.process_count()} cannot go on, another one was lost or failed: "
            f"{str(error).splitlines()[0]}"
        )
    finally:
        peers.farewell()
