"""Message format between processes: a name, JSON values and numpy arrays. Nothing in a message is ever executed.

On the wire a message is the length of its header, the header as JSON, and then the bytes of its arrays, which the
header lists by name, dtype and shape.
"""

import json
import math
import socket
import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jllm_runtime.errors import DistributedError

LENGTH = struct.Struct("!I")
"""Length of the header in bytes, at the beginning of a message."""

MAX_HEADER, MAX_ARRAYS = 2**20, 2**30
"""Most bytes of a header and of a message's arrays, so that garbage is not taken for the promise of a large message."""

DTYPES = ("|b1", "<i4", "<u4", "<f4")
"""The dtypes that programs are given; an array of any other one is a mistake."""


@dataclass(frozen=True)
class Message:
    """A message from one process to another.

    Attributes:
        name: what it is about.
        values: numpy arrays of DTYPES, and anything that JSON has.
    """

    name: str
    values: dict[str, Any] = field(default_factory=dict)


def pack(message: Message) -> bytes:
    """Encode a message. Of an array of zeros only the shape is sent: the masks of most steps are blank.

    Raises:
        DistributedError: an array whose dtype is not sent.
    """
    arrays = {key: value for key, value in message.values.items() if isinstance(value, np.ndarray)}
    plain = {key: value for key, value in message.values.items() if key not in arrays}
    # A list and not an object: the order of the arrays' bytes is the order of the list.
    listed, parts = [], []
    for key, array in arrays.items():
        if array.dtype.str not in DTYPES:
            raise DistributedError(f"{message.name}: {key} is of {array.dtype}, expected one of {', '.join(DTYPES)}")
        # A pass over the array, which is cheaper than to send it.
        is_blank = not array.any()
        listed.append((key, array.dtype.str, array.shape, is_blank))
        parts += [] if is_blank else [array.tobytes()]
    header = json.dumps({"name": message.name, "plain": plain, "arrays": listed}, separators=(",", ":")).encode()
    return b"".join([LENGTH.pack(len(header)), header, *parts])


def receive(connection: socket.socket) -> Message:
    """Wait for the next message on a connection. Only one thread at a time may do so.

    Raises:
        OSError: the other end is gone.
        DistributedError: what came is not a message.
    """
    (length,) = LENGTH.unpack(_read(connection, LENGTH.size))
    # The length is checked before memory is taken for it, and the header before memory is taken for the arrays.
    if length > MAX_HEADER:
        raise DistributedError(f"a message's header must have at most {MAX_HEADER} bytes, got {length}")
    name, values, listed = _parse(_read(connection, length))
    for key, dtype, shape, is_blank in listed:
        # The system gives zeroed memory, so a blank array costs nothing until it is read.
        array = np.zeros(shape, dtype)
        if not is_blank:
            _fill(connection, array.reshape(-1).view(np.uint8).data)
        values[key] = array
    return Message(name, values)


def _read(connection: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    _fill(connection, memoryview(data))
    return bytes(data)


def _fill(connection: socket.socket, buffer: memoryview) -> None:
    # Straight into the array's memory, however few bytes a call gives.
    while buffer:
        count = connection.recv_into(buffer)
        if not count:
            raise ConnectionError("the connection has ended")
        buffer = buffer[count:]


def _parse(header: bytes) -> tuple[str, dict[str, Any], list[tuple[str, str, list[int], bool]]]:
    """Check a header, field by field: whoever sends garbage gets an error here, and no array or name gets through."""
    try:
        fields = json.loads(header)
        name, values, listed = fields["name"], fields["plain"], fields["arrays"]
        total = 0
        for key, dtype, shape, is_blank in listed:
            known = isinstance(key, str) and dtype in DTYPES and isinstance(is_blank, bool)
            if not known or not all(isinstance(size, int) and size >= 0 for size in shape):
                raise ValueError(f"an array {key!r:.40} of type {dtype!r:.40} and shape {shape!r:.40}")
            # Python's integers do not overflow, so absurd shapes are counted right.
            total += math.prod(shape) * int(dtype[-1])
        if not isinstance(name, str) or not isinstance(values, dict) or total > MAX_ARRAYS:
            raise ValueError(f"{name!r:.40} with arrays of {total} bytes")
    except (ValueError, KeyError, TypeError) as error:
        raise DistributedError(f"what came from another process is no message: {error}") from error
    return name, values, listed
