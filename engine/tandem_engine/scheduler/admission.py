"""Admission: who leaves the queue for free blocks, and where its prompt is computed."""

from typing import Final

from tandem_engine import metrics
from tandem_engine.cache.ledger import BlockLedger
from tandem_engine.cache.prefix_index import PrefixMatch
from tandem_engine.metrics import Meter
from tandem_engine.scheduler.blocks import RequestBlocks
from tandem_engine.scheduler.limits import Limits
from tandem_engine.scheduler.preemption import Preemption
from tandem_engine.scheduler.queues import Running, WaitingQueue
from tandem_engine.scheduler.request import Kind, Request
from tandem_engine.scheduler.step_budget import LATE_PATIENCE, StepBudget
from tandem_engine.scheduler.transfers import Transfers

WATERMARK_SHARE: Final = 20
"""Admission leaves at most one block in this many free, for running sequences to grow into."""


class Admission:
    """Moves requests from the queue into prefill or into a fetch, in order, while they fit.

    The head of the queue alone decides: nothing overtakes it. It is tried again only when
    something has changed that could make it fit. A head whose first token can't come in time any
    more goes back into the queue once, behind those whose first token still can.
    """

    def __init__(
        self,
        limits: Limits,
        ledger: BlockLedger,
        running: Running,
        waiting: WaitingQueue,
        blocks: RequestBlocks,
        transfers: Transfers,
        preemption: Preemption,
        budget: StepBudget,
        meter: Meter,
    ) -> None:
        self._limits = limits
        self._ledger = ledger
        self._running = running
        self._waiting = waiting
        self._blocks = blocks
        self._transfers = transfers
        self._preemption = preemption
        self._budget = budget
        self._meter = meter
        self._blocked: tuple[Request, int, int] | None = None

    def admit(self, now: float) -> None:
        """Admit what fits."""
        running = self._running
        room = self._limits.max_batched_tokens - len(running.decoding)
        room -= sum(request.num_uncomputed for request in running.prefilling)
        while (request := self._waiting.head) is not None:
            if request.ttft_due and self._gives_way(request, now):
                continue
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
            self._waiting.remove(request)
            self._blocks.place(request, match)
            self._count(request, now)
            if fetch:
                self._transfers.fetch(request, now)
                continue
            running.start_prefill(request, now)
            if request.kind is Kind.REMOTE:
                self._transfers.push_ready(request)
            room -= request.num_uncomputed

    def deadlocked_prefills(self) -> list[Request]:
        """Remote prefills to refuse because only fetches hold the blocks or the places.

        What those fetches wait for may be the very prompts queued here: two workers that prefill
        for each other would wait forever.
        """
        if not len(self._waiting) or len(self._running) or self._transfers.num_pushing:
            return []
        return [request for request in self._waiting if request.kind is Kind.REMOTE]

    def may_admit(self) -> bool:
        """Whether the head of the queue might fit now."""
        head = self._waiting.head
        if head is None:
            return False
        return self._blocked != self._situation(head) and not self._is_full_for(head)

    def _situation(self, head: Request) -> tuple[Request, int, int]:
        """What decides whether the head of the queue fits."""
        return head, self._ledger.num_available, self._num_active

    @property
    def _num_active(self) -> int:
        return len(self._running) + self._transfers.num_fetching

    def _is_full_for(self, head: Request) -> bool:
        return head.kind is Kind.ROUTED and self._num_active >= self._limits.max_running

    def _fit(self, request: Request, may_prefill: bool) -> tuple[PrefixMatch, bool] | None:
        """The cached prefix to place `request` on, and whether to fetch the rest; None: no room.

        Preempts routed requests of a lower priority when it takes their blocks to fit.
        """
        while True:
            match = self._blocks.match(request, partial=True)
            fetch = self._transfers.wants_fetch(request, match)
            if not fetch and not may_prefill:
                return None
            if fetch:
                match = self._blocks.match_for_fetch(request, match)
            elif match.num_partial and self._missing(request, match) > 0:
                match = PrefixMatch(match.blocks)
            if self._missing(request, match) <= 0:
                return match, fetch
            if not self._preemption.preempt_below(request.priority):
                return None

    def _missing(self, request: Request, match: PrefixMatch) -> int:
        running = self._running
        watermark = min(len(running.decoding), self._limits.num_blocks // WATERMARK_SHARE)
        return self._blocks.missing(request, match, watermark if len(running) else 0)

    def _gives_way(self, request: Request, now: float) -> bool:
        """Put the head of the queue back if its first token can't come in time any more."""
        budget, num_own = self._budget, len(request.tokens)
        num_before = sum(each.num_uncomputed for each in self._running.prefilling)
        if request.may_fetch:
            num_before = num_own = 0  # another worker computes its prompt
        if not budget.is_late(request, num_before, num_own, now):
            return False
        # Matching a long prompt is not free.
        if num_own:
            cached = self._blocks.match(request, partial=False).blocks
            num_own -= len(cached) * self._limits.page_size
            if not budget.is_late(request, num_before, num_own, now):
                return False
        request.is_late = True
        self._meter.count(metrics.POSTPONED)
        patience = LATE_PATIENCE * (request.ttft_due - request.arrival_time)
        self._waiting.postpone(request, patience)
        return True

    def _count(self, request: Request, now: float) -> None:
        if request.num_preemptions:
            return
        request.num_cached_tokens = min(request.num_computed, request.num_prompt_tokens)
        if request.fetch is not None and request.fetch.asked:
            return  # counted when it was placed for the fetch that failed
        self._meter.count(metrics.PREFIX_QUERY_TOKENS, len(request.tokens))
        self._meter.count(metrics.PREFIX_HIT_TOKENS, request.num_computed)
        is_routed = request.kind is Kind.ROUTED
        stage = metrics.QUEUE_SECONDS if is_routed else metrics.REMOTE_QUEUE_SECONDS
        self._meter.observe(stage, now - request.arrival_time)
