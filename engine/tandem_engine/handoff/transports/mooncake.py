"""The mooncake transport: Mooncake's transfer engine writes to a ring in D's host memory.

Over TCP, or over RDMA where MOONCAKE_PROTOCOL says so. The two engines shake hands with each other,
so that nothing else must be deployed; P dials D's engine, at two ports between 15000 and 17000.

Staged, like `shm`: D can't take the right to write back while the rest of a write comes in, because
the engine looks a registration up only when a write begins. What D does to its ring when a session
ends (`SealedMemory`) would take its cache from every other peer too.

Completion: `_put` returns when D's engine has acknowledged that the bytes are in D's memory.
Revocation: once D has sealed its ring, the kernel refuses to copy into it, by which D's engine
closes that connection. D does so at the end of every session; P does so with what an unfinished
write still reads. Proof: `test_mooncake.py`. Over RDMA it is the card that refuses what comes after
the deregistration, which was not tried.

A thread may be left to itself: the one that reaches for D's engine while D is stopped. It keeps its
engine, and the memory that it reads is sealed; the engine is used again when the thread has ended.
"""

import asyncio
import concurrent.futures
import ctypes
import mmap
import os
import threading
from typing import Final

from tandem_engine.handoff.errors import TransportError
from tandem_engine.handoff.settings import HandoffSettings
from tandem_engine.handoff.transports import transfer_engine
from tandem_engine.handoff.transports.base import Inbound, Link, Outbound, Transport
from tandem_engine.handoff.transports.remote_ring import (
    RegisteredMemory,
    RemoteRingInbound,
    RemoteRingOutbound,
)
from tandem_engine.handoff.transports.ring import RingShape
from tandem_engine.handoff.transports.transfer_engine import Engine
from tandem_engine.step import KVStore
from tandem_wire.handoff import TransportOffer

_PROT_NONE: Final = 0
_MAP_FIXED: Final = 0x10
_MAP_NORESERVE: Final = 0x4000
_SEALED: Final[list[mmap.mmap]] = []
"""Addresses that are never used again: an object that is forgotten would unmap them."""
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip


class SealedMemory(RegisteredMemory):
    """Registered memory that nothing can touch any more once it is closed.

    If a write may be under way, its pages go, and its addresses stay behind without any right: that
    costs nothing but addresses, of which neighbours become one entry of the system's. Else it is
    unmapped.
    """

    def _map_new(self, num_bytes: int) -> mmap.mmap:
        """Without a file: the object would keep it open, with all of its pages."""
        try:
            return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise TransportError(f"can't make a ring of {num_bytes} bytes: {error}") from error

    def _set_aside(self) -> None:
        self._library.unregister(self.registration)
        self._unpin()
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED | _MAP_NORESERVE
        sealed = _libc.mmap(self.address, self.num_bytes, _PROT_NONE, flags, -1, 0)
        if sealed != self.address:  # it stays as it is, for the life of the process
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        _SEALED.append(self._map)
        self._map = mmap.mmap(-1, 1)
        self._map.close()


class MooncakeTransport(Transport):
    """Through Mooncake's transfer engine."""

    name = "mooncake"
    placement = "staged"
    memory = "host"
    is_automatic = False

    def __init__(self, settings: HandoffSettings, kv: KVStore) -> None:
        super().__init__(settings, kv)
        transfer_engine.load()

    def offer(self, link: Link) -> Inbound:
        engine = transfer_engine.borrow(link.connection.local_host)
        try:
            return MooncakeInbound(self, link, engine)
        except BaseException:
            transfer_engine.give_back(engine)
            raise

    async def accept(self, offer: TransportOffer, link: Link) -> Outbound:
        shape = RingShape.offered(offer)
        name, identity = str(offer.details.get("engine", "")), str(offer.details.get("id", ""))
        address, protocol = offer.details.get("address"), offer.details.get("protocol")
        if not name or not identity or not isinstance(address, int):
            raise TransportError("the peer's offer names no engine")
        engine = transfer_engine.borrow(link.connection.local_host, name, identity)
        try:
            if protocol != engine.protocol:
                raise TransportError(
                    f"the peer's engine speaks {protocol}, and this worker's {engine.protocol}; "
                    "give both workers the same MOONCAKE_PROTOCOL"
                )
            outbound = MooncakeOutbound(self, link, shape, engine, name, address)
        except BaseException:
            transfer_engine.give_back(engine)
            raise
        try:
            # Before D gives up on the handshake, so that another transport can still be taken.
            await outbound.reach(link.settings.dial_seconds / 3)
        except BaseException:
            await outbound.close()
            raise
        return outbound


