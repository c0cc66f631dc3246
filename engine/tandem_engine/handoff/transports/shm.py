"""The shm transport: a staging ring in a directory that both workers of one host see.

D makes the ring, a file of equal slots behind a page that holds a nonce. P maps the file and reads
the nonce there: if it is the handshake's, both see one file. D then unlinks the file, so that
nothing is left of it however the two end.
"""

import contextlib
import mmap
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tandem_engine.handoff.errors import TransportError
from tandem_engine.handoff.transports.base import Inbound, Link, Outbound
from tandem_engine.handoff.transports.ring import (
    HostStaging,
    RingInbound,
    RingOutbound,
    RingShape,
    RingTransport,
)
from tandem_engine.step import KVStore
from tandem_wire.handoff import TransportOffer

_HEAD_BYTES: Final = mmap.PAGESIZE
_LEAST_SLOT_BYTES: Final = 4 << 20
"""What the messages of a slot cost, some 0.1 ms, shows little beside these."""


class ShmTransport(RingTransport):
    """Through memory that two workers of one host share."""

    name = "shm"
    memory = "host"

    def offer(self, link: Link) -> Inbound:
        return ShmInbound(self, link)

    async def accept(self, offer: TransportOffer, link: Link) -> Outbound:
        shape = RingShape.offered(offer)
        ring = ShmStaging(link.kv, _map_ring(link.settings.shm_dir, offer, shape))
        ring.pin()
        return RingOutbound(self, link, shape, ring)


class ShmStaging(HostStaging):
    """A mapped ring file; locked for the device between `pin` and `close`."""

    def __init__(self, kv: KVStore, mapping: mmap.mmap) -> None:
        super().__init__(kv, mapping, _HEAD_BYTES)
        if kv.is_on_host:
            self.num_lanes = 1  # D's processor copies at the same time; a GPU's copies overlap
        self._unpin: Callable[[], None] | None = None

    def pin(self) -> None:
        """Tell the store that pages will go through this memory."""
        with memoryview(self._map) as ring:
            self._unpin = self._kv.pin(ring)

    def close(self) -> None:
        if self._unpin is not None:
            self._unpin()
            self._unpin = None
        super().close()


class ShmInbound(RingInbound):
    """D's end: owns the ring."""

    def __init__(self, transport: ShmTransport, link: Link) -> None:
        """Make the ring file. Raises TransportError when the directory has no room for it."""
        settings = link.settings
        slot_bytes = max(link.kv.write_bytes, _LEAST_SLOT_BYTES)
        shape = RingShape.of(link, slot_bytes, settings.shm_ring_bytes)
        super().__init__(transport, link, shape)
        self._path = Path(settings.shm_dir) / f"tandem-ring-{secrets.token_hex(8)}"
        self._nonce = secrets.token_hex(16)
        self._staging = self._ring = ShmStaging(link.kv, self._make())

    def _make(self) -> mmap.mmap:
        size = _HEAD_BYTES + self._shape.num_bytes
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
        details: dict[str, str | int] = {"file": self._path.name, "nonce": self._nonce}
        return TransportOffer(self.name, details | self._shape.details)

    def unlink(self) -> None:
        """Remove the file's name; the ring lives as long as a process maps it."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()

    async def open(self) -> None:
        self.unlink()
        self._ring.pin()
        await super().open()

    async def close(self) -> None:
        self.unlink()
        await super().close()


def _map_ring(directory: str, offer: TransportOffer, shape: RingShape) -> mmap.mmap:
    """D's ring, if it is in this host's directory. Raises TransportError."""
    name, nonce = str(offer.details.get("file", "")), str(offer.details.get("nonce", ""))
    if not nonce or name != Path(name).name:
        raise TransportError("the peer's offer names no ring file")
    try:
        descriptor = os.open(Path(directory) / name, os.O_RDWR | os.O_NOFOLLOW)
        try:
            ring = mmap.mmap(descriptor, _HEAD_BYTES + shape.num_bytes)
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
