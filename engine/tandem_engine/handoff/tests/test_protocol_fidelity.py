"""What the protocol's model has instead of the operating system behaves like the real thing."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec
import pytest

from tandem_engine.handoff.pages import KVPages, payload_checksum
from tandem_engine.handoff.tests.protocol.loop import Clock, make_loop
from tandem_engine.handoff.tests.protocol.network import Network
from tandem_engine.handoff.tests.protocol.staged import finish_write
from tandem_engine.handoff.tests.scripted import LAYOUT, BytesStore
from tandem_engine.handoff.transports.landing import Landing
from tandem_wire.connection import Connection
from tandem_wire.endpoint import Listener, dial, listen
from tandem_wire.errors import WireError
from tandem_wire.handoff import Fence, Fenced, HandoffMessage

Program = Callable[[], Coroutine[Any, Any, list[str]]]


def run_in_model(program: Program) -> list[str]:
    """Run a program on the model's loop, everything as soon as it can, time by the timers."""
    network = Network()
    loop = make_loop(Clock(), network)
    task = loop.create_task(program())
    while not task.done():
        loop.run_turn()
        while network.dials:
            network.answer_dial()
        for pipe in network.pipes():
            if pipe.can_deliver:
                pipe.deliver()
        if not loop.ready and loop.next_timer is not None:
            loop.clock.now = max(loop.clock.now, loop.next_timer)
    assert not loop.errors
    return task.result()


async def order_of_callbacks() -> list[str]:
    """Callbacks, tasks, cancellation and timers, and the order in which they run."""
    loop = asyncio.get_running_loop()
    seen: list[str] = []
    go, last = asyncio.Event(), asyncio.Event()

    async def wait(name: str) -> None:
        try:
            await go.wait()
            seen.append(name)
        except asyncio.CancelledError:
            seen.append(f"{name} cancelled")
            raise

    tasks = [loop.create_task(wait(name)) for name in ("a", "b", "c")]
    loop.call_soon(seen.append, "soon")
    loop.call_later(0.02, last.set)
    loop.call_later(0.01, seen.append, "later")
    loop.call_later(0.01, seen.append, "never").cancel()
    await asyncio.sleep(0)
    tasks[1].cancel()
    go.set()
    await asyncio.wait(tasks)
    await last.wait()
    seconds = 0.01
    try:
        async with asyncio.timeout(seconds):
            await asyncio.Event().wait()
    except TimeoutError:
        seen.append("timeout")
    return seen


class Peers:
    """A connection with its two ends, over whatever network the running loop has."""

    def __init__(self) -> None:
        self.served: asyncio.Future[Connection[HandoffMessage]]
        self.over = asyncio.Event()
        self.decoder: msgspec.msgpack.Decoder[HandoffMessage] = msgspec.msgpack.Decoder(
            HandoffMessage
        )

    async def open(self) -> "tuple[Listener[HandoffMessage], Connection[HandoffMessage]]":
        self.served = asyncio.get_running_loop().create_future()

        async def serve(connection: Connection[HandoffMessage]) -> None:
            self.served.set_result(connection)
            await self.over.wait()

        listener = await listen("127.0.0.1", 0, self.decoder, serve)
        return listener, await dial("127.0.0.1", listener.port, self.decoder)


async def _rest_of(connection: Connection[HandoffMessage]) -> list[str]:
    seen: list[str] = []
    try:
        async for message in connection:
            seen.append(str(message))
        seen.append("clean end")
    except WireError as error:
        seen.append(type(error).__name__)
    return seen


async def _talk(end: Callable[[Connection[HandoffMessage]], Awaitable[None]]) -> list[str]:
    peers = Peers()
    listener, here = await peers.open()
    there = await peers.served
    for epoch in range(3):
        here.send(Fence("r", epoch))
    there.send(Fenced("r", 7))
    seen = [str(await there.receive()), str(await here.receive())]
    await end(here)
    seen += await _rest_of(there)
    try:
        here.send(Fence("r", 9))
        seen.append("sent")
    except WireError as error:
        seen.append(type(error).__name__)
    peers.over.set()
    await listener.close()
    try:
        await dial("127.0.0.1", listener.port, peers.decoder)
    except WireError as error:
        seen.append(type(error).__name__)
    return seen


async def closed_connection() -> list[str]:
    """What both ends see of messages and of an orderly end."""
    return await _talk(lambda connection: connection.close())


async def aborted_connection() -> list[str]:
    """What both ends see when one of them is cut off after what it has sent has gone out."""

    async def abort(connection: Connection[HandoffMessage]) -> None:
        await connection.drain()
        connection.abort()

    return [line for line in await _talk(abort) if line not in ("clean end", "ConnectionLost")]


@pytest.mark.parametrize("program", [order_of_callbacks, closed_connection, aborted_connection])
def test_a_program_does_the_same_in_the_model(program: Program) -> None:
    real = asyncio.run(program())
    assert len(real) >= 5
    assert run_in_model(program) == real


def test_a_write_in_two_steps_is_landed_as_in_one() -> None:
    """`Stream` makes `Landing.write` in two steps, so that a fence can come between them."""

    async def land(in_two: bool) -> tuple[bytes, int, int]:
        kv = BytesStore(LAYOUT, 4)
        layers = range(LAYOUT.num_layers)
        payload = bytes(i % 251 for i in range(LAYOUT.block_bytes))
        landing = Landing(KVPages(kv), [2], checksum=True, on_progress=lambda: None)
        if in_two:
            assert landing._begin()
            fenced = asyncio.ensure_future(landing.fence())
            await asyncio.sleep(0)
            finish_write(landing, [2], layers, payload)
            await fenced
            assert not landing.write([2], layers, memoryview(payload))
        else:
            assert landing.write([2], layers, memoryview(payload))
        assert landing.checksum == payload_checksum([2], layers, payload)
        return bytes(kv.export_blocks([2], layers)), landing.num_bytes, landing.checksum

    assert asyncio.run(land(True)) == asyncio.run(land(False))
