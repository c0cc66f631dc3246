"""Staging rings: memory of D's that P fills slot by slot, and D empties into its cache.

P packs pages into a free slot and says so on the control connection (`PagesWritten`); D checks,
takes the bytes into its cache and gives the slot back (`SlotFreed`). A slot belongs to P from the
start or from `SlotFreed` on until `PagesWritten`, else to D. What the memory is and how P comes to
map it is the transport's own business.

P never maps D's cache itself: a P that was stopped in the middle of a copy and is taken for dead
would finish the copy when it wakes, into pages that D has given to another request. In the ring it
can only spoil the ring of a session that is over.
"""

import asyncio
import mmap
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import xxhash

from tandem_engine.errors import StagingUnavailableError
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
from tandem_engine.memory import Staging
from tandem_engine.step import KVStore
from tandem_wire.handoff import HandoffMessage, PagesWritten, SlotFreed, TransportOffer

_ALIGNMENT: Final = 16
"""Of every slot, so that a GPU reads and writes whole words."""


@dataclass(frozen=True, slots=True)
class RingShape:
    """Equal slots, one behind the other."""

    slot_bytes: int
    num_slots: int

    @classmethod
    def of(cls, link: Link, write_bytes: int, ring_bytes: int) -> "RingShape":
        """Slots of the size of a good write, at least of one layer of one block."""
        slot_bytes = max(link.settings.write_bytes or write_bytes, link.kv.layout.layer_bytes)
        slot_bytes = -(-slot_bytes // _ALIGNMENT) * _ALIGNMENT
        return cls(slot_bytes, max(2, ring_bytes // slot_bytes))

    @classmethod
    def offered(cls, offer: TransportOffer) -> "RingShape":
        """The shape that is written in an offer. Raises TransportError when none is."""
        slot_bytes = offer.details.get("slot_bytes")
        num_slots = offer.details.get("num_slots")
        if not (isinstance(slot_bytes, int) and isinstance(num_slots, int)):
            raise TransportError("the peer's offer does not say how large its ring is")
        if slot_bytes < 1 or num_slots < 1 or slot_bytes > MAX_WRITE_BYTES:
            raise TransportError(f"the peer offers {num_slots} slots of {slot_bytes} bytes")
        return cls(slot_bytes, num_slots)

    @property
    def num_bytes(self) -> int:
        """Size of the whole ring."""
        return self.slot_bytes * self.num_slots

    @property
    def details(self) -> dict[str, str | int]:
        """Its part of an offer."""
        return {"slot_bytes": self.slot_bytes, "num_slots": self.num_slots}


class RingTransport(Transport):
    """Through a ring that D and P find in a directory of their host."""

    placement = "staged"

    def __init__(self, settings: HandoffSettings, kv: KVStore) -> None:
        super().__init__(settings, kv)
        if not settings.shm_dir:
            raise TransportError(
                "TANDEM_SHM_DIR is not set; set it to a directory that the workers of a node share"
            )


class RingInbound(Inbound):
    """D's end: one thread that empties slots. The staging memory is there when it is opened."""

    def __init__(self, transport: Transport, link: Link, shape: RingShape) -> None:
        super().__init__(transport)
        self._loop = asyncio.get_running_loop()
        self._link = link
        self._shape = shape
        self._staging: Staging | None = None
        self._queue: queue.SimpleQueue[PagesWritten | None] = queue.SimpleQueue()
        self._full: set[int] = set()
        self._ended: asyncio.Future[None] | None = None

    async def open(self) -> None:
        assert self._staging is not None
        self._ended = self._loop.create_future()
        threading.Thread(
            target=self._run, args=(self._staging, self._ended), name=f"kv-in-{self.name}",
            daemon=True,
        ).start()  # fmt: skip

    def handle(self, message: HandoffMessage) -> None:
        """P has filled a slot."""
        if not isinstance(message, PagesWritten):
            return
        wrong = self._find_fault(message)
        if wrong:
            self._link.on_lost(TransportError(wrong))
            return
        self._full.add(message.slot)
        self._queue.put(message)

    def _find_fault(self, message: PagesWritten) -> str:
        shape, slot = self._shape, message.slot
        num_bytes = len(message.blocks) * message.num_layers * self._link.kv.layout.layer_bytes
        if not 0 <= slot < shape.num_slots or message.num_bytes > shape.slot_bytes:
            return (
                f"the peer wrote {message.num_bytes} bytes to slot {slot} of a ring "
                f"of {shape.num_slots} slots of {shape.slot_bytes} bytes"
            )
        if message.num_bytes != num_bytes:
            return f"the peer wrote {message.num_bytes} bytes for pages of {num_bytes} bytes"
        if slot in self._full:
            return f"the peer wrote to slot {slot}, which was not its own"
        return ""

    def _run(self, staging: Staging, ended: asyncio.Future[None]) -> None:
        while (message := self._queue.get()) is not None:
            layers = range(message.first_layer, message.first_layer + message.num_layers)
            at = message.slot * self._shape.slot_bytes
            try:
                self._land_staged(message.epoch, message.blocks, layers, staging, at)
            except Exception as error:
                self._loop.call_soon_threadsafe(self._link.on_lost, error)
            self._loop.call_soon_threadsafe(self._free, message.slot)
        self._loop.call_soon_threadsafe(ended.set_result, None)

    def _free(self, slot: int) -> None:
        self._full.discard(slot)
        self._link.send(SlotFreed(slot))

    async def close(self) -> None:
        self._queue.put(None)
        if self._ended is not None:
            await self._ended
        if self._staging is not None:
            self._staging.close()


class RingOutbound(Outbound):
    """P's end: lanes that fill slots of D's ring. `ring` is memory that this side maps."""

    def __init__(self, transport: Transport, link: Link, shape: RingShape, ring: Staging) -> None:
        super().__init__(transport, link)
        self._link = link
        self._checksum = link.settings.checksum
        self._shape = shape
        self._staging = ring
        self.write_bytes = shape.slot_bytes
        self._unused: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._full: set[int] = set()
        for slot in range(shape.num_slots):
            self._unused.put(slot)
        self.num_lanes = ring.num_lanes
        for lane in range(self.num_lanes):
            self.start_lane(self._send, f"{self.name}-{lane}")

    def handle(self, message: HandoffMessage) -> None:
        """D has taken a slot's bytes."""
        if not isinstance(message, SlotFreed):
            return
        if message.slot not in self._full:
            failure = TransportError(f"the peer freed slot {message.slot}, which was not full")
            self._link.on_lost(failure)
            return
        self._full.discard(message.slot)
        self._unused.put(message.slot)

    def _send(self, write: PageWrite) -> Written:
        num_bytes, blocks, layers = write.num_bytes, write.target_blocks, write.layers
        if num_bytes > self._shape.slot_bytes:
            raise TransportError(
                f"a write of {num_bytes} bytes doesn't fit a slot of {self._shape.slot_bytes}"
            )
        slot = self._unused.get()
        if slot is None:
            self._unused.put(None)  # whatever this lane takes next must not wait either
            raise TransportError("the session has ended")
        try:
            checksum = self._fill(slot, write)
        except BaseException:
            self._unused.put(slot)
            raise
        self._full.add(slot)
        message = PagesWritten(
            write.epoch, slot, list(blocks), num_bytes, layers.start, len(layers)
        )
        self._loop.call_soon_threadsafe(self._link.send, message)
        return Written(num_bytes, checksum)

    def _fill(self, slot: int, write: PageWrite) -> int:
        """Bring a write's pages into D's slot; their checksum. OSError: the session is lost."""
        return self._stage(write, slot * self._shape.slot_bytes)

    def _stage(self, write: PageWrite, at: int) -> int:
        """Pack a write's pages into the memory that this side maps; their checksum."""
        blocks, layers = write.target_blocks, write.layers
        seed = place_seed(blocks, layers) if self._checksum else None
        return write.pages.stage(write.source_blocks, layers, self._staging, at, seed)

    def _interrupt(self) -> None:
        for _ in range(self.num_lanes):
            self._unused.put(None)

    async def close(self) -> None:
        await super().close()
        self._staging.close()


class HostStaging(Staging):
    """Staging in the host's memory: `mapping` from byte `start` on."""

    kind = "host"

    def __init__(self, kv: KVStore, mapping: mmap.mmap, start: int) -> None:
        self.num_bytes = len(mapping) - start
        self._kv = kv
        self._map = mapping
        self._start = start

    def descriptor(self) -> int:
        raise StagingUnavailableError("a ring in a file has a name, no descriptor")

    def _view(self, at: int, num_bytes: int) -> memoryview:
        start = self._start + at
        with memoryview(self._map) as whole:
            return whole[start : start + num_bytes]

    def _size(self, blocks: Sequence[int], layers: range) -> int:
        return len(blocks) * len(layers) * self._kv.layout.layer_bytes

    def _pieces(
        self, blocks: Sequence[int], layers: range, at: int
    ) -> Iterator[tuple[range, memoryview]]:
        """Layers and their packed bytes, as much at a time as suits the store."""
        step = max(1, self._kv.write_bytes // self._size(blocks, range(1)))
        for first in range(0, len(layers), step):
            some = layers[first : first + step]
            num_bytes = self._size(blocks, some)
            with self._view(at, num_bytes) as payload:
                yield some, payload
            at += num_bytes

    def stage(self, blocks: Sequence[int], layers: range, at: int, seed: int | None) -> int:
        digest = None if seed is None else xxhash.xxh3_64(seed=seed)
        for some, payload in self._pieces(blocks, layers, at):
            self._kv.export_into(blocks, some, payload)
            if digest is not None:  # while the bytes are in the processor's cache
                digest.update(payload)
        return 0 if digest is None else digest.intdigest()

    def unstage(self, blocks: Sequence[int], layers: range, at: int, seed: int | None) -> int:
        digest = None if seed is None else xxhash.xxh3_64(seed=seed)
        for some, payload in self._pieces(blocks, layers, at):
            if digest is not None:
                digest.update(payload)
            self._kv.import_blocks(blocks, some, payload)
        return 0 if digest is None else digest.intdigest()

    def put(self, data: bytes, at: int, seed: int | None) -> int:
        with self._view(at, len(data)) as payload:
            payload[:] = data
            return _checksum(payload, seed)

    def get(self, num_bytes: int, at: int, seed: int | None) -> tuple[bytes, int]:
        with self._view(at, num_bytes) as payload:
            data = bytes(payload)
        return data, _checksum(data, seed)

    def close(self) -> None:
        self._map.close()


def _checksum(payload: bytes | memoryview, seed: int | None) -> int:
    return 0 if seed is None else xxhash.xxh3_64_intdigest(payload, seed)
