"""D's side of one control connection: the attempts that one prefill worker is working on."""

import asyncio
import contextlib
import secrets
from collections.abc import Callable
from typing import Any

import msgspec

from tandem_engine.handoff.errors import AttemptFailed, PairingRefused, TransportError
from tandem_engine.handoff.settings import HandoffSettings
from tandem_engine.handoff.transports.base import Inbound
from tandem_engine.handoff.transports.landing import Landing
from tandem_engine.handoff.transports.shm import ShmInbound
from tandem_engine.handoff.transports.tcp import TcpInbound
from tandem_engine.step import KVStore
from tandem_wire.connection import Connection
from tandem_wire.endpoint import dial, keep_alive
from tandem_wire.errors import ConnectionLost, WireError
from tandem_wire.handoff import (
    Beat,
    ChunkPushed,
    Commit,
    Fence,
    Fenced,
    HandoffMessage,
    Handshake,
    HandshakeReply,
    PagesWritten,
    PrefillFailed,
    TransportOffer,
)

_MAX_WRITE_BYTES = 1 << 30


class Attempt:
    """What has become of one epoch: progress, then a commit or a failure."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self.progress_at = self._loop.time()
        self.commit: Commit | None = None
        self.failure: AttemptFailed | None = None
        self.over_at_peer = False  # P has said its last word: no fence is needed
        self.fenced = asyncio.Event()
        self.landing: Landing | None = None

    def progress(self) -> None:
        """Pages landed, or P said that it is getting on."""
        self.progress_at = self._loop.time()
        if self.landing is not None and self.landing.error:
            self.fail(AttemptFailed(self.landing.error))
        self._changed.set()

    def fail(self, failure: AttemptFailed) -> None:
        """The first failure counts."""
        if self.failure is None:
            self.failure = failure
        self._changed.set()

    async def complete(self, stall_seconds: float) -> Commit:
        """Wait for the commit and all the bytes it speaks of. Raises AttemptFailed."""
        assert self.landing is not None
        while True:
            if self.failure is not None:
                raise self.failure
            if self.commit is not None and self.landing.num_bytes >= self.commit.num_bytes:
                return self.commit
            left = self.progress_at + stall_seconds - self._loop.time()
            if left <= 0:
                raise AttemptFailed(f"no progress for {stall_seconds:g} s")
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._changed.wait()


class DecodeSession:
    """One paired prefill worker. `lost` is done when the session has ended and nothing can land."""

    def __init__(
        self,
        connection: Connection[HandoffMessage],
        inbound: Inbound,
        reply: HandshakeReply,
        settings: HandoffSettings,
        on_ended: Callable[["DecodeSession"], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self.connection = connection
        self.inbound = inbound
        self.worker_id = reply.worker_id
        self.draining = False
        self._num_chunks = 0
        self.attempts: dict[int, Attempt] = {}
        self.lost: asyncio.Future[None] = loop.create_future()
        self._on_ended = on_ended
        self._fence_seconds = settings.stall_seconds
        self._beats = loop.create_task(keep_alive(connection, Beat, settings.heartbeat_seconds))
        self._reader = loop.create_task(self._run())

    @property
    def is_open(self) -> bool:
        """False once the connection has begun to end."""
        return self.connection.is_open

    def begin(self, epoch: int, landing: Landing, attempt: Attempt) -> None:
        """Expect pages and words about `epoch`."""
        attempt.landing = landing
        self.attempts[epoch] = attempt
        self.inbound.register(epoch, landing)

    async def end(self, rid: str, epoch: int) -> None:
        """Make sure that nothing of `epoch` can land any more, here and at P, and forget it.

        Waits for P's acknowledgement unless P has said its last word, or for the session's end,
        which this side brings about when P beats but doesn't acknowledge.
        """
        attempt = self.attempts[epoch]
        if not attempt.over_at_peer:
            with contextlib.suppress(WireError):
                self.connection.send(Fence(rid, epoch))
            fenced = asyncio.ensure_future(attempt.fenced.wait())
            either: list[asyncio.Future[Any]] = [fenced, self.lost]
            await asyncio.wait(
                either, timeout=self._fence_seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if not fenced.done() and not self.lost.done():
                self.connection.abort(ConnectionLost(f"{self.worker_id} does not fence"))
                await asyncio.wait([self.lost])
            fenced.cancel()
        await self.inbound.fence(epoch)
        del self.attempts[epoch]

    async def _run(self) -> None:
        reason = ""
        try:
            async for message in self.connection:
                self._handle(message)
        except WireError as error:
            reason = str(error)
        finally:
            self._beats.cancel()
            await self.inbound.close()
            for attempt in self.attempts.values():
                attempt.fail(AttemptFailed(f"lost the prefill worker: {reason or 'it closed'}"))
            self.lost.set_result(None)
            self._on_ended(self)

    def _handle(self, message: HandoffMessage) -> None:
        if isinstance(message, PagesWritten):
            if isinstance(self.inbound, ShmInbound):
                self.inbound.written(message)
            return
        if isinstance(message, Beat):
            self.draining = message.draining
            if message.num_chunks != self._num_chunks:
                # Busy with others' prompts: ours wait their turn, they don't stall.
                self._num_chunks = message.num_chunks
                for waiting in self.attempts.values():
                    waiting.progress()
            return
        if not isinstance(message, ChunkPushed | Commit | PrefillFailed | Fenced):
            return
        attempt = self.attempts.get(message.epoch)
        if attempt is None:
            return  # words about an epoch that is over
        if isinstance(message, Commit):
            attempt.commit = message
            attempt.over_at_peer = True
        elif isinstance(message, PrefillFailed):
            attempt.over_at_peer = True
            attempt.fail(AttemptFailed(f"{message.code}: {message.message}"))
        elif isinstance(message, Fenced):
            attempt.fenced.set()
        attempt.progress()

    async def close(self) -> None:
        """End the session; its attempts fail."""
        await self.connection.close()
        await asyncio.shield(self.lost)


class Dialler:
    """Opens sessions: dials, offers transports, shakes hands."""

    def __init__(self, settings: HandoffSettings, kv: KVStore, compatibility_hash: str) -> None:
        self._settings = settings
        self._kv = kv
        self._compatibility_hash = compatibility_hash
        self._decoder: msgspec.msgpack.Decoder[HandoffMessage] = msgspec.msgpack.Decoder(
            HandoffMessage
        )

    async def open(
        self, host: str, port: int, on_ended: Callable[[DecodeSession], None]
    ) -> DecodeSession:
        """A session with the prefill worker at host:port.

        Raises WireError, TransportError, PairingRefused or TimeoutError.
        """
        async with asyncio.timeout(self._settings.dial_seconds):
            connection = await dial(
                host, port, self._decoder, timeout_seconds=self._settings.dial_seconds
            )
            name = secrets.token_hex(16)
            inbounds = self._offer(connection, (host, port), name)
            try:
                reply = await self._shake(connection, name, inbounds)
                assert reply.transport is not None
                await inbounds[reply.transport.name].open()
                chosen = inbounds.pop(reply.transport.name)
            except BaseException:
                connection.abort()
                raise
            finally:
                for refused in inbounds.values():
                    await refused.close()
        return DecodeSession(connection, chosen, reply, self._settings, on_ended)

    def _offer(
        self, connection: Connection[HandoffMessage], address: tuple[str, int], name: str
    ) -> dict[str, Inbound]:
        """The receiving ends that this side can do, best first."""
        settings = self._settings
        inbounds: dict[str, Inbound] = {}

        def lost(error: Exception) -> None:
            connection.abort(ConnectionLost(str(error)))

        def freed(message: msgspec.Struct) -> None:
            with contextlib.suppress(WireError):
                connection.send(message)

        if settings.shm_dir and settings.transfer in ("auto", "shm"):
            write_bytes = settings.write_bytes or self._kv.write_bytes
            slot_bytes = max(write_bytes, self._kv.layout.layer_bytes)
            num_slots = max(2, settings.shm_ring_bytes // slot_bytes)
            with contextlib.suppress(TransportError):
                inbounds["shm"] = ShmInbound(
                    settings.shm_dir, slot_bytes, num_slots, freed, lost, self._kv.pin
                )
        if settings.transfer in ("auto", "tcp"):
            inbounds["tcp"] = TcpInbound(
                address, name, settings.num_streams, _MAX_WRITE_BYTES, lost
            )
        return inbounds

    async def _shake(
        self, connection: Connection[HandoffMessage], name: str, inbounds: dict[str, Inbound]
    ) -> HandshakeReply:
        offers = [
            inbound.offer if isinstance(inbound, ShmInbound) else TransportOffer("tcp")
            for inbound in inbounds.values()
        ]
        connection.send(
            Handshake(
                worker_id=self._settings.worker_id,
                boot_id=self._settings.boot_id,
                session=name,
                compatibility_hash=self._compatibility_hash,
                layout=self._kv.layout,
                offers=offers,
                heartbeat_seconds=self._settings.heartbeat_seconds,
            )
        )
        reply = await connection.receive()
        if not isinstance(reply, HandshakeReply):
            raise PairingRefused("the answer to the handshake is none", "is this a worker?")
        if reply.error or reply.transport is None or reply.transport.name not in inbounds:
            raise PairingRefused(reply.error or "no transport was chosen", reply.remedy)
        return reply
