"""The scheduler: continuous batching of decodes and prompt chunks under a token budget."""

from tandem_engine import metrics
from tandem_engine.cache.ledger import BlockLedger
from tandem_engine.handoff.events import FetchDone, FetchFailed
from tandem_engine.metrics import Meter
from tandem_engine.scheduler.admission import Admission
from tandem_engine.scheduler.blocks import RequestBlocks
from tandem_engine.scheduler.limits import Limits
from tandem_engine.scheduler.outbox import Outbox
from tandem_engine.scheduler.preemption import Preemption
from tandem_engine.scheduler.queues import OpenRequests, Running, WaitingQueue
from tandem_engine.scheduler.request import Finish, Kind, Request, State
from tandem_engine.scheduler.step_budget import StepBudget
from tandem_engine.scheduler.transfers import Transfers
from tandem_engine.step import (
    ANY_SHAPE,
    Batch,
    BatchItem,
    SampledTokens,
    ScoredRows,
    StepShapes,
    has_penalties,
)
from tandem_wire.messages import Role, StepItem


class Scheduler:
    """Decides what runs in each step, and keeps every request until its end.

    The core thread alone calls it: `schedule`, run the batch, `finish_step`; everything else in
    between. Whoever adds a request has checked it against `Limits`.
    """

    def __init__(
        self, limits: Limits, ledger: BlockLedger, meter: Meter, shapes: StepShapes = ANY_SHAPE
    ) -> None:
        self.limits = limits
        self.ledger = ledger
        self.meter = meter
        self.outbox = Outbox()
        self.role: Role = "both"
        self.requests = OpenRequests()
        self.waiting = WaitingQueue()
        self.running = Running()
        self._blocks = RequestBlocks(ledger)
        self.transfers = Transfers(limits, self._blocks, self.outbox, meter)
        self.budget = StepBudget(limits.max_batched_tokens, shapes, meter)
        self._preemption = Preemption(limits, self.running, self.waiting, self._blocks, meter)
        self._admission = Admission(
            limits,
            ledger,
            self.running,
            self.waiting,
            self._blocks,
            self.transfers,
            self._preemption,
            self.budget,
            meter,
        )
        self._scheduled: list[Request] = []
        self._ahead: list[Request] = []  # of the step planned ahead
        self._step_ended = 0.0

    # --- requests come and go ---------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        """Requests that hold blocks, including those whose blocks the hand-off still has."""
        return len(self.running) + self.transfers.num_open

    @property
    def has_work(self) -> bool:
        """Whether `schedule` may have something to run now."""
        return bool(len(self.running) or len(self.waiting))

    @property
    def is_full(self) -> bool:
        """Whether the queue takes no more requests."""
        return len(self.waiting) >= self.limits.max_waiting

    def add(self, request: Request) -> None:
        """Queue a request that `Limits` has accepted and whose key is new."""
        self.requests.add(request)
        self.limits.prepare(request)
        preference = self._preference(request)
        request.sort_key = (-request.priority, preference, request.arrival_time, request.arrival)
        self.waiting.add(request)
        if len(request.tokens) >= request.end_length and request.kind is Kind.ROUTED:
            self.end(request, "length")
            return
        self._blocks.hash_prompt(request)

    def _preference(self, request: Request) -> int:
        """Who goes first within a priority class, which is all that a role means here."""
        first = {"prefill": Kind.REMOTE, "decode": Kind.ROUTED}.get(self.role)
        return 0 if first is None or request.kind is first else 1

    def end(self, request: Request, finish: Finish, error: str = "", *, tell: bool = True) -> None:
        """End a request, whatever its state; with `tell` its router learns of it."""
        self._detach(request)
        self.requests.remove(request)
        if request.kind is Kind.ROUTED:
            self.meter.count(metrics.FINISHED[finish])
            if tell:
                self.outbox.item(request.router, StepItem(request.key, [], finish, error=error))

    def _detach(self, request: Request) -> None:
        """Take a request out of every list and free its blocks, or have the hand-off free them."""
        state = request.state
        if state is State.FETCHING:
            self.transfers.abandon(request)
            return
        if state is State.WAITING:
            self.waiting.remove(request)
        elif state in (State.PREFILL, State.DECODE):
            self.running.remove(request)
        elif state is State.PUSHING:
            self.transfers.forget(request)
        self._blocks.release(request)
        request.state = State.DONE

    def sweep(self, now: float) -> None:
        """End what is past its deadline. Call it in every loop, with or without work."""
        for request in self.requests.overdue(now):
            if request.kind is Kind.REMOTE:
                if request.state is State.WAITING:
                    self.transfers.refuse(request.key, "no_room", "no KV blocks became free")
                    self.end(request, "error")
            elif not request.first_token_sent and self.requests.holds(request):
                self.meter.count(metrics.DEADLINES_MISSED)
                self.end(request, "error", "the request's deadline passed before its first token")

    # --- one step ---------------------------------------------------------------------------------

    def schedule(self, now: float) -> Batch | None:
        """The next step's batch, or None when nothing can run."""
        self._preemption.grow_decodes()
        self._admission.admit(now)
        for request in self._admission.deadlocked_prefills():
            self.transfers.refuse(request.key, "no_room", "fetches hold all KV blocks")
            self.end(request, "")
        running = self.running
        budget = share = self.limits.max_batched_tokens
        if running.prefilling:
            share -= min(self.limits.page_size, budget // 2)
        scheduled = list(running.take_turns(share))
        items = [request.item_decode() for request in scheduled]
        scored: list[ScoredRows] = []
        if running.prefilling:
            scored = self._add_chunks(scheduled, items, budget - len(items), now)
        if not items:
            return None
        self._scheduled = scheduled
        return Batch(items, self._blocks.take_copies(), scored)

    def _add_chunks(
        self, scheduled: list[Request], items: list[BatchItem], budget: int, now: float
    ) -> list[ScoredRows]:
        """Fill a step of decodes up with prompt chunks, as far as TBT and `budget` tokens allow.

        Returns the rows whose prompt logprobs are wanted.
        """
        scored: list[ScoredRows] = []
        prefilling = self.running.prefilling
        allowance = self.budget.allow(scheduled, prefilling, self.waiting, now)
        for request in prefilling:
            if budget <= 0:
                break
            count = min(request.num_uncomputed, budget)
            if request.kind is Kind.REMOTE:
                count = min(count, self.limits.chunk_tokens)
            if allowance is not None:
                count = allowance.take(request.num_computed, count)
                if not count:
                    break
            item = request.item(count)
            item.sample = count == request.num_uncomputed
            if request.wants_scores:
                rows = request.scored_rows(len(items), item)
                scored += [rows] if rows.end > rows.first else []
            items.append(item)
            scheduled.append(request)
            budget -= count
        return scored

    def plan_ahead(self) -> Batch | None:
        """The step after the one that runs now, before its results are known; None: wait for them.

        Only decodes are planned ahead, and only while nothing else could run beside them. For a
        sequence that turns out to have ended, the step computes a token that no one wants.
        """
        if self.limits.step_tokens > 1:
            return None  # where the next step starts depends on how many tokens this one gives
        running = [(row, r) for row, r in enumerate(self._scheduled) if r.state is State.DECODE]
        if self.running.prefilling or self._admission.may_admit():
            return None
        if len(running) != len(self.running.decoding):
            return None
        going_on = [(row, r) for row, r in running if len(r.tokens) + 1 < r.end_length]
        if not going_on or not all(self._can_run_ahead(request) for _, request in going_on):
            return None
        self._ahead = [request for _, request in going_on]
        return Batch([request.item_ahead(row) for row, request in going_on])

    def _can_run_ahead(self, request: Request) -> bool:
        """Whether its next step needs only the last token unseen, and has a block to write to."""
        if has_penalties(request.params):
            return False
        has_block = len(request.blocks) * self.limits.page_size > request.num_computed + 1
        return has_block or self._blocks.grow(request)

    def finish_step(self, batch: Batch, results: list[SampledTokens | None], now: float) -> None:
        """Take the results of the batch that `schedule` returned, or `plan_ahead` before that."""
        self._blocks.finish_copies()
        self.budget.note_gap(self._scheduled, now - self._step_ended)
        self._step_ended = now
        ended = False
        for request, item, result in zip(self._scheduled, batch.items, results, strict=True):
            if request.state is State.DONE:
                continue  # it had ended when this step was planned ahead
            if result is not None and request.kind is Kind.ROUTED:
                if request.state is State.PREFILL:
                    if result.prompt_logprobs is not None:
                        self.outbox.prompt_logprobs(request, result.prompt_logprobs)
                    if not item.sample:
                        self._advance(request, item)
                        continue
                    self.running.start_decode(request)
                    self.meter.observe(metrics.PREFILL_SECONDS, now - request.prefill_start)
                ended |= self._append(request, result)
                continue
            self._advance(request, item)
            if request.kind is Kind.REMOTE:
                self._finish_remote_chunk(request, result, now)
        self._scheduled, self._ahead = self._ahead, []
        if ended:
            self.running.drop_ended()

    def _advance(self, request: Request, item: BatchItem) -> None:
        request.num_computed = end = item.start + len(item.tokens)
        if end // self.limits.page_size > request.num_registered:
            self._blocks.register(request)

    def finish_fetch(self, event: FetchDone | FetchFailed, now: float) -> None:
        """The hand-off has given a request's blocks back: decode, or else prefill here."""
        request = self.transfers.finish_fetch(event, now)
        if request is None:
            return
        if isinstance(event, FetchFailed):
            if self._blocks.can_compute(request):
                self.running.start_prefill(request, now)
            else:  # what it was placed on is enough for a fetch only
                self._blocks.release(request)
                request.state = State.WAITING
                self.waiting.add(request)
            return
        self.running.start_decode(request)
        logprobs = event.first_logprobs
        first = SampledTokens([event.first_token], [logprobs] if logprobs is not None else None)
        if self._append(request, first):
            self.running.drop_ended()

    def _finish_remote_chunk(
        self, request: Request, result: SampledTokens | None, now: float
    ) -> None:
        if result is None:
            self.transfers.push_ready(request)
            return
        self.running.remove(request)
        self.transfers.push_last(request, result, now)

    def _append(self, request: Request, result: SampledTokens) -> bool:
        """Stream new tokens up to the request's end; KV exists for all of them but the last.

        True when it has ended: the caller drops it from `running`.
        """
        tokens, logprobs, before = result.tokens, result.logprobs, len(request.tokens)
        finish = request.extend(tokens)
        request.num_computed = end = len(request.tokens) - 1
        if end // self.limits.page_size > request.num_registered:
            self._blocks.register(request)
        if not finish:
            self.outbox.tokens(request, tokens, finish, logprobs)
            return False
        count = len(request.tokens) - before
        logprobs = logprobs[:count] if logprobs is not None else None
        self.outbox.tokens(request, tokens[:count], finish, logprobs)
        self.requests.remove(request)
        self.meter.count(metrics.FINISHED[finish])
        self._blocks.release(request)
        request.state = State.DONE
        return True
