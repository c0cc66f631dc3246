"""A socket at which D hands file descriptors to the P that its offer went to.

Memory of a GPU travels as a file descriptor, over a Unix socket in a directory that both see: that
works between processes that see one GPU each and through every namespace, which CUDA's own IPC
handles don't. D listens at a name that only its offer tells. P connects, shows the nonce of the
offer, and gets the descriptors. The name is removed as soon as P has answered the handshake.
"""

import asyncio
import contextlib
import json
import logging
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from tandem_engine.errors import StagingUnavailableError
from tandem_engine.handoff.errors import TransportError
from tandem_engine.handoff.settings import HandoffSettings
from tandem_wire.handoff import TransportOffer

_MAX_ANSWER_BYTES: Final = 4096
_MAX_DESCRIPTORS: Final = 4
_NONCE_BYTES: Final = 32

log = logging.getLogger(__name__)

Give = Callable[[socket.socket], Sequence[int]]
"""The descriptors for a visitor that has shown the nonce. Raises StagingUnavailableError."""


class Door:
    """D's end: open from the offer until P has answered the handshake."""

    def __init__(self, settings: HandoffSettings, give: Give) -> None:
        """Raises TransportError when the directory takes no socket."""
        self.was_used = False
        self._directory = settings.shm_dir
        self._give = give
        self._seconds = settings.dial_seconds / 3
        self._loop = asyncio.get_running_loop()
        self._file = f"tandem-gpu-{secrets.token_hex(8)}"
        self._nonce = secrets.token_hex(_NONCE_BYTES // 2)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        try:
            with _reachable(self._directory, self._file) as path:
                self._socket.bind(path)
                os.chmod(path, 0o600)
                self._socket.listen(1)
        except OSError as error:
            self._remove()
            raise TransportError(
                f"can't make a socket in {self._directory}: {error}; "
                "set TANDEM_SHM_DIR to a directory that this worker may write"
            ) from error
        self._visits = self._loop.create_task(self._receive())

    @property
    def details(self) -> dict[str, str | int]:
        """Its part of an offer."""
        return {"file": self._file, "nonce": self._nonce}

    async def _receive(self) -> None:
        """Until P has come with the nonce, and has got what it came for."""
        while not self.was_used:
            visitor, _ = await self._loop.sock_accept(self._socket)
            with visitor:
                visitor.setblocking(False)
                try:
                    async with asyncio.timeout(self._seconds):
                        await self._serve(visitor)
                except (OSError, TimeoutError) as error:
                    log.warning("a visitor of the socket for GPU memory was lost: %s", error)

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
            descriptors = self._give(visitor)
        except StagingUnavailableError as error:
            await self._loop.sock_sendall(visitor, json.dumps({"error": str(error)}).encode())
            return
        self.was_used = True
        socket.send_fds(visitor, [b"{}"], list(descriptors))

    def _remove(self) -> None:
        self._socket.close()
        with contextlib.suppress(OSError):
            (Path(self._directory) / self._file).unlink()

    async def close(self) -> None:
        """Let no one in any more. Safe to call twice."""
        self._visits.cancel()
        await asyncio.wait([self._visits])
        self._remove()


async def visit(settings: HandoffSettings, offer: TransportOffer) -> list[int]:
    """P's end: what D gives at the door of its offer, ours to close. Raises TransportError."""
    # Before D gives up on the handshake, so that another transport can still be taken.
    seconds = settings.dial_seconds / 3
    try:
        async with asyncio.timeout(seconds):
            return await _visit(settings.shm_dir, offer)
    except TimeoutError:
        raise TransportError(f"the peer gave no memory within {seconds:.1f} s") from None
    except OSError as error:
        raise TransportError(
            f"can't reach the peer's socket in {settings.shm_dir}: {error}; "
            "give both workers the same TANDEM_SHM_DIR"
        ) from error


async def _visit(directory: str, offer: TransportOffer) -> list[int]:
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
        answer, descriptors, _, _ = socket.recv_fds(door, _MAX_ANSWER_BYTES, _MAX_DESCRIPTORS)
    if descriptors:
        return list(descriptors)
    if not answer:
        raise TransportError("the peer closed its socket without giving its memory")
    raise TransportError(f"the peer can't share its memory: {json.loads(answer)['error']}")


@contextlib.contextmanager
def _reachable(directory: str, name: str) -> Iterator[str]:
    """A path to a socket in `directory` that is short enough for the system, however deep it is."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)


async def _wait_readable(door: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(door.fileno(), readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(door.fileno())
