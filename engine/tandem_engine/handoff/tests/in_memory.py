"""A one-sided transport between two workers of one process: P writes D's pages itself."""

import asyncio
import secrets
import threading

from deadlines import patience

from tandem_engine.handoff.errors import TransportError
from tandem_engine.handoff.pages import Pages, payload_checksum
from tandem_engine.handoff.settings import HandoffSettings
from tandem_engine.handoff.transports.base import (
    Inbound,
    Link,
    Outbound,
    PageWrite,
    Transport,
    Written,
)
from tandem_engine.handoff.transports.landing import Landing
from tandem_engine.memory import MemoryRegion
from tandem_engine.step import KVStore
from tandem_wire.handoff import HandoffMessage, PagesWritten, TransportOffer


class Region:
    """The pages of D that P may write, by epoch: the right to do so can be revoked at any time."""

    def __init__(self) -> None:
        self._pages: dict[int, Pages] = {}
        self._lock = threading.Lock()

    def grant(self, epoch: int, pages: Pages) -> None:
        with self._lock:
            self._pages[epoch] = pages

    def revoke(self, *epochs: int) -> None:
        """Returns when no write is under way, as a network card's deregistration does."""
        with self._lock:
            for epoch in epochs or list(self._pages):
                self._pages.pop(epoch, None)

    def write(self, write: PageWrite, payload: memoryview) -> None:
        with self._lock:
            pages = self._pages.get(write.epoch)
            if pages is None:
                raise TransportError(f"no right to write pages of epoch {write.epoch}")
            pages.take(write.target_blocks, write.layers, payload)


class Network:
    """What both workers' transports are attached to, and what a test does to their writes."""

    def __init__(self) -> None:
        self.registered: list[tuple[MemoryRegion, ...]] = []
        self.regions: dict[str, Region] = {}
        self.holds = False  # writes wait for `release` before they touch D's pages
        self.is_stopped = False  # P's process, as by SIGSTOP: nothing wakes a write but `release`
        self.held = threading.Event()
        self.release = threading.Event()
        self.num_refused = 0


class InMemoryTransport(Transport):
    """Planted by the tests under a name that the wire knows and the registry doesn't."""

    name = "mooncake"
    placement = "one-sided"
    memory = "host"
    network: Network

    def __init__(self, settings: HandoffSettings, kv: KVStore) -> None:
        super().__init__(settings, kv)
        self._network = self.network
        self._memory = kv.regions()
        if not self._memory:
            raise TransportError("the cache's memory can't be registered; use Tcp")
        self._network.registered.append(self._memory)

    def close(self) -> None:
        self._network.registered.remove(self._memory)

    def offer(self, link: Link) -> Inbound:
        return InMemoryInbound(self)

    async def accept(self, offer: TransportOffer, link: Link) -> Outbound:
        region = self._network.regions.get(str(offer.details.get("region")))
        if region is None:
            raise TransportError("the peer's memory is in another process")
        return InMemoryOutbound(self, region, link)


class InMemoryInbound(Inbound):
    """D's end: grants each epoch its pages and hears of finished writes by message."""

    def __init__(self, transport: InMemoryTransport) -> None:
        super().__init__(transport)
        self._key = secrets.token_hex(8)
        self._region = transport.network.regions[self._key] = Region()

    @property
    def offer(self) -> TransportOffer:
        return TransportOffer(self.name, {"region": self._key})

    async def open(self) -> None:
        await asyncio.sleep(0)

    def register(self, epoch: int, landing: Landing) -> None:
        super().register(epoch, landing)
        self._region.grant(epoch, landing.pages)

    def handle(self, message: HandoffMessage) -> None:
        if isinstance(message, PagesWritten):
            layers = range(message.first_layer, message.first_layer + message.num_layers)
            self._placed(message.epoch, message.blocks, layers)

    async def fence(self, epoch: int) -> None:
        self._region.revoke(epoch)
        await super().fence(epoch)

    async def close(self) -> None:
        self._region.revoke()


class InMemoryOutbound(Outbound):
    """P's end: one lane that writes D's pages and says so."""

    def __init__(self, transport: InMemoryTransport, region: Region, link: Link) -> None:
        super().__init__(transport, link)
        self._network = transport.network
        self._region = region
        self._link = link
        self.start_lane(self._send, "in-memory")

    def _send(self, write: PageWrite) -> Written:
        payload = memoryview(write.pages.export(write.source_blocks, write.layers))
        if self._network.holds:
            self._network.held.set()
            assert self._network.release.wait(patience(20))
        try:
            self._region.write(write, payload)
        except TransportError:
            self._network.num_refused += 1
            raise
        blocks, layers = list(write.target_blocks), write.layers
        message = PagesWritten(write.epoch, 0, blocks, write.num_bytes, layers.start, len(layers))
        self._loop.call_soon_threadsafe(self._link.send, message)
        checksum = payload_checksum(blocks, layers, payload)
        return Written(write.num_bytes, checksum if self._link.settings.checksum else 0)

    def _interrupt(self) -> None:
        if not self._network.is_stopped:
            self._network.release.set()
