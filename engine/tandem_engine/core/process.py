"""The server's side of the core process: start it, talk to it, notice its death."""

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

import msgspec

from tandem_engine.config import WorkerConfig
from tandem_engine.errors import CoreDiedError
from tandem_engine.frames import HEADER, FromCore, Shutdown, ToCore, pack_frame

SOCKET_BUFFER_BYTES: Final = 4 * 2**20
"""Room for bursts in both directions, so that neither side waits for the other's event loop."""


@dataclass(frozen=True, slots=True)
class CoreChild:
    """A core's process that no one is listening to yet. It ends when the socket closes."""

    process: "subprocess.Popen[bytes]"
    connection: socket.socket

    @classmethod
    def start(cls, config: WorkerConfig, began: float | None = None) -> "CoreChild":
        """Start a core, which begins to load at once.

        `began` is when the worker was started, on the clock of `boot_seconds`; None means just now.
        """
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
        command = [sys.executable, "-m", "tandem_engine.core.child", str(theirs.fileno())]
        if began is not None:
            command.append(repr(began))
        try:
            process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.sendall(pack_frame(msgspec.msgpack.encode(config)))
        return cls(process, ours)


class CoreProcess:
    """A core in a child process, as an asyncio client.

    Iterate it for the core's frames. The child ends when this side of the socket closes, whatever
    happens to this process; when the child ends unasked, the iteration raises CoreDiedError.
    """

    def __init__(
        self,
        process: "subprocess.Popen[bytes]",
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._closing = False
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromCore] = msgspec.msgpack.Decoder(FromCore)

    @classmethod
    async def spawn(cls, config: WorkerConfig) -> "CoreProcess":
        """Start a core. Its first frames are `CoreLoading`, then `CoreReady` or `CoreFailed`."""
        return await cls.connect(await asyncio.to_thread(CoreChild.start, config))

    @classmethod
    async def connect(cls, child: CoreChild) -> "CoreProcess":
        """Listen to a core that was started before."""
        child.connection.setblocking(False)
        reader, writer = await asyncio.open_connection(
            sock=child.connection, limit=SOCKET_BUFFER_BYTES
        )
        return cls(child.process, reader, writer)

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def send(self, message: ToCore) -> None:
        """Send a frame; returns at once. Frames to a dead core are dropped; iterating tells."""
        if not self._writer.is_closing():
            self._writer.write(pack_frame(self._encoder.encode(message)))

    async def __aiter__(self) -> AsyncIterator[FromCore]:
        """Frames from the core until it was closed. Raises CoreDiedError when it died."""
        while True:
            try:
                header = await self._reader.readexactly(HEADER.size)
                payload = await self._reader.readexactly(HEADER.unpack(header)[0])
            except (asyncio.IncompleteReadError, ConnectionResetError):
                break
            yield self._decoder.decode(payload)
        if not self._closing:
            code = await asyncio.to_thread(self._process.wait)
            raise CoreDiedError(f"the core process ended by itself ({_describe(code)})")

    async def close(self, grace_seconds: float = 5.0) -> int:
        """Have the core give everything back and end, or kill it after the grace; its exit code."""
        self._closing = True
        self.send(Shutdown())
        try:
            await asyncio.to_thread(self._process.wait, grace_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._writer.close()
        return await asyncio.to_thread(self._process.wait)


def _describe(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
