"""Peers: connections to the other processes of a run, and detection of their loss."""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from threading import Lock, Thread
from typing import NoReturn

from jllm_runtime.distributed.messages import Message, pack, receive
from jllm_runtime.errors import DistributedError

FAREWELL = "farewell"
"""Name of a process's last message."""

LOSS_GRACE_S = 1
"""Seconds that the callbacks of ``on_loss`` have for their work (failed requests reach their clients), before the
process ends."""


class Peers:
    """Connections to other processes: the first process has one to each of the others, and each of them one to it.

    A process notices at once when a peer is gone, because the connection ends without a farewell. JAX notices that as
    well, but only when the two next compute together, or after a time of silence, and then it ends with a crash dump.
    A lost peer cannot be replaced: its part of every array is gone, and a collective operation would wait for it for
    ever. So a loss ends this process.

    A thread for each connection reads messages into one queue. Any thread may send.

    Args:
        connections: a connected socket for each process, by its index.
        own: name of this process in messages: ``"process 0 of 2"``.
    """

    def __init__(self, connections: Mapping[int, socket.socket] | None = None, own: str = "") -> None:
        self._connections = dict(connections or {})
        self._own = own
        # A message is sent whole before the next one begins: the engine's thread and a caller that closes or embeds may
        # send at the same time.
        self._sending = {index: Lock() for index in self._connections}
        self._received: SimpleQueue[tuple[int, Message]] = SimpleQueue()
        self._on_loss: list[Callable[[str], None]] = []
        self._aborting = Lock()
        for connection in self._connections.values():
            connection.settimeout(None)
            if connection.family != getattr(socket, "AF_UNIX", None):
                # A step waits for its message; Nagle's algorithm would keep it back for a fuller packet.
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._readers = [Thread(target=self._read, args=item, daemon=True) for item in self._connections.items()]
        for reader in self._readers:
            reader.start()

    @property
    def indexes(self) -> frozenset[int]:
        """Indexes of the connected processes."""
        return frozenset(self._connections)

    def send(self, message: Message) -> None:
        """Send a message to every peer. Ends the process where one cannot be reached.

        Raises:
            DistributedError: an array whose dtype is not sent.
        """
        data = pack(message)
        for index, connection in self._connections.items():
            try:
                with self._sending[index]:
                    connection.sendall(data)
            except OSError:
                self._lost(index)

    def receive(self) -> tuple[int, Message]:
        """Wait for the next message of any peer, and return it with the peer's index. The last one is a FAREWELL."""
        return self._received.get()

    def on_loss(self, callback: Callable[[str], None]) -> None:
        """Register a function to be called with the reason, on any thread, before a loss ends this process."""
        self._on_loss.append(callback)

    def abort(self, reason: str) -> None:
        """End this process, and with it the run: the peers notice that their connections have ended."""
        # Several readers may notice a loss at once; the first one says why. The lock is not released before the end.
        with self._aborting:
            reason = f"{self._own} cannot go on, {reason}"
            try:
                for callback in self._on_loss:
                    callback(reason)
                if self._on_loss:
                    time.sleep(LOSS_GRACE_S)
            finally:
                exit_now(reason)

    def farewell(self) -> None:
        """Tell the peers that this process ends in order: it is done, or all of them fail for the same reason."""
        data = pack(Message(FAREWELL))
        for index, connection in self._connections.items():
            with contextlib.suppress(OSError), self._sending[index]:  # the peer may have ended before
                connection.sendall(data)

    def _read(self, index: int, connection: socket.socket) -> None:
        message = None
        while message is None or message.name != FAREWELL:
            try:
                message = receive(connection)
            except (OSError, DistributedError):
                # Behind garbage nothing can be read, so a peer that sends it is as good as lost.
                self._lost(index)
                return
            self._received.put((index, message))

    def _lost(self, index: int) -> None:
        self.abort(f"process {index} was lost or failed")


def exit_now(reason: str) -> NoReturn:
    """Print the reason and end the process at once, with exit code 1.

    ``sys.exit`` would run JAX's own shutdown, which waits for the lost process.
    """
    print(f"Error: {reason}", file=sys.stderr, flush=True)
    os._exit(1)
