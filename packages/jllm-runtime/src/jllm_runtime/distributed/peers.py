"""The other processes of a run, as each of them sees them: lines on which it tells and hears, also that one is gone."""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from threading import Lock, Thread
from typing import NoReturn

from jllm_runtime.distributed.messages import Line, Message
from jllm_runtime.errors import DistributedError

FAREWELL = "farewell"
"""The name of a process's last message."""

LAST_WORDS_S = 1
"""Seconds that those have who were told of a loss, before the process ends."""


class Companions:
    """Lines to the other processes. The first process has one to each of the others, and they to it.

    Each hears at once when another is gone. JAX notices that, too, but only when the two next compute together, or
    after a time of silence, and then ends with a crash dump.

    Args:
        lines: a connection to each process that this one talks with.
        own: what this process is called: ``"process 0 of 2"``.
    """

    def __init__(self, lines: Mapping[int, socket.socket] | None = None, own: str = "") -> None:
        self._lines = {index: Line(connection) for index, connection in (lines or {}).items()}
        self._own = own
        self._heard: SimpleQueue[tuple[int, Message]] = SimpleQueue()
        self._at_loss: list[Callable[[str], None]] = []
        self._losing = Lock()
        self._listeners = [Thread(target=self._listen, args=line, daemon=True) for line in self._lines.items()]
        for listener in self._listeners:
            listener.start()

    @property
    def indexes(self) -> frozenset[int]:
        """The processes that there is a line to."""
        return frozenset(self._lines)

    def tell(self, message: Message) -> None:
        """Send a message to each of them. Ends the process where one cannot be reached.

        Raises:
            DistributedError: an array of a type that is not sent.
        """
        for index, line in self._lines.items():
            try:
                line.send(message)
            except OSError:
                self._lost(index)

    def hear(self) -> tuple[int, Message]:
        """Wait for the next message, and whose it is. That one is done comes as a message named FAREWELL."""
        return self._heard.get()

    def at_loss(self, tell: Callable[[str], None]) -> None:
        """Have a function called with the reason, before the process ends because another is gone; on any thread."""
        self._at_loss.append(tell)

    def give_up(self, reason: str) -> None:
        """End this process, and with it the run: the others hear that the line has ended."""
        with self._losing:
            reason = f"{self._own} cannot go on, {reason}"
            try:
                for tell in self._at_loss:
                    tell(reason)
                if self._at_loss:
                    time.sleep(LAST_WORDS_S)
            finally:
                leave(reason)

    def farewell(self) -> None:
        """Say that this process ends because it is done, or because all of them will for the same reason."""
        for line in self._lines.values():
            with contextlib.suppress(OSError):  # it has ended before
                line.send(Message(FAREWELL))

    def _listen(self, index: int, line: Line) -> None:
        message = None
        while message is None or message.name != FAREWELL:
            try:
                message = line.receive()
            except (OSError, DistributedError):
                self._lost(index)
                return
            self._heard.put((index, message))

    def _lost(self, index: int) -> None:
        self.give_up(f"process {index} was lost or failed")


def leave(reason: str) -> NoReturn:
    """End the process at once. The usual way out would wait for the lost one to say goodbye."""
    print(f"Error: {reason}", file=sys.stderr, flush=True)
    os._exit(1)
