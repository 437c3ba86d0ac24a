"""Messages between the processes of a run: a name, numbers, texts and arrays. Nothing in them is ever executed."""

import contextlib
import json
import math
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jllm_runtime.errors import DistributedError

LENGTH = struct.Struct("!I")
"""What a message begins with: the bytes of its header, which is JSON and says which arrays follow."""

MAX_HEADER, MAX_ARRAYS = 2**20, 2**30
"""Most bytes of a message, so that noise on a line is not taken for the promise of a large one."""

DTYPES = ("|b1", "<i4", "<u4", "<f4")
"""What steps are given; an array of any other type is a mistake."""


@dataclass(frozen=True)
class Message:
    """What one process tells another.

    Attributes:
        name: what it is about.
        values: numpy arrays of DTYPES, and anything that JSON has.
    """

    name: str
    values: dict[str, Any] = field(default_factory=dict)


class Line:
    """One end of a connection on which messages go both ways. One thread receives, any may send."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        if connection.family != getattr(socket, "AF_UNIX", None):
            # A step waits for its message; it must not wait for a fuller packet.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._sending = threading.Lock()

    def send(self, message: Message) -> None:
        """Send a message.

        Raises:
            OSError: the other end is gone.
            DistributedError: an array of a type that is not sent.
        """
        data = packed(message)
        with self._sending:
            self._connection.sendall(data)

    def receive(self) -> Message:
        """Wait for the next message.

        Raises:
            OSError: the other end is gone.
            DistributedError: what came is no message.
        """
        (length,) = LENGTH.unpack(self._exactly(LENGTH.size))
        if length > MAX_HEADER:
            raise DistributedError(f"a message's header must have at most {MAX_HEADER} bytes, got {length}")
        name, values, listed = _parsed(self._exactly(length))
        for key, dtype, shape, is_blank in listed:
            array = np.zeros(shape, dtype)
            if not is_blank:
                self._fill(array.reshape(-1).view(np.uint8).data)
            values[key] = array
        return Message(name, values)

    def hang_up(self) -> None:
        """End the connection, for both sides and at once."""
        with contextlib.suppress(OSError):  # it has ended already
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _exactly(self, count: int) -> bytes:
        data = bytearray(count)
        self._fill(memoryview(data))
        return bytes(data)

    def _fill(self, place: memoryview) -> None:
        while place:
            count = self._connection.recv_into(place)
            if not count:
                raise ConnectionError("the connection has ended")
            place = place[count:]


def packed(message: Message) -> bytes:
    """The bytes of a message. Of arrays without any value but zero only the shape is sent.

    Raises:
        DistributedError: an array of a type that is not sent.
    """
    arrays = {key: value for key, value in message.values.items() if isinstance(value, np.ndarray)}
    plain = {key: value for key, value in message.values.items() if key not in arrays}
    listed, parts = [], []
    for key, array in arrays.items():
        if array.dtype.str not in DTYPES:
            raise DistributedError(f"{message.name}: {key} is of {array.dtype}, expected one of {', '.join(DTYPES)}")
        is_blank = not array.any()
        listed.append((key, array.dtype.str, array.shape, is_blank))
        parts += [] if is_blank else [array.tobytes()]
    header = json.dumps({"name": message.name, "plain": plain, "arrays": listed}, separators=(",", ":")).encode()
    return b"".join([LENGTH.pack(len(header)), header, *parts])


def _parsed(header: bytes) -> tuple[str, dict[str, Any], list[tuple[str, str, list[int], bool]]]:
    try:
        told = json.loads(header)
        name, values, listed = told["name"], told["plain"], told["arrays"]
        total = 0
        for key, dtype, shape, is_blank in listed:
            known = isinstance(key, str) and dtype in DTYPES and isinstance(is_blank, bool)
            if not known or not all(isinstance(size, int) and size >= 0 for size in shape):
                raise ValueError(f"an array {key!r:.40} of type {dtype!r:.40} and shape {shape!r:.40}")
            total += math.prod(shape) * int(dtype[-1])
        if not isinstance(name, str) or not isinstance(values, dict) or total > MAX_ARRAYS:
            raise ValueError(f"{name!r:.40} with arrays of {total} bytes")
    except (ValueError, KeyError, TypeError) as error:
        raise DistributedError(f"what came from another process is no message: {error}") from error
    return name, values, listed
