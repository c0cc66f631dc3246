"""Framed connections: what arrives, what is refused, and how connections end."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial

import msgspec
import pytest
from deadlines import patience

from tandem_wire.connection import MAX_QUEUED_MESSAGES, Connection, pack_checked
from tandem_wire.endpoint import Listener, dial, keep_alive, listen
from tandem_wire.errors import (
    ConnectionLost,
    DialFailed,
    FrameTooLarge,
    MalformedFrame,
    PeerSilent,
    SlowPeer,
    WireError,
)
from tandem_wire.messages import Cancel, Hello, Ping, RouterMessage

DECODER: msgspec.msgpack.Decoder[RouterMessage] = msgspec.msgpack.Decoder(RouterMessage)
Handler = Callable[[Connection[RouterMessage]], Awaitable[None]]


class Pair:
    """A listener that records, and connections to it."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self.received: list[RouterMessage] = []
        self.ended: list[WireError | None] = []
        self.server: asyncio.Queue[Connection[RouterMessage]] = asyncio.Queue()
        self.listener: Listener[RouterMessage]

    async def handle(self, connection: Connection[RouterMessage]) -> None:
        self.server.put_nowait(connection)
        try:
            async for message in connection:
                self.received.append(message)
        finally:
            self.ended.append(connection.error)

    async def open(self, handler: Handler | None = None, limit: int = 1 << 20) -> None:
        self.listener = await listen(
            "127.0.0.1", 0, DECODER, handler or self.handle, max_frame_bytes=limit
        )
        self._stack.push_async_callback(self.listener.close)

    async def dial(self) -> Connection[RouterMessage]:
        connection = await dial("127.0.0.1", self.listener.port, DECODER)
        self._stack.push_async_callback(connection.close)
        return connection

    def raw(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.listener.port))
        self._stack.callback(connection.close)
        return connection


@pytest.fixture(name="pair")
async def pair_fixture() -> AsyncIterator[Pair]:
    async with AsyncExitStack() as stack:
        yield Pair(stack)


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + patience(20)
    while True:
        if condition():
            return
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


async def test_messages_arrive_in_order_and_in_one_write(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    await pair.open()
    connection = await pair.dial()
    flushes = 0
    flush = connection._flush

    def count() -> None:
        nonlocal flushes
        flushes += 1
        flush()

    monkeypatch.setattr(connection, "_flush", count)
    sent: list[RouterMessage] = [Ping(number) for number in range(1000)]
    for message in sent:
        connection.send(message)
    await until(lambda: len(pair.received) == 1000)
    assert pair.received == sent
    assert flushes == 1
    await connection.close()
    await until(lambda: pair.ended)
    assert pair.ended == [None]


async def test_frames_cut_anywhere_are_put_together(pair: Pair) -> None:
    await pair.open()
    raw = pair.raw()
    frames = b""
    sent = [Hello("r"), Cancel("x" * 300), Ping(1), Cancel("y" * 70000), Ping(2)]
    for message in sent:
        body = msgspec.msgpack.encode(message)
        frames += len(body).to_bytes(4, "big") + body
    loop = asyncio.get_running_loop()
    raw.setblocking(False)
    position = 0
    for size in [1, 2, 3, 5, 7, 300, 11, 1] + [9000] * 20:
        await loop.sock_sendall(raw, frames[position : position + size])
        position += size
        await asyncio.sleep(0)
    await until(lambda: len(pair.received) == len(sent))
    assert pair.received == sent


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"\xff\xff\xff\xff", FrameTooLarge),
        (b"\0\0\0\1\xc1", MalformedFrame),
        (b"\0\0\0\x10" + msgspec.msgpack.encode({"type": "nobody"}).ljust(16, b"\0"), WireError),
        (b"\0\0\0\x09abc", MalformedFrame),
        (b"\0\0", MalformedFrame),
    ],
)
async def test_nonsense_ends_the_connection(
    pair: Pair, data: bytes, error: type[WireError]
) -> None:
    await pair.open()
    raw = pair.raw()
    raw.sendall(data)
    raw.shutdown(socket.SHUT_WR)
    await until(lambda: pair.ended)
    assert isinstance(pair.ended[0], error)
    # The listener lives on.
    connection = await pair.dial()
    connection.send(Ping(1))
    await until(lambda: pair.received)


async def test_a_message_beyond_the_limit_is_not_sent(pair: Pair) -> None:
    await pair.open()
    connection = await dial("127.0.0.1", pair.listener.port, DECODER, max_frame_bytes=100)
    connection.send(Ping(1))
    with pytest.raises(FrameTooLarge):
        connection.send(Cancel("x" * 200))
    connection.send(Ping(2))
    await until(lambda: len(pair.received) == 2)
    assert pair.received == [Ping(1), Ping(2)]
    await connection.close()


async def test_the_end_is_clean_or_an_error(pair: Pair) -> None:
    await pair.open()
    connection = await pair.dial()
    server = await pair.server.get()
    server.send(Ping(7))
    await server.close()
    assert await connection.receive() == Ping(7)
    with pytest.raises(ConnectionLost, match="closed"):
        await connection.receive()
    assert await connection.receive_many() == []
    with pytest.raises(ConnectionLost):
        connection.send(Ping(1))
    await connection.drain()
    with pytest.raises(ConnectionLost):
        connection.detach()
    other = await pair.dial()
    await pair.server.get()
    waiting = asyncio.create_task(other.receive())
    await asyncio.sleep(0)
    other.abort()
    with pytest.raises(ConnectionLost, match="this side cut"):
        await waiting
    assert not other.is_open


