"""Frames between server and core: 4 bytes of length, big-endian, then MessagePack."""

import socket
import struct
from typing import Final

HEADER: Final = struct.Struct(">I")
MAX_FRAME_BYTES: Final = 256 * 2**20


def pack_frame(payload: bytes) -> bytes:
    """`payload` with its length before it."""
    return HEADER.pack(len(payload)) + payload


def read_frame(connection: socket.socket) -> bytes | None:
    """The next payload from a blocking socket, or None at its end."""
    header = _read_exactly(connection, HEADER.size)
    if header is None:
        return None
    (size,) = HEADER.unpack(header)
    return _read_exactly(connection, size)


def _read_exactly(connection: socket.socket, size: int) -> bytes | None:
    buffer = bytearray(size)
    view = memoryview(buffer)
    while view.nbytes:
        try:
            count = connection.recv_into(view)
        except ConnectionResetError:
            return None
        if count == 0:
            return None
        view = view[count:]
    return bytes(buffer)
