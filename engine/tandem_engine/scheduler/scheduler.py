"""The scheduler: continuous batching of decodes and prompt chunks under a token budget."""

import heapq
from bisect import insort
from collections.abc import Iterator

from tandem_engine.cache.ledger import BlockLedger
from tandem_engine.cache.prefix_index import PrefixMatch
from tandem_engine.handoff.events import FetchDone, FetchFailed
from tandem_engine.scheduler.limits import Limits
from tandem_engine.scheduler.meter import Meter
from tandem_engine.scheduler.outbox import Finish, Outbox
from tandem_engine.scheduler.placement import Placement
from tandem_engine.scheduler.request import Kind, Request, State
from tandem_engine.scheduler.transfers import Transfers
from tandem_engine.scheduler.waiting import WaitingQueue
from tandem_engine.step import Batch, BatchItem, SampledToken, has_penalties
from tandem_wire.messages import Role, StepItem, TokenLogprobs

WATERMARK_SHARE = 20
"""One block in so many is the most that admission leaves free for running sequences to grow."""


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
        self.placement = Placement(ledger)
        self.transfers = Transfers(limits, self.placement, self.outbox, meter)
        self.role: Role = "both"
        self.waiting = WaitingQueue()
        self.prefilling: list[Request] = []
        self.decoding: list[Request] = []
        self._routed: dict[str, Request] = {}
        self._remote: dict[str, Request] = {}
        self._deadlines: list[tuple[float, int, Request]] = []
        self._scheduled: list[Request] = []
        self._ahead: list[Request] = []  # of the step planned ahead
        self._blocked: tuple[Request, int, int] | None = None

    # --- requests come and go ---------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        """Routed requests and remote prefills that have no end yet and hold blocks."""
        return len(self.prefilling) + len(self.decoding) + self.transfers.num_open

    @property
    def has_work(self) -> bool:
        """Whether `schedule` may have something to run now."""
        return bool(self.decoding or self.prefilling or len(self.waiting))

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
        self.placement.hash_prompt(request)
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
        elif state is State.PREFILL:
            self.prefilling.remove(request)
        elif state is State.DECODE:
            self.decoding.remove(request)
        elif state is State.PUSHING:
            self.transfers.forget(request)
        self.placement.release(request)
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
        self._grow_decodes()
        self._admit(now)
        budget = self.limits.max_batched_tokens
        items: list[BatchItem] = []
        scheduled: list[Request] = []
        decodes = self.decoding
        share = budget
        if self.prefilling:
            share -= min(self.limits.page_size, budget // 2)
        if len(decodes) > share:
            # More decodes than budget: take turns.
            self.decoding = decodes[share:] + decodes[:share]
            decodes = decodes[:share]
        items.extend(request.item_decode() for request in decodes)
        scheduled.extend(decodes)
        budget -= len(decodes)
        for request in self.prefilling:
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
        return Batch(items, self.placement.take_copies())

    def plan_ahead(self) -> Batch | None:
        """The step after the one that runs now, before its results are known; None: wait for them.

        Only decodes are planned so, and only while nothing else could run beside them. A sequence
        that turns out to have ended computes a token for nobody.
        """
        running = [(row, r) for row, r in enumerate(self._scheduled) if r.state is State.DECODE]
        if self.prefilling or self._may_admit() or len(running) != len(self.decoding):
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
        return has_block or self.placement.grow(request)

    def _may_admit(self) -> bool:
        """Whether the head of the queue might find a place now."""
        head = self.waiting.head
        if head is None:
            return False
        return self._blocked != self._situation(head) and not self._is_full_for(head)

    def _situation(self, head: Request) -> tuple[Request, int, int]:
        """What decides about the head of the queue: it is only tried again when this changes."""
        return head, self.ledger.num_available, self._num_active

    @property
    def _num_active(self) -> int:
        return len(self.prefilling) + len(self.decoding) + self.transfers.num_fetching

    def _is_full_for(self, head: Request) -> bool:
        return head.kind is Kind.ROUTED and self._num_active >= self.limits.max_running

    def finish_step(self, batch: Batch, results: list[SampledToken | None], now: float) -> None:
        """Take the results of the batch that `schedule` returned, or `plan_ahead` before that."""
        self.placement.finish_copies()
        page = self.limits.page_size
        done = False
        for request, item, result in zip(self._scheduled, batch.items, results, strict=True):
            if request.state is State.DONE:
                continue  # it had ended when this step was planned ahead
            end = item.start + len(item.tokens)
            request.num_computed = end
            if end // page > request.num_registered:
                self.placement.register(request)
            if request.kind is Kind.REMOTE:
                self._finish_remote_chunk(request, result, now)
            elif result is not None:
                if request.state is State.PREFILL:
                    self._enter_decode(request, now)
                done |= self._append(request, result.token, result.logprobs)
        self._scheduled, self._ahead = self._ahead, []
        if done:
            self.decoding = [r for r in self.decoding if r.state is State.DECODE]

    def finish_fetch(self, event: FetchDone | FetchFailed, now: float) -> None:
        """The hand-off has given a request's blocks back: decode, or else prefill here."""
        request = self.transfers.finish_fetch(event, now)
        if request is None:
            return
        if isinstance(event, FetchFailed):
            self._start_prefill(request, now)
            return
        request.state = State.DECODE
        if not self._append(request, event.first_token, event.first_logprobs):
            self.decoding.append(request)

    def _finish_remote_chunk(
        self, request: Request, result: SampledToken | None, now: float
    ) -> None:
        if result is None:
            self.transfers.push_ready(request)
            return
        self.prefilling.remove(request)
        self.transfers.push_last(request, result, now)

    def _enter_decode(self, request: Request, now: float) -> None:
        self.prefilling.remove(request)
        request.state = State.DECODE
        self.decoding.append(request)
        self.meter.observe("prefill_seconds", now - request.prefill_start)

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
        self.placement.release(request)
        request.state = State.DONE
        return True

    # --- blocks -----------------------------------------------------------------------------------

    def _grow_decodes(self) -> None:
        """Give every decode the block its next token needs; preempt when they run out."""
        page = self.limits.page_size
        growing = [r for r in self.decoding if len(r.blocks) * page <= r.num_computed]
        growing.sort(key=_preemption_order)
        for request in growing:
            while request.state is State.DECODE and not self.placement.grow(request):
                self.preempt(max(self._preemptible(), key=_preemption_order))

    def _preemptible(self) -> list[Request]:
        """Running requests whose blocks nobody else works on."""
        return [*self.decoding, *(r for r in self.prefilling if r.kind is Kind.ROUTED)]

    def preempt(self, request: Request) -> None:
        """Take the blocks away; the tokens stay and are computed again when there is room."""
        self._detach(request)
        request.state = State.WAITING
        request.num_preemptions += 1
        self.meter.count("preemptions_total")
        self.waiting.add(request)

    def _admit(self, now: float) -> None:
        """Move requests from the queue into prefill or into a fetch, in order, while they fit."""
        self._admit_fitting(now)
        busy = self.decoding or self.prefilling or self.transfers.num_pushing
        if len(self.waiting) and not busy:
            # Fetches alone hold the blocks or the places. What they wait for may be the very
            # prompts queued here (two workers that prefill for each other), so those go back.
            for request in [r for r in self.waiting if r.kind is Kind.REMOTE]:
                self.transfers.refuse(request.key, "no_room", "all KV blocks wait for fetches")
                self.end(request, "")

    def _admit_fitting(self, now: float) -> None:
        room = self.limits.max_batched_tokens - len(self.decoding)
        room -= sum(request.num_uncomputed for request in self.prefilling)
        while (request := self.waiting.head) is not None:
            if self._is_full_for(request):
                return
            # Matching a long prompt is not free.
            situation = self._situation(request)
            if situation == self._blocked:
                return
            fit = self._fit(request, room > 0)
            if fit is None:
                if room > 0:
                    self._blocked = situation
                return
            match, fetch = fit
            self.waiting.remove(request)
            self.placement.place(request, match)
            self._count_admission(request, now)
            if fetch:
                self.transfers.fetch(request, now)
            else:
                self._start_prefill(request, now)
                room -= request.num_uncomputed

    def _fit(self, request: Request, may_prefill: bool) -> tuple[PrefixMatch, bool] | None:
        """The cached prefix to place `request` on, and whether to fetch the rest; None: no room.

        Preempts routed requests of a lower priority when that is what it takes.
        """
        while True:
            match = self.placement.match(request, partial=True)
            fetch = self.transfers.wants_fetch(request, match)
            if not fetch and not may_prefill:
                return None
            if match.num_partial and (fetch or self._missing(request, match) > 0):
                match = PrefixMatch(match.blocks)
            if self._missing(request, match) <= 0:
                return match, fetch
            lower = [r for r in self._preemptible() if r.priority < request.priority]
            if not lower:
                return None
            self.preempt(max(lower, key=_preemption_order))

    def _start_prefill(self, request: Request, now: float) -> None:
        request.state = State.PREFILL
        request.prefill_start = now
        insort(self.prefilling, request, key=_queue_order)
        if request.kind is Kind.REMOTE:
            self.transfers.push_ready(request)

    def _missing(self, request: Request, match: PrefixMatch) -> int:
        watermark = min(len(self.decoding), self.limits.num_blocks // WATERMARK_SHARE)
        alone = not (self.decoding or self.prefilling)
        return self.placement.missing_blocks(request, match, 0 if alone else watermark)

    def _count_admission(self, request: Request, now: float) -> None:
        if request.num_preemptions:
            return
        request.num_cached_tokens = min(request.num_computed, request.num_prompt_tokens)
        self.meter.count("prefix_query_tokens_total", len(request.tokens))
        self.meter.count("prefix_hit_tokens_total", request.num_computed)
        stage = "queue_seconds" if request.kind is Kind.ROUTED else "remote_queue_seconds"
        self.meter.observe(stage, now - request.arrival_time)


def _preemption_order(request: Request) -> tuple[int, int]:
    """Largest goes first: lowest priority, then latest arrival."""
    return (-request.priority, request.arrival)


def _queue_order(request: Request) -> tuple[int, int, int]:
    return request.sort_key
