"""Rings that P reaches by a library's remote write: what `nixl` and `mooncake` have in common.

D makes a ring in its own memory for each session, in the host's or in a GPU's, registers it with
the library, and says in its offer where it is. P packs a write into memory of its own, has the
library write it to D's slot, and sends `PagesWritten` when the library has said that it is in D's
memory. From there on it is the ring of `shm`: D checks the bytes, takes them into its cache and
frees the slot.

The library never sees D's cache. Without an RDMA card a registration can't be revoked: UCX then
writes to an address in D's process, whatever is there by then. So D unmaps a ring only when P has
said its last word on every epoch of the session (`Inbound.fence` was called for all of them). Any
other ring is kept mapped, as is memory of P's that an unfinished write may still read. No more than
`MAX_KEPT` of one size are kept: the oldest one is used again then. A write that comes so late
spoils a slot of another session; the checksum shows it, and without checksums D refuses. A
transport that has a better way brings its own memory (`mooncake`).

Memory of a GPU is never freed while the transport lives: P's library may have mapped it, and keeps
such mappings for longer than any session. Once it is safe to use again, another session gets it.
"""

import ctypes
import mmap
import os
import queue
import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import ClassVar, Final, Protocol

from tandem_engine.errors import StagingUnavailableError
from tandem_engine.handoff.errors import TransportError
from tandem_engine.handoff.settings import HandoffSettings
from tandem_engine.handoff.transports.base import Link, Memory, PageWrite, Transport
from tandem_engine.handoff.transports.ring import (
    HostStaging,
    RingInbound,
    RingOutbound,
    RingShape,
)
from tandem_engine.memory import MemoryKind, MemoryRegion, Staging
from tandem_engine.step import KVStore

MAX_KEPT: Final = 4


class Library(Protocol):
    """What holds the registrations."""

    def register(self, region: MemoryRegion) -> object:
        """Let the library use this memory; what `unregister` needs. Raises TransportError."""

    def unregister(self, registration: object) -> None:
        """Take memory back from the library; it is still mapped."""


class Registered(Staging):
    """Memory of this process that the library may read or write, from `address` on."""

    region: MemoryRegion
    registration: object

    def _register(self, library: Library, kept: "deque[Registered] | None") -> None:
        """The last step of making it. `kept`: where `close` puts it if it must stay."""
        self._library = library
        self._kept = kept
        self._is_kept = False
        self._is_closed = False
        try:
            self.registration = library.register(self.region)
        except BaseException:
            self.unmap()
            raise

    @property
    def address(self) -> int:
        """Where it begins, in this process."""
        return self.region.address

    def keep(self) -> None:
        """Have `close` set it aside: a write to it or from it may still be under way."""
        self._is_kept = True

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        if self._is_kept:
            self._set_aside()
        else:
            self._release()

    def _release(self) -> None:
        """What `close` does when nothing of it can be under way."""
        self._library.unregister(self.registration)
        self.unmap()

    def _set_aside(self) -> None:
        """What `close` does when something of it may still be under way."""
        assert self._kept is not None
        self._kept.append(self)

    def reopen(self) -> "Registered":
        """It after `close`, for another session."""
        self._is_kept = self._is_closed = False
        return self

    @abstractmethod
    def unmap(self) -> None:
        """Give the memory back; the library knows of it no more."""


class RegisteredMemory(Registered, HostStaging):
    """Memory of the host."""

    def __init__(
        self,
        library: Library,
        kv: KVStore,
        num_bytes: int,
        kept: deque[Registered] | None = None,
    ) -> None:
        """Raises TransportError: no room for it."""
        mapping = self._map_new(num_bytes)
        HostStaging.__init__(self, kv, mapping, 0)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        self.region = MemoryRegion("host", address, num_bytes)
        with memoryview(mapping) as whole:
            self._unpin = kv.pin(whole)
        self._register(library, kept)

    def _map_new(self, num_bytes: int) -> mmap.mmap:
        return _map(num_bytes)

    def unmap(self) -> None:
        self._unpin()
        HostStaging.close(self)


class RegisteredDeviceMemory(Registered):
    """Memory of the GPU that has the cache."""

    kind = "cuda"

    def __init__(
        self,
        library: Library,
        kv: KVStore,
        num_bytes: int,
        kept: deque[Registered],
        unused: deque[Registered],
    ) -> None:
        """`unused`: where `close` puts it for the next session. Raises TransportError: no room."""
        try:
            self._staging = kv.make_own_staging(num_bytes)
        except StagingUnavailableError as error:
            raise TransportError(f"{num_bytes} bytes of the GPU's memory: {error}") from error
        self._unused = unused
        self.num_bytes = num_bytes
        self.region = self._staging.region
        self._register(library, kept)

    def descriptor(self) -> int:
        return self._staging.descriptor()

    def stage(self, blocks: Sequence[int], layers: range, at: int, seed: int | None) -> int:
        return self._staging.stage(blocks, layers, at, seed)

    def unstage(self, blocks: Sequence[int], layers: range, at: int, seed: int | None) -> int:
        return self._staging.unstage(blocks, layers, at, seed)

    def put(self, data: bytes, at: int, seed: int | None) -> int:
        return self._staging.put(data, at, seed)

    def get(self, num_bytes: int, at: int, seed: int | None) -> tuple[bytes, int]:
        return self._staging.get(num_bytes, at, seed)

    def _release(self) -> None:
        self._unused.append(self)

    def unmap(self) -> None:
        self._staging.close()


