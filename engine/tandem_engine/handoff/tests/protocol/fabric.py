"""What the model's transports share: writes that go on one phase at a time, when the model says so.

P's lanes are threads of `Outbound`. Here they are objects, and a write takes them two steps: claim
it, and make it by the base's own code.
"""

import asyncio
import itertools
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Final, Protocol

from tandem_engine.handoff.pages import KVPages, payload_checksum
from tandem_engine.handoff.settings import HandoffSettings
from tandem_engine.handoff.transports.base import (
    Inbound,
    Link,
    Outbound,
    PageWrite,
    Transport,
    Written,
    _Job,
)
from tandem_engine.handoff.transports.landing import Landing
from tandem_engine.step import KVStore
from tandem_wire.handoff import TransportOffer

NUM_LANES: Final = 2
"""Of a session: P's lanes, and the streams of a staged transport."""


@dataclass
class Arrival:
    """A write on its way to D, or being made there."""

    inbound: "ModelInbound"
    write: PageWrite
    serial: int
    """Which attempt of D the write was made for: see `ModelInbound.serials`."""
    payload: bytes = b""
    landing: Landing | None = None  # set while D's own code makes it

    @property
    def touches_cache(self) -> bool:
        """Whether its pages are those of a cache, not those of a probe."""
        return isinstance(self.write.pages, KVPages)


@dataclass
class Post:
    """A write that the network makes by itself: even while P's process sleeps."""

    arrival: Arrival
    land: Callable[["Post"], None]
    """The network makes it, or finds that P has lost the right to."""
    payload: bytes = b""
    is_done: bool = False
    failure: Exception | None = None


class Thread(Protocol):
    """A thread of D's end."""

    @property
    def can_step(self) -> bool:
        """Whether it has something to do."""

    def step(self) -> None:
        """Do a bit of it."""

    @property
    def current(self) -> Arrival | None:
        """The write that it is making."""


@dataclass
class Seat:
    """What one process has of threads: those of P's ends, and those of D's ends."""

    lanes: list["Lane"] = field(default_factory=list)
    threads: list["Thread"] = field(default_factory=list)


class Fabric:
    """All that is under way between the workers of a world, and how it misbehaves."""

    def __init__(self) -> None:
        self.seats: dict[str, Seat] = {}
        self.inbounds: dict[str, ModelInbound] = {}
        self.posted: list[Post] = []
        self.failing: Exception | None = None  # what the next write that is made ends by
        self.flips_next = False  # a byte of the next write changes on its way
        self.on_landing: Callable[[Arrival], None] = lambda _: None
        self.names = itertools.count(1)

    def take_failure(self) -> Exception | None:
        """What the next write was to end by."""
        failing, self.failing = self.failing, None
        return failing

    def carry(self, payload: bytes) -> bytes:
        """What arrives of a payload."""
        if not self.flips_next:
            return payload
        self.flips_next = False
        return bytes([payload[0] ^ 1]) + payload[1:]


class ModelTransport(Transport):
    """What both have; a world sets `fabric`."""

    memory = "host"
    fabric: ClassVar[Fabric]

    def __init__(self, settings: HandoffSettings, kv: KVStore) -> None:
        super().__init__(settings, kv)
        self.kv = kv
        self.seat = self.fabric.seats[settings.boot_id]


class ModelInbound(Inbound):
    """D's end. `serials` tells the attempts of an epoch apart, should there be two."""

    def __init__(self, transport: ModelTransport, link: Link) -> None:
        super().__init__(transport)
        self.fabric = transport.fabric
        self.kv = transport.kv
        self.link = link
        self.loop = asyncio.get_running_loop()
        self.key = str(next(self.fabric.names))
        self.is_closed = False
        self.serials: dict[int, int] = {}
        self.fabric.inbounds[self.key] = self
        self.seat = transport.seat

    @property
    def offer(self) -> TransportOffer:
        return TransportOffer(self.name, {"key": self.key})

    async def open(self) -> None:
        return None

    def register(self, epoch: int, landing: Landing) -> None:
        super().register(epoch, landing)
        self.serials[epoch] = next(self.fabric.names)

    def landing(self, epoch: int) -> Landing | None:
        """Where the writes of an epoch go now."""
        return self._landings.get(epoch)


class Lane:
    """One of P's threads: the base's own, cut into a claim and the rest."""

    def __init__(self, outbound: "ModelOutbound", number: int) -> None:
        self.outbound = outbound
        self.number = number
        self.job: _Job | None = None
        self.post: Post | None = None
        self._ended: asyncio.Future[None] = outbound._loop.create_future()
        outbound._lanes.append(self._ended)
        outbound.seat.lanes.append(self)

    @property
    def can_step(self) -> bool:
        if self.job is None:
            return not self.outbound._queue.empty()
        return self.outbound.can_send(self)

    def step(self) -> None:
        """Claim a write, or make the one that is claimed."""
        outbound = self.outbound
        if self.job is None:
            job = outbound._queue.get_nowait()
            if job is None:
                self._end()
            elif job.claim():
                self.job = job
                outbound.begin(self, job.write)
            return
        job = self.job
        goes_on = outbound._make(job, self._send)
        self.job = self.post = None
        if not goes_on:
            self._end()

    def _send(self, write: PageWrite) -> Written:
        return self.outbound.send(self, write)

    def _end(self) -> None:
        self.outbound.seat.lanes.remove(self)
        self.outbound._post(self._ended.set_result, None)


class ModelOutbound(Outbound):
    """P's end: two lanes."""

    def __init__(self, transport: ModelTransport, inbound: ModelInbound, link: Link) -> None:
        super().__init__(transport, link)
        self.fabric = transport.fabric
        self.seat = transport.seat
        self.inbound = inbound
        self.link = link
        self.is_interrupted = False
        self._serials: dict[int, int] = {}
        for number in range(NUM_LANES):
            Lane(self, number)

    async def write(self, write: PageWrite) -> Written:
        # Which attempt of D it is for: the one that has the epoch while P works on it.
        self._serials[id(write)] = self.inbound.serials.get(write.epoch, 0)
        return await super().write(write)

    def arrival(self, write: PageWrite) -> Arrival:
        return Arrival(self.inbound, write, self._serials[id(write)])

    @abstractmethod
    def can_send(self, lane: Lane) -> bool:
        """Whether the write that a lane has claimed can go on."""

    def begin(self, lane: Lane, write: PageWrite) -> None:
        """A lane has claimed a write."""
        return None

    @abstractmethod
    def send(self, lane: Lane, write: PageWrite) -> Written:
        """Make the write that a lane has claimed, or say what became of it."""

    def result(self, write: PageWrite, payload: bytes) -> Written:
        checksum = payload_checksum(write.target_blocks, write.layers, payload)
        return Written(len(payload), checksum)

    def _interrupt(self) -> None:
        self.is_interrupted = True


def read(write: PageWrite) -> bytes:
    """The bytes of P's source blocks, now."""
    return bytes(write.pages.export(write.source_blocks, write.layers))
