"""The shm transport: a staging ring in a directory that both workers of one host see.

D makes the ring, a file of equal slots behind a page that holds a nonce; P maps it when the nonce
that it reads there is the one of the handshake, which proves that both see the same file. D then
unlinks the file, so that nothing is left of it however the two end. P exports straight into a slot
and says so on the control connection (`PagesWritten`); D checks, takes the bytes into its cache and
gives the slot back (`SlotFreed`).

P never maps D's cache itself: a P that was stopped in the middle of a copy and is taken for dead
would finish the copy when it wakes, into pages that D has given to somebody else. In the ring it
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
from tandem_engine.handoff.transports.base import Inbound, Outbound, PageWrite, Written
from tandem_wire.handoff import PagesWritten, SlotFreed, TransportOffer

_HEAD_BYTES: Final = mmap.PAGESIZE
_LANES: Final = 2

Pin = Callable[[memoryview], Callable[[], None]]
"""`KVStore.pin`."""


class ShmInbound(Inbound):
    """D's end: owns the ring and one thread that empties slots."""

    name = "shm"

    def __init__(
        self,
        directory: str,
        slot_bytes: int,
        num_slots: int,
        send_freed: Callable[[SlotFreed], None],
        on_lost: Callable[[Exception], None],
        pin: Pin,
    ) -> None:
        """Make the ring file. Raises TransportError when the directory has no room for it."""
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._slot_bytes = slot_bytes
        self._num_slots = num_slots
        self._send_freed = send_freed
        self._on_lost = on_lost
        self._pin = pin
        self._unpin: Callable[[], None] | None = None
        self._queue: queue.SimpleQueue[PagesWritten | None] = queue.SimpleQueue()
        self._ended: asyncio.Future[None] | None = None
        self._path = Path(directory) / f"tandem-ring-{secrets.token_hex(8)}"
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
            raise TransportError(f"no ring of {size} bytes at {self._path}: {error}") from error
        ring[: len(self._nonce)] = self._nonce.encode()
        return ring

    @property
    def offer(self) -> TransportOffer:
        """What P needs to find the ring and to know it."""
        details: dict[str, str | int] = {
            "file": self._path.name,
            "nonce": self._nonce,
            "slot_bytes": self._slot_bytes,
            "num_slots": self._num_slots,
        }
        return TransportOffer("shm", details)

    def unlink(self) -> None:
        """Take the name away; the ring lives as long as somebody maps it."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()

    async def open(self) -> None:
        self.unlink()
        with memoryview(self._map) as ring:
            self._unpin = self._pin(ring)
        self._ended = self._loop.create_future()
        threading.Thread(
            target=self._run, args=(self._ended,), name="kv-in-shm", daemon=True
        ).start()

    def written(self, message: PagesWritten) -> None:
        """P filled a slot; called on the loop."""
        self._queue.put(message)

    def _run(self, ended: asyncio.Future[None]) -> None:
        while (message := self._queue.get()) is not None:
            if not 0 <= message.slot < self._num_slots or message.num_bytes > self._slot_bytes:
                failure = TransportError(f"slot {message.slot} of {message.num_bytes} bytes")
                self._loop.call_soon_threadsafe(self._on_lost, failure)
                continue
            start = _HEAD_BYTES + message.slot * self._slot_bytes
            with memoryview(self._map) as ring, ring[start : start + message.num_bytes] as payload:
                try:
                    layers = range(message.first_layer, message.first_layer + message.num_layers)
                    self._land(message.epoch, message.blocks, layers, payload)
                except Exception as error:
                    self._loop.call_soon_threadsafe(self._on_lost, error)
            self._loop.call_soon_threadsafe(self._send_freed, SlotFreed(message.slot))
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

    def __init__(
        self,
        directory: str,
        offer: TransportOffer,
        send_written: Callable[[PagesWritten], None],
        on_lost: Callable[[Exception], None],
        *,
        pin: Pin,
        checksum: bool,
    ) -> None:
        """Map D's ring. Raises TransportError when it isn't to be found here."""
        super().__init__(on_lost)
        self._checksum = checksum
        self._send_written = send_written
        self._slot_bytes = int(offer.details.get("slot_bytes", 0))
        num_slots = int(offer.details.get("num_slots", 0))
        self._map = self._attach(directory, offer, _HEAD_BYTES + num_slots * self._slot_bytes)
        self.max_write_bytes = self._slot_bytes
        with memoryview(self._map) as ring:
            self._unpin: Callable[[], None] | None = pin(ring)
        self._free: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        for slot in range(num_slots):
            self._free.put(slot)
        for lane in range(_LANES):
            self.start_lane(self._send, f"shm-{lane}")

    @staticmethod
    def _attach(directory: str, offer: TransportOffer, size: int) -> mmap.mmap:
        name, nonce = str(offer.details.get("file", "")), str(offer.details.get("nonce", ""))
        if not directory or not nonce or name != Path(name).name:
            raise TransportError("no directory is shared with the peer")
        try:
            descriptor = os.open(Path(directory) / name, os.O_RDWR | os.O_NOFOLLOW)
            try:
                ring = mmap.mmap(descriptor, size)
            finally:
                os.close(descriptor)
        except (OSError, ValueError) as error:
            raise TransportError(f"the peer's ring is not to be had here: {error}") from error
        if ring[: len(nonce)] != nonce.encode():
            ring.close()
            raise TransportError("the peer's ring is another one than this host's")
        return ring

    def freed(self, message: SlotFreed) -> None:
        """D has taken a slot's bytes; called on the loop."""
        self._free.put(message.slot)

    def _send(self, write: PageWrite) -> Written:
        num_bytes, blocks, layers = write.num_bytes, write.target_blocks, write.layers
        if num_bytes > self._slot_bytes:
            raise TransportError(f"a write of {num_bytes} bytes for a slot of {self._slot_bytes}")
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
        self._loop.call_soon_threadsafe(self._send_written, message)
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
