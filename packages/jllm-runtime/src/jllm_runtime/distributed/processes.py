"""Several processes that run one model together, each with its own devices (``jax.distributed``).

Every process runs the same program, and holds its devices' part of every array. For ``generate`` each has the same
requests; for an ``Engine`` the first one has them and tells the others what to do (``engine/leader.py``). What is read
back is whole on every device, so each process sees every token; only the first one prints.
"""

import contextlib
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TextIO

import jax
import numpy as np

from jllm_runtime.distributed.peers import Companions, leave
from jllm_runtime.errors import DistributedError

JOIN_TIMEOUT_S = 60
"""How long a process waits for the others at the start."""

HEARTBEAT_TIMEOUT_S = 20
"""How long a process may be silent before the others give it up."""

SHUTDOWN_TIMEOUT_S = 10

GO = b"go"


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as a user names them.

    Attributes:
        coordinator: ``host:port`` of the first process.
        count: how many there are.
        index: which of them this is, from 0.
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
    """Whether the environment says that this is one of several processes: a Slurm step, or a host of a TPU slice."""
    if environ.get("SLURM_STEP_NUM_TASKS", "1").isdigit() and int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return True
    return "," in environ.get("TPU_WORKER_HOSTNAMES", "")


def join(processes: Processes | None) -> Companions:
    """Join the other processes; before anything else of JAX is used.

    Args:
        processes: None finds them as JAX does: on Cloud TPU, Slurm and Open MPI.

    Raises:
        DistributedError: they cannot be found, or do not come in time.
    """
    companions = Companions() if processes is None else _meet(processes)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator_address=None if processes is None else processes.coordinator,
            num_processes=None if processes is None else processes.count,
            process_id=None if processes is None else processes.index,
            initialization_timeout=JOIN_TIMEOUT_S,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
        )
    except (RuntimeError, ValueError) as error:
        where = "the processes of this run" if processes is None else f"the coordinator {processes.coordinator}"
        raise DistributedError(f"could not join {where}: {str(error).splitlines()[0]}") from error
    return companions


def _meet(processes: Processes) -> Companions:
    """Wait until every process is there, on the port that JAX takes next.

    JAX by itself ends a process with a crash dump when the others do not come; this can say who is missing.

    Raises:
        DistributedError: somebody has not come in time, or the address cannot be used.
    """
    host, _, port = processes.coordinator.rpartition(":")
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    own = f"process {processes.index} of {processes.count}"
    try:
        if processes.index == 0:
            return Companions(_wait_for_others(int(port), processes.count, deadline), own)
        return Companions({0: _call_first(host, int(port), processes.index, deadline)}, own)
    except OSError as error:
        raise DistributedError(
            f"{own} found no coordinator at {processes.coordinator} within {JOIN_TIMEOUT_S} s ({error}); "
            "start the process with id 0 there"
            if processes.index
            else f"cannot wait for the other processes on port {port}: {error}"
        ) from error


def _wait_for_others(port: int, count: int, deadline: float) -> dict[int, socket.socket]:
    others: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as on_failure, socket.create_server(("", port), backlog=count) as server:
        while missing := sorted(set(range(1, count)) - set(others)):
            try:
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                caller = on_failure.enter_context(server.accept()[0])
                caller.settimeout(max(deadline - time.monotonic(), 0.001))
                index = int(caller.recv(16) or b"0")
            except (TimeoutError, ValueError) as error:
                raise DistributedError(
                    f"process {missing[0]} of {count} has not come within {JOIN_TIMEOUT_S} s (missing: {missing}); "
                    "every process must be started, each with an id of its own"
                ) from error
            if index not in missing:
                raise DistributedError(f"two processes have the id {index}; each needs one of its own, from 0")
            others[index] = caller
        for caller in others.values():
            caller.sendall(GO)
        on_failure.pop_all()
    return others


def _call_first(host: str, port: int, index: int, deadline: float) -> socket.socket:
    while True:
        try:
            line = socket.create_connection((host, port), timeout=5)
            break
        except (ConnectionRefusedError, socket.gaierror):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    with contextlib.ExitStack() as on_failure:
        on_failure.enter_context(line)
        line.sendall(str(index).encode())
        line.settimeout(max(deadline - time.monotonic(), 0.001) + 1)
        if line.recv(len(GO)) != GO:
            raise ConnectionError("it has given up waiting for the other processes")
        on_failure.pop_all()
    return line


def is_alone() -> bool:
    """Whether this process has joined no others."""
    return not jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process is the one that prints."""
    return jax.process_index() == 0


def output_of_first() -> TextIO | None:
    """Where the first process prints its results; None in the others.

    The libraries that connect processes write notes to the standard output, among which nobody could find an answer:
    from here on it is the standard error, and the stream that this gives is the standard output as it was.
    """
    if jax.process_count() == 1:
        return sys.stdout
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(own, "w", encoding="utf-8") if is_first() else None


def draw_seed() -> int:
    """A random seed of 32 bits, the same in every process."""
    own = secrets.randbits(32)
    if jax.process_count() == 1:
        return own
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.uint32(own)))


def run_together(work: Callable[[], None], companions: Companions) -> None:
    """Do the work; when another process is lost meanwhile, say so and leave."""
    try:
        work()
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        leave(
            f"process {jax.process_index()} of {jax.process_count()} cannot go on, another one was lost or failed: "
            f"{str(error).splitlines()[0]}"
        )
    finally:
        companions.farewell()
