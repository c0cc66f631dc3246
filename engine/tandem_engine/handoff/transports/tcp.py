"""The tcp transport: several data streams per session, opened by D to P's bootstrap port.

After its `DataHello` frame a stream carries writes from P to D: a header, D's block numbers, and
the packed bytes. Both ends use blocking sockets in threads of their own, which don't hold the
interpreter while they copy; D's thread puts the bytes into the cache straight from its buffer.
"""

import asyncio
import contextlib
import socket
import struct
import threading
from typing import Final

from tandem_engine.handoff.errors import TransportError
from tandem_engine.handoff.pages import payload_checksum
from tandem_engine.handoff.transports.base import (
    MAX_WRITE_BYTES,
    Inbound,
    Link,
    Outbound,
    PageWrite,
    Transport,
    Written,
)
from tandem_wire.connection import Connection, pack_checked, tune_socket
from tandem_wire.handoff import DataHello, HandoffMessage, TransportOffer

_HEADER: Final = struct.Struct("<QIHHQ")  # epoch, blocks, first layer, layers, payload bytes
_BUFFER_BYTES: Final = 4 << 20


class TcpTransport(Transport):
    """Through sockets; works wherever the bootstrap port does."""

    name = "tcp"
    placement = "staged"
    memory = "host"

    def offer(self, link: Link) -> Inbound:
        return TcpInbound(self, link)

    async def accept(self, offer: TransportOffer, link: Link) -> Outbound:
        return TcpOutbound(self, link)


class TcpOutbound(Outbound):
    """P's end; each data connection that D opens becomes a lane."""

    def __init__(self, transport: TcpTransport, link: Link) -> None:
        super().__init__(transport, link)
        self._checksum = link.settings.checksum
        self._sockets: list[socket.socket] = []

    def attach(self, connection: Connection[HandoffMessage]) -> None:
        """Start a lane over the connection's socket, as a blocking one."""
        stream = connection.detach()
        if self._closed:
            stream.close()
            return
        _enlarge_buffers(stream)
        self._sockets.append(stream)
        self.start_lane(lambda write: self._send(stream, write), f"tcp-{stream.fileno()}")

    def _send(self, stream: socket.socket, write: PageWrite) -> Written:
        payload = write.pages.export(write.source_blocks, write.layers)
        blocks, layers = write.target_blocks, write.layers
        checksum = payload_checksum(blocks, layers, payload) if self._checksum else 0
        num_bytes = len(payload)
        head = _HEADER.pack(write.epoch, len(blocks), layers.start, len(layers), num_bytes)
        stream.sendall(head + struct.pack(f"<{len(blocks)}I", *blocks), socket.MSG_MORE)
        stream.sendall(payload)
        return Written(num_bytes, checksum)

    def _interrupt(self) -> None:
        for stream in self._sockets:
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)

    async def close(self) -> None:
        await super().close()
        for stream in self._sockets:
            stream.close()


class TcpInbound(Inbound):
    """D's end; `open` dials the streams."""

    def __init__(self, transport: TcpTransport, link: Link) -> None:
        super().__init__(transport)
        self._address = link.address
        self._session = link.session
        self._num_streams = link.settings.num_streams
        self._on_lost = link.on_lost
        self._loop = asyncio.get_running_loop()
        self._sockets: list[socket.socket] = []
        self._ended: list[asyncio.Future[None]] = []

    @property
    def offer(self) -> TransportOffer:
        return TransportOffer(self.name)

    async def open(self) -> None:
        for number in range(self._num_streams):
            stream = await self._dial(number)
            ended: asyncio.Future[None] = self._loop.create_future()
            self._sockets.append(stream)
            self._ended.append(ended)
            threading.Thread(
                target=self._receive, args=(stream, ended), name=f"kv-in-{number}", daemon=True
            ).start()

    async def _dial(self, number: int) -> socket.socket:
        hello = pack_checked(DataHello(self._session, number))
        host, port = self._address
        try:
            found = await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            stream = socket.socket(found[0][0], socket.SOCK_STREAM)
            stream.setblocking(False)
            try:
                await self._loop.sock_connect(stream, found[0][4])
                await self._loop.sock_sendall(stream, hello)
            except BaseException:
                stream.close()
                raise
        except OSError as error:
            raise TransportError(f"can't open a data stream to {host}:{port}: {error}") from error
        tune_socket(stream)
        _enlarge_buffers(stream)
        stream.setblocking(True)
        return stream

    def _receive(self, stream: socket.socket, ended: asyncio.Future[None]) -> None:
        """Run a stream's thread until the stream's end, which is also the session's."""
        failure: Exception
        try:
            self._receive_writes(stream)
            failure = TransportError("the peer closed a data stream")
        except Exception as error:
            failure = TransportError(f"a data stream failed: {error}")
            failure.__cause__ = error
        self._loop.call_soon_threadsafe(self._on_lost, failure)
        self._loop.call_soon_threadsafe(ended.set_result, None)

    def _receive_writes(self, stream: socket.socket) -> None:
        head = memoryview(bytearray(_HEADER.size))
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        while _fill(stream, head):
            epoch, num_blocks, first, num_layers, num_bytes = _HEADER.unpack(head)
            if num_bytes > MAX_WRITE_BYTES or num_blocks * 4 > MAX_WRITE_BYTES:
                raise TransportError(
                    f"the peer announced a write of {num_blocks} blocks and {num_bytes} bytes, "
                    f"but {MAX_WRITE_BYTES} bytes are the most"
                )
            listed = memoryview(bytearray(4 * num_blocks))
            if num_bytes > len(buffer):
                buffer = memoryview(bytearray(num_bytes))
            payload = buffer[:num_bytes]
            if not (_fill(stream, listed) and _fill(stream, payload)):
                raise TransportError("the peer closed in the middle of a write")
            blocks = struct.unpack(f"<{num_blocks}I", listed)
            self._land(epoch, blocks, range(first, first + num_layers), payload)

    async def close(self) -> None:
        for stream in self._sockets:
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)
        if self._ended:
            await asyncio.wait(self._ended)
        for stream in self._sockets:
            stream.close()


def _fill(stream: socket.socket, view: memoryview) -> bool:
    """Receive exactly `view`'s bytes; False at the end of the stream before all of them."""
    while view:
        received = stream.recv_into(view, len(view), socket.MSG_WAITALL)
        if received == 0:
            return False
        view = view[received:]
    return True


def _enlarge_buffers(stream: socket.socket) -> None:
    """Room for a whole write, so that the other side's copy overlaps with this side's."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        stream.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
