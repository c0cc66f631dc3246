"""The cudaIpcRing transport: a staging ring in D's GPU memory, which P's GPU writes over NVLink.

It stands in for `cudaIpc` where P can't write D's cache itself. D makes the ring when P comes to
its door (`door`), so an offer to a worker of another host costs no GPU memory. Whether a GPU can
map the memory of another one is found out by mapping it; P then says no to this transport and takes
the next one.
"""

import os
import socket

from tandem_engine.errors import StagingUnavailableError
from tandem_engine.handoff.errors import TransportError
from tandem_engine.handoff.settings import HandoffSettings
from tandem_engine.handoff.transports.base import Inbound, Link, Outbound
from tandem_engine.handoff.transports.door import Door, visit
from tandem_engine.handoff.transports.ring import (
    RingInbound,
    RingOutbound,
    RingShape,
    RingTransport,
)
from tandem_engine.step import KVStore
from tandem_wire.handoff import TransportOffer


class CudaIpcRingTransport(RingTransport):
    """From GPU to GPU of one host, through a ring."""

    name = "cudaIpcRing"
    memory = "device"

    def __init__(self, settings: HandoffSettings, kv: KVStore) -> None:
        # First: without a GPU's memory no directory helps.
        try:
            kv.make_staging(1).close()
        except StagingUnavailableError as error:
            raise TransportError(str(error)) from error
        super().__init__(settings, kv)

    def offer(self, link: Link) -> Inbound:
        return CudaIpcRingInbound(self, link)

    async def accept(self, offer: TransportOffer, link: Link) -> Outbound:
        shape = RingShape.offered(offer)
        descriptors = await visit(link.settings, offer)
        try:
            ring = self._kv.map_staging(descriptors[0], shape.num_bytes)
        except StagingUnavailableError as error:
            raise TransportError(f"can't map the peer's memory: {error}") from error
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return RingOutbound(self, link, shape, ring)


class CudaIpcRingInbound(RingInbound):
    """D's end: a door until P has answered, the ring from P's visit on."""

    def __init__(self, transport: CudaIpcRingTransport, link: Link) -> None:
        """Raises TransportError when the directory takes no socket."""
        settings = link.settings
        shape = RingShape.of(link, settings.device_slot_bytes, settings.device_ring_bytes)
        super().__init__(transport, link, shape)
        self._door = Door(settings, self._give)

    @property
    def offer(self) -> TransportOffer:
        return TransportOffer(self.name, self._door.details | self._shape.details)

    def _give(self, visitor: socket.socket) -> list[int]:
        if self._staging is None:
            self._staging = self._link.kv.make_staging(self._shape.num_bytes)
        return [self._staging.descriptor()]

    async def open(self) -> None:
        await self._door.close()
        if self._staging is None:
            raise TransportError("the peer chose cudaIpcRing, but never came for the ring")
        await super().open()

    async def close(self) -> None:
        await self._door.close()
        await super().close()
