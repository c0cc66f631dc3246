"""Opens sessions with prefill workers: dials, offers transports, shakes hands."""

import asyncio
import logging
import secrets
from collections.abc import Callable

import msgspec

from tandem_engine.frames import Pairing
from tandem_engine.handoff.decode.exchange import Exchange
from tandem_engine.handoff.decode.session import DecodeSession
from tandem_engine.handoff.errors import AttemptFailed, PairingRefused
from tandem_engine.handoff.injection import Injector, make_connection
from tandem_engine.handoff.settings import HandoffSettings
from tandem_engine.handoff.transports.base import Inbound, Link
from tandem_engine.handoff.transports.registry import Reasons, Transports, better_ones
from tandem_engine.step import KVStore
from tandem_wire.endpoint import dial
from tandem_wire.errors import ConnectionLost
from tandem_wire.handoff import HandoffMessage, Handshake, HandshakeReply, TransportName

log = logging.getLogger(__name__)


class Dialler:
    """Opens sessions for one worker, all with the same layout, hash and transports."""

    def __init__(
        self,
        settings: HandoffSettings,
        kv: KVStore,
        compatibility_hash: str,
        transports: Transports,
        exchange: Exchange,
        injector: Injector | None,
    ) -> None:
        self._settings = settings
        self._kv = kv
        self._compatibility_hash = compatibility_hash
        self._transports = transports
        self._exchange = exchange
        self._make_connection = make_connection(injector)
        self._decoder: msgspec.msgpack.Decoder[HandoffMessage] = msgspec.msgpack.Decoder(
            HandoffMessage
        )

    async def open(
        self, host: str, port: int, on_ended: Callable[[DecodeSession], None]
    ) -> DecodeSession:
        """Pair with the prefill worker at host:port, over the best transport that moves a page.

        Raises WireError, TransportError, PairingRefused or TimeoutError.
        """
        failed: Reasons = {}
        while True:
            session = await self._pair(host, port, on_ended, failed)
            try:
                await self._exchange.try_out(session)
            except AttemptFailed as failure:
                name = session.inbound.name
                log.warning("%s does not work with %s:%d: %s", name, host, port, failure)
                failed = session.pairing.passed_over | {
                    name: f"the first page did not come: {failure}"
                }
                await session.close()
            except BaseException:
                session.connection.abort()
                # No one else knows of this session, and the loop must not end before its threads.
                await asyncio.wait([session.lost])
                raise
            else:
                return session

    async def _pair(
        self,
        host: str,
        port: int,
        on_ended: Callable[[DecodeSession], None],
        failed: Reasons,
    ) -> DecodeSession:
        async with asyncio.timeout(self._settings.dial_seconds):
            connection = await dial(
                host,
                port,
                self._decoder,
                timeout_seconds=self._settings.dial_seconds,
                make=self._make_connection,
            )
            link = Link(
                session=secrets.token_hex(16),
                address=(host, port),
                connection=connection,
                settings=self._settings,
                kv=self._kv,
                on_lost=lambda error: connection.abort(ConnectionLost(str(error))),
            )
            inbounds: dict[TransportName, Inbound] = {}
            try:
                inbounds, why = self._transports.offer(link, failed)
                reply, name = await self._shake(link, inbounds)
                await inbounds[name].open()
                chosen = inbounds.pop(name)
            except BaseException:
                connection.abort()
                raise
            finally:
                for refused in inbounds.values():
                    await refused.close()
        pairing = Pairing(
            worker_id=reply.worker_id,
            side="decode",
            transport=name,
            passed_over=better_ones(why | reply.passed_over, name),
            memory=chosen.memory,
            shortfalls=chosen.shortfalls,
        )
        return DecodeSession(link, chosen, pairing, on_ended)

    async def _shake(
        self, link: Link, inbounds: dict[TransportName, Inbound]
    ) -> tuple[HandshakeReply, TransportName]:
        """P's reply, and the transport that it chose."""
        link.connection.send(
            Handshake(
                worker_id=self._settings.worker_id,
                boot_id=self._settings.boot_id,
                session=link.session,
                compatibility_hash=self._compatibility_hash,
                layout=self._kv.layout,
                offers=[inbound.offer for inbound in inbounds.values()],
                heartbeat_seconds=self._settings.heartbeat_seconds,
            )
        )
        reply = await link.connection.receive()
        if not isinstance(reply, HandshakeReply):
            raise PairingRefused(
                f"{link.connection.peer} answered the handshake with another message",
                "check that this is a worker's bootstrap port",
            )
        if reply.error or reply.transport is None:
            raise PairingRefused(reply.error or "the peer chose no transport", reply.remedy)
        if reply.transport.name not in inbounds:
            raise PairingRefused(
                f"the peer chose the transport {reply.transport.name}, which was not offered",
                "run both workers from the same release",
            )
        return reply, reply.transport.name