MakeMemory = Callable[[int], Registered]
"""Gives registered memory of so many bytes. Raises TransportError."""


class RemoteRingTransport(Transport):
    """Through a library that writes to the memory of another process."""

    placement = "staged"
    memory: Memory = "host"

    def __init__(self, settings: HandoffSettings, kv: KVStore) -> None:
        super().__init__(settings, kv)
        self._checksum = settings.checksum
        self.kept: deque[Registered] = deque()
        self.unused: deque[Registered] = deque()

    @abstractmethod
    def register(self, region: MemoryRegion) -> object:
        """Let the library use this memory; what `unregister` needs. Raises TransportError."""

    @abstractmethod
    def unregister(self, registration: object) -> None:
        """Take memory back from the library; it is still mapped."""

    def make_ring(self, num_bytes: int, kind: MemoryKind = "host") -> Registered:
        """Memory for D's end of a session. Raises TransportError."""
        kept = self._oldest_kept(num_bytes, kind)
        if kept is not None and not self._checksum:
            raise TransportError(
                f"{MAX_KEPT} peers were lost in the middle of a write, so their rings can't be "
                "used again without checksums; start this worker with checksums, or anew"
            )
        return self._make(kept, num_bytes, kind)

    def make_outgoing(self, num_bytes: int, kind: MemoryKind = "host") -> Registered:
        """Memory for P's end of a session. Raises TransportError."""
        return self._make(self._oldest_kept(num_bytes, kind), num_bytes, kind)

    def _make(self, kept: Registered | None, num_bytes: int, kind: MemoryKind) -> Registered:
        if kept is not None:
            self.kept.remove(kept)
            return kept.reopen()
        for memory in self.unused:
            if memory.kind == kind and memory.num_bytes == num_bytes:
                self.unused.remove(memory)
                return memory.reopen()
        if kind == "cuda":
            return RegisteredDeviceMemory(self, self._kv, num_bytes, self.kept, self.unused)
        return RegisteredMemory(self, self._kv, num_bytes, self.kept)

    def _oldest_kept(self, num_bytes: int, kind: MemoryKind) -> Registered | None:
        """The one to use again, when there are too many of this size."""
        same = [
            memory for memory in self.kept if memory.kind == kind and memory.num_bytes == num_bytes
        ]
        return same[0] if len(same) >= MAX_KEPT else None

    def close(self) -> None:
        """Give back what was kept. The subclass has ended the library: nothing writes there."""
        for memories in (self.kept, self.unused):
            while memories:
                memories.popleft().unmap()


class RemoteRingInbound(RingInbound):
    """D's end: a ring in this process's memory, made by `make_ring`. Subclasses make the offer."""

    least_slot_bytes: ClassVar[int] = 0
    """What the library writes well, if it is more than what suits the store."""
    most_slots: ClassVar[int] = 0
    """So many are enough; 0: as many as there is room for."""

    def __init__(
        self,
        transport: Transport,
        link: Link,
        make_ring: MakeMemory,
        shape: RingShape | None = None,
    ) -> None:
        """`shape`: None: the one for memory of the host. Raises TransportError."""
        shape = shape or self._host_shape(link)
        super().__init__(transport, link, shape)
        self._staging = self._ring = make_ring(shape.num_bytes)

    @classmethod
    def _host_shape(cls, link: Link) -> RingShape:
        slot_bytes = max(link.kv.write_bytes, cls.least_slot_bytes)
        shape = RingShape.of(link, slot_bytes, link.settings.shm_ring_bytes)
        num_slots = min(shape.num_slots, cls.most_slots or shape.num_slots)
        return RingShape(shape.slot_bytes, num_slots)

    async def close(self) -> None:
        if self._landings:
            self._ring.keep()
        await super().close()


class RemoteRingOutbound(RingOutbound):
    """P's end: each lane packs a write here and has the library write it to D's slot."""

    def __init__(
        self, transport: Transport, link: Link, shape: RingShape, make_outgoing: MakeMemory
    ) -> None:
        """Raises TransportError."""
        self._outgoing = make_outgoing(Staging.num_lanes * shape.slot_bytes)
        self._interrupted = threading.Event()
        self._places: queue.SimpleQueue[int] = queue.SimpleQueue()
        for lane in range(Staging.num_lanes):
            self._places.put(lane * shape.slot_bytes)
        super().__init__(transport, link, shape, self._outgoing)

    @abstractmethod
    def _put(self, source: int, target: int, num_bytes: int) -> None:
        """Write bytes at the address `source` here to byte `target` of D's ring.

        Returns when they are in D's memory. Raises OSError when they may not get there, and soon
        after `_interrupted` is set; the library may then go on reading.
        """

    def _fill(self, slot: int, write: PageWrite) -> int:
        at = self._places.get()  # there is one for each lane
        try:
            checksum = self._stage(write, at)
            self._put(self._outgoing.address + at, slot * self._shape.slot_bytes, write.num_bytes)
        except OSError:
            self._outgoing.keep()
            raise
        finally:
            self._places.put(at)
        return checksum

    def _interrupt(self) -> None:
        self._interrupted.set()
        super()._interrupt()


def _map(num_bytes: int) -> mmap.mmap:
    """New memory, which shows in /proc/PID/maps under its name. Raises TransportError."""
    descriptor = os.memfd_create("tandem-ring")
    try:
        os.ftruncate(descriptor, num_bytes)
        return mmap.mmap(descriptor, num_bytes)
    except OSError as error:
        raise TransportError(f"can't make a ring of {num_bytes} bytes: {error}") from error
    finally:
        os.close(descriptor)
