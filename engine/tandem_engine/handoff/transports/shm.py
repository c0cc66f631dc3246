"""The shm transport: a staging ring in a directory that both workers of one host see.

D makes the ring, a file of equal slots behind a page that holds a nonce. P maps the file and reads
the nonce there: if it is the handshake's, both see one file. D then unlinks the file, so that
nothing is left of it however the two end. P exports straight into a slot and says so on the
control connection (`PagesWritten`); D checks, takes the bytes into its cache and gives the slot
back (`SlotFreed`).

P never maps D's cache itself: a P that was stopped in the middle of a copy and is taken for dead
would finish the copy when it wakes, into pages that D has given to another request. In the ring it
can only spoil the ring of a session that is over.
"""

import asyncio
import contextlib
import mmap
import os
import queue
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tandem_engine.handoff.errors import TransportError
from tandem_engine.handoff.pages import payload_checksum
from tandem_engine.handoff.settings import HandoffSettings
from tandem_engine.handoff.transports.base import (
    Inbound,
    Link,
    Outbound,
    PageWrite,
    Transport,
    Written,
)
from tandem_wire.handoff import HandoffMessage, PagesWritten, SlotFreed, TransportOffer

_HEAD_BYTES: Final = mmap.PAGESIZE
_LANES: Final = 2


class ShmTransport(Transport):
    """Through memory that two workers of one host share."""

    name = "shm"
    placement = "staged"
    memory = "host"

    def missing(self, settings: HandoffSettings) -> str:
        if settings.shm_dir:
            return ""
        return "TANDEM_SHM_DIR is not set; set it to a directory that the workers of a node share"

    def offer(self, link: Link) -> Inbound:
        return ShmInbound(self, link)

    def accept(self, offer: TransportOffer, link: Link) -> Outbound:
        return ShmOutbound(self, offer, link)


