"""The core's loop: take what arrived, sweep, schedule, run, stream."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from tandem_engine.cache.ledger import BlockLedger
from tandem_engine.config import WorkerConfig
from tandem_engine.core.intake import RETRY_SECONDS, Intake
from tandem_engine.core.messages import (
    CoreFailed,
    CoreReady,
    FromCore,
    ProbeRequest,
    ProbeResult,
    RoutedSubmit,
    RouterGone,
    SetMode,
    Shutdown,
    ToCore,
)
from tandem_engine.core.report import build_stats
from tandem_engine.kv_transfer.events import (
    FetchDone,
    FetchFailed,
    Handoff,
    PrefillArrived,
    PrefillDropped,
    PushDone,
)
from tandem_engine.kv_transfer.events import ToCore as HandoffEvent
from tandem_engine.request import Kind
from tandem_engine.runner.base import Runner
from tandem_engine.scheduler.limits import Limits
from tandem_engine.scheduler.meter import Meter
from tandem_engine.scheduler.scheduler import Scheduler
from tandem_engine.startup import StartReport
from tandem_wire.hashing import compatibility_hash
from tandem_wire.messages import PROTOCOL, Cancel, KvEvents

STATS_SECONDS: Final = 0.5
"""Interval of load reports; WorkerState promises one a second at least."""
IDLE_SECONDS: Final = 0.1
"""Longest sleep without work, so that deadlines are swept on time."""

log = logging.getLogger(__name__)


def core_compatibility_hash(config: WorkerConfig, runner: Runner) -> str:
    """Two workers with the same hash may exchange KV."""
    layout = runner.kv.layout
    return compatibility_hash(
        protocol=PROTOCOL,
        model=model_identity(config),
        revision=config.revision,
        dtype=layout.dtype,
        layout=layout,
        adapters="",
    )


def model_identity(config: WorkerConfig) -> str:
    """The model's URI; a mock's latency options don't make it another model."""
    return config.model.split("?", 1)[0] if config.is_mock else config.model