async def test_a_reset_is_a_lost_connection(pair: Pair) -> None:
    await pair.open()
    raw = pair.raw()
    server = await pair.server.get()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    raw.close()
    await server.wait_closed()
    await until(lambda: pair.ended)
    assert isinstance(pair.ended[0], ConnectionLost)


async def test_no_one_listens() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(DialFailed, match="can't connect to"):
            await dial("127.0.0.1", unused.getsockname()[1], DECODER)


async def test_a_reader_that_does_not_read_stops_the_sender(pair: Pair) -> None:
    release = asyncio.Event()

    async def lazy(connection: Connection[RouterMessage]) -> None:
        pair.server.put_nowait(connection)
        await release.wait()
        while batch := await connection.receive_many():
            pair.received += batch

    await pair.open(lazy)
    connection = await pair.dial()
    filler = "x" * 1000
    sent = 0

    async def flood() -> None:
        nonlocal sent
        while sent < 40000:
            connection.send(Cancel(filler))
            sent += 1
            if sent % 100 == 0:
                await connection.drain()

    flooding = asyncio.create_task(flood())
    server = await pair.server.get()
    await until(lambda: server._reading_paused and connection._writing_paused)
    assert not flooding.done()
    assert len(server._messages) < MAX_QUEUED_MESSAGES * 2
    release.set()
    await flooding
    await until(lambda: len(pair.received) == sent)


async def test_a_peer_that_never_reads_is_cut_off(pair: Pair) -> None:
    async def deaf(connection: Connection[RouterMessage]) -> None:
        await connection.wait_closed()

    await pair.open(deaf)
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(
        lambda: Connection(DECODER, max_pending_bytes=1 << 20), "127.0.0.1", pair.listener.port
    )

    async def flood() -> None:
        while True:
            connection.send(Cancel("x" * 10000))
            await asyncio.sleep(0)

    with pytest.raises(SlowPeer):
        await flood()
    await connection.wait_closed()


async def test_closing_does_not_wait_for_a_deaf_peer(pair: Pair) -> None:
    async def deaf(connection: Connection[RouterMessage]) -> None:
        await connection.wait_closed()

    await pair.open(deaf)
    connection = await pair.dial()
    for _ in range(2000):
        connection.send(Cancel("x" * 10000))
    await connection.close(linger_seconds=0.05)
    assert not connection.is_open


async def test_heartbeats(pair: Pair) -> None:
    await pair.open()
    connection = await pair.dial()
    server = await pair.server.get()
    beats = [
        asyncio.create_task(keep_alive(side, lambda: Ping(0), 0.02))
        for side in (connection, server)
    ]
    await until(lambda: len(pair.received) > 10)
    assert connection.is_open
    # The other side stops to speak, and is taken for gone.
    beats[1].cancel()
    with pytest.raises(PeerSilent):
        async for _ in connection:
            pass
    await beats[0]


async def test_a_handler_that_fails_harms_no_other(pair: Pair) -> None:
    reported: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))

    async def broken(connection: Connection[RouterMessage]) -> None:
        if await connection.receive() == Ping(13):
            raise RuntimeError("a bug")
        await pair.handle(connection)

    await pair.open(broken)
    connection = await pair.dial()
    connection.send(Ping(13))
    await connection.wait_closed()
    assert isinstance(reported[0]["exception"], RuntimeError)
    other = await pair.dial()
    other.send(Ping(1))
    other.send(Ping(2))
    await until(lambda: pair.received == [Ping(2)])
    pair.listener.stop_accepting()
    other.send(Ping(3))
    await until(lambda: len(pair.received) == 2)


async def test_detach_hands_the_socket_over(pair: Pair) -> None:
    taken: asyncio.Queue[socket.socket] = asyncio.Queue()

    async def take(connection: Connection[RouterMessage]) -> None:
        await connection.receive()
        taken.put_nowait(connection.detach())

    await pair.open(take)
    raw = pair.raw()
    body = msgspec.msgpack.encode(Ping(1))
    raw.sendall(len(body).to_bytes(4, "big") + body)
    mine = await taken.get()
    mine.sendall(b"plain bytes")
    assert await asyncio.to_thread(raw.recv, 100) == b"plain bytes"
    mine.close()
    raw = pair.raw()
    raw.sendall(2 * (len(body).to_bytes(4, "big") + body))
    assert await asyncio.to_thread(raw.recv, 100) == b""


async def test_a_changed_bit_ends_a_checked_connection(pair: Pair) -> None:
    """Whichever it is; the frame as it was sent comes through."""
    checked = partial(Connection, checked=True)
    received: list[RouterMessage] = []
    errors: list[WireError | None] = []

    async def handle(connection: Connection[RouterMessage]) -> None:
        try:
            async for message in connection:
                received.append(message)
        finally:
            errors.append(connection.error)

    listener = await listen("127.0.0.1", 0, DECODER, handle, make=checked)
    frame = pack_checked(Ping(7))
    sender = await dial("127.0.0.1", listener.port, DECODER, make=checked)
    sender.send(Ping(7))
    await until(lambda: received == [Ping(7)])
    await sender.close()
    await until(lambda: errors == [None])
    for place in range(4, len(frame), 3):
        changed = bytearray(frame)
        changed[place] ^= 1 << place % 8
        with socket.create_connection(("127.0.0.1", listener.port)) as raw:
            raw.sendall(changed)
            await until(lambda: errors[1:])
        ended = errors.pop()
        assert isinstance(ended, MalformedFrame), place
        assert "changed on its way" in str(ended)
    assert received == [Ping(7)]
    await listener.close()
