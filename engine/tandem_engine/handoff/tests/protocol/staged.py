"""A staged transport: P's lanes fill streams, and threads of D put the bytes into place."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final
from unittest import mock

from tandem_engine.handoff.errors import TransportError
from tandem_engine.handoff.tests.protocol.fabric import (
    NUM_LANES,
    Arrival,
    Lane,
    ModelInbound,
    ModelOutbound,
    ModelTransport,
    read,
)
from tandem_engine.handoff.transports.base import Inbound, Link, Outbound, PageWrite, Written
from tandem_engine.handoff.transports.landing import Landing
from tandem_wire.handoff import TransportOffer

STREAM_WRITES: Final = 2
"""How many writes fit into a stream before P's lane has to wait for D."""


def finish_write(landing: Landing, blocks: Sequence[int], layers: range, payload: bytes) -> None:
    """The rest of `Landing.write`, whose `_begin` was a step of its own."""
    with mock.patch.object(landing, "_begin", return_value=True):
        landing.write(blocks, layers, memoryview(payload))


class Stream:
    """What is on its way over one data connection, and D's thread that takes it."""

    def __init__(self, inbound: "StagedInbound") -> None:
        self.inbound = inbound
        self.arrivals: deque[Arrival] = deque()
        self.current: Arrival | None = None
        self.is_cut = False
        self.ended: asyncio.Future[None] = inbound.loop.create_future()
        inbound.seat.threads.append(self)

    @property
    def can_step(self) -> bool:
        return bool(self.current or self.arrivals or self.is_cut or self.inbound.is_closed)

    def step(self) -> None:
        """Take up a write, or finish the one that is being made, or end."""
        if self.current is not None:
            self._finish(self.current)
            self.current = None
        elif self.inbound.is_closed or (self.is_cut and not self.arrivals):
            self.inbound.seat.threads.remove(self)
            self._post(self.ended.set_result, None)
            self._post(self.inbound.link.on_lost, TransportError("a data stream ended"))
        else:
            arrival = self.arrivals.popleft()
            landing = self.inbound.landing(arrival.write.epoch)
            if landing is None or not landing._begin():
                self.inbound.num_stale_writes += 1
            else:
                arrival.landing, self.current = landing, arrival

    def _finish(self, arrival: Arrival) -> None:
        landing, write = arrival.landing, arrival.write
        assert landing is not None
        self.inbound.fabric.on_landing(arrival)
        finish_write(landing, write.target_blocks, write.layers, arrival.payload)

    def _post(self, call: Callable[..., None], *args: object) -> None:
        self.inbound.loop.call_soon_threadsafe(call, *args)


class StagedInbound(ModelInbound):
    """D's end: two streams, and a thread for each."""

    def __init__(self, transport: ModelTransport, link: Link) -> None:
        super().__init__(transport, link)
        self.streams: list[Stream] = []

    async def open(self) -> None:
        self.streams = [Stream(self) for _ in range(NUM_LANES)]

    async def close(self) -> None:
        self.is_closed = True
        if self.streams:
            await asyncio.wait([stream.ended for stream in self.streams])


class StagedOutbound(ModelOutbound):
    """P's end: every write goes into one of D's streams, when it has room."""

    inbound: StagedInbound

    def can_send(self, lane: Lane) -> bool:
        stream = self._stream(lane)
        full = stream is not None and len(stream.arrivals) >= STREAM_WRITES
        return self.is_interrupted or self.fabric.failing is not None or not full

    def _stream(self, lane: Lane) -> Stream | None:
        streams = self.inbound.streams
        return streams[lane.number] if streams else None

    def send(self, lane: Lane, write: PageWrite) -> Written:
        failure = self.fabric.take_failure()
        if failure is not None:
            raise failure
        stream = self._stream(lane)
        if self.is_interrupted or stream is None or stream.is_cut or self.inbound.is_closed:
            raise OSError("the data stream is closed")
        payload = read(write)
        arrival = self.arrival(write)
        arrival.payload = self.fabric.carry(payload)
        stream.arrivals.append(arrival)
        return self.result(write, payload)

    def _interrupt(self) -> None:
        super()._interrupt()
        for stream in self.inbound.streams:
            stream.is_cut = True


class StagedTransport(ModelTransport):
    """D's own code puts the bytes into place, as over `tcp`."""

    name = "tcp"
    placement = "staged"

    def offer(self, link: Link) -> Inbound:
        return StagedInbound(self, link)

    async def accept(self, offer: TransportOffer, link: Link) -> Outbound:
        inbound = self.fabric.inbounds[str(offer.details["key"])]
        assert isinstance(inbound, StagedInbound)
        return StagedOutbound(self, inbound, link)
