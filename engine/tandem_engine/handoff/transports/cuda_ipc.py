"""The cudaIpc transport: a staging ring in D's GPU memory, which P's GPU writes over NVLink.

The memory travels as a file descriptor, from D to P over a Unix socket in a directory that both
see: that works between processes that see one GPU each and through every namespace, which CUDA's
own IPC handles don't. D listens at a name that only its offer tells. P connects, shows the nonce of
the offer, and gets the descriptor. Only then does D make the ring, so an offer to a worker of
another host costs no GPU memory. The name is removed as soon as P has answered the handshake.

Whether a GPU can map the memory of another one is found out by mapping it; P then says no to this
transport and takes the next one.
"""

import asyncio
import contextlib
import json
import logging
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tandem_engine.errors import StagingUnavailableError
from tandem_engine.handoff.errors import TransportError
from tandem_engine.handoff.settings import HandoffSettings
from tandem_engine.handoff.transports.base import Inbound, Link, Outbound
from tandem_engine.handoff.transports.ring import (
    RingInbound,
    RingOutbound,
    RingShape,
    RingTransport,
)
from tandem_engine.step import KVStore
from tandem_wire.handoff import TransportOffer

_MAX_ANSWER_BYTES: Final = 4096
_NONCE_BYTES: Final = 32

log = logging.getLogger(__name__)


class CudaIpcTransport(RingTransport):
    """From GPU to GPU of one host."""

    name = "cudaIpc"
    memory = "device"

    def __init__(self, settings: HandoffSettings, kv: KVStore) -> None:
        # First: without a GPU's memory no directory helps.
        try:
            kv.make_staging(1).close()
        except StagingUnavailableError as error:
            raise TransportError(str(error)) from error
        super().__init__(settings, kv)

    def offer(self, link: Link) -> Inbound:
        return CudaIpcInbound(self, link)

    async def accept(self, offer: TransportOffer, link: Link) -> Outbound:
        shape = RingShape.offered(offer)
        # Before D gives up on the handshake, so that another transport can still be taken.
        seconds = link.settings.dial_seconds / 3
        try:
            async with asyncio.timeout(seconds):
                descriptor = await _take_descriptor(link.settings.shm_dir, offer)
        except TimeoutError:
            raise TransportError(f"the peer gave no memory within {seconds:.1f} s") from None
        except OSError as error:
            raise TransportError(
                f"can't reach the peer's socket in {link.settings.shm_dir}: {error}; "
                "give both workers the same TANDEM_SHM_DIR"
            ) from error
        try:
            ring = self._kv.map_staging(descriptor, shape.num_bytes)
        except StagingUnavailableError as error:
            raise TransportError(f"can't map the peer's memory: {error}") from error
        finally:
            os.close(descriptor)
        return RingOutbound(self, link, shape, ring)


class CudaIpcInbound(RingInbound):
    """D's end: a listening socket until P has answered, the ring from P's visit on."""

    def __init__(self, transport: CudaIpcTransport, link: Link) -> None:
        """Raises TransportError when the directory takes no socket."""
        settings = link.settings
        shape = RingShape.of(link, settings.device_slot_bytes, settings.device_ring_bytes)
        super().__init__(transport, link, shape)
        self._directory = settings.shm_dir
        self._file = f"tandem-gpu-{secrets.token_hex(8)}"
        self._nonce = secrets.token_hex(_NONCE_BYTES // 2)
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._door.setblocking(False)
        try:
            with _reachable(self._directory, self._file) as path:
                self._door.bind(path)
                os.chmod(path, 0o600)
                self._door.listen(1)
        except OSError as error:
            self._shut()
            raise TransportError(
                f"can't make a socket in {self._directory}: {error}; "
                "set TANDEM_SHM_DIR to a directory that this worker may write"
            ) from error
        self._visits = self._loop.create_task(self._receive_visits())

    @property
    def offer(self) -> TransportOffer:
        details: dict[str, str | int] = {"file": self._file, "nonce": self._nonce}
        return TransportOffer(self.name, details | self._shape.details)

    async def _receive_visits(self) -> None:
        """Until P has come with the nonce."""
        while self._staging is None:
            visitor, _ = await self._loop.sock_accept(self._door)
            with visitor:
                visitor.setblocking(False)
                try:
                    async with asyncio.timeout(self._link.settings.dial_seconds / 3):
                        await self._serve(visitor)
                except (OSError, TimeoutError) as error:
                    log.warning("a visitor of the ring's socket was lost: %s", error)

    async def _serve(self, visitor: socket.socket) -> None:
        shown = b""
        while len(shown) < _NONCE_BYTES:
            part = await self._loop.sock_recv(visitor, _NONCE_BYTES - len(shown))
            if not part:
                return
            shown += part
        if not secrets.compare_digest(shown, self._nonce.encode()):
            return
        try:
            self._staging = self._link.kv.make_staging(self._shape.num_bytes)
        except StagingUnavailableError as error:
            await self._loop.sock_sendall(visitor, json.dumps({"error": str(error)}).encode())
            return
        socket.send_fds(visitor, [b"{}"], [self._staging.descriptor()])

    def _shut(self) -> None:
        self._door.close()
        with contextlib.suppress(OSError):
            (Path(self._directory) / self._file).unlink()

    async def open(self) -> None:
        await self._end_visits()
        if self._staging is None:
            raise TransportError("the peer chose cudaIpc, but never came for the ring")
        await super().open()

    async def _end_visits(self) -> None:
        self._visits.cancel()
        await asyncio.wait([self._visits])
        self._shut()

    async def close(self) -> None:
        await self._end_visits()
        await super().close()


@contextlib.contextmanager
def _reachable(directory: str, name: str) -> Iterator[str]:
    """A path to a socket in `directory` that is short enough for the system, however deep it is."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)


async def _take_descriptor(directory: str, offer: TransportOffer) -> int:
    """The descriptor of D's ring, ours to close. Raises OSError, TransportError."""
    name, nonce = str(offer.details.get("file", "")), str(offer.details.get("nonce", ""))
    if not nonce or not name or name != Path(name).name:
        raise TransportError("the peer's offer names no socket")
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
        door.setblocking(False)
        with _reachable(directory, name) as path:
            await loop.sock_connect(door, path)
        await loop.sock_sendall(door, nonce.encode())
        await _wait_readable(door)
        answer, descriptors, _, _ = socket.recv_fds(door, _MAX_ANSWER_BYTES, 1)
    if descriptors:
        return descriptors[0]
    if not answer:
        raise TransportError("the peer closed its socket without giving its memory")
    raise TransportError(f"the peer can't make its ring: {json.loads(answer)['error']}")


async def _wait_readable(door: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(door.fileno(), readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(door.fileno())
