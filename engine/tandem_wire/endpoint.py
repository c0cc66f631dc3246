"""Opening framed connections, serving them, and noticing that a peer is gone."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

import msgspec

from tandem_wire.connection import MAX_FRAME_BYTES, Connection
from tandem_wire.errors import ConnectionLost, DialFailed, PeerSilent, WireError

T = TypeVar("T")

Make = Callable[..., Connection[T]]
"""Makes the protocol of one connection: `Connection`, or what takes its place."""


async def dial(
    host: str,
    port: int,
    decoder: "msgspec.msgpack.Decoder[T]",
    *,
    timeout_seconds: float = 5.0,
    max_frame_bytes: int = MAX_FRAME_BYTES,
    make: Make[T] = Connection,
) -> Connection[T]:
    """Open a connection to host:port. Raises `DialFailed`."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_seconds):
            _, connection = await loop.create_connection(
                lambda: make(decoder, max_frame_bytes=max_frame_bytes), host, port
            )
    except TimeoutError:
        raise DialFailed(f"{host}:{port} did not answer within {timeout_seconds:g} s") from None
    except OSError as error:
        raise DialFailed(f"can't connect to {host}:{port}: {error}") from error
    return connection


class Listener(Generic[T]):
    """An open port and its connections. Made by `listen`."""

    def __init__(
        self,
        server: asyncio.Server,
        connections: set[Connection[T]],
        handlers: set[asyncio.Task[None]],
    ) -> None:
        self._server = server
        self._handlers = handlers
        self.connections = connections
        self.port: int = server.sockets[0].getsockname()[1]

    def stop_accepting(self) -> None:
        """Close the port; connections that are open stay."""
        self._server.close()

    async def close(self) -> None:
        """Close the port and every connection, and wait for their handlers to return."""
        self._server.close()
        await asyncio.gather(*(connection.close() for connection in list(self.connections)))
        if self._handlers:
            await asyncio.wait(list(self._handlers))


async def listen(
    host: str,
    port: int,
    decoder: "msgspec.msgpack.Decoder[T]",
    handler: Callable[[Connection[T]], Awaitable[None]],
    *,
    max_frame_bytes: int = MAX_FRAME_BYTES,
    make: Make[T] = Connection,
) -> Listener[T]:
    """Serve framed connections at host:port (0: a free port), one `handler` task for each.

    The connection is closed when its handler returns. A `WireError` of the handler is the normal
    end of a connection; any other exception goes to the loop's exception handler and ends the
    connection, not the listener. Raises OSError when the port can't be opened.
    """
    loop = asyncio.get_running_loop()
    connections: set[Connection[T]] = set()
    tasks: set[asyncio.Task[None]] = set()

    async def run(connection: Connection[T]) -> None:
        try:
            await handler(connection)
        except WireError:
            connection.abort()
        except Exception as error:
            loop.call_exception_handler(
                {"message": f"handler for {connection.peer} failed", "exception": error}
            )
            connection.abort()
        finally:
            connections.discard(connection)
        await connection.close()

    def opened(connection: Connection[T]) -> None:
        connections.add(connection)
        task = loop.create_task(run(connection))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await loop.create_server(
        lambda: make(decoder, on_open=opened, max_frame_bytes=max_frame_bytes), host, port
    )
    return Listener(server, connections, tasks)


async def keep_alive(
    connection: Connection[Any],
    beat: Callable[[], msgspec.Struct],
    interval_seconds: float,
    *,
    misses: int = 3,
) -> None:
    """Send `beat()` at the interval; cut the connection (`PeerSilent`) after `misses` silent ones.

    Runs until the connection ends; start it as a task beside the reader.
    """
    loop = asyncio.get_running_loop()
    last_turn = loop.time()
    while connection.is_open:
        with contextlib.suppress(ConnectionLost):
            connection.send(beat())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(interval_seconds):
                await connection.wait_closed()
        now = loop.time()
        # A pause of this very process (SIGSTOP, a busy machine) says nothing about the peer.
        paused_here = now - last_turn > 2 * interval_seconds
        last_turn = now
        silent = now - connection.last_received
        if silent > misses * interval_seconds and not paused_here:
            connection.abort(PeerSilent(f"{connection.peer} was silent for {silent:.1f} s"))
