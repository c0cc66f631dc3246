"""Connections in memory: bytes arrive when the model says so, in their order, or never."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

from tandem_engine.handoff.tests.protocol.loop import ModelLoop

Ending = Literal["", "eof", "reset"]


class Pipe:
    """One direction of a connection, to the socket that reads."""

    def __init__(self, receiver: "Socket") -> None:
        self.receiver = receiver
        self.chunks: deque[bytes] = deque()
        self.ending: Ending = ""
        self.is_held = False  # nothing arrives for now
        self.is_dead = False  # nothing arrives any more, and no one is told

    @property
    def can_deliver(self) -> bool:
        """Whether something can arrive now."""
        if self.is_held or self.is_dead or not self.receiver.is_started:
            return False
        return bool(self.chunks or self.ending)

    def deliver(self) -> None:
        """Let the next chunk arrive, or the end after the last one."""
        receiver = self.receiver
        if self.chunks:
            receiver.loop.call_soon(receiver.receive, self.chunks.popleft())
        else:
            receiver.loop.call_soon(receiver.peer_ended, self.ending)
            self.is_dead = True

    def put(self, data: bytes) -> None:
        """Take what was written."""
        if not self.is_dead and not self.ending:
            self.chunks.append(data)

    def finish(self, ending: Ending, *, drop: bool = False) -> None:
        """Nothing more will be written; with `drop`, what is under way is lost too."""
        if drop:
            self.chunks.clear()
        self.ending = self.ending or ending


class Socket(asyncio.Transport):
    """One end of a connection, as its `Connection` sees it."""

    def __init__(self, loop: ModelLoop, port: int) -> None:
        super().__init__()
        self.loop = loop
        self.peer: Socket
        self.incoming = Pipe(self)
        self._port = port
        self._protocol: Any = None
        self._closing = False

    @property
    def outgoing(self) -> Pipe:
        """The pipe that this end writes to."""
        return self.peer.incoming

    @property
    def is_started(self) -> bool:
        """Whether there is a protocol that takes what arrives."""
        return self._protocol is not None

    def discard(self) -> None:
        """Close a connection that no one took over."""
        self._closing = True
        self.outgoing.finish("reset")

    def start(self, protocol: Any) -> None:
        """Give the connection to its protocol; call it on the loop."""
        self._protocol = protocol
        protocol.connection_made(self)

    def receive(self, data: bytes) -> None:
        if not self._closing:
            self._protocol.data_received(data)

    def peer_ended(self, ending: Ending) -> None:
        if self._closing:
            return
        if ending == "reset":
            self._end(ConnectionResetError("connection reset by peer"), "reset")
        else:
            self._protocol.eof_received()
            self._end(None, "eof")

    def _end(self, error: Exception | None, ending: Ending) -> None:
        if not self._closing:
            self._closing = True
            self.outgoing.finish(ending)
            self.loop.call_soon(self._protocol.connection_lost, error)

    # --- asyncio's side ---------------------------------------------------------------------------

    def write(self, data: Any) -> None:
        if not self._closing:
            self.outgoing.put(bytes(data))

    def close(self) -> None:
        self._end(None, "eof")

    def abort(self) -> None:
        self._end(None, "reset")

    def is_closing(self) -> bool:
        return self._closing

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("host", self._port) if name == "peername" else default

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        return None

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        return None

    def resume_reading(self) -> None:
        return None


class Port:
    """A port that is open; stands for an `asyncio.Server` with its one socket."""

    def __init__(
        self, network: "Network", loop: ModelLoop, factory: Callable[[], Any], number: int
    ) -> None:
        self.loop = loop
        self.factory = factory
        self.sockets = (self,)
        self._network = network
        self._number = number

    def getsockname(self) -> tuple[str, int]:
        return ("host", self._number)

    def close(self) -> None:
        if self._network.ports.get(self._number) is self:
            del self._network.ports[self._number]


class Network:
    """Ports by number, connections that are open, and those that are being opened."""

    def __init__(self) -> None:
        self.ports: dict[int, Port] = {}
        self.sockets: list[Socket] = []  # of the side that dialled
        self.dials: list[tuple[ModelLoop, int, asyncio.Future[Socket]]] = []

    async def connect(self, loop: ModelLoop, host: str, port: int) -> Socket:
        opened: asyncio.Future[Socket] = loop.create_future()
        self.dials.append((loop, port, opened))
        try:
            return await opened
        except asyncio.CancelledError:
            if opened.done() and not opened.cancelled() and opened.exception() is None:
                opened.result().discard()
            raise

    def listen(self, loop: ModelLoop, factory: Callable[[], Any], number: int) -> Port:
        port = self.ports[number] = Port(self, loop, factory, number)
        return port

    def answer_dial(self) -> None:
        """Let the oldest dial come through, or be refused."""
        loop, number, opened = self.dials.pop(0)
        if opened.done():
            return  # given up
        port = self.ports.get(number)
        if port is None:
            loop.call_soon(self._refuse, opened)
            return
        here, there = Socket(loop, number), Socket(port.loop, 0)
        here.peer, there.peer = there, here
        self.sockets.append(here)
        port.loop.call_soon(lambda: there.start(port.factory()))
        loop.call_soon(self._connected, opened, here)

    @staticmethod
    def _connected(opened: "asyncio.Future[Socket]", here: Socket) -> None:
        if opened.done():
            here.discard()
        else:
            opened.set_result(here)

    @staticmethod
    def _refuse(opened: "asyncio.Future[Socket]") -> None:
        if not opened.done():
            opened.set_exception(ConnectionRefusedError("connection refused"))

    def pipes(self) -> list[Pipe]:
        """All directions of all connections."""
        return [pipe for here in self.sockets for pipe in (here.incoming, here.outgoing)]

    def forget_ended(self) -> None:
        """Drop connections that have ended at both ends."""
        self.sockets = [
            here for here in self.sockets if not (here.is_closing() and here.peer.is_closing())
        ]

    def cut(self, here: Socket) -> None:
        """Reset a connection; what is under way is lost."""
        for pipe in (here.incoming, here.outgoing):
            pipe.finish("reset", drop=True)

    def leave(self, loop: ModelLoop) -> None:
        """A process has died: the kernel closes its connections and ports."""
        for number in [number for number, port in self.ports.items() if port.loop is loop]:
            del self.ports[number]
        self.dials = [dial for dial in self.dials if dial[0] is not loop]
        for here in self.sockets:
            for end in (here, here.peer):
                if end.loop is loop:
                    end.outgoing.finish("reset")
                    end.incoming.finish("reset", drop=True)
