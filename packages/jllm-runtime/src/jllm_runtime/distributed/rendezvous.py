"""Rendezvous: connections between the processes of a run, before or after JAX has connected them.

``meet`` comes before, where a user has named the processes: it takes the coordinator's port, which JAX takes next.
``connect`` comes after, where JAX has found the processes by itself: the first one listens on a free port, and tells
the others where by a broadcast of JAX, with a secret that keeps everybody else out.
"""

import contextlib
import hmac
import json
import secrets
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import jax
import numpy as np

from jllm_runtime.distributed.peers import Peers
from jllm_runtime.errors import DistributedError

BROADCAST_BYTES = 1024
"""Bytes of a Rendezvous in a broadcast, which must have one shape in every process."""

CONNECT_TIMEOUT_S = 60
"""Seconds that ``connect`` waits for all processes."""

CALL_TIMEOUT_S = 5
"""Seconds that one connection attempt may take, and that a caller may be silent."""

RETRY_S = 0.2
"""Seconds between two attempts to reach a first process that has not started yet."""

CHALLENGE_BYTES = 16

RESPONSE = struct.Struct("!I32s")
"""Response to a challenge: the process index, and an HMAC-SHA256 of challenge and index."""

GO = b"go"
"""Sent by the first process when all have come. Without it a process would go on alone after the others gave up."""

Broadcast = Callable[[np.ndarray], np.ndarray]


def meet(coordinator: str, *, count: int, index: int, timeout_s: float) -> Peers:
    """Wait at the coordinator's address until every process is there.

    JAX by itself ends a process with a crash dump when the others do not come; this can say who is missing.

    Args:
        coordinator: ``host:port`` of the first process.
        count: number of processes.
        index: this process, from 0.
        timeout_s: seconds to wait.

    Raises:
        DistributedError: a process has not come in time, or the address cannot be used.
    """
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + timeout_s
    own = f"process {index} of {count}"
    try:
        if index == 0:
            return Peers(_accept_named(int(port), count=count, deadline=deadline, timeout_s=timeout_s), own)
        return Peers({0: _call_named(host, int(port), index=index, deadline=deadline)}, own)
    except OSError as error:
        raise DistributedError(
            f"{own} found no coordinator at {coordinator} within {timeout_s} s ({error}); "
            "start the process with id 0 there"
            if index
            else f"cannot wait for the other processes on port {port}: {error}"
        ) from error


def _accept_named(port: int, *, count: int, deadline: float, timeout_s: float) -> dict[int, socket.socket]:
    connections: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as on_failure, socket.create_server(("", port), backlog=count) as server:
        while missing := sorted(set(range(1, count)) - set(connections)):
            try:
                server.settimeout(_left(deadline))
                caller = on_failure.enter_context(server.accept()[0])
                caller.settimeout(_left(deadline))
                # Index 0 is this process, so a caller that sends nothing is refused like one whose id is taken.
                index = int(caller.recv(16) or b"0")
            except (TimeoutError, ValueError) as error:
                raise DistributedError(
                    f"process {missing[0]} of {count} has not come within {timeout_s} s (missing: {missing}); "
                    "every process must be started, each with an id of its own"
                ) from error
            if index not in missing:
                raise DistributedError(f"two processes have the id {index}; each needs one of its own, from 0")
            connections[index] = caller
        for caller in connections.values():
            caller.sendall(GO)
        on_failure.pop_all()  # they stay open
    return connections


def _call_named(host: str, port: int, *, index: int, deadline: float) -> socket.socket:
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=CALL_TIMEOUT_S)
            break
        except (ConnectionRefusedError, socket.gaierror):  # the first process, or its name, is not there yet
            if time.monotonic() > deadline:
                raise
            time.sleep(RETRY_S)
    with contextlib.ExitStack() as on_failure:
        on_failure.enter_context(connection)
        connection.sendall(str(index).encode())
        # A second longer than the first process waits, so that it is the one to give up, and says who is missing.
        connection.settimeout(_left(deadline) + 1)
        if connection.recv(len(GO)) != GO:
            raise ConnectionError("it has given up waiting for the other processes")
        on_failure.pop_all()
    return connection


@dataclass(frozen=True)
class Rendezvous:
    """Address where the first process listens, and the secret of the run.

    Attributes:
        hosts: its addresses and names, the most promising first.
        port: the port.
        secret: key of the HMAC, in hexadecimal digits.
    """

    hosts: list[str]
    port: int
    secret: str

    def to_array(self) -> np.ndarray:
        """Encode it as uint8 ``[BROADCAST_BYTES]``."""
        data = json.dumps(asdict(self)).encode()
        array = np.zeros(BROADCAST_BYTES, np.uint8)
        array[: len(data)] = np.frombuffer(data, np.uint8)
        return array

    @classmethod
    def from_array(cls, array: np.ndarray) -> "Rendezvous":
        """Decode what ``to_array`` has made."""
        # A broadcast of JAX may give a wider dtype back.
        return cls(**json.loads(array.astype(np.uint8).tobytes().rstrip(b"\0")))

    def respond(self, challenge: bytes, index: int) -> bytes:
        """Return the response of process ``index`` to a challenge. The secret itself never goes over a connection."""
        return RESPONSE.pack(index, hmac.digest(bytes.fromhex(self.secret), challenge + str(index).encode(), "sha256"))


