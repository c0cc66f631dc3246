"""The cudaIpc transport: P's GPU writes D's cache itself, one launch for all pages of a chunk.

P maps D's cache, and the gates beside it, by descriptors that it gets at D's door (`door`). A
kernel (`tandem_kernels.page_push`) writes the pages and sums them in one pass, then D's GPU sums
what it has and compares. No byte passes through the host.

D's pages are safe by *revocation*, although no mapping can be revoked. Each session has a gate: one
word in D's memory that holds a generation and counts who is inside. P's programs enter it before
their first write and leave it after their last one; one that comes after D has shut it writes
nothing, whenever its launch was made. So when `close` has shut the gate and then seen no one
inside, no byte of this session can land any more, however long P was stopped and whenever it wakes
(docs/adr/0019). Someone may stay inside: a P that was killed in a copy. `close` then waits until
the system says that P's process has ended, which takes its work off the GPU; until then the pages
are in quarantine, and the ledger says so.

Steps that were launched before D gave the pages away may still write to them for their former
sequence. D tells P when they are over (`PagesReady`), and P's writes of the epoch wait for it.

A probe's pages go through a scratch room beside the gates, one write at a time.
"""

import asyncio
import os
import queue
import select
import socket
import struct
import threading
from typing import Final

from tandem_engine.errors import GateShutError, StagingUnavailableError
from tandem_engine.handoff.errors import TransportError
from tandem_engine.handoff.pages import place_seed
from tandem_engine.handoff.settings import HandoffSettings
from tandem_engine.handoff.transports.base import (
    MAX_WRITE_BYTES,
    Inbound,
    Link,
    Outbound,
    PageWrite,
    Transport,
    Written,
)
from tandem_engine.handoff.transports.door import Door, visit
from tandem_engine.handoff.transports.landing import Landing
from tandem_engine.memory import Gate, OpenCache, PeerCache
from tandem_engine.step import KVStore
from tandem_wire.handoff import HandoffMessage, PagesReady, PagesWritten, SlotFreed, TransportOffer

_IN_CACHE: Final = -1
_SCRATCH: Final = 0
"""The slot of a write: none, or the scratch room."""
_PEER_PROCESS: Final = 77
"""SO_PEERPIDFD of Linux 6.5: a descriptor that says when the peer's process has ended."""
_LOOK_SECONDS: Final = 0.001
_LOOK_FOR_END_SECONDS: Final = 0.05
_REST_SECONDS: Final = 1.0
"""From when a writer has left that was inside when its gate was shut; see the ADR's last part."""


class CudaIpcTransport(Transport):
    """From one GPU's cache into another's, or into another part of the same GPU's memory."""

    name = "cudaIpc"
    placement = "one-sided"
    memory = "device"

    def __init__(self, settings: HandoffSettings, kv: KVStore) -> None:
        super().__init__(settings, kv)
        try:
            self.cache: OpenCache = kv.open_cache()
        except StagingUnavailableError as error:
            raise TransportError(str(error)) from error
        # Last: without a GPU's memory no directory helps.
        if not settings.shm_dir:
            self.cache.close()
            raise TransportError(
                "TANDEM_SHM_DIR is not set; set it to a directory that the workers of a node share"
            )

    def offer(self, link: Link) -> Inbound:
        return CudaIpcInbound(self, link)

    async def accept(self, offer: TransportOffer, link: Link) -> Outbound:
        gate, generation = offer.details.get("gate"), offer.details.get("generation")
        if not (isinstance(gate, int) and isinstance(generation, int)):
            raise TransportError("the peer's offer names no gate")
        descriptors = await visit(link.settings, offer)
        try:
            cache = self._kv.map_cache(descriptors, offer.details)
        except StagingUnavailableError as error:
            raise TransportError(f"can't map the peer's cache: {error}") from error
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return CudaIpcOutbound(self, link, cache, Gate(gate, generation))

    def close(self) -> None:
        self.cache.close()


