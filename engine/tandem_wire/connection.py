"""A connection that carries messages: 4 bytes of big-endian length, then MessagePack.

`Connection` is an asyncio Protocol and parses in `data_received`: one callback per read of the
socket, whatever the number of frames in it, and no task switch per frame. `send` only appends to a
buffer; one write per loop turn takes all of it to the socket.

On a checked connection every frame ends with the CRC-32 of its message. It is for messages in which
a changed bit would be believed: the tokens of a prompt, the first token of an answer.
"""

import asyncio
import socket
import struct
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, Generic, TypeVar, cast

import msgspec

from tandem_wire.errors import (
    ConnectionLost,
    FrameTooLarge,
    MalformedFrame,
    SlowPeer,
    WireError,
)

T = TypeVar("T")

MAX_FRAME_BYTES: Final = 64 << 20
MAX_PENDING_BYTES: Final = 256 << 20
MAX_QUEUED_MESSAGES: Final = 4096
HIGH_WATER_BYTES: Final = 1 << 20

_LENGTH = struct.Struct(">I")
_CHECK_BYTES: Final = 4
_ENCODER = msgspec.msgpack.Encoder()


def pack_checked(message: msgspec.Struct) -> bytes:
    """One frame of a checked connection, for a sender that has only the socket."""
    payload = _ENCODER.encode(message)
    check = zlib.crc32(payload)
    return b"".join((_LENGTH.pack(len(payload) + _CHECK_BYTES), payload, _LENGTH.pack(check)))