class MooncakeInbound(RemoteRingInbound):
    """D's end: an engine, and a ring that is registered with it."""

    least_slot_bytes = transfer_engine.PIECE_BYTES
    most_slots = 4  # two that are written and two that are emptied; more don't fit a CPU's cache

    def __init__(self, transport: MooncakeTransport, link: Link, engine: Engine) -> None:
        """Takes over the engine. Raises TransportError."""
        super().__init__(transport, link, lambda size: SealedMemory(engine, link.kv, size))
        self._engine: Engine | None = engine
        self._details: dict[str, str | int] = {
            "engine": engine.name,
            "id": engine.identity,
            "protocol": engine.protocol,
            "address": self._ring.address,
        }

    @property
    def offer(self) -> TransportOffer:
        return TransportOffer(self.name, self._details | self._shape.details)

    async def close(self) -> None:
        # Also after a clean end: of a write that has failed at P, a part may still be on its way
        # from this side's own socket into the ring.
        self._ring.keep()
        await super().close()
        engine, self._engine = self._engine, None
        if engine is not None:
            transfer_engine.give_back(engine)


class MooncakeOutbound(RemoteRingOutbound):
    """P's end: an engine, and memory that it reads from."""

    def __init__(
        self,
        transport: MooncakeTransport,
        link: Link,
        shape: RingShape,
        engine: Engine,
        peer: str,
        address: int,
    ) -> None:
        """Takes over the engine. D's ring is at `address` of the process of the engine `peer`."""
        self._engine = engine
        self._peer = peer
        self._address = address
        self._is_borrowed = True
        self._reaching: concurrent.futures.Future[None] = concurrent.futures.Future()
        super().__init__(transport, link, shape, lambda size: SealedMemory(engine, link.kv, size))

    async def reach(self, seconds: float) -> None:
        """See that D's engine can be reached. Raises TransportError."""
        self._reaching.set_running_or_notify_cancel()
        threading.Thread(target=self._greet, name="kv-out-reach", daemon=True).start()
        try:
            async with asyncio.timeout(seconds):
                await asyncio.wrap_future(self._reaching)
        except TimeoutError:
            raise TransportError(
                f"can't reach the peer's engine at {self._peer} within {seconds:.1f} s; "
                "see that nothing between the workers blocks ports 15000 to 17000"
            ) from None
        except OSError as error:
            raise TransportError(
                f"can't reach the peer's engine: {error}; "
                "see that nothing between the workers blocks ports 15000 to 17000"
            ) from error

    def _greet(self) -> None:
        # Every slot is P's from the start, so a few bytes there disturb no one.
        try:
            source, target = self._outgoing.address, self._address
            self._engine.reach(self._peer, source, target, self._interrupted)
        except BaseException as error:
            self._reaching.set_exception(error)
        else:
            self._reaching.set_result(None)

    def _put(self, source: int, target: int, num_bytes: int) -> None:
        at = self._address + target
        self._engine.write(self._peer, source, at, num_bytes, self._interrupted)

    async def close(self) -> None:
        if self._reaching.running():
            self._outgoing.keep()
        await super().close()
        if self._is_borrowed:
            self._is_borrowed = False
            if self._reaching.running():
                self._reaching.add_done_callback(lambda _: transfer_engine.give_back(self._engine))
            else:
                transfer_engine.give_back(self._engine)
