"""The tcp transport: several data streams per session, opened by D to P's bootstrap port.

After its `DataHello` frame a stream carries writes from P to D: a header, D's block numbers, and
the packed bytes. Both ends use blocking sockets in threads of their own, which don't hold the
interpreter while they copy.

Where a cache is in the host's memory, in pages that are not small, the kernel reads P's pages and
writes D's: neither end packs. A checksum is made of what is in the processor's cache, some of the
write at a time: on P after it was sent, on D after it has come. D looks the epoch up before each
piece and waits for one no longer than `_PATIENCE`, so a fence waits no longer either; the rest of a
write that is fenced goes nowhere. Other pages go through a buffer at both ends.
"""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final

import xxhash

from tandem_engine.handoff.errors import TransportError
from tandem_engine.handoff.pages import place_seed
from tandem_engine.handoff.transports.base import (
    MAX_WRITE_BYTES,
    Inbound,
    Link,
    Outbound,
    PageWrite,
    Transport,
    Written,
)
from tandem_engine.handoff.transports.landing import Landing
from tandem_wire.connection import Connection, pack_checked, tune_socket
from tandem_wire.handoff import DataHello, HandoffMessage, TransportOffer

_HEADER: Final = struct.Struct("<QIHHQ")  # epoch, blocks, first layer, layers, payload bytes
_MOST_WRITE_BYTES: Final = 16 << 20
"""Of a long prompt's pages: what a write costs beside its bytes does not show."""
PIECE_BYTES: Final = 4 << 20
"""So much is checked and sent, or received and checked, at a time: it stays in a shared cache."""
_LOCAL_BUFFER_BYTES: Final = 128 << 10
"""Of a socket between two processes of one host: what waits there stays in a core's own cache."""
_MOST_VIEWS: Final = 512
"""That one call to the kernel takes; it allows 1,024."""
_PATIENCE: Final = struct.pack("@ll", 0, 50_000)
_NO_HURRY: Final = struct.pack("@ll", 0, 0)


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
        self.num_lanes = link.settings.num_streams
        if not link.settings.write_bytes and link.kv.is_on_host:
            self.write_bytes = max(self.write_bytes, _MOST_WRITE_BYTES)

    def attach(self, connection: Connection[HandoffMessage]) -> None:
        """Start a lane over the connection's socket, as a blocking one."""
        stream = connection.detach()
        if self._closed:
            stream.close()
            return
        fit_buffers(stream)
        self._sockets.append(stream)
        self.start_lane(lambda write: self._send(stream, write), f"tcp-{stream.fileno()}")

    def _send(self, stream: socket.socket, write: PageWrite) -> Written:
        blocks, layers = write.target_blocks, write.layers
        views = write.pages.views(write.source_blocks, layers)
        if views is None:
            views = [memoryview(write.pages.export(write.source_blocks, layers)).cast("B")]
        num_bytes = sum(map(len, views))
        head = _HEADER.pack(write.epoch, len(blocks), layers.start, len(layers), num_bytes)
        stream.sendall(head + struct.pack(f"<{len(blocks)}I", *blocks), socket.MSG_MORE)
        digest = xxhash.xxh3_64(seed=place_seed(blocks, layers)) if self._checksum else None
        for step in _steps(views):
            rest = step
            while rest:
                rest = _after(rest, stream.sendmsg(rest))
            if digest is not None:
                for view in step:
                    digest.update(view)  # while D receives
        return Written(num_bytes, digest.intdigest() if digest else 0)

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
        self._checksum = link.settings.checksum
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
        fit_buffers(stream)
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
        buffer = memoryview(bytearray(PIECE_BYTES))
        while _fill(stream, head):
            epoch, num_blocks, first, num_layers, num_bytes = _HEADER.unpack(head)
            if num_bytes > MAX_WRITE_BYTES or num_blocks * 4 > MAX_WRITE_BYTES:
                raise TransportError(
                    f"the peer announced a write of {num_blocks} blocks and {num_bytes} bytes, "
                    f"but {MAX_WRITE_BYTES} bytes are the most"
                )
            listed = memoryview(bytearray(4 * num_blocks))
            if not _fill(stream, listed):
                raise TransportError("the peer closed in the middle of a write")
            blocks = struct.unpack(f"<{num_blocks}I", listed)
            layers = range(first, first + num_layers)
            landing = self._landings.get(epoch)
            views = landing.views(blocks, layers) if landing else None
            if landing and views and sum(map(len, views)) == num_bytes:
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _PATIENCE)
                self._pour(stream, landing, views, place_seed(blocks, layers))
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _NO_HURRY)
                continue
            if num_bytes > len(buffer):
                buffer = memoryview(bytearray(num_bytes))
            payload = buffer[:num_bytes]
            if not _fill(stream, payload):
                raise TransportError("the peer closed in the middle of a write")
            self._land(epoch, blocks, layers, payload)

    def _pour(
        self, stream: socket.socket, landing: Landing, views: list[memoryview], seed: int
    ) -> None:
        """Receive one write where it belongs."""
        num_bytes = 0
        digest = xxhash.xxh3_64(seed=seed) if self._checksum else None
        for step in _steps(views):
            rest = step
            while rest:
                received = landing.pour(partial(_receive_some, stream, rest))
                if received is None:  # fenced: what is left goes nowhere
                    rest = [memoryview(bytearray(len(view))) for view in rest]
                    received = _receive_some(stream, rest)
                rest = _after(rest, received)
            num_bytes += sum(map(len, step))
            if digest is not None:
                for view in step:
                    digest.update(view)
            landing.progress()
        if not landing.poured(num_bytes, digest.intdigest() if digest else 0):
            self.num_stale_writes += 1

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


def _steps(views: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """The same bytes, as many at a time as stay in the processor's cache."""
    step: list[memoryview] = []
    room = PIECE_BYTES
    for view in views:
        rest = view
        while rest:
            step.append(rest[:room])
            rest = rest[room:]
            room -= len(step[-1])
            if not room or len(step) == _MOST_VIEWS:
                yield step
                step, room = [], PIECE_BYTES
    if step:
        yield step


def _after(views: list[memoryview], num_bytes: int) -> list[memoryview]:
    """What is left of them behind the first bytes."""
    for number, view in enumerate(views):
        if num_bytes < len(view):
            return [view[num_bytes:], *views[number + 1 :]]
        num_bytes -= len(view)
    return []


def _receive_some(stream: socket.socket, views: list[memoryview]) -> int:
    """Receive what there is for them within `_PATIENCE`; 0: nothing came. Raises TransportError."""
    try:
        received = stream.recvmsg_into(views, 0, socket.MSG_WAITALL)[0]
    except BlockingIOError:
        return 0
    if received == 0:
        raise TransportError("the peer closed in the middle of a write")
    return received


def fit_buffers(stream: socket.socket) -> None:
    """Small ones on one host; else the kernel's own, which grow with the link's rate and delay."""
    if stream.getsockname()[0] != stream.getpeername()[0]:
        return
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        stream.setsockopt(socket.SOL_SOCKET, option, _LOCAL_BUFFER_BYTES)
