"""Builds the load report: worker state, gauges, counters, samples, ledger."""

import msgspec

from tandem_engine import metrics
from tandem_engine.frames import CoreStats, HeldRequest, LeaseReport
from tandem_engine.handoff.events import Handoff
from tandem_engine.scheduler.request import Kind
from tandem_engine.scheduler.scheduler import Scheduler
from tandem_wire.messages import WorkerState


def queued_prompt_tokens(scheduler: Scheduler) -> int:
    """Prompt tokens that this worker has still to compute.

    Requests that will ask a prefill worker don't count: their prompts are that worker's work.
    """
    limits = scheduler.limits
    tokens = sum(request.num_uncomputed for request in scheduler.running.prefilling)
    for request in scheduler.waiting:
        num_tokens = len(request.tokens)
        if not request.may_fetch or num_tokens <= limits.local_prefill_tokens:
            tokens += num_tokens
    return tokens


def build_state(scheduler: Scheduler, *, draining: bool, num_leases: int) -> WorkerState:
    """What routers need to know about the load."""
    meter = scheduler.meter
    tokens = queued_prompt_tokens(scheduler)
    return WorkerState(
        role=scheduler.role,
        draining=draining,
        num_running=scheduler.num_running,
        num_waiting=len(scheduler.waiting),
        queued_prompt_tokens=tokens,
        queued_prompt_seconds=tokens / meter.prefill_rate if meter.prefill_rate else 0.0,
        num_free_blocks=scheduler.ledger.num_available,
        num_blocks=scheduler.ledger.num_blocks,
        step_seconds=meter.step_seconds,
        prefill_tokens_per_second=meter.prefill_rate,
        num_leases=num_leases,
    )


def build_stats(scheduler: Scheduler, handoff: Handoff, *, draining: bool) -> CoreStats:
    """One report; takes the meter's samples."""
    num_leases = handoff.num_leases()
    state = build_state(scheduler, draining=draining, num_leases=num_leases)
    ledger, transfers = scheduler.ledger, scheduler.transfers
    waiting_remote = sum(1 for request in scheduler.waiting if request.kind is Kind.REMOTE)
    gauges: dict[str, float] = {
        metrics.QUEUE_LENGTH: len(scheduler.waiting) - waiting_remote,
        metrics.REMOTE_QUEUE_LENGTH: waiting_remote,
        metrics.PREFILLING: len(scheduler.running.prefilling),
        metrics.DECODING: len(scheduler.running.decoding),
        metrics.FETCHING: transfers.num_fetching,
        metrics.PUSHING: transfers.num_pushing,
        metrics.LEASES: num_leases,
        metrics.KV_USAGE: ledger.num_used / ledger.num_blocks,
        metrics.KV_BLOCKS: ledger.num_blocks,
        metrics.PREFIX_CACHE_BLOCKS: len(ledger.index),
        metrics.QUEUED_PROMPT_TOKENS: state.queued_prompt_tokens,
        metrics.QUEUED_PROMPT_SECONDS: state.queued_prompt_seconds,
        metrics.PREFILL_RATE: state.prefill_tokens_per_second,
        metrics.DECODE_STEP_SECONDS: state.step_seconds,
        metrics.STEP_TIME_ERROR: scheduler.budget.times.error,
        metrics.DRAINING: float(draining),
    }
    return CoreStats(
        state=state,
        counters={**scheduler.meter.counters, **handoff.counters()},
        gauges={**gauges, **handoff.gauges()},
        observations=scheduler.meter.take_observations(),
        ledger=ledger.counts(),
        pairings=handoff.pairings(),
        troubles=handoff.troubles(),
    )


def complete_leases(handoff: LeaseReport, scheduler: Scheduler) -> LeaseReport:
    """Add to the hand-off's part of a report what the scheduler and the ledger hold."""
    return msgspec.structs.replace(
        handoff,
        blocks=scheduler.ledger.counts(),
        requests=[
            HeldRequest(
                rid=request.key,
                kind=request.kind.name.lower(),
                state=request.state.name.lower(),
                num_tokens=len(request.tokens),
                num_blocks=len(request.blocks),
                leased=request.holding is not None and request.holding.leased,
            )
            for request in (*scheduler.requests, *scheduler.transfers.abandoned)
        ],
    )
