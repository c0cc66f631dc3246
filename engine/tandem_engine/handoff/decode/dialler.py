"""Opens sessions with prefill workers: dials, offers transports, shakes hands."""

import asyncio
import secrets
from collections.abc import Callable

import msgspec

from tandem_engine.handoff.decode.session import DecodeSession
from tandem_engine.handoff.errors import PairingRefused
from tandem_engine.handoff.settings import HandoffSettings
from tandem_engine.handoff.transports.base import Inbound, Link
from tandem_engine.handoff.transports.registry import Transports
from tandem_engine.step import KVStore
from tandem_wire.endpoint import dial
from tandem_wire.errors import ConnectionLost
from tandem_wire.handoff import HandoffMessage, Handshake, HandshakeReply, TransportName


class Dialler:
    """Opens sessions for one worker, all with the same layout, hash and transports."""

    def __init__(
        self,
        settings: HandoffSettings,
        kv: KVStore,
        compatibility_hash: str,
        transports: Transports,
    ) -> None:
        self._settings = settings
        self._kv = kv
        self._compatibility_hash = compatibility_hash
        self._transports = transports
        self._decoder: msgspec.msgpack.Decoder[HandoffMessage] = msgspec.msgpack.Decoder(
            HandoffMessage
        )

    async def open(
        self, host: str, port: int, on_ended: Callable[[DecodeSession], None]
    ) -> DecodeSession:
        """Pair with the prefill worker at host:port.

        Raises WireError, TransportError, PairingRefused or TimeoutError.
        """
        async with asyncio.timeout(self._settings.dial_seconds):
            connection = await dial(
                host, port, self._decoder, timeout_seconds=self._settings.dial_seconds
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
                inbounds = self._transports.offer(link)
                reply, name = await self._shake(link, inbounds)
                await inbounds[name].open()
                chosen = inbounds.pop(name)
            except BaseException:
                connection.abort()
                raise
            finally:
                for refused in inbounds.values():
                    await refused.close()
        return DecodeSession(link, chosen, reply, on_ended)

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
