"""The prefill side: the bootstrap port, who may pair with this worker, leases."""

import asyncio
import logging
from collections.abc import Callable

import msgspec

from tandem_engine.handoff.counters import Counters
from tandem_engine.handoff.errors import HandoffUnavailable, PairingRefused, TransportError
from tandem_engine.handoff.events import PushChunk, PushFailed, ToCore
from tandem_engine.handoff.prefill.session import PrefillSession
from tandem_engine.handoff.settings import HandoffSettings
from tandem_engine.handoff.transports.base import Outbound
from tandem_engine.handoff.transports.shm import ShmOutbound
from tandem_engine.handoff.transports.tcp import TcpOutbound
from tandem_engine.step import KVStore
from tandem_wire.connection import Connection
from tandem_wire.endpoint import Listener, keep_alive, listen
from tandem_wire.handoff import (
    Beat,
    DataHello,
    HandoffMessage,
    Handshake,
    HandshakeReply,
    KVLayout,
    TransportOffer,
)
from tandem_wire.messages import PROTOCOL

log = logging.getLogger(__name__)


def check_pairing(mine: KVLayout, my_hash: str, theirs: Handshake) -> None:
    """Raise `PairingRefused`, with the remedy, unless these two may exchange KV."""
    if theirs.protocol != PROTOCOL:
        raise PairingRefused(
            f"hand-off protocol {theirs.protocol} meets {PROTOCOL}",
            "run both workers from the same release",
        )
    for field in KVLayout.__struct_fields__:
        here, there = getattr(mine, field), getattr(theirs.layout, field)
        if here != there:
            raise PairingRefused(
                f"KV layouts differ: {field} is {here} here and {there} there",
                f"start both workers with the same {field}",
            )
    if theirs.compatibility_hash != my_hash:
        raise PairingRefused(
            f"compatibility hash {theirs.compatibility_hash} meets {my_hash}",
            "pair workers of one model, revision, dtype and adapter set",
        )


class PrefillSide:
    """All sessions in which this worker is P. Lives on the hand-off's loop."""

    def __init__(
        self,
        settings: HandoffSettings,
        kv: KVStore,
        compatibility_hash: str,
        report: Callable[[ToCore], None],
        counters: Counters,
    ) -> None:
        self._settings = settings
        self._kv = kv
        self._compatibility_hash = compatibility_hash
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
                settings.host, settings.bootstrap_port, decoder, self._serve
            )
        except OSError as error:
            raise HandoffUnavailable(
                f"the bootstrap port {settings.host}:{settings.bootstrap_port} is not to be had: "
                f"{error}; choose another --bootstrap-port, or 0 for a free one"
            ) from error
        return self._listener.port

    async def _serve(self, connection: Connection[HandoffMessage]) -> None:
        """One connection: its first frame says whether it is a control or a data connection."""
        try:
            async with asyncio.timeout(self._settings.dial_seconds):
                first = await connection.receive()
        except TimeoutError:
            return
        if isinstance(first, DataHello):
            session = self._sessions.get(first.session)
            if session is not None and isinstance(session.outbound, TcpOutbound):
                session.outbound.attach(connection.detach())
        elif isinstance(first, Handshake):
            await self._serve_session(connection, first)

    async def _serve_session(
        self, connection: Connection[HandoffMessage], handshake: Handshake
    ) -> None:
        settings = self._settings
        reply = HandshakeReply(worker_id=settings.worker_id, boot_id=settings.boot_id)
        try:
            check_pairing(self._kv.layout, self._compatibility_hash, handshake)
            if handshake.session in self._sessions:
                raise PairingRefused("the session's name is taken", "choose another one")
            offer, outbound = self._choose_transport(connection, handshake.offers)
        except PairingRefused as refused:
            self._counters.add("kv_refused_pairings_total")
            log.warning("refused to pair with %s: %s", handshake.worker_id, refused)
            connection.send(
                msgspec.structs.replace(reply, error=refused.error, remedy=refused.remedy)
            )
            return
        session = PrefillSession(
            handshake.session,
            connection,
            outbound,
            self._kv,
            settings,
            self._report,
            self._counters,
            lambda: self.draining,
        )
        self._sessions[handshake.session] = session
        connection.send(msgspec.structs.replace(reply, transport=offer))
        beats = asyncio.get_running_loop().create_task(
            keep_alive(connection, self._beat, handshake.heartbeat_seconds)
        )
        try:
            await session.run()
        finally:
            beats.cancel()
            del self._sessions[handshake.session]

    def _choose_transport(
        self, connection: Connection[HandoffMessage], offers: list[TransportOffer]
    ) -> tuple[TransportOffer, Outbound]:
        """The first of D's offers that this side can do too, ready to write."""
        allowed = {"auto": ("shm", "tcp")}.get(self._settings.transfer, (self._settings.transfer,))

        def lost(error: Exception) -> None:
            connection.abort()
            self._counters.add("kv_transport_failures_total")

        why = []
        for offer in offers:
            try:
                if offer.name not in allowed:
                    raise TransportError("not allowed by --transfer here")
                if offer.name == "tcp":
                    return offer, TcpOutbound(lost, checksum=self._settings.checksum)
                if offer.name == "shm":
                    return offer, ShmOutbound(
                        self._settings.shm_dir,
                        offer,
                        connection.send,
                        lost,
                        pin=self._kv.pin,
                        checksum=self._settings.checksum,
                    )
            except TransportError as error:
                why.append(f"{offer.name}: {error}")
        raise PairingRefused(
            "no common transport" + (f" ({'; '.join(why)})" if why else ""),
            "use --transfer Auto or Tcp on both, or give both the same TANDEM_SHM_DIR",
        )

    def _beat(self) -> Beat:
        return Beat(self.draining, self._num_chunks)

    def feed(self, event: PushChunk | PushFailed) -> None:
        """The core has news for a push; `event.key` is `session/epoch`."""
        self._num_chunks += isinstance(event, PushChunk)
        name, _, epoch = event.key.rpartition("/")
        session = self._sessions.get(name)
        if session is not None:
            session.feed(int(epoch), event)

    async def sweep(self, now: float) -> None:
        """Expire leases; called at every tick of the hand-off's loop."""
        for session in list(self._sessions.values()):
            await session.expire(now)

    @property
    def num_leases(self) -> int:
        """Pushes that are not finished."""
        return sum(len(session.pushes) for session in self._sessions.values())

    def sessions_by_transport(self) -> dict[str, int]:
        """How many decode workers are connected, by transport."""
        count: dict[str, int] = {}
        for session in self._sessions.values():
            count[session.transport_name] = count.get(session.transport_name, 0) + 1
        return count

    async def close(self) -> None:
        """Close the port and every session; their pushes are reported as dropped."""
        if self._listener is not None:
            await self._listener.close()