class Connection(asyncio.Protocol, Generic[T]):
    """One framed connection; `T` is the type of the messages that arrive.

    Reading: `async for message in connection` ends when the peer closed cleanly and raises
    `WireError` otherwise; `receive()` returns one message; `receive_many()` returns all that are
    there. One reader at a time. When no one reads, the socket is paused after
    `MAX_QUEUED_MESSAGES`, so that the peer has to wait.

    Writing: `send` never waits; producers that can outrun the peer await `drain()`. A peer that
    leaves `max_pending_bytes` unread is cut off (`SlowPeer`).
    """

    def __init__(
        self,
        decoder: "msgspec.msgpack.Decoder[T]",
        *,
        on_open: "Callable[[Connection[T]], None] | None" = None,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        max_pending_bytes: int = MAX_PENDING_BYTES,
        checked: bool = False,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._decoder = decoder
        self._checked = checked
        self._on_open = on_open
        self._max_frame_bytes = max_frame_bytes
        self._max_pending_bytes = max_pending_bytes
        self._transport: asyncio.Transport | None = None
        self._partial = bytearray()
        self._needed = _LENGTH.size
        self._messages: deque[T] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._reading_paused = False
        self._out = bytearray()
        self._flush_scheduled = False
        self._writing_paused = False
        self._drainers: list[asyncio.Future[None]] = []
        self._error: WireError | None = None
        self._ended = False
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self.last_received = self._loop.time()
        self.peer = ""
        self.local_host = ""
        """The address by which the peer is connected to this side."""

    # --- asyncio's side ---------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have the methods but not the base class.
        transport = cast(asyncio.Transport, transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)
        name = transport.get_extra_info("peername")
        self.peer = f"{name[0]}:{name[1]}" if isinstance(name, tuple) else str(name or "")
        name = transport.get_extra_info("sockname")
        self.local_host = str(name[0]) if isinstance(name, tuple) else ""
        raw = transport.get_extra_info("socket")
        if raw is not None and raw.family != socket.AF_UNIX:
            tune_socket(raw)
        if self._on_open is not None:
            self._on_open(self)

    def data_received(self, data: bytes) -> None:
        self.last_received = self._loop.time()
        partial = self._partial
        if partial:
            partial += data
            if len(partial) < self._needed:
                return
            data = bytes(partial)
            partial.clear()
        try:
            self._parse(data)
        except WireError as error:
            self._fail(error)
        self._wake_reader()

    def _parse(self, data: bytes) -> None:
        """Decode all whole frames of `data` and keep the rest, knowing how much is missing."""
        view = memoryview(data)
        position, end = 0, len(data)
        decode = self._decode_checked if self._checked else self._decoder.decode
        append = self._messages.append
        while end - position >= 4:
            (length,) = _LENGTH.unpack_from(data, position)
            if length > self._max_frame_bytes:
                raise FrameTooLarge(
                    f"{self.peer} sent a frame of {length} bytes; the limit is "
                    f"{self._max_frame_bytes}"
                )
            stop = position + 4 + length
            if stop > end:
                break
            try:
                append(decode(view[position + 4 : stop]))
            except msgspec.MsgspecError as error:
                raise MalformedFrame(
                    f"{self.peer} sent a frame that is not a known message: {error}"
                ) from error
            position = stop
        if position < end:
            self._partial += view[position:]
            self._needed = 4
            if end - position >= 4:
                self._needed += _LENGTH.unpack_from(data, position)[0]
        if len(self._messages) > MAX_QUEUED_MESSAGES and not self._reading_paused:
            self._reading_paused = True
            if self._transport is not None:
                self._transport.pause_reading()

    def _decode_checked(self, frame: memoryview) -> T:
        end = len(frame) - _CHECK_BYTES
        if end < 0 or _LENGTH.unpack_from(frame, end)[0] != zlib.crc32(frame[:end]):
            raise MalformedFrame(
                f"a frame from {self.peer} changed on its way, or the peer is of another release"
            )
        return self._decoder.decode(frame[:end])

    def eof_received(self) -> bool:
        if self._partial and self._error is None:
            self._error = MalformedFrame(f"{self.peer} closed in the middle of a frame")
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._ended = True
        if exc is not None and self._error is None:
            self._error = ConnectionLost(f"lost {self.peer}: {exc}")
            self._error.__cause__ = exc
        self._wake_reader()
        self.resume_writing()
        if not self._closed.done():
            self._closed.set_result(None)

    def pause_writing(self) -> None:
        self._writing_paused = True

    def resume_writing(self) -> None:
        self._writing_paused = False
        drainers, self._drainers = self._drainers, []
        for drainer in drainers:
            if not drainer.done():
                drainer.set_result(None)

    # --- reading ----------------------------------------------------------------------------------

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def _wait_for_messages(self) -> bool:
        """Wait until something is queued; False at the clean end."""
        while not self._messages:
            if self._ended or self._error is not None:
                if self._error is not None:
                    raise self._error
                return False
            assert self._reader is None, "a connection has one reader at a time"
            self._reader = self._loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return True

    def _resume_reading(self) -> None:
        if self._reading_paused and len(self._messages) <= MAX_QUEUED_MESSAGES // 2:
            self._reading_paused = False
            if self._transport is not None and not self._transport.is_closing():
                self._transport.resume_reading()

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        if not self._messages and not await self._wait_for_messages():
            raise StopAsyncIteration
        message = self._messages.popleft()
        if self._reading_paused:
            self._resume_reading()
        return message

    async def receive(self) -> T:
        """The next message; `ConnectionLost` when the peer closed, even cleanly."""
        try:
            return await self.__anext__()
        except StopAsyncIteration:
            raise ConnectionLost(f"{self.peer} closed the connection") from None

    async def receive_many(self) -> list[T]:
        """All messages that are there, at least one; an empty list at the clean end."""
        if not await self._wait_for_messages():
            return []
        messages = list(self._messages)
        self._messages.clear()
        self._resume_reading()
        return messages

    # --- writing ----------------------------------------------------------------------------------

    def send(self, message: msgspec.Struct) -> None:
        """Queue one message; it is written at the end of this turn of the loop.

        Raises `ConnectionLost` when the connection has ended, `FrameTooLarge` for a message beyond
        the limit, `SlowPeer` when the peer hasn't read for too long.
        """
        if self._transport is None or self._transport.is_closing():
            raise self._error or ConnectionLost(f"the connection to {self.peer} is closed")
        out = self._out
        start = len(out)
        out += b"\0\0\0\0"
        try:
            _ENCODER.encode_into(message, out, -1)
            if self._checked:
                with memoryview(out) as whole:
                    check = zlib.crc32(whole[start + 4 :])
                out += _LENGTH.pack(check)
            length = len(out) - start - 4
            if length > self._max_frame_bytes:
                raise FrameTooLarge(
                    f"a frame of {length} bytes for {self.peer} is not sent; the limit is "
                    f"{self._max_frame_bytes}"
                )
        except BaseException:
            del out[start:]
            raise
        _LENGTH.pack_into(out, start, length)
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        transport = self._transport
        if transport is None or not self._out:
            return
        out, self._out = self._out, bytearray()
        if self._writing_paused:
            pending = transport.get_write_buffer_size() + len(out)
            if pending > self._max_pending_bytes:
                self._fail(SlowPeer(f"{self.peer} left {pending} bytes unread and was cut off"))
                return
        transport.write(out)

    async def drain(self) -> None:
        """Wait until the peer has read enough; return at once when the connection has ended."""
        self._flush()
        if self._writing_paused and self._transport is not None:
            drainer: asyncio.Future[None] = self._loop.create_future()
            self._drainers.append(drainer)
            await drainer

    # --- the end ----------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """False once either side has begun to close."""
        return self._transport is not None and not self._transport.is_closing()

    @property
    def error(self) -> WireError | None:
        """Why the connection ended, unless it ended cleanly."""
        return self._error

    def _fail(self, error: WireError) -> None:
        if self._error is None:
            self._error = error
        self._wake_reader()
        if self._transport is not None:
            self._transport.abort()

    def abort(self, error: WireError | None = None) -> None:
        """Cut the connection without sending what waits; readers get `error`."""
        self._fail(error or ConnectionLost(f"this side cut the connection to {self.peer}"))

    async def close(self, linger_seconds: float = 2.0) -> None:
        """Send what waits, close, and return when the socket is gone.

        A peer that doesn't take the rest within `linger_seconds` is cut off.
        """
        self._flush()
        if self._transport is not None:
            self._transport.close()
        try:
            async with asyncio.timeout(linger_seconds):
                await self.wait_closed()
        except TimeoutError:
            if self._transport is not None:
                self._transport.abort()
            await self.wait_closed()

    async def wait_closed(self) -> None:
        """Return when the socket is gone, for whatever reason."""
        await asyncio.shield(self._closed)

    def detach(self) -> socket.socket:
        """Give the socket to the caller, in blocking mode, and end the framed connection.

        For connections that carry no frames after the first one. The peer must not have sent more
        than that yet: bytes that were already received would be lost (ProtocolError).
        """
        if self._transport is None:
            raise self._error or ConnectionLost(f"the connection to {self.peer} is closed")
        if self._partial or self._messages:
            raise MalformedFrame(
                f"{self.peer} sent more than one frame on a connection that carries only one"
            )
        raw = self._transport.get_extra_info("socket")
        self._transport.pause_reading()
        taken = socket.socket(fileno=socket.dup(raw.fileno()))
        taken.setblocking(True)
        self._transport.abort()
        return taken


def tune_socket(raw: Any) -> None:
    """No delay for small frames, and the kernel notices a dead host within about 30 s."""
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