class EngineCore:
    """One worker's engine, without processes or sockets.

    `send` gets every frame for the server, on the thread that runs the loop. `post` may be called
    from any thread; everything else belongs to the loop's thread. `clock` gives seconds.
    """

    def __init__(
        self,
        config: WorkerConfig,
        runner: Runner,
        handoff: Handoff,
        send: Callable[[FromCore], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._handoff = handoff
        self._send = send
        self._clock = clock
        self._inbox: deque[ToCore] = deque()
        self._wake = threading.Event()
        self._running = True
        self._draining = False
        self._stats_due = 0.0
        self._check_due = 0.0
        self._events_sequence = 0
        self.limits = Limits.build(config, runner)
        self.ledger = BlockLedger(runner.num_blocks, config.page_size)
        self.scheduler = Scheduler(self.limits, self.ledger, Meter())
        self.scheduler.role = config.role
        self._salt_parts = (model_identity(config), config.revision, runner.kv.layout.dtype, "")
        self._intake = Intake(self.scheduler, self._salt_parts)
        self._intake.queue_seconds = self._queue_seconds
        self.compatibility_hash = core_compatibility_hash(config, runner)
        handoff.wake_on_event(self._wake)

    def post(self, message: ToCore) -> None:
        """Give the core something to do; thread-safe, returns at once."""
        self._inbox.append(message)
        self._wake.set()

    def ready(self, bootstrap_port: int, startup: StartReport | None = None) -> CoreReady:
        """What the server needs to greet routers, and where the time until now went."""
        return CoreReady(
            max_model_len=self.limits.max_model_len,
            page_size=self.limits.page_size,
            num_blocks=self.limits.num_blocks,
            vocab_size=self.limits.vocab_size,
            eos_token_ids=list(self.limits.eos_token_ids),
            compatibility_hash=self.compatibility_hash,
            bootstrap_port=bootstrap_port,
            salt_parts=list(self._salt_parts),
            startup=startup,
        )

    def run(self) -> None:
        """Loop until `Shutdown`. A failing step is reported as `CoreFailed` and raised."""
        try:
            while self._running:
                if not self.run_once():
                    self._wait()
        except Exception as error:
            log.exception("the core can't go on")
            self._send(CoreFailed(f"{type(error).__name__}: {error}"))
            raise
        finally:
            self._handoff.close()
            self._runner.close()

    def run_once(self) -> bool:
        """One round; False when there was nothing to run."""
        now = self._clock()
        while self._inbox:
            self._take(self._inbox.popleft(), now)
        for event in self._handoff.poll():
            self._take_handoff(event, now)
        scheduler = self.scheduler
        scheduler.sweep(now)
        batch = scheduler.schedule(now) if scheduler.has_work else None
        # The hand-off starts on new fetches while the step runs; refusals don't wait for it.
        self._flush()
        if batch is not None:
            started = self._clock()
            results = self._runner.execute(batch)
            ended = self._clock()
            num_decodes = sum(1 for item in batch.items if len(item.tokens) == 1)
            scheduler.meter.record_step(
                ended - started, len(batch.items), num_decodes, batch.num_tokens - num_decodes
            )
            scheduler.finish_step(batch, results, ended)
            self._flush()
        if now >= self._stats_due:
            self.report()
        return batch is not None

    def check(self) -> None:
        """Raise LedgerError unless every block is accounted for."""
        self.ledger.check()

    def report(self) -> None:
        """Send a load report now."""
        self._stats_due = self._clock() + STATS_SECONDS
        self._send(build_stats(self.scheduler, self._handoff, draining=self._draining))

    def _wait(self) -> None:
        """Sleep until something arrives or a sweep or report is due; checks the ledger."""
        now = self._clock()
        if now >= self._check_due:
            self.check()
            self._check_due = now + 1.0
        self._wake.wait(IDLE_SECONDS)
        self._wake.clear()

    def _flush(self) -> None:
        """Send what the scheduler has collected; tokens before the block events they caused."""
        outbox = self.scheduler.outbox
        for event in outbox.take_handoff():
            self._handoff.post(event)
        for refused in outbox.take_refused():
            self._send(refused)
        step = outbox.take_step()
        if step is not None:
            self._send(step)
        stored, removed = self.ledger.index.take_events()
        if stored or removed:
            self._events_sequence += 1
            self._send(KvEvents(self._events_sequence, stored, removed))

    def _queue_seconds(self) -> float:
        """When a refused router may try again."""
        waiting = sum(len(request.tokens) for request in self.scheduler.waiting)
        rate = self.scheduler.meter.prefill_rate
        return max(RETRY_SECONDS, waiting / rate) if rate else RETRY_SECONDS

    # --- what arrives -----------------------------------------------------------------------------

    def _take(self, message: ToCore, now: float) -> None:
        match message:
            case RoutedSubmit():
                self._intake.submit(message, now)
            case Cancel(rid):
                request = self.scheduler.find(Kind.ROUTED, rid)
                if request is not None:
                    self.scheduler.end(request, "cancelled")
            case RouterGone(router):
                for request in list(self.scheduler.requests()):
                    if request.kind is Kind.ROUTED and request.router == router:
                        self.scheduler.end(request, "cancelled", tell=False)
            case SetMode():
                self._set_mode(message)
            case ProbeRequest():
                self._handoff.post(message)
            case Shutdown():
                self._set_mode(SetMode(draining=True, move_streams=True))
                self._flush()
                self.report()
                self._running = False

    def _take_handoff(self, event: HandoffEvent, now: float) -> None:
        match event:
            case FetchDone() | FetchFailed():
                self.scheduler.finish_fetch(event, now)
            case PrefillArrived():
                self._intake.prefill(event, now)
            case PrefillDropped(key) | PushDone(key):
                request = self.scheduler.find(Kind.REMOTE, key)
                if request is not None:
                    self.scheduler.end(request, "")
            case ProbeResult():
                self._send(event)

    def _set_mode(self, mode: SetMode) -> None:
        if mode.role is not None:
            self.scheduler.role = mode.role
        if mode.draining is not None:
            self._draining = self._intake.draining = mode.draining
            self._handoff.set_draining(mode.draining)
        if mode.move_streams and self._draining:
            for request in list(self.scheduler.requests()):
                if request.kind is Kind.ROUTED:
                    self.scheduler.end(request, "moved")
        self.report()