class ShmInbound(Inbound):
    """D's end: owns the ring and one thread that empties slots."""

    def __init__(self, transport: ShmTransport, link: Link) -> None:
        """Make the ring file. Raises TransportError when the directory has no room for it."""
        super().__init__(transport)
        settings, kv = link.settings, link.kv
        self._loop = asyncio.get_running_loop()
        self._link = link
        self._slot_bytes = max(settings.write_bytes or kv.write_bytes, kv.layout.layer_bytes)
        self._num_slots = max(2, settings.shm_ring_bytes // self._slot_bytes)
        self._unpin: Callable[[], None] | None = None
        self._queue: queue.SimpleQueue[PagesWritten | None] = queue.SimpleQueue()
        self._ended: asyncio.Future[None] | None = None
        self._path = Path(settings.shm_dir) / f"tandem-ring-{secrets.token_hex(8)}"
        self._nonce = secrets.token_hex(16)
        self._map = self._make()

    def _make(self) -> mmap.mmap:
        size = _HEAD_BYTES + self._num_slots * self._slot_bytes
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                # Really allocated: a sparse file in a full directory would be SIGBUS later.
                os.posix_fallocate(descriptor, 0, size)
                ring = mmap.mmap(descriptor, size)
            except BaseException:
                self.unlink()
                raise
            finally:
                os.close(descriptor)
        except OSError as error:
            raise TransportError(
                f"can't make a ring of {size} bytes at {self._path}: {error}; "
                "free some of TANDEM_SHM_DIR or make it larger"
            ) from error
        ring[: len(self._nonce)] = self._nonce.encode()
        return ring

    @property
    def offer(self) -> TransportOffer:
        details: dict[str, str | int] = {
            "file": self._path.name,
            "nonce": self._nonce,
            "slot_bytes": self._slot_bytes,
            "num_slots": self._num_slots,
        }
        return TransportOffer(self.name, details)

    def unlink(self) -> None:
        """Remove the file's name; the ring lives as long as a process maps it."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()

    async def open(self) -> None:
        self.unlink()
        with memoryview(self._map) as ring:
            self._unpin = self._link.kv.pin(ring)
        self._ended = self._loop.create_future()
        threading.Thread(
            target=self._run, args=(self._ended,), name="kv-in-shm", daemon=True
        ).start()

    def handle(self, message: HandoffMessage) -> None:
        """P has filled a slot."""
        if isinstance(message, PagesWritten):
            self._queue.put(message)

    def _run(self, ended: asyncio.Future[None]) -> None:
        while (message := self._queue.get()) is not None:
            if not 0 <= message.slot < self._num_slots or message.num_bytes > self._slot_bytes:
                failure = TransportError(
                    f"the peer wrote {message.num_bytes} bytes to slot {message.slot} of a ring "
                    f"of {self._num_slots} slots of {self._slot_bytes} bytes"
                )
                self._loop.call_soon_threadsafe(self._link.on_lost, failure)
                continue
            start = _HEAD_BYTES + message.slot * self._slot_bytes
            with memoryview(self._map) as ring, ring[start : start + message.num_bytes] as payload:
                try:
                    layers = range(message.first_layer, message.first_layer + message.num_layers)
                    self._land(message.epoch, message.blocks, layers, payload)
                except Exception as error:
                    self._loop.call_soon_threadsafe(self._link.on_lost, error)
            self._loop.call_soon_threadsafe(self._link.send, SlotFreed(message.slot))
        self._loop.call_soon_threadsafe(ended.set_result, None)

    async def close(self) -> None:
        self.unlink()
        self._queue.put(None)
        if self._ended is not None:
            await self._ended
        if self._unpin is not None:
            self._unpin()
            self._unpin = None
        self._map.close()


class ShmOutbound(Outbound):
    """P's end: two lanes that fill slots."""

    def __init__(self, transport: ShmTransport, offer: TransportOffer, link: Link) -> None:
        """Map D's ring. Raises TransportError when it is not found here."""
        super().__init__(transport, link)
        self._link = link
        self._checksum = link.settings.checksum
        self._slot_bytes = int(offer.details.get("slot_bytes", 0))
        num_slots = int(offer.details.get("num_slots", 0))
        size = _HEAD_BYTES + num_slots * self._slot_bytes
        self._map = _map_ring(link.settings.shm_dir, offer, size)
        self.max_write_bytes = self._slot_bytes
        with memoryview(self._map) as ring:
            self._unpin: Callable[[], None] | None = link.kv.pin(ring)
        self._free: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        for slot in range(num_slots):
            self._free.put(slot)
        for lane in range(_LANES):
            self.start_lane(self._send, f"shm-{lane}")

    def handle(self, message: HandoffMessage) -> None:
        """D has taken a slot's bytes."""
        if isinstance(message, SlotFreed):
            self._free.put(message.slot)

    def _send(self, write: PageWrite) -> Written:
        num_bytes, blocks, layers = write.num_bytes, write.target_blocks, write.layers
        if num_bytes > self._slot_bytes:
            raise TransportError(
                f"a write of {num_bytes} bytes doesn't fit a slot of {self._slot_bytes}"
            )
        slot = self._free.get()
        if slot is None:
            raise TransportError("the session has ended")
        start = _HEAD_BYTES + slot * self._slot_bytes
        try:
            with memoryview(self._map) as ring, ring[start : start + num_bytes] as payload:
                write.pages.export_into(write.source_blocks, layers, payload)
                checksum = payload_checksum(blocks, layers, payload) if self._checksum else 0
        except BaseException:
            self._free.put(slot)
            raise
        message = PagesWritten(
            write.epoch, slot, list(blocks), num_bytes, layers.start, len(layers)
        )
        self._loop.call_soon_threadsafe(self._link.send, message)
        return Written(num_bytes, checksum)

    def _interrupt(self) -> None:
        for _ in range(_LANES):
            self._free.put(None)

    async def close(self) -> None:
        await super().close()
        if self._unpin is not None:
            self._unpin()
            self._unpin = None
        self._map.close()


def _map_ring(directory: str, offer: TransportOffer, size: int) -> mmap.mmap:
    """D's ring, if it is in this host's directory. Raises TransportError."""
    name, nonce = str(offer.details.get("file", "")), str(offer.details.get("nonce", ""))
    if not nonce or name != Path(name).name:
        raise TransportError("the peer's offer names no ring file")
    try:
        descriptor = os.open(Path(directory) / name, os.O_RDWR | os.O_NOFOLLOW)
        try:
            ring = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        raise TransportError(
            f"can't map the peer's ring in {directory}: {error}; "
            "give both workers the same TANDEM_SHM_DIR"
        ) from error
    if ring[: len(nonce)] != nonce.encode():
        ring.close()
        raise TransportError(
            f"{name} in {directory} is not the peer's ring; "
            "give both workers the same TANDEM_SHM_DIR"
        )
    return ring
