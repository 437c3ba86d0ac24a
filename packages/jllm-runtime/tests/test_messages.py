"""Messages between processes: each arrives as it was sent, and anything else is refused."""

import socket
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from jllm_runtime.distributed.messages import LENGTH, MAX_HEADER, Message, pack, receive
from jllm_runtime.errors import DistributedError


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection."""
    one, other = socket.socketpair()
    yield one, other
    one.close()
    other.close()


@pytest.mark.parametrize("dtype", [np.bool_, np.int32, np.uint32, np.float32])
def test_arrays_arrive_as_they_were(ends: Any, dtype: Any) -> None:
    one, other = ends
    values = {"full": np.arange(12).reshape(3, 4).astype(dtype), "blank": np.zeros((2, 0, 5), dtype), "n": 3, "s": "ä"}
    other.sendall(pack(Message("decode", values)))
    message = receive(one)
    assert (message.name, message.values.keys()) == ("decode", values.keys())
    for name, value in values.items():
        np.testing.assert_array_equal(message.values[name], value)
    assert message.values["full"].dtype == dtype


def test_messages_keep_their_order_in_pieces_of_any_size(ends: Any) -> None:
    one, other = ends
    data = b"".join(pack(Message(str(number), {"x": np.full(5, number, np.int32)})) for number in range(3))
    for byte in data:
        other.sendall(bytes([byte]))
    for number in range(3):
        message = receive(one)
        assert message.name == str(number)
        np.testing.assert_array_equal(message.values["x"], number)


def test_zeros_are_not_sent() -> None:
    assert len(pack(Message("x", {"zeros": np.zeros((1000, 1000), np.float32)}))) < 200


def test_an_array_of_another_type_is_a_mistake() -> None:
    with pytest.raises(DistributedError, match="x is of float64, expected one of"):
        pack(Message("decode", {"x": np.zeros(2)}))


@pytest.mark.parametrize(
    "header",
    [
        b"no json",
        b"[]",
        b'{"name": 3, "plain": {}, "arrays": []}',
        b'{"name": "x", "plain": {}, "arrays": [["a", "|O", [1], false]]}',
        b'{"name": "x", "plain": {}, "arrays": [["a", "<f4", [-1], false]]}',
        b'{"name": "x", "plain": {}, "arrays": [["a", "<f4", [1000000, 1000000], true]]}',
    ],
)
def test_what_is_no_message_is_refused(ends: Any, header: bytes) -> None:
    one, other = ends
    other.sendall(LENGTH.pack(len(header)) + header)
    with pytest.raises(DistributedError, match="no message"):
        receive(one)


def test_a_header_without_bounds_is_refused_before_it_is_read(ends: Any) -> None:
    one, other = ends
    other.sendall(struct.pack("!I", MAX_HEADER + 1))
    with pytest.raises(DistributedError, match=f"at most {MAX_HEADER} bytes"):
        receive(one)


def test_an_end_within_a_message_is_an_error(ends: Any) -> None:
    one, other = ends
    other.sendall(pack(Message("x", {"a": np.ones(9, np.float32)}))[:-1])
    other.close()
    with pytest.raises(OSError, match="ended"):
        receive(one)
