"""The scheduler: continuous batching of decodes and prompt chunks under a token budget."""

import heapq
from collections.abc import Iterator

from tandem_engine.cache.ledger import BlockLedger
from tandem_engine.handoff.events import FetchDone, FetchFailed
from tandem_engine.scheduler.admission import Admission
from tandem_engine.scheduler.blocks import RequestBlocks
from tandem_engine.scheduler.limits import Limits
from tandem_engine.scheduler.meter import Meter
from tandem_engine.scheduler.outbox import Outbox
from tandem_engine.scheduler.preemption import Preemption
from tandem_engine.scheduler.queues import Running, WaitingQueue
from tandem_engine.scheduler.request import Finish, Kind, Request, State
from tandem_engine.scheduler.transfers import Transfers
from tandem_engine.step import Batch, SampledToken, has_penalties
from tandem_wire.messages import Role, StepItem, TokenLogprobs


class Scheduler:
    """Decides what runs in each step and keeps every request until its one end.

    The core thread alone calls it: `schedule`, run the batch, `finish_step`; in between, anything
    else. Whoever adds a request has checked it against `Limits`.
    """

    def __init__(self, limits: Limits, ledger: BlockLedger, meter: Meter) -> None:
        self.limits = limits
        self.ledger = ledger
        self.meter = meter
        self.outbox = Outbox()
        self.role: Role = "both"
        self.waiting = WaitingQueue()
        self.running = Running()
        self._blocks = RequestBlocks(ledger)
        self.transfers = Transfers(limits, self._blocks, self.outbox, meter)
        self._preemption = Preemption(self.running, self.waiting, self._blocks, meter)
        self._admission = Admission(
            limits,
            ledger,
            self.running,
            self.waiting,
            self._blocks,
            self.transfers,
            self._preemption,
            meter,
        )
        self._routed: dict[str, Request] = {}
        self._remote: dict[str, Request] = {}
        self._deadlines: list[tuple[float, int, Request]] = []
        self._scheduled: list[Request] = []
        self._ahead: list[Request] = []  # of the step planned ahead

    # --- requests come and go ---------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        """Routed requests and remote prefills that have no end yet and hold blocks."""
        return len(self.running) + self.transfers.num_open

    @property
    def has_work(self) -> bool:
        """Whether `schedule` may have something to run now."""
        return bool(len(self.running) or len(self.waiting))

    @property
    def is_full(self) -> bool:
        """Whether the queue takes nobody any more."""
        return len(self.waiting) >= self.limits.max_waiting

    def requests(self) -> Iterator[Request]:
        """Every request that has had no end yet."""
        yield from self._routed.values()
        yield from self._remote.values()

    def find(self, kind: Kind, key: str) -> Request | None:
        """The request with this rid or hand-off key."""
        return (self._routed if kind is Kind.ROUTED else self._remote).get(key)

    def add(self, request: Request) -> None:
        """Queue a request that `Limits` has accepted and whose key is new."""
        table = self._routed if request.kind is Kind.ROUTED else self._remote
        assert request.key not in table, "keys are unique"
        table[request.key] = request
        self.limits.prepare(request)
        request.sort_key = (-request.priority, self._preference(request), request.arrival)
        if len(request.tokens) >= request.end_length and request.kind is Kind.ROUTED:
            self.waiting.add(request)
            self.end(request, "length")
            return
        self._blocks.hash_prompt(request)
        self.waiting.add(request)
        if request.deadline:
            heapq.heappush(self._deadlines, (request.deadline, request.arrival, request))

    def _preference(self, request: Request) -> int:
        """A role is nothing but this: who goes first within a priority class."""
        first = {"prefill": Kind.REMOTE, "decode": Kind.ROUTED}.get(self.role)
        return 0 if first is None or request.kind is first else 1

    def end(self, request: Request, finish: Finish, error: str = "", *, tell: bool = True) -> None:
        """End a request in whatever state it is, once; with `tell` its router learns of it."""
        self._detach(request)
        if request.kind is Kind.ROUTED:
            del self._routed[request.key]
            self.meter.count(f"finished_{finish}_total")
            if tell:
                self.outbox.item(request.router, StepItem(request.key, [], finish, error=error))
        else:
            del self._remote[request.key]

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
        """End what is past its deadline; to be called in every loop, with or without work."""
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, request = heapq.heappop(self._deadlines)
            if request.kind is Kind.REMOTE:
                if request.state is State.WAITING:
                    self.transfers.refuse(request.key, "no_room", "no KV blocks became free")
                    self.end(request, "error")
            elif not request.first_token_sent and self._routed.get(request.key) is request:
                self.meter.count("deadlines_missed_total")
                self.end(request, "error", "no token before the request's deadline")

    # --- one step ---------------------------------------------------------------------------------

    def schedule(self, now: float) -> Batch | None:
        """The next step's batch, or None when nothing can run."""
        self._preemption.grow_decodes()
        self._admission.admit(now)
        for request in self._admission.deadlocked_prefills():
            self.transfers.refuse(request.key, "no_room", "all KV blocks wait for fetches")
            self.end(request, "")
        running = self.running
        budget = share = self.limits.max_batched_tokens
        if running.prefilling:
            share -= min(self.limits.page_size, budget // 2)
        scheduled = list(running.take_turns(share))
        items = [request.item_decode() for request in scheduled]
        budget -= len(items)
        for request in running.prefilling:
            if budget <= 0:
                break
            count = min(request.num_uncomputed, budget)
            if request.kind is Kind.REMOTE:
                count = min(count, self.limits.chunk_tokens)
            item = request.item(count)
            item.sample = count == request.num_uncomputed
            items.append(item)
            scheduled.append(request)
            budget -= count
        if not items:
            return None
        self._scheduled = scheduled
        return Batch(items, self._blocks.take_copies())

    def plan_ahead(self) -> Batch | None:
        """The step after the one that runs now, before its results are known; None: wait for them.

        Only decodes are planned so, and only while nothing else could run beside them. A sequence
        that turns out to have ended computes a token for nobody.
        """
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
        """Whether the step after the next needs no token of it, and has its block."""
        if has_penalties(request.params):
            return False
        has_block = len(request.blocks) * self.limits.page_size > request.num_computed + 1
        return has_block or self._blocks.grow(request)

    def finish_step(self, batch: Batch, results: list[SampledToken | None], now: float) -> None:
        """Take the results of the batch that `schedule` returned, or `plan_ahead` before that."""
        self._blocks.finish_copies()
        page = self.limits.page_size
        done = False
        for request, item, result in zip(self._scheduled, batch.items, results, strict=True):
            if request.state is State.DONE:
                continue  # it had ended when this step was planned ahead
            end = item.start + len(item.tokens)
            request.num_computed = end
            if end // page > request.num_registered:
                self._blocks.register(request)
            if request.kind is Kind.REMOTE:
                self._finish_remote_chunk(request, result, now)
            elif result is not None:
                if request.state is State.PREFILL:
                    self.running.start_decode(request)
                    self.meter.observe("prefill_seconds", now - request.prefill_start)
                done |= self._append(request, result.token, result.logprobs)
        self._scheduled, self._ahead = self._ahead, []
        if done:
            self.running.drop_ended()

    def finish_fetch(self, event: FetchDone | FetchFailed, now: float) -> None:
        """The hand-off has given a request's blocks back: decode, or else prefill here."""
        request = self.transfers.finish_fetch(event, now)
        if request is None:
            return
        if isinstance(event, FetchFailed):
            self.running.start_prefill(request, now)
            return
        self.running.start_decode(request)
        if self._append(request, event.first_token, event.first_logprobs):
            self.running.drop_ended()

    def _finish_remote_chunk(
        self, request: Request, result: SampledToken | None, now: float
    ) -> None:
        if result is None:
            self.transfers.push_ready(request)
            return
        self.running.remove(request)
        self.transfers.push_last(request, result, now)

    def _append(self, request: Request, token: int, logprobs: TokenLogprobs | None) -> bool:
        """Stream one token; True when it was the last (the caller cleans `decoding` up)."""
        request.append(token)
        finish: Finish = ""
        if token in request.stops and len(request.output) > request.params.min_tokens:
            finish = "stop"
        elif len(request.tokens) >= request.end_length:
            finish = "length"
        self.outbox.token(request, token, finish, logprobs)
        if not finish:
            return False
        self.meter.count(f"finished_{finish}_total")
        del self._routed[request.key]
        self._blocks.release(request)
        request.state = State.DONE
        return True
