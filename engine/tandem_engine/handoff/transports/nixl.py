"""The nixl transport: NVIDIA's NIXL writes to a ring in D's memory, over what UCX finds.

UCX takes RDMA where both have a device for it, else memory that two processes of one host share,
else TCP; its `UCX_*` environment variables decide among those. The ring and its rules are those of
`remote_ring`. A cache on one GPU has rings on that GPU, and P packs there too: no byte of KV goes
through the host, where UCX has a way from GPU to GPU. It has one between processes of one PID
namespace (CUDA IPC), and between hosts whose cards reach the GPUs (GPUDirect). Where it has none
it copies through the host, slowly and without a word: NIXL_RING_MEMORY=host is better then. D
offers a ring in the host's memory if it can't make one on the GPU, and says why.

One agent for each process, with a thread that makes progress for both sides: without it a write
over TCP would wait until D calls NIXL. It registers the rings of all sessions. D's offer carries
the metadata of its agent and of one ring, some 500 bytes; P loads it, and forgets D's agent when
its last session with it has ended, which also drops a connection that failed.

Completion: NIXL says that a write is done after UCX has flushed it, so its bytes are in D's memory.
Revocation: none that holds everywhere. Over TCP and over shared memory a write still lands after
`deregister_memory`, as was tried on a plain machine; so D keeps the ring mapped instead.
"""

import asyncio
import base64
import binascii
import logging
import secrets
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import xxhash

from tandem_engine.handoff.errors import TransportError
from tandem_engine.handoff.settings import HandoffSettings
from tandem_engine.handoff.transports.base import Inbound, Link, Outbound
from tandem_engine.handoff.transports.nixl_agent import Agent
from tandem_engine.handoff.transports.remote_ring import (
    RegisteredDeviceMemory,
    RemoteRingInbound,
    RemoteRingOutbound,
    RemoteRingTransport,
)
from tandem_engine.handoff.transports.ring import RingShape
from tandem_engine.memory import MemoryKind, MemoryRegion
from tandem_engine.step import KVStore
from tandem_wire.handoff import TransportOffer

log = logging.getLogger(__name__)

RDMA_DIRECTORY: Final = Path("/dev/infiniband")
IN_GPU_MEMORY: Final = "nixl in GPU memory"
"""What a pairing passes over, with the reason, when a GPU's pages go through the host."""
_TRIAL_BYTES: Final = 64 << 10  # a page of the system, so that no other memory is in it


class NixlTransport(RemoteRingTransport):
    """Through an agent of NIXL with the backend UCX."""

    name = "nixl"

    def __init__(self, settings: HandoffSettings, kv: KVStore) -> None:
        super().__init__(settings, kv)
        if settings.transport == "auto" and not any(RDMA_DIRECTORY.glob("uverbs*")):
            raise TransportError(
                f"there is no RDMA device in {RDMA_DIRECTORY}, and without one shm and tcp are "
                "faster; use --transfer Nixl to take it all the same"
            )
        self.agent = Agent(f"tandem-{secrets.token_hex(8)}")
        self._num_sessions: Counter[str] = Counter()
        self._loading = asyncio.Lock()
        self.no_gpu = self._try_gpu(settings, kv)
        """Why the rings of this worker are in the host's memory; empty: they are on its GPU."""
        if not self.no_gpu:
            self.memory = "device"
        elif any(region.kind == "cuda" for region in kv.regions()):
            log.warning("nixl goes through the host's memory: %s", self.no_gpu)
            self.shortfalls = {IN_GPU_MEMORY: self.no_gpu}

    def _try_gpu(self, settings: HandoffSettings, kv: KVStore) -> str:
        """See whether UCX takes memory of the cache's GPU; why not."""
        if settings.nixl_memory == "host":
            return "NIXL_RING_MEMORY is host"
        if settings.no_peer_memory:
            return settings.no_peer_memory
        try:
            trial = RegisteredDeviceMemory(self, kv, _TRIAL_BYTES, self.kept, self.unused)
        except TransportError as error:
            return str(error)
        self.unregister(trial.registration)
        trial.unmap()
        return ""

    def register(self, region: MemoryRegion) -> object:
        try:
            return self.agent.register(region)
        except Exception as error:  # the library's errors have no common base
            remedy = "with RDMA, check the limit of locked memory (ulimit -l)"
            if region.kind == "cuda":
                remedy = "see this worker's log: UCX may be without CUDA (UCX_TLS, its modules)"
            raise TransportError(
                f"nixl can't register {region.num_bytes} bytes of {region.kind} memory: {error}; "
                f"{remedy}"
            ) from error

    def unregister(self, registration: object) -> None:
        self.agent.unregister(registration)

    def offer(self, link: Link) -> Inbound:
        if self.memory == "host":
            return NixlInbound(self, link, "host")
        try:
            return NixlInbound(self, link, "cuda")
        except TransportError as error:
            log.warning("nixl goes through the host's memory: %s", error)
            inbound = NixlInbound(self, link, "host")
            inbound.shortfalls = {IN_GPU_MEMORY: str(error)}
            return inbound

    async def accept(self, offer: TransportOffer, link: Link) -> Outbound:
        shape = RingShape.offered(offer)
        metadata, ring = _read_offer(offer, self.agent.version, shape)
        if ring.kind == "cuda" and self.memory == "host":
            raise TransportError(
                f"the peer's ring is in a GPU's memory, and this worker's can't be: {self.no_gpu}; "
                "set NIXL_RING_MEMORY=host for the peer"
            )
        async with self._loading:
            try:
                peer = await asyncio.to_thread(self.agent.add, metadata)
            except Exception as error:
                raise TransportError(f"nixl can't reach the peer's agent: {error}") from error
            self._num_sessions[peer] += 1
        try:
            return NixlOutbound(self, link, shape, peer, ring)
        except BaseException:
            await self.forget(peer)
            raise

    async def forget(self, peer: str) -> None:
        """A session with that agent has ended."""
        async with self._loading:
            self._num_sessions[peer] -= 1
            if self._num_sessions[peer]:
                return
            del self._num_sessions[peer]
            try:
                await asyncio.to_thread(self.agent.remove, peer)
            except Exception as error:
                log.warning("nixl can't forget the agent %s: %s", peer, error)

    def close(self) -> None:
        del self.agent
        super().close()


