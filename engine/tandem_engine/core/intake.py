"""Turns each message into a request, or into a typed refusal at once."""

import itertools
from collections.abc import Callable

from tandem_engine import metrics
from tandem_engine.frames import RoutedSubmit
from tandem_engine.handoff.events import PrefillArrived
from tandem_engine.scheduler.request import Fetch, Kind, Push, Request
from tandem_engine.scheduler.scheduler import Scheduler
from tandem_wire.hashing import salt_hash
from tandem_wire.messages import RefusalCode, Refused

RETRY_SECONDS = 1.0
"""When a refused router may come back if nothing better is known."""
REMOTE_PATIENCE_LEASES = 3.0
"""A remote prefill that has found no room for this many lease times is refused; the decode worker
then asks another one."""


class Intake:
    """Checks what arrives and hands it to the scheduler."""

    def __init__(self, scheduler: Scheduler, salt_parts: tuple[str, ...]) -> None:
        self._scheduler = scheduler
        self._limits = scheduler.limits
        self._salt_parts = salt_parts
        self._salts: dict[str, int] = {}
        self._arrivals = itertools.count()
        self.draining = False
        self.queue_seconds: Callable[[], float] = lambda: RETRY_SECONDS

    def submit(self, routed: RoutedSubmit, now: float) -> None:
        """Take a router's request or refuse it."""
        submit, scheduler = routed.submit, self._scheduler
        refusal: tuple[RefusalCode, str] | None
        if self.draining:
            refusal = "draining", "this worker is draining"
        elif scheduler.requests.find(Kind.ROUTED, submit.rid) or scheduler.transfers.is_open(
            submit.rid
        ):
            refusal = "invalid", f"rid {submit.rid!r} is in use; every attempt needs its own"
        else:
            refusal = self._limits.refusal(submit)
        if refusal is None and scheduler.is_full:
            refusal = "no_room", f"the queue is full: {len(scheduler.waiting)} requests are waiting"
        if refusal is not None:
            code, message = refusal
            scheduler.meter.count(metrics.REFUSED[code])
            retry = self.queue_seconds() if code == "no_room" else 0.0
            scheduler.outbox.refuse(routed.router, Refused(submit.rid, code, message, retry))
            return
        scheduler.meter.count(metrics.REQUESTS)
        peers = tuple(submit.prefill)
        if submit.params.prompt_logprobs is not None:
            peers = ()  # they don't travel with KV
        deadline = now + submit.deadline_seconds if submit.deadline_seconds > 0 else 0.0
        ttft_due = now + submit.ttft_seconds if submit.ttft_seconds > 0 else 0.0
        scheduler.add(
            Request(
                submit.rid,
                tokens=list(submit.tokens),
                num_prompt_tokens=submit.num_prompt_tokens,
                params=submit.params,
                salt=self._salt(submit.cache_salt),
                arrival=next(self._arrivals),
                arrival_time=now,
                priority=submit.priority,
                router=routed.router,
                deadline=deadline,
                ttft_due=ttft_due,
                tbt_seconds=max(submit.tbt_seconds, 0.0),
                fetch=Fetch(peers, submit.cache_salt) if peers else None,
            )
        )

    def prefill(self, arrived: PrefillArrived, now: float) -> None:
        """Take a decode worker's prompt or refuse it."""
        prefill, scheduler = arrived.request, self._scheduler
        refusal = self._limits.prefill_refusal(prefill)
        if self.draining:
            refusal = "draining", "this worker is draining"
        elif refusal is None and scheduler.is_full:
            refusal = "no_room", f"the queue is full: {len(scheduler.waiting)} requests are waiting"
        elif refusal is None and scheduler.requests.find(Kind.REMOTE, arrived.key):
            refusal = "invalid", f"prefill {arrived.key!r} is already being computed"
        if refusal is not None:
            scheduler.transfers.refuse(arrived.key, *refusal)
            return
        scheduler.meter.count(metrics.REMOTE_PREFILLS)
        scheduler.add(
            Request(
                arrived.key,
                tokens=list(prefill.tokens),
                num_prompt_tokens=prefill.num_prompt_tokens,
                params=prefill.params,
                salt=self._salt(prefill.cache_salt),
                arrival=next(self._arrivals),
                arrival_time=now,
                priority=prefill.priority,
                deadline=now + REMOTE_PATIENCE_LEASES * self._limits.lease_seconds,
                push=Push(prefill.num_skip_tokens),
            )
        )

    def _salt(self, cache_salt: str) -> int:
        salt = self._salts.get(cache_salt)
        if salt is None:
            if len(self._salts) >= 4096:  # tenants come and go; the salts are cheap to compute
                self._salts.clear()
            salt = self._salts[cache_salt] = salt_hash(*self._salt_parts, cache_salt)
        return salt
