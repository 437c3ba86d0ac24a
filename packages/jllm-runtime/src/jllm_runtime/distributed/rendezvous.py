"""Lines between processes that JAX has connected already, by whatever it found them with.

The first process listens on a port that is free, and tells the others where by a broadcast of JAX, with a secret that
they answer with. What calls without it is not let in.
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

from jllm_runtime.distributed.peers import Companions
from jllm_runtime.errors import DistributedError

SIZE = 1024
"""Bytes of an invitation on its way: a broadcast has one shape in every process."""

CONNECT_TIMEOUT_S = 60
"""How long the first process waits for the others to call."""

CALL_TIMEOUT_S = 5
"""How long a caller may be silent."""

CHALLENGE, ANSWER, GO = 16, struct.Struct("!I32s"), b"go"

Broadcast = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Invitation:
    """Where the first process listens.

    Attributes:
        hosts: its addresses and names, the most promising first.
        port: the port.
        secret: what a caller must know, in hexadecimal digits.
    """

    hosts: list[str]
    port: int
    secret: str

    def to_array(self) -> np.ndarray:
        """uint8 ``[SIZE]``."""
        data = json.dumps(asdict(self)).encode()
        array = np.zeros(SIZE, np.uint8)
        array[: len(data)] = np.frombuffer(data, np.uint8)
        return array

    @classmethod
    def from_array(cls, array: np.ndarray) -> "Invitation":
        """The inverse."""
        return cls(**json.loads(array.astype(np.uint8).tobytes().rstrip(b"\0")))

    def answer(self, challenge: bytes, index: int) -> bytes:
        """What a process of the run says to a challenge."""
        return ANSWER.pack(index, hmac.digest(bytes.fromhex(self.secret), challenge + str(index).encode(), "sha256"))


def connect() -> Companions:
    """Lines to the other processes of ``jax.distributed``. All of them must call it.

    Raises:
        DistributedError: somebody has not come in time.
    """
    return connected(jax.process_index(), jax.process_count(), _broadcast)


def connected(index: int, count: int, broadcast: Broadcast) -> Companions:
    """``connect``, as process ``index`` of ``count``, with what gives every process the first one's array."""
    own = f"process {index} of {count}"
    if index:
        invitation = Invitation.from_array(broadcast(np.zeros(SIZE, np.uint8)))
        return Companions({0: _call(invitation, index, own)}, own)
    with socket.create_server(("", 0), backlog=count) as server:
        invitation = Invitation(_own_hosts(), server.getsockname()[1], secrets.token_hex(32))
        broadcast(invitation.to_array())
        return Companions(_admit(server, invitation, count), own)


def _broadcast(array: np.ndarray) -> np.ndarray:
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def _own_hosts() -> list[str]:
    """What others may call this machine."""
    hosts = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing, but chooses the address that this machine has towards others
        hosts.append(probe.getsockname()[0])
    return [*hosts, socket.gethostname(), "127.0.0.1"]


def _admit(server: socket.socket, invitation: Invitation, count: int) -> dict[int, socket.socket]:
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    others: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as on_failure:
        while missing := sorted(set(range(1, count)) - set(others)):
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                caller = on_failure.enter_context(server.accept()[0])
            except TimeoutError as error:
                raise DistributedError(
                    f"process {missing[0]} of {count} has not called {' or '.join(invitation.hosts)} at port "
                    f"{invitation.port} within {CONNECT_TIMEOUT_S} s (missing: {missing}); every process must follow, "
                    "and reach the first one there"
                ) from error
            index = _index_of(caller, invitation)
            if index in missing:
                others[index] = caller
            else:
                caller.close()
        for caller in others.values():
            caller.sendall(GO)
        on_failure.pop_all()
    return others


def _index_of(caller: socket.socket, invitation: Invitation) -> int | None:
    """Which process calls; None where it is none of the run's."""
    challenge = secrets.token_bytes(CHALLENGE)
    caller.settimeout(CALL_TIMEOUT_S)
    try:
        caller.sendall(challenge)
        answer = _exactly(caller, ANSWER.size)
    except OSError:
        return None
    index: int = ANSWER.unpack(answer)[0]
    return index if hmac.compare_digest(answer, invitation.answer(challenge, index)) else None


def _call(invitation: Invitation, index: int, own: str) -> socket.socket:
    reasons = []
    for host in invitation.hosts:
        with contextlib.ExitStack() as on_failure:
            try:
                line = on_failure.enter_context(
                    socket.create_connection((host, invitation.port), timeout=CALL_TIMEOUT_S)
                )
                line.sendall(invitation.answer(_exactly(line, CHALLENGE), index))
                line.settimeout(CONNECT_TIMEOUT_S)
                if _exactly(line, len(GO)) != GO:
                    raise ConnectionError("somebody else answers there")
            except OSError as error:
                reasons.append(f"{host}: {error}")
                continue
            on_failure.pop_all()
            return line
    raise DistributedError(f"{own} cannot reach the first one at port {invitation.port} ({'; '.join(reasons)})")


def _exactly(line: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = line.recv(count - len(data))
        if not more:
            raise ConnectionError("the connection has ended")
        data += more
    return data
