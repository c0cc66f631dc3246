"""The hand-off of one worker: a thread with its own loop beside the core's."""

import asyncio
import contextlib
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable

import uvloop

from tandem_engine.config import WorkerConfig
from tandem_engine.faults import parse_faults
from tandem_engine.frames import LeaseQuery, LeaseReport, Pairing, PairTrouble, ProbeRequest
from tandem_engine.handoff.decode.side import DecodeSide
from tandem_engine.handoff.events import (
    Counters,
    FetchCancelled,
    FetchDone,
    FetchFailed,
    FetchRequest,
    FromHandoff,
    PrefillArrived,
    PrefillDropped,
    PushChunk,
    PushDone,
    PushFailed,
    ToHandoff,
)
from tandem_engine.handoff.injection import Injector
from tandem_engine.handoff.prefill.side import PrefillSide
from tandem_engine.handoff.settings import HandoffSettings
from tandem_engine.handoff.transports.registry import Transports
from tandem_engine.step import KVStore

log = logging.getLogger(__name__)


class HandoffService:
    """Implements `events.Handoff`. Made by `start_handoff`.

    The core's calls only touch a deque; everything else happens in the thread. The thread exchanges
    the messages; the transports' own threads move the pages.

    Whoever gives it a loop runs `serve` there instead of `start`: the protocol's model does.
    """

    def __init__(
        self,
        settings: HandoffSettings,
        kv: KVStore,
        compatibility_hash: str,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._settings = settings
        self._transports = Transports(settings, kv)
        self._kv = kv
        self._compatibility_hash = compatibility_hash
        self._inbox: deque[ToHandoff] = deque()
        self._outbox: deque[FromHandoff] = deque()
        self._wake: threading.Event | None = None
        self._counters = Counters()
        self._gauges: dict[str, float] = {}
        self._pairings: list[Pairing] = []
        self._troubles: list[PairTrouble] = []
        self._lock = threading.Lock()
        self._num_leases = 0
        self._started = threading.Event()
        self._failure: Exception | None = None
        self._loop = loop or uvloop.new_event_loop()
        self._stop = asyncio.Event()
        self._prefill: PrefillSide
        self._decode: DecodeSide
        self.bootstrap_port = 0
        self._thread = threading.Thread(target=self._main, name="kv-handoff", daemon=True)

    def start(self) -> None:
        """Start the thread. Raises `HandoffUnavailable` when it can't serve."""
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    # --- called by the core -----------------------------------------------------------------------

    def post(self, event: ToHandoff) -> None:
        """Give the hand-off something to do."""
        if isinstance(event, FetchRequest):
            self._kv.reserve(event.blocks)
            self._count_lease(1)
        self._inbox.append(event)
        self._call(self._take_inbox)

    def poll(self) -> list[FromHandoff]:
        """Take everything that has happened since the last call. Raises what the thread died of."""
        if self._failure is not None:
            raise self._failure
        events: list[FromHandoff] = []
        while self._outbox:
            events.append(self._outbox.popleft())
        return events

    def wake_on_event(self, wake: threading.Event) -> None:
        """Have `wake` set whenever `poll` has something new."""
        self._wake = wake
        if self._outbox:
            wake.set()

    def num_leases(self) -> int:
        """Count the fetches and pushes that are not finished; a drain waits for zero."""
        return self._num_leases

    def counters(self) -> dict[str, float]:
        """Return totals since the start, by metric name."""
        stale = float(self._decode.num_stale_writes())
        return self._counters.totals() | {"kv_stale_writes_total": stale}

    def gauges(self) -> dict[str, float]:
        """Return the number of open sessions by side and transport."""
        return self._gauges

    def pairings(self) -> list[Pairing]:
        """Return the open sessions, as they were at the last tick."""
        return self._pairings

    def troubles(self) -> list[PairTrouble]:
        """Return the peers with link faults, as they were at the last tick."""
        return self._troubles

    def set_draining(self, draining: bool) -> None:
        """Refuse new `Prefill` messages while set; peers hear of it with the next beat."""
        self._call(setattr, self._prefill, "draining", draining)

    def close(self) -> None:
        """Stop the thread; every open lease is reported as failed first."""
        self.stop()
        self._thread.join()

    def stop(self) -> None:
        """Have `serve` return, after it has ended every lease."""
        self._call(self._stop.set)

    def _call(self, call: Callable[..., None], *args: object) -> None:
        # After `close` the loop is gone, and nothing is left to do.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *args)

    # --- the thread -------------------------------------------------------------------------------

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self.serve())
        except Exception as error:
            self._failure = error
            if self._started.is_set():
                log.exception("the hand-off thread died")
                if self._wake is not None:
                    self._wake.set()
        finally:
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()
            self._started.set()
            self._transports.close()

    async def serve(self) -> None:
        """Serve both sides until `stop`. Raises `HandoffUnavailable`."""
        pairing = (self._settings, self._kv, self._compatibility_hash, self._transports)
        injector = self._make_injector()
        self._prefill = PrefillSide(*pairing, self._report, self._counters, injector)
        self._decode = DecodeSide(*pairing, self._report, self._counters, injector)
        self.bootstrap_port = await self._prefill.open()
        log.info("hand-off at port %d, over %s", self.bootstrap_port, self._transports)
        self._started.set()
        tick = min(0.5, self._settings.heartbeat_seconds / 2)
        try:
            # Leases are swept at every tick, whether or not there is any work (TRT-LLM#12313).
            while not self._stop.is_set():
                await self._prefill.sweep(self._loop.time())
                self._measure()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(tick):
                        await self._stop.wait()
        finally:
            # Also when a bug ends the thread: peers hear of it at once.
            self._take_inbox()
            await self._decode.close()
            await self._prefill.close()

    def _make_injector(self) -> Injector | None:
        if not self._settings.faults:
            return None
        log.warning("this worker injects faults: TANDEM_FAULTS is %s", self._settings.faults)
        plan = parse_faults(self._settings.faults)
        return Injector(plan, self._settings.worker_id, self._counters)

    def _measure(self) -> None:
        self._pairings = [*self._prefill.pairings(), *self._decode.pairings()]
        self._troubles = self._decode.troubles()
        sessions = Counter((pairing.transport, pairing.side) for pairing in self._pairings)
        self._gauges = {
            f'kv_sessions{{backend="{name}",side="{side}"}}': float(number)
            for (name, side), number in sessions.items()
        } | {
            f'kv_pair_out_of_use{{peer="{trouble.worker_id}"}}': float(trouble.out_of_use)
            for trouble in self._troubles
        }

    def _take_inbox(self) -> None:
        while self._inbox:
            event = self._inbox.popleft()
            match event:
                case FetchRequest():
                    self._decode.fetch(event)
                case FetchCancelled():
                    self._decode.cancel(event.rid)
                case PushChunk() | PushFailed():
                    self._prefill.feed(event)
                case ProbeRequest():
                    self._decode.probe(event)
                case LeaseQuery(number):
                    self._report(
                        LeaseReport(
                            number=number,
                            fetches=self._decode.held(),
                            pushes=self._prefill.held(),
                        )
                    )

    def _report(self, event: FromHandoff) -> None:
        if isinstance(event, PrefillArrived):
            self._count_lease(1)
        elif isinstance(event, FetchDone | FetchFailed | PushDone | PrefillDropped):
            self._count_lease(-1)
        self._outbox.append(event)
        if self._wake is not None:
            self._wake.set()

    def _count_lease(self, change: int) -> None:
        with self._lock:
            self._num_leases += change


def start_handoff(
    config: WorkerConfig | HandoffSettings, kv: KVStore, compatibility_hash: str
) -> HandoffService:
    """Open the bootstrap port and start the hand-off's thread.

    Raises `HandoffUnavailable` when the port is taken or the transport can't work here.
    """
    settings = (
        config if isinstance(config, HandoffSettings) else HandoffSettings.from_worker(config)
    )
    service = HandoffService(settings, kv, compatibility_hash)
    service.start()
    return service
