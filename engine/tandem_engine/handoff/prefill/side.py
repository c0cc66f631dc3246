"""The prefill side: the bootstrap port, who may pair with this worker, leases."""

import asyncio
import logging
from collections.abc import Callable

import msgspec

from tandem_engine.frames import HeldPush, Pairing
from tandem_engine.handoff.errors import HandoffUnavailable, PairingRefused
from tandem_engine.handoff.events import Counters, FromHandoff, PushChunk, PushFailed
from tandem_engine.handoff.injection import Injector, make_connection
from tandem_engine.handoff.prefill.session import PrefillSession
from tandem_engine.handoff.settings import HandoffSettings
from tandem_engine.handoff.transports.base import Link
from tandem_engine.handoff.transports.registry import Transports
from tandem_engine.step import KVStore
from tandem_wire.connection import Connection
from tandem_wire.endpoint import Listener, keep_alive, listen
from tandem_wire.errors import ConnectionLost
from tandem_wire.handoff import (
    Beat,
    DataHello,
    HandoffMessage,
    Handshake,
    HandshakeReply,
    KVLayout,
)
from tandem_wire.messages import PROTOCOL

log = logging.getLogger(__name__)


def check_pairing(mine: KVLayout, my_hash: str, theirs: Handshake) -> None:
    """Raise `PairingRefused`, with the remedy, unless these two may exchange KV."""
    if theirs.protocol != PROTOCOL:
        raise PairingRefused(
            f"the hand-off protocol is {PROTOCOL} here and {theirs.protocol} there",
            "run both workers from the same release",
        )
    for field in KVLayout.__struct_fields__:
        here, there = getattr(mine, field), getattr(theirs.layout, field)
        if here != there:
            raise PairingRefused(
                f"the KV layouts differ: {field} is {here} here and {there} there",
                f"start both workers with the same {field}",
            )
    if theirs.compatibility_hash != my_hash:
        raise PairingRefused(
            f"the compatibility hash is {my_hash} here and {theirs.compatibility_hash} there",
            "pair workers of one model, revision, dtype and adapter set",
        )


class PrefillSide:
    """All sessions in which this worker is P. Lives on the hand-off's loop."""

    def __init__(
        self,
        settings: HandoffSettings,
        kv: KVStore,
        compatibility_hash: str,
        transports: Transports,
        report: Callable[[FromHandoff], None],
        counters: Counters,
        injector: Injector | None = None,
    ) -> None:
        self._injector = injector
        self._settings = settings
        self._kv = kv
        self._compatibility_hash = compatibility_hash
        self._transports = transports
        self._report = report
        self._counters = counters
        self._sessions: dict[str, PrefillSession] = {}
        self._listener: Listener[HandoffMessage] | None = None
        self.draining = False
        self._num_chunks = 0

    async def open(self) -> int:
        """Open the bootstrap port and return it. Raises HandoffUnavailable."""
        settings = self._settings
        decoder: msgspec.msgpack.Decoder[HandoffMessage] = msgspec.msgpack.Decoder(HandoffMessage)
        try:
            self._listener = await listen(
                settings.host,
                settings.bootstrap_port,
                decoder,
                self._serve,
                make=make_connection(self._injector),
            )
        except OSError as error:
            raise HandoffUnavailable(
                f"can't open the bootstrap port {settings.host}:{settings.bootstrap_port}: "
                f"{error}; choose another --bootstrap-port, or 0 for a free one"
            ) from error
        return self._listener.port

    async def _serve(self, connection: Connection[HandoffMessage]) -> None:
        """Serve one connection: its first frame says whether it carries control or data."""
        try:
            async with asyncio.timeout(self._settings.dial_seconds):
                first = await connection.receive()
        except TimeoutError:
            return
        if isinstance(first, DataHello):
            session = self._sessions.get(first.session)
            if session is not None:
                session.outbound.attach(connection)
        elif isinstance(first, Handshake):
            await self._serve_session(connection, first)

    async def _serve_session(
        self, connection: Connection[HandoffMessage], handshake: Handshake
    ) -> None:
        settings = self._settings
        reply = HandshakeReply(worker_id=settings.worker_id, boot_id=settings.boot_id)
        link = self._make_link(connection, handshake.session)
        try:
            check_pairing(self._kv.layout, self._compatibility_hash, handshake)
            if link.session in self._sessions:
                raise PairingRefused(
                    f"a session named {link.session} is open already", "choose another name"
                )
            offer, outbound, passed_over = await self._transports.accept(handshake.offers, link)
        except PairingRefused as refused:
            self._counters.add("kv_refused_pairings_total")
            log.warning("refused to pair with %s: %s", handshake.worker_id, refused)
            connection.send(
                msgspec.structs.replace(reply, error=refused.error, remedy=refused.remedy)
            )
            return
        pairing = Pairing(
            worker_id=handshake.worker_id,
            side="prefill",
            transport=offer.name,
            passed_over=passed_over,
            memory=outbound.memory,
            shortfalls=outbound.shortfalls,
        )
        session = PrefillSession(
            link, outbound, pairing, self._report, self._counters, lambda: self.draining
        )
        self._sessions[link.session] = session
        # D may be gone by now; the session finds that out, and then gives back what it has.
        link.send(msgspec.structs.replace(reply, transport=offer, passed_over=passed_over))
        beats = asyncio.get_running_loop().create_task(
            keep_alive(connection, self._beat, handshake.heartbeat_seconds)
        )
        try:
            await session.run()
        finally:
            beats.cancel()
            del self._sessions[link.session]

    def _make_link(self, connection: Connection[HandoffMessage], session: str) -> Link:
        def lost(error: Exception) -> None:
            connection.abort(ConnectionLost(str(error)))
            self._counters.add("kv_transport_failures_total")

        return Link(
            session=session,
            address=(self._settings.host, self._settings.bootstrap_port),
            connection=connection,
            settings=self._settings,
            kv=self._kv,
            on_lost=lost,
            around_lane=self._injector.around if self._injector else None,
        )

    def _beat(self) -> Beat:
        return Beat(self.draining, self._num_chunks)

    def feed(self, event: PushChunk | PushFailed) -> None:
        """Pass the core's news to a push; `event.key` is `session/epoch`."""
        self._num_chunks += isinstance(event, PushChunk)
        name, _, epoch = event.key.rpartition("/")
        session = self._sessions.get(name)
        if session is not None:
            session.feed(int(epoch), event)

    async def sweep(self, now: float) -> None:
        """Expire leases; called at every tick of the hand-off's loop."""
        for session in list(self._sessions.values()):
            session.expire(now)

    def held(self) -> list[HeldPush]:
        """The pushes whose blocks are pinned."""
        now = asyncio.get_running_loop().time()
        return [held for session in self._sessions.values() for held in session.held(now)]

    def pairings(self) -> list[Pairing]:
        """The decode workers that are connected."""
        return [session.pairing for session in self._sessions.values()]

    async def close(self) -> None:
        """Close the port and every session; their pushes are reported as dropped."""
        if self._listener is not None:
            await self._listener.close()
