"""The wire port: the routers' connections, and the core's frames on their way to them."""

import asyncio
import itertools
from collections.abc import Callable
from typing import Final

import msgspec
import structlog

from tandem_engine.frames import CoreRefused, CoreStep, RoutedSubmit, RouterGone, ToCore
from tandem_engine.server.status import WorkerStatus
from tandem_wire.connection import Connection
from tandem_wire.endpoint import Listener, listen
from tandem_wire.errors import WireError
from tandem_wire.messages import (
    PROTOCOL,
    Cancel,
    Hello,
    KvEvents,
    Ping,
    Pong,
    Refused,
    RouterMessage,
    Step,
    Submit,
    WorkerMessage,
)

log = structlog.get_logger()

HELLO_SECONDS: Final = 5.0


class _Router:
    """One connection and the requests that came on it."""

    def __init__(self, number: int, router_id: str, connection: Connection[RouterMessage]) -> None:
        self.number = number
        self.router_id = router_id
        self.connection = connection
        self.rids: set[str] = set()

    def send(self, message: WorkerMessage) -> None:
        """Send; a connection that fails here ends in its own handler."""
        try:
            self.connection.send(message)
        except WireError as error:
            self.connection.abort(error)


class RouterHub:
    """All routers. Tokens go to the router that asked for them, load and KV events to each."""

    def __init__(self, status: WorkerStatus, to_core: Callable[[ToCore], None]) -> None:
        self._status = status
        self._to_core = to_core
        self._routers: dict[int, _Router] = {}
        self._numbers = itertools.count(1)
        self._listener: Listener[RouterMessage] | None = None
        self._cached_blocks: set[int] = set()
        self._kv_sequence = 0

    async def open(self, host: str, port: int) -> int:
        """Open the wire port; which one it is. Raises OSError."""
        decoder: msgspec.msgpack.Decoder[RouterMessage] = msgspec.msgpack.Decoder(RouterMessage)
        self._listener = await listen(host, port, decoder, self._serve)
        return self._listener.port

    @property
    def running(self) -> list[str]:
        """Requests that have not ended, by rid."""
        return sorted(rid for router in self._routers.values() for rid in router.rids)

    @property
    def router_ids(self) -> list[str]:
        """Who is connected."""
        return sorted(router.router_id for router in self._routers.values())

    # --- from routers -----------------------------------------------------------------------------

    async def _serve(self, connection: Connection[RouterMessage]) -> None:
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                hello = await connection.receive()
        except TimeoutError:
            return
        refusal = self._check(hello)
        if refusal is not None:
            connection.send(refusal)
            return
        assert isinstance(hello, Hello)
        router = _Router(next(self._numbers), hello.router_id, connection)
        self._greet(router)
        log.info("router connected", router=router.router_id, peer=connection.peer)
        try:
            async for message in connection:
                self._handle(router, message)
        finally:
            del self._routers[router.number]
            self._to_core(RouterGone(router.number))
            log.info("router gone", router=router.router_id, requests=len(router.rids))

    def _check(self, hello: RouterMessage) -> Refused | None:
        if not isinstance(hello, Hello):
            return Refused("", "protocol", "the first frame must be a hello")
        if hello.protocol != PROTOCOL:
            return Refused(
                "",
                "protocol",
                f"this worker speaks protocol {PROTOCOL}, not {hello.protocol}; use its release",
            )
        if self._status.ready is None:
            return Refused("", "no_room", self._status.not_ready(), retry_after_seconds=1.0)
        return None

    def _greet(self, router: _Router) -> None:
        router.send(self._status.welcome())
        router.send(self._status.state)
        cached = KvEvents(self._kv_sequence, stored=list(self._cached_blocks), cleared=True)
        router.send(cached)
        self._routers[router.number] = router

    def _handle(self, router: _Router, message: RouterMessage) -> None:
        match message:
            case Submit():
                router.rids.add(message.rid)
                self._to_core(RoutedSubmit(router.number, message))
            case Cancel():
                self._to_core(message)
            case Ping():
                router.send(Pong(message.number))
            case Hello():
                router.send(Refused("", "protocol", "a second hello; send one only"))

    # --- from the core ----------------------------------------------------------------------------

    def step(self, step: CoreStep) -> None:
        """Tokens of one step: one frame for each router that has some."""
        for routed in step.routed:
            router = self._routers.get(routed.router)
            if router is None:
                continue
            router.send(Step(routed.items))
            for item in routed.items:
                if item.finish:
                    router.rids.discard(item.rid)

    def refuse(self, refused: CoreRefused) -> None:
        """A request that will not be run."""
        router = self._routers.get(refused.router)
        if router is not None:
            router.rids.discard(refused.refused.rid)
            router.send(refused.refused)

    def broadcast_state(self) -> None:
        """Tell every router the newest state."""
        state = self._status.state
        for router in list(self._routers.values()):
            router.send(state)

    def kv_events(self, events: KvEvents) -> None:
        """Pass on what entered and left the prefix cache, and keep it for later routers."""
        if events.cleared:
            self._cached_blocks.clear()
        self._cached_blocks.difference_update(events.removed)
        self._cached_blocks.update(events.stored)
        self._kv_sequence = events.sequence
        for router in list(self._routers.values()):
            router.send(events)

    async def close(self) -> None:
        """Send what is still queued and close every connection."""
        if self._listener is not None:
            await self._listener.close()