class NixlInbound(RemoteRingInbound):
    """D's end: a ring that is registered with the agent."""

    least_slot_bytes = 4 << 20  # 1.4 times as fast over TCP as 1 MiB, no slower over shared memory

    def __init__(self, transport: NixlTransport, link: Link, kind: MemoryKind) -> None:
        """Raises TransportError when there is no room for the ring."""
        shape = None
        if kind == "cuda":
            settings = link.settings
            shape = RingShape.of(link, settings.nixl_slot_bytes, settings.nixl_ring_bytes)
        super().__init__(transport, link, partial(transport.make_ring, kind=kind), shape)
        self.memory = "device" if kind == "cuda" else "host"
        try:
            metadata = transport.agent.describe(self._ring.registration)
        except Exception as error:
            self._ring.close()
            raise TransportError(f"nixl can't describe its memory: {error}") from error
        self._details: dict[str, str | int] = {
            "version": transport.agent.version,
            "metadata": base64.b64encode(metadata).decode(),
            "digest": xxhash.xxh3_64_hexdigest(metadata),
            "address": self._ring.address,
            "memory": kind,
            "device": self._ring.region.device,
        }

    @property
    def offer(self) -> TransportOffer:
        return TransportOffer(self.name, self._details | self._shape.details)


def _read_offer(
    offer: TransportOffer, version: str, shape: RingShape
) -> tuple[bytes, MemoryRegion]:
    """The metadata of D's agent, and where its ring is in D's process.

    Raises TransportError: what is not whole must not get into the library, which is C++.
    """
    details = offer.details
    theirs = str(details.get("version", ""))
    if theirs != version:
        raise TransportError(
            f"the peer has nixl {theirs or '(it does not say)'}, this worker {version}; "
            "run both from the same image"
        )
    try:
        metadata = base64.b64decode(str(details.get("metadata", "")), validate=True)
    except binascii.Error as error:
        raise TransportError(f"the peer's metadata of nixl is broken: {error}") from error
    address, device = details.get("address"), details.get("device")
    is_whole = xxhash.xxh3_64_hexdigest(metadata) == details.get("digest")
    if not is_whole or not isinstance(address, int) or not isinstance(device, int):
        raise TransportError("the peer's metadata of nixl is broken: it is not what it sent")
    kind: MemoryKind = "cuda" if details.get("memory") == "cuda" else "host"
    return metadata, MemoryRegion(kind, address, shape.num_bytes, device)


class NixlOutbound(RemoteRingOutbound):
    """P's end: writes to D's ring by the agent, one for each lane at a time."""

    def __init__(
        self, transport: NixlTransport, link: Link, shape: RingShape, peer: str, ring: MemoryRegion
    ) -> None:
        """`ring`: D's. Raises TransportError when there is no room for what is packed here."""
        super().__init__(transport, link, shape, partial(transport.make_outgoing, kind=ring.kind))
        self.memory = "device" if ring.kind == "cuda" else "host"
        self._transport = transport
        self._peer = peer
        self._ring = ring
        self._is_forgotten = False

    def _put(self, source: int, target: int, num_bytes: int) -> None:
        try:
            is_there = self._transport.agent.write(
                self._peer,
                replace(self._outgoing.region, address=source, num_bytes=num_bytes),
                replace(self._ring, address=self._ring.address + target, num_bytes=num_bytes),
                self._interrupted.wait,
            )
        except Exception as error:
            raise ConnectionError(f"nixl can't write to the peer: {error}") from error
        if not is_there:
            raise ConnectionError("the session ended in the middle of a write")

    async def close(self) -> None:
        await super().close()
        if not self._is_forgotten:
            self._is_forgotten = True
            await self._transport.forget(self._peer)