class CudaIpcInbound(Inbound):
    """D's end: a gate of its own, and a thread that checks what P says it has written."""

    def __init__(self, transport: CudaIpcTransport, link: Link) -> None:
        """Raises TransportError when there is no gate left, or no room for a door."""
        super().__init__(transport)
        self._loop = asyncio.get_running_loop()
        self._link = link
        self._cache = transport.cache
        try:
            self._gate = self._cache.open_gate()
        except StagingUnavailableError as error:
            raise TransportError(str(error)) from error
        self._writer = -1  # a descriptor that says when P's process has ended
        self._queue: queue.SimpleQueue[PagesWritten | None] = queue.SimpleQueue()
        self._ended: asyncio.Future[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        try:
            self._door = Door(link.settings, self._give)
        except TransportError:
            self._cache.give_back(self._gate)
            raise

    @property
    def offer(self) -> TransportOffer:
        gate = {"gate": self._gate.number, "generation": self._gate.generation}
        return TransportOffer(self.name, {**self._door.details, **self._cache.details, **gate})

    def _give(self, visitor: socket.socket) -> tuple[int, ...]:
        try:
            room = visitor.getsockopt(socket.SOL_SOCKET, _PEER_PROCESS, struct.calcsize("i"))
        except OSError as error:
            raise StagingUnavailableError(
                f"the system doesn't tell when a peer's process has ended (SO_PEERPIDFD: {error}); "
                "Linux 6.5 does"
            ) from error
        self._writer = struct.unpack("i", room)[0]
        return self._cache.descriptors()

    async def open(self) -> None:
        await self._door.close()
        if self._writer < 0:
            raise TransportError("the peer chose cudaIpc, but never came for the cache")
        self._ended = self._loop.create_future()
        threading.Thread(
            target=self._run, args=(self._ended,), name=f"kv-in-{self.name}", daemon=True
        ).start()

    def register(self, epoch: int, landing: Landing) -> None:
        super().register(epoch, landing)
        self._tell_when_ready(epoch, landing)

    def _tell_when_ready(self, epoch: int, landing: Landing) -> None:
        if self._landings.get(epoch) is not landing:
            return
        if landing.is_settled():
            self._link.send(PagesReady(epoch))
        else:
            self._loop.call_later(_LOOK_SECONDS, self._tell_when_ready, epoch, landing)

    def handle(self, message: HandoffMessage) -> None:
        """P has written some pages."""
        if isinstance(message, PagesWritten):
            self._queue.put(message)

    def _run(self, ended: asyncio.Future[None]) -> None:
        while (message := self._queue.get()) is not None:
            layers = range(message.first_layer, message.first_layer + message.num_layers)
            try:
                self._check(message.epoch, message.blocks, layers, self._cache)
            except Exception as error:
                self._loop.call_soon_threadsafe(self._link.on_lost, error)
            if message.slot == _SCRATCH:
                self._loop.call_soon_threadsafe(self._link.send, SlotFreed(_SCRATCH))
        self._loop.call_soon_threadsafe(ended.set_result, None)

    async def close(self) -> None:
        if self._closing is None:
            self._closing = self._loop.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        await self._door.close()
        self._queue.put(None)
        if self._ended is not None:
            await self._ended
        self._cache.shut(self._gate)
        if await self._wait_for_writers():
            self._cache.give_back(self._gate)
        if self._writer >= 0:
            os.close(self._writer)

    async def _wait_for_writers(self) -> bool:
        """Until nothing of this session can land. False: its gate still counts a dead writer."""
        pause = _LOOK_SECONDS
        while self._cache.num_inside(self._gate):
            self.in_quarantine = True
            if _has_ended(self._writer):
                return not self._cache.num_inside(self._gate)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LOOK_FOR_END_SECONDS)
        if self.in_quarantine:
            await asyncio.sleep(_REST_SECONDS)
        return True


class CudaIpcOutbound(Outbound):
    """P's end: lanes that launch and wait for their launch."""

    def __init__(
        self, transport: CudaIpcTransport, link: Link, cache: PeerCache, gate: Gate
    ) -> None:
        super().__init__(transport, link)
        self.write_bytes = min(link.settings.write_bytes or cache.write_bytes, MAX_WRITE_BYTES)
        self.least_write_bytes = self.write_bytes  # what goes in one launch is never cut
        self.num_lanes = cache.num_lanes
        self.probe_bytes = min(self.write_bytes, transport.cache.scratch_bytes)
        self._link = link
        self._checksum = link.settings.checksum
        self._cache = cache
        self._gate = gate
        self._ready: dict[int, asyncio.Future[None]] = {}
        self._scratch: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._scratch.put(True)
        for lane in range(cache.num_lanes):
            self.start_lane(self._send, f"{self.name}-{lane}")

    def handle(self, message: HandoffMessage) -> None:
        """An epoch's pages may be written, or the scratch room is free again."""
        match message:
            case PagesReady(epoch):
                ready = self._readiness(epoch)
                if not ready.done():
                    ready.set_result(None)
            case SlotFreed():
                self._scratch.put(True)

    def _readiness(self, epoch: int) -> "asyncio.Future[None]":
        return self._ready.setdefault(epoch, self._loop.create_future())

    async def write(self, write: PageWrite) -> Written:
        await asyncio.shield(self._readiness(write.epoch))
        return await super().write(write)

    async def fence(self, epoch: int) -> None:
        self._readiness(epoch).cancel()
        await super().fence(epoch)

    def forget(self, epoch: int) -> None:
        self._ready.pop(epoch, None)

    def _send(self, write: PageWrite) -> Written:
        if write.pages.are_of_a_cache:
            return self._push(write, _IN_CACHE)
        if not self._scratch.get():
            self._scratch.put(False)  # whatever comes next must not wait either
            raise TransportError("the session has ended")
        try:
            return self._push(write, _SCRATCH)
        except BaseException:
            self._scratch.put(True)
            raise

    def _push(self, write: PageWrite, slot: int) -> Written:
        blocks, layers = write.target_blocks, write.layers
        seed = place_seed(blocks, layers) if self._checksum else None
        try:
            checksum = write.pages.push(
                self._cache, self._gate, write.source_blocks, blocks, layers, seed
            )
        except GateShutError as error:
            raise ConnectionResetError(str(error)) from error
        message = PagesWritten(
            write.epoch, slot, list(blocks), write.num_bytes, layers.start, len(layers)
        )
        self._loop.call_soon_threadsafe(self._link.send, message)
        return Written(write.num_bytes, checksum)

    def _interrupt(self) -> None:
        for ready in self._ready.values():
            ready.cancel()
        for _ in range(self._cache.num_lanes):
            self._scratch.put(False)

    async def close(self) -> None:
        await super().close()
        self._cache.close()


def _has_ended(process: int) -> bool:
    """Whether a process has ended, with all of its files: what it had on the GPU went with them."""
    poller = select.poll()
    poller.register(process, select.POLLIN)
    return bool(poller.poll(0))
