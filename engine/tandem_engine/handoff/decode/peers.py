"""The prefill workers that this decode worker knows: one kept connection each.

A peer that can't be reached is passed over for a short, growing time, never longer than
`blacklist_seconds`, while a probe in the background tries it; the first success ends that.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from tandem_engine.frames import HeldFetch, Pairing
from tandem_engine.handoff.decode.session import DecodeSession
from tandem_engine.handoff.errors import PairingRefused, PeerUnavailable, TransportError
from tandem_engine.handoff.events import Counters
from tandem_engine.handoff.settings import HandoffSettings
from tandem_wire.errors import WireError
from tandem_wire.messages import PrefillPeer

log = logging.getLogger(__name__)
Open = Callable[[str, int, Callable[[DecodeSession], None]], Awaitable[DecodeSession]]

_FIRST_DELAY_SECONDS = 0.2
_FORGET_SECONDS = 300.0


class Peer:
    """One address. Used on the hand-off's loop only."""

    def __init__(
        self, host: str, port: int, open_session: Open, settings: HandoffSettings, count: Counters
    ) -> None:
        self.name = f"{host}:{port}"
        self.session: DecodeSession | None = None
        self._num_stale_writes = 0
        self._host = host
        self._port = port
        self._open = open_session
        self._max_delay = settings.blacklist_seconds
        self._counters = count
        self._loop = asyncio.get_running_loop()
        self._lock = asyncio.Lock()
        self._num_failures = 0
        self._retry_at = 0.0
        self._error = ""
        self._wanted_at = 0.0
        self._probe: asyncio.Task[None] | None = None
        self._closing = False

    @property
    def num_stale_writes(self) -> int:
        """Writes of fenced epochs that were dropped, past sessions included."""
        session = self.session  # the core's thread reads this too
        open_ones = session.inbound.num_stale_writes if session is not None else 0
        return self._num_stale_writes + open_ones

    @property
    def is_forgotten(self) -> bool:
        """Whether it is not connected and no one has wanted it for long."""
        idle = self._loop.time() - self._wanted_at
        return self.session is None and idle > _FORGET_SECONDS

    async def connect(self, *, at_once: bool = False) -> DecodeSession:
        """Return the open session, or a new one.

        Raises `PeerUnavailable`: at once while the peer is passed over, unless `at_once` is set.
        """
        self._wanted_at = self._loop.time()
        if self.session is not None and self.session.is_open:
            return self.session
        if not at_once:
            self._check_passed_over()
        async with self._lock:
            if self.session is not None and self.session.is_open:
                return self.session
            if not at_once:
                self._check_passed_over()  # the last holder of the lock may have failed
            return await self._dial()

    def _check_passed_over(self) -> None:
        wait = self._retry_at - self._loop.time()
        if wait > 0:
            raise PeerUnavailable(f"{self.name} is passed over for {wait:.1f} s: {self._error}")

    async def _dial(self) -> DecodeSession:
        self._counters.add("kv_dials_total")
        try:
            self.session = await self._open(self._host, self._port, self._ended)
        except (WireError, TransportError, PairingRefused, TimeoutError) as error:
            self._num_failures += 1
            delay = min(self._max_delay, _FIRST_DELAY_SECONDS * 2 ** (self._num_failures - 1))
            self._retry_at = self._loop.time() + delay
            self._error = str(error) or "the handshake timed out"
            if self._num_failures == 1:
                log.warning("can't pair with %s: %s", self.name, self._error)
            self._counters.add("kv_dial_failures_total")
            self._start_probe()
            raise PeerUnavailable(f"{self.name}: {self._error}") from error
        self._num_failures = 0
        self._retry_at = 0.0
        session = self.session
        pairing = session.pairing
        log.info(
            "paired with %s at %s over %s; passed over: %s",
            pairing.worker_id,
            self.name,
            pairing.transport,
            pairing.passed_over or "nothing",
        )
        return self.session

    def _ended(self, session: DecodeSession) -> None:
        if self.session is session:
            self._num_stale_writes += session.inbound.num_stale_writes
            self.session = None
            log.info("lost %s at %s: %s", session.worker_id, self.name, session.connection.error)
            self._start_probe()

    def _start_probe(self) -> None:
        if not self._closing and (self._probe is None or self._probe.done()):
            self._probe = self._loop.create_task(self._reconnect())

    async def _reconnect(self) -> None:
        """Try again with back-off until it works or no one has wanted the peer for long."""
        while self._loop.time() - self._wanted_at < _FORGET_SECONDS:
            wait = self._retry_at - self._loop.time()
            if wait > 0:
                await asyncio.sleep(wait)
            async with self._lock:
                if self.session is not None and self.session.is_open:
                    return
                try:
                    await self._dial()
                except PeerUnavailable:
                    continue  # `_dial` has noted the error and the next time
                return

    async def close(self) -> None:
        """Close the session and stop trying."""
        self._closing = True
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.wait([self._probe])
        if self.session is not None:
            await self.session.close()


class PeerPool:
    """All peers by address."""

    def __init__(self, open_session: Open, settings: HandoffSettings, counters: Counters) -> None:
        self._open = open_session
        self._settings = settings
        self._counters = counters
        self._peers: dict[tuple[str, int], Peer] = {}

    async def session(self, wanted: PrefillPeer, *, at_once: bool = False) -> DecodeSession:
        """Return an open session with `wanted`. Raises `PeerUnavailable`."""
        key = (wanted.host, wanted.port)
        peer = self._peers.get(key)
        if peer is None:
            for old in [old for old, known in self._peers.items() if known.is_forgotten]:
                del self._peers[old]
            peer = Peer(*key, self._open, self._settings, self._counters)
            self._peers[key] = peer
        session = await peer.connect(at_once=at_once)
        if wanted.worker_id and session.worker_id != wanted.worker_id:
            raise PeerUnavailable(f"{peer.name} is now {session.worker_id}, not {wanted.worker_id}")
        if session.draining and not at_once:
            raise PeerUnavailable(f"{session.worker_id} is draining")
        return session

    def pairings(self) -> list[Pairing]:
        """The prefill workers that are connected."""
        open_ones = (peer.session for peer in self._peers.values())
        return [session.pairing for session in open_ones if session is not None and session.is_open]

    def held(self) -> list[HeldFetch]:
        """The epochs that are open with any of them."""
        sessions = (peer.session for peer in self._peers.values())
        return [held for session in sessions if session is not None for held in session.held()]

    def num_stale_writes(self) -> int:
        """Count the writes of fenced epochs that were dropped."""
        return sum(peer.num_stale_writes for peer in list(self._peers.values()))

    async def close(self) -> None:
        """Close every session."""
        await asyncio.gather(*(peer.close() for peer in self._peers.values()))
