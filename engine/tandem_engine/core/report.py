"""Builds the load report: worker state, gauges, counters, samples, ledger."""

from tandem_engine.frames import CoreStats
from tandem_engine.handoff.events import Handoff
from tandem_engine.scheduler.request import Kind
from tandem_engine.scheduler.scheduler import Scheduler
from tandem_wire.messages import WorkerState


def queued_prompt_tokens(scheduler: Scheduler) -> int:
    """Prompt tokens that wait for, or are in, prefill on this worker.

    Requests that will ask a prefill worker don't count here: their prompts are that worker's work.
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
        "queue_length": len(scheduler.waiting) - waiting_remote,
        "remote_queue_length": waiting_remote,
        "prefilling": len(scheduler.running.prefilling),
        "decoding": len(scheduler.running.decoding),
        "fetching": transfers.num_fetching,
        "pushing": transfers.num_pushing,
        "leases": num_leases,
        "kv_usage_ratio": ledger.num_used / ledger.num_blocks,
        "kv_blocks": ledger.num_blocks,
        "prefix_cache_blocks": len(ledger.index),
        "queued_prompt_tokens": state.queued_prompt_tokens,
        "queued_prompt_seconds": state.queued_prompt_seconds,
        "prefill_tokens_per_second": state.prefill_tokens_per_second,
        "decode_step_seconds": state.step_seconds,
        "draining": float(draining),
    }
    return CoreStats(
        state=state,
        counters={**scheduler.meter.counters, **handoff.counters()},
        gauges={**gauges, **handoff.gauges()},
        observations=scheduler.meter.take_observations(),
        ledger=ledger.counts(),
    )