def connect() -> Peers:
    """Connect the processes of ``jax.distributed``. All of them must call it.

    Raises:
        DistributedError: a process has not come in time.
    """
    return connect_by(_broadcast, index=jax.process_index(), count=jax.process_count())


def connect_by(broadcast: Broadcast, *, index: int, count: int) -> Peers:
    """Connect as process ``index`` of ``count``.

    Args:
        broadcast: gives every process the array of the first one.
        index: this process.
        count: number of processes.

    Raises:
        DistributedError: as ``connect``.
    """
    own = f"process {index} of {count}"
    if index:
        rendezvous = Rendezvous.from_array(broadcast(np.zeros(BROADCAST_BYTES, np.uint8)))
        return Peers({0: _call(rendezvous, index, own)}, own)
    # It listens before the broadcast, so that nobody calls too early.
    with socket.create_server(("", 0), backlog=count) as server:
        rendezvous = Rendezvous(_own_hosts(), server.getsockname()[1], secrets.token_hex(32))
        broadcast(rendezvous.to_array())
        return Peers(_accept(server, rendezvous, count), own)


def _broadcast(array: np.ndarray) -> np.ndarray:
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def _own_hosts() -> list[str]:
    """Addresses and names that others may reach this machine by."""
    hosts = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # A documentation address (RFC 5737). To connect a UDP socket sends nothing, but chooses the address that this
        # machine has towards others.
        probe.connect(("192.0.2.1", 9))
        hosts.append(probe.getsockname()[0])
    return [*hosts, socket.gethostname(), "127.0.0.1"]


def _accept(server: socket.socket, rendezvous: Rendezvous, count: int) -> dict[int, socket.socket]:
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    connections: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as on_failure:
        while missing := sorted(set(range(1, count)) - set(connections)):
            server.settimeout(_left(deadline))
            try:
                caller = on_failure.enter_context(server.accept()[0])
            except TimeoutError as error:
                raise DistributedError(
                    f"process {missing[0]} of {count} has not called {' or '.join(rendezvous.hosts)} at port "
                    f"{rendezvous.port} within {CONNECT_TIMEOUT_S} s (missing: {missing}); every process must follow, "
                    "and reach the first one there"
                ) from error
            index = _authenticate(caller, rendezvous)
            # The port is open to anybody who reaches this machine: a stranger must neither get in nor end the run.
            if index in missing:
                connections[index] = caller
            else:
                caller.close()
        for caller in connections.values():
            caller.sendall(GO)
        on_failure.pop_all()
    return connections


def _authenticate(caller: socket.socket, rendezvous: Rendezvous) -> int | None:
    """Return the index of the process that calls; None where it is not of this run."""
    # A new challenge for each caller: a response that somebody has overheard is of no use.
    challenge = secrets.token_bytes(CHALLENGE_BYTES)
    caller.settimeout(CALL_TIMEOUT_S)
    try:
        caller.sendall(challenge)
        response = _read(caller, RESPONSE.size)
    except OSError:
        return None
    # In constant time, so that the digest cannot be found byte by byte.
    index: int = RESPONSE.unpack(response)[0]
    return index if hmac.compare_digest(response, rendezvous.respond(challenge, index)) else None


def _call(rendezvous: Rendezvous, index: int, own: str) -> socket.socket:
    # The addresses are tried in turn: which of them leads to the first process depends on the networks between.
    reasons = []
    for host in rendezvous.hosts:
        with contextlib.ExitStack() as on_failure:
            try:
                connection = on_failure.enter_context(
                    socket.create_connection((host, rendezvous.port), timeout=CALL_TIMEOUT_S)
                )
                connection.sendall(rendezvous.respond(_read(connection, CHALLENGE_BYTES), index))
                connection.settimeout(CONNECT_TIMEOUT_S)
                if _read(connection, len(GO)) != GO:
                    raise ConnectionError("somebody else answers there")
            except OSError as error:
                reasons.append(f"{host}: {error}")
                continue
            on_failure.pop_all()
            return connection
    raise DistributedError(f"{own} cannot reach the first one at port {rendezvous.port} ({'; '.join(reasons)})")


def _left(deadline: float) -> float:
    """Seconds until the deadline. Never 0, which would make a socket non-blocking."""
    return max(deadline - time.monotonic(), 0.001)


def _read(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise ConnectionError("the connection has ended")
        data += more
    return data
