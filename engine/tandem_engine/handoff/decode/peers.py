"""The prefill workers that this decode worker knows: one kept connection each.

A peer that can't be reached is passed over for a short, growing time, never longer than
`blacklist_seconds`, while a probe in the background tries it; the first success ends that. One that
is reached, but loses or changes bytes, is taken out of use until a check has passed (`health`).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from tandem_engine.frames import HeldFetch, Pairing, PairTrouble
from tandem_engine.handoff.decode.health import PairHealth
from tandem_engine.handoff.decode.session import DecodeSession
from tandem_engine.handoff.errors import (
    AttemptFailed,
    PairingRefused,
    PeerUnavailable,
    TransportError,
)
from tandem_engine.handoff.events import Counters
from tandem_engine.handoff.settings import HandoffSettings
from tandem_wire.errors import ConnectionLost, WireError
from tandem_wire.messages import PrefillPeer

log = logging.getLogger(__name__)
Open = Callable[[str, int, Callable[[DecodeSession], None]], Awaitable[DecodeSession]]
Check = Callable[[DecodeSession], Awaitable[None]]

_FIRST_DELAY_SECONDS = 0.2
_FORGET_SECONDS = 300.0


class Peer:
    """One address. Used on the hand-off's loop only."""

    def __init__(
        self,
        host: str,
        port: int,
        open_session: Open,
        check: Check,
        settings: HandoffSettings,
        count: Counters,
    ) -> None:
        self.name = f"{host}:{port}"
        self.session: DecodeSession | None = None
        self._num_stale_writes = 0
        self._host = host
        self._port = port
        self._open = open_session
        self._check = check
        self._settings = settings
        self._max_delay = settings.blacklist_seconds
        self._counters = count
        self._loop = asyncio.get_running_loop()
        self._lock = asyncio.Lock()
        self._num_failures = 0
        self._retry_at = 0.0
        self._error = ""
        self._wanted_at = 0.0
        self._probe: asyncio.Task[None] | None = None
        self._recheck: asyncio.Task[None] | None = None
        self._health = PairHealth(settings)
        self._pairing: Pairing | None = None  # of the last session
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
        return self.session is None and self._is_unwanted()

    def _is_unwanted(self) -> bool:
        return self._loop.time() - self._wanted_at > _FORGET_SECONDS

    async def connect(self, *, at_once: bool = False) -> DecodeSession:
        """Return the open session, or a new one.

        Raises `PeerUnavailable`: at once while the peer is passed over, unless `at_once` is set.
        """
        self._wanted_at = self._loop.time()
        return await self._connect(at_once=at_once)

    async def _connect(self, *, at_once: bool) -> DecodeSession:
        if not at_once:
            self._check_in_use()
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

    def _check_in_use(self) -> None:
        if self._health.out_of_use:
            wait = max(0.0, self._health.check_at - self._loop.time())
            raise PeerUnavailable(
                f"{self.name} is out of use, to be checked in {wait:.0f} s: {self._health.reason}"
            )

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
        pairing = self.session.pairing
        if self._pairing is not None and self._pairing.worker_id != pairing.worker_id:
            self._health = PairHealth(self._settings)  # another worker has the address now
        self._pairing = pairing
        log.info(
            "paired with %s at %s over %s in %s memory; passed over: %s",
            pairing.worker_id,
            self.name,
            pairing.transport,
            pairing.memory,
            list(pairing.passed_over.items()) + list(pairing.shortfalls.items()) or "nothing",
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
        while not self._is_unwanted():
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

    # --- link faults ------------------------------------------------------------------------------

    def note_fault(self, session: DecodeSession, why: str) -> None:
        """Count a transfer that came damaged or not at all."""
        self._counters.add("kv_link_faults_total")
        if self._pairing is None or session.worker_id != self._pairing.worker_id:
            return  # a late one, of the worker that had the address before
        if not self._health.note_fault(why, self._loop.time()):
            log.warning("KV of %s did not arrive whole: %s", session.worker_id, why)
            return
        log.error("%s at %s is taken out of use: %s", session.worker_id, self.name, why)
        self._counters.add("kv_pairs_taken_out_total")
        if not self._closing:
            self._recheck = self._loop.create_task(self._check_until_whole())

    async def _check_until_whole(self) -> None:
        """Move a pattern after each rest, until it arrives whole or no one wants the peer."""
        health = self._health
        while health is self._health and health.out_of_use and not self._is_unwanted():
            await asyncio.sleep(max(0.0, health.check_at - self._loop.time()))
            try:
                session = await self._connect(at_once=True)
                await self._check(session)
            except PeerUnavailable as error:
                health.fail_check(str(error), self._loop.time())
            except AttemptFailed as error:
                log.error("%s stays out of use: %s", self.name, error)
                health.fail_check(str(error), self._loop.time())
                # The next check gets a session, and with it a transport, of its own.
                session.connection.abort(ConnectionLost(f"the pair failed its check: {error}"))
            else:
                log.info("%s at %s is in use again", session.worker_id, self.name)
                health.pass_check(self._loop.time())

    def trouble(self) -> PairTrouble | None:
        """What the link faults of this peer have come to; None if there were none."""
        health, pairing = self._health, self._pairing
        if pairing is None or not health.num_faults:
            return None
        return PairTrouble(
            worker_id=pairing.worker_id,
            address=self.name,
            transport=pairing.transport,
            num_faults=health.num_faults,
            out_of_use=health.out_of_use,
            reason=health.reason,
        )

    async def close(self) -> None:
        """Close the session and stop trying."""
        self._closing = True
        tasks = [task for task in (self._probe, self._recheck) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self.session is not None:
            await self.session.close()


class PeerPool:
    """All peers by address."""

    def __init__(
        self, open_session: Open, check: Check, settings: HandoffSettings, counters: Counters
    ) -> None:
        self._open = open_session
        self._check = check
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
            peer = Peer(*key, self._open, self._check, self._settings, self._counters)
            self._peers[key] = peer
        session = await peer.connect(at_once=at_once)
        if wanted.worker_id and session.worker_id != wanted.worker_id:
            raise PeerUnavailable(f"{peer.name} is now {session.worker_id}, not {wanted.worker_id}")
        if session.draining and not at_once:
            raise PeerUnavailable(f"{session.worker_id} is draining")
        return session

    def note_fault(self, wanted: PrefillPeer, session: DecodeSession, why: str) -> None:
        """Count a transfer from `wanted` that came damaged or not at all."""
        peer = self._peers.get((wanted.host, wanted.port))
        if peer is not None:
            peer.note_fault(session, why)

    def troubles(self) -> list[PairTrouble]:
        """The peers with link faults."""
        found = (peer.trouble() for peer in self._peers.values())
        return [trouble for trouble in found if trouble is not None]

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
