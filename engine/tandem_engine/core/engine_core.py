"""The core's loop: take what arrived, sweep, schedule, run, stream."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tandem_engine.cache.ledger import BlockLedger
from tandem_engine.config import WorkerConfig
from tandem_engine.core.intake import RETRY_SECONDS, Intake
from tandem_engine.core.report import build_stats, complete_leases
from tandem_engine.frames import (
    CoreFailed,
    CoreReady,
    FromCore,
    LeaseQuery,
    LeaseReport,
    ProbeRequest,
    ProbeResult,
    RoutedSubmit,
    RouterGone,
    SetMode,
    Shutdown,
    ToCore,
)
from tandem_engine.handoff.events import (
    FetchDone,
    FetchFailed,
    FromHandoff,
    Handoff,
    PrefillArrived,
    PrefillDropped,
    PushDone,
)
from tandem_engine.metrics import Meter
from tandem_engine.scheduler.limits import Limits
from tandem_engine.scheduler.request import Kind
from tandem_engine.scheduler.scheduler import Scheduler
from tandem_engine.scheduler.step_times import StepLoad
from tandem_engine.startup import StartReport
from tandem_engine.step import Batch, PendingStep, Runner
from tandem_wire.hashing import compatibility_hash
from tandem_wire.messages import PROTOCOL, Cancel, KvEvents

STATS_SECONDS: Final = 0.5
"""Interval of load reports; WorkerState promises at least one a second."""
IDLE_SECONDS: Final = 0.1
"""Longest sleep without work, so that deadlines are swept on time."""

log = logging.getLogger(__name__)


def core_compatibility_hash(config: WorkerConfig, runner: Runner) -> str:
    """The hash that two workers must share to exchange KV."""
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


@dataclass(frozen=True, slots=True)
class _RunningStep:
    """A step whose results the scheduler doesn't have yet; `launched` is a clock time."""

    batch: Batch
    launched: float
    pending: PendingStep


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
        self._handoff_events: deque[FromHandoff] = deque()
        self._running_step: _RunningStep | None = None
        self._step_ended = 0.0
        self._wake = threading.Event()
        self._running = True
        self._draining = False
        self._stats_due = 0.0
        self._check_due = 0.0
        self._events_sequence = 0
        self.limits = Limits.build(config, runner)
        self.ledger = BlockLedger(runner.num_blocks, config.page_size, runner.kv.layout.window)
        self.scheduler = Scheduler(self.limits, self.ledger, Meter(), runner.shapes)
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
        """One round; False when there was nothing to run.

        Where the runner can, the next step is launched before the results of the one that runs are
        read, as long as nothing has arrived that could change it.
        """
        now = self._clock()
        self._handoff_events.extend(self._handoff.poll())
        running = self._running_step
        if running is not None:
            self._running_step = None
            if not self._inbox and not self._handoff_events:
                ahead = self.scheduler.plan_ahead()
                if ahead is not None:
                    self._running_step = self._launch(ahead)
            self._finish(running)
        worked = running is not None
        if self._running_step is None:
            worked |= self._start_step(now)
        else:
            self.scheduler.sweep(now)
            self._flush()
        if now >= self._stats_due:
            self.report()
        return worked

    def _start_step(self, now: float) -> bool:
        """Take what has arrived and run what there is to run; False when there is nothing."""
        while self._inbox:
            self._take(self._inbox.popleft(), now)
        while self._handoff_events:
            self._take_handoff(self._handoff_events.popleft(), now)
        scheduler = self.scheduler
        scheduler.sweep(now)
        batch = scheduler.schedule(now) if scheduler.has_work else None
        # The hand-off starts on new fetches while the step runs; refusals don't wait for it.
        self._flush()
        if batch is None:
            return False
        step = self._launch(batch)
        if self._runner.plans_ahead:
            self._running_step = step
        else:
            self._finish(step)
            self._flush()
        return True

    def _launch(self, batch: Batch) -> _RunningStep:
        return _RunningStep(batch, self._clock(), self._runner.launch(batch))

    def _finish(self, step: _RunningStep) -> None:
        """Wait for a step, and give its results to the scheduler."""
        results = step.pending.wait()
        ended = self._clock()
        # A step planned ahead starts when the one before it ends.
        started = max(step.launched, self._step_ended)
        self._step_ended = ended
        batch = step.batch
        counts = [len(item.tokens) for item in batch.items]
        num_decodes = counts.count(1)
        num_prompt = sum(counts) - num_decodes
        num_extra = sum([len(result.tokens) - 1 for result in results if result is not None])
        self.scheduler.meter.record_step(
            ended - started, len(counts), num_decodes + num_extra, num_prompt
        )
        if num_prompt:
            self.scheduler.budget.times.learn(StepLoad.of(batch.items), ended - started)
        self.scheduler.finish_step(batch, results, ended)

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
                request = self.scheduler.requests.find(Kind.ROUTED, rid)
                if request is not None:
                    self.scheduler.end(request, "cancelled")
            case RouterGone(router):
                for request in list(self.scheduler.requests):
                    if request.kind is Kind.ROUTED and request.router == router:
                        self.scheduler.end(request, "cancelled", tell=False)
            case SetMode():
                self._set_mode(message)
            case ProbeRequest() | LeaseQuery():
                self._handoff.post(message)
            case Shutdown():
                self._set_mode(SetMode(draining=True, move_streams=True))
                self._flush()
                self.report()
                self._running = False

    def _take_handoff(self, event: FromHandoff, now: float) -> None:
        match event:
            case FetchDone() | FetchFailed():
                self.scheduler.finish_fetch(event, now)
            case PrefillArrived():
                self._intake.prefill(event, now)
            case PrefillDropped(key) | PushDone(key):
                request = self.scheduler.requests.find(Kind.REMOTE, key)
                if request is not None:
                    self.scheduler.end(request, "")
            case ProbeResult():
                self._send(event)
            case LeaseReport():
                self._send(complete_leases(event, self.scheduler))

    def _set_mode(self, mode: SetMode) -> None:
        if mode.role is not None:
            self.scheduler.role = mode.role
        if mode.draining is not None:
            self._draining = self._intake.draining = mode.draining
            self._handoff.set_draining(mode.draining)
        if mode.move_streams and self._draining:
            for request in list(self.scheduler.requests):
                if request.kind is Kind.ROUTED:
                    self.scheduler.end(request, "moved")
        self.report()
