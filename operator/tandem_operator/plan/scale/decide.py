"""The pure function: policy, sizes, signals and time in; one decision for both pools out.

Each pool has its own cause to grow. Prefill: the backlog that waits, the work that arrives, and
TTFT as the check. Decode: KV in use, requests without room, and TBT as the check. Neither looks at
the utilisation of a GPU, which is high at any load. A pool shrinks by one at a time, only after the
same rules hold for one worker fewer, and only after that was so for the hold time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from tandem_operator.api.autoscaling_policy import (
    AutoscalingPolicySpec,
    CoordinationMode,
    HoldMode,
    OnDeadline,
    PolicyPools,
    PoolBounds,
)
from tandem_operator.facts.scaling import ScalerState
from tandem_operator.facts.signals import WINDOW_SECONDS, Signals
from tandem_operator.plan.scale.decision import Decision

TOLERANCE = 0.10
"""Latency may exceed its objective by this share before a pool grows."""
TARGET_BUSY = 0.8
"""Share of a prefill worker's time that arriving work should take at most."""
SPARE = 0.8
"""A smaller pool must stay below this share of every limit, else it is not tried."""
BACKLOG_SHARE = 0.5
"""Part of the TTFT objective within which the backlog should be worked off."""

IDLE = "no request arrives and none runs"


@dataclass(frozen=True)
class PoolSizes:
    """Both pools as they are: ready workers, and those on their way (with the oldest's age)."""

    prefill_ready: int
    decode_ready: int
    prefill_pending: int = 0
    decode_pending: int = 0
    oldest_pending_seconds: float = 0.0
    startup_seconds: float = 0.0  # measured p90; 0: unknown
    num_draining: int = 0  # workers of both pools that finish their streams
    prefill_age_seconds: float = math.inf  # since the newest worker became ready
    decode_age_seconds: float = math.inf

    @property
    def prefill(self) -> int:
        """Prefill workers, ready or on their way."""
        return self.prefill_ready + self.prefill_pending

    @property
    def decode(self) -> int:
        """Decode workers, ready or on their way."""
        return self.decode_ready + self.decode_pending


@dataclass(frozen=True)
class _Want:
    """What one pool needs: enough for now, or fewer if `spare`, each with its reason."""

    size: int
    because: str
    spare: bool = False
    infeasible: str = ""


def decide(
    policy: AutoscalingPolicySpec,
    ttft_seconds: float,
    tbt_seconds: float,
    sizes: PoolSizes,
    signals: Signals,
    state: ScalerState,
    now: float,
    constrain: Callable[[int, int], tuple[int, int]] = lambda prefill, decode: (prefill, decode),
    gpus_per_worker: tuple[int, int] = (0, 0),
) -> Decision:
    """Sizes for both pools.

    `ttft_seconds` and `tbt_seconds` are the objectives in force. `constrain` applies the service's
    ratio to (prefill, decode). `gpus_per_worker` are the GPUs of one worker of each pool, for the
    budget.
    """
    if signals.age_seconds > policy.signals.stale_seconds:
        why = f"held: no complete metrics for more than {policy.signals.stale_seconds} s"
        held = replace(state, prefill_spare_since=None, decode_spare_since=None)
        return Decision(sizes.prefill, sizes.decode, why, why, held, metrics_stale=True)
    policy = policy.model_copy(update={"pools": _pools_now(policy, signals)})
    prefill = _want_prefill(policy, ttft_seconds, sizes, signals)
    decode = _want_decode(policy, tbt_seconds, sizes, signals)
    gated = ""
    if (
        policy.coordination.mode == CoordinationMode.BOTTLENECK
        and prefill.size > sizes.prefill
        and decode.size > sizes.decode
        and signals.prefill.queued_seconds < BACKLOG_SHARE * ttft_seconds
        and signals.decode.num_waiting > 0
    ):
        gated = "prefill waits for decode: requests have no room there, and no prompt is queued"
        prefill = _Want(sizes.prefill, gated)
    withdrawn, state = _withdraw(policy, sizes, state, now)
    if withdrawn:
        prefill = _Want(min(prefill.size, sizes.prefill_ready), withdrawn, prefill.spare)
        decode = _Want(min(decode.size, sizes.decode_ready), withdrawn, decode.spare)
    hold = _hold_seconds(policy, sizes)
    may_shrink = signals.settled and sizes.num_draining == 0
    pools = policy.pools
    since_p, since_d = state.prefill_spare_since, state.decode_spare_since
    prefill_step = _settle(prefill, sizes.prefill, pools.prefill, since_p, now, hold, may_shrink)
    decode_step = _settle(decode, sizes.decode, pools.decode, since_d, now, hold, may_shrink)
    if prefill_step.size < sizes.prefill and decode_step.size < sizes.decode:
        # One drain at a time: a later tick takes the other pool.
        prefill_step = replace(prefill_step, size=sizes.prefill, spare_since=since_p)
    size_p, size_d, limited = _coordinate(
        policy, sizes, prefill_step, decode_step, constrain, gpus_per_worker
    )
    return Decision(
        size_p,
        size_d,
        f"{prefill_step.because}{limited}",
        f"{decode_step.because}{limited}",
        replace(
            state,
            prefill_spare_since=prefill_step.spare_since,
            decode_spare_since=decode_step.spare_since,
        ),
        slo_infeasible=prefill.infeasible or decode.infeasible,
        gated_by_peer=gated,
        capacity_unavailable=withdrawn,
    )


def _pools_now(policy: AutoscalingPolicySpec, signals: Signals) -> PolicyPools:
    """The bounds, with the floor that holds now: zero is for a service that is idle for long."""
    pools, to_zero = policy.pools, policy.scale_to_zero
    if to_zero.enabled and signals.idle and signals.idle_seconds >= to_zero.idle_seconds:
        prefill, decode = 0, 0
    else:
        # Nobody serves without decode. Prefill may be zero, for decode prefills by itself, but only
        # while nothing arrives: without a worker there is no measurement that would raise it.
        prefill = pools.prefill.min if signals.idle else max(pools.prefill.min, 1)
        decode = max(pools.decode.min, 1)
    return pools.model_copy(
        update={
            "prefill": pools.prefill.model_copy(update={"min": prefill}),
            "decode": pools.decode.model_copy(update={"min": decode}),
        }
    )


def _want_prefill(
    policy: AutoscalingPolicySpec, objective: float, sizes: PoolSizes, signals: Signals
) -> _Want:
    seen, count = signals.prefill, max(sizes.prefill, 1)
    if signals.idle:
        return _Want(policy.pools.prefill.min, IDLE, spare=True)
    backlog = math.ceil(seen.queued_seconds / (BACKLOG_SHARE * objective))
    arriving = math.ceil(seen.busy_workers / TARGET_BUSY)
    standby = policy.burst.standby.prefill
    wants = [
        (
            backlog + standby,
            f"{_seconds(seen.queued_seconds)} of prompts wait, objective {_seconds(objective)}",
        ),
        (
            arriving + standby,
            f"arriving prompts take {seen.busy_workers:.1f} workers' whole time",
        ),
    ]
    ttft = seen.ttft_seconds
    settled = sizes.prefill_pending == 0 and sizes.prefill_age_seconds >= WINDOW_SECONDS
    if settled and ttft is not None and ttft > objective * (1 + TOLERANCE):
        text = f"TTFT {_seconds(ttft)} > {_seconds(objective)}"
        peak = max(seen.queued_seconds, seen.peak_queued_seconds)
        if peak == 0 and seen.busy_workers <= 0.5 * count:
            why = f"{text} although no prompt waits: more workers would not help"
            return _Want(sizes.prefill, why, infeasible=why)
        if signals.num_inflight > 0:  # else it is what was, and its cause is gone
            wants.append((math.ceil(count * min(ttft / objective, 2.0)), text))
    size, why = max(wants)
    if size > sizes.prefill:
        return _Want(size, why)

    def enough(fewer: int) -> bool:
        return fewer >= standby and (
            seen.busy_workers <= SPARE * TARGET_BUSY * fewer
            and seen.queued_seconds <= SPARE * BACKLOG_SHARE * objective * fewer
            and (ttft is None or ttft * count / fewer <= SPARE * objective)
        )

    fewer = _fewest(count, enough)
    if fewer < count:
        return _Want(fewer, f"{fewer} would do: {seen.busy_workers:.1f} busy", spare=True)
    return _Want(sizes.prefill, "prefill is sized right")


def _want_decode(
    policy: AutoscalingPolicySpec, objective: float, sizes: PoolSizes, signals: Signals
) -> _Want:
    seen, count = signals.decode, max(sizes.decode, 1)
    ready = max(sizes.decode_ready, 1)
    if signals.idle:
        return _Want(policy.pools.decode.min, IDLE, spare=True)
    ceiling = policy.pools.decode.kv_ceiling_percent / 100
    used = seen.kv_usage * ready  # in workers' worth of KV
    standby = policy.burst.standby.decode
    wants = [
        (
            math.ceil(used / ceiling) + standby,
            f"KV use {seen.kv_usage:.0%} of {ready} workers, ceiling {ceiling:.0%}",
        )
    ]
    if seen.num_waiting > 0 and seen.max_kv_usage > SPARE * ceiling:
        wants.append((count + 1, f"{seen.num_waiting} requests have no room in decode"))
    tbt = seen.tbt_seconds
    settled = sizes.decode_pending == 0 and sizes.decode_age_seconds >= WINDOW_SECONDS
    if settled and tbt is not None and tbt > objective * (1 + TOLERANCE):
        text = f"TBT {_seconds(tbt)} > {_seconds(objective)}"
        if seen.num_running <= ready and seen.peak_running <= 1 and seen.num_waiting == 0:
            why = f"{text} with at most one stream per worker: more workers would not help"
            return _Want(sizes.decode, why, infeasible=why)
        if seen.num_running > 0:  # else it is what was, and its cause is gone
            wants.append((math.ceil(ready * min(tbt / objective, 2.0)), text))
    size, why = max(wants)
    if size > sizes.decode:
        return _Want(size, why)

    def enough(fewer: int) -> bool:
        return fewer >= standby and (
            used <= SPARE * ceiling * fewer
            and seen.num_waiting == 0
            and (tbt is None or tbt * count / fewer <= SPARE * objective)
        )

    fewer = _fewest(count, enough)
    if fewer < count:
        return _Want(fewer, f"{fewer} would do: KV use {seen.kv_usage:.0%}", spare=True)
    return _Want(sizes.decode, "decode is sized right")


def _fewest(count: int, enough: Callable[[int], bool]) -> int:
    """The smallest size, from `count` down and never zero, up to which each one is enough."""
    while count > 1 and enough(count - 1):
        count -= 1
    return count


@dataclass(frozen=True)
class _Step:
    """Where a pool goes now; `floor` is how low a ratio may take it, which moves in whole units."""

    size: int
    because: str
    floor: int
    spare_since: float | None = None


def _settle(
    want: _Want,
    current: int,
    bounds: PoolBounds,
    spare_since: float | None,
    now: float,
    hold: float,
    may_shrink: bool,
) -> _Step:
    """Bounds, step up, and the wait before a step down."""
    target = min(max(want.size, bounds.min), bounds.max)
    if target > current:
        why = want.because if want.size > current else f"below its minimum {bounds.min}"
        return _Step(min(target, current + bounds.max_step_up), why, current)
    if current > bounds.max:
        size = current - 1 if may_shrink else current
        return _Step(size, f"above its maximum {bounds.max}", size)
    if target == current:
        return _Step(current, f"{want.because}{_at_bound(want, current, bounds)}", current)
    if not want.spare:
        return _Step(target, want.because, target)
    since = now if spare_since is None else spare_since
    if now - since < hold:
        return _Step(current, f"{want.because}; kept for {_seconds(hold)}", current, since)
    if not may_shrink:
        why = f"{want.because}; waits for a drain or for more measurements"
        return _Step(current, why, current, since)
    return _Step(current - 1, want.because, target, now)


def _at_bound(want: _Want, current: int, bounds: PoolBounds) -> str:
    if want.size > current:
        return f"; at its maximum {bounds.max}"
    return f"; at its minimum {bounds.min}" if want.spare else ""


def _coordinate(
    policy: AutoscalingPolicySpec,
    sizes: PoolSizes,
    prefill_step: _Step,
    decode_step: _Step,
    constrain: Callable[[int, int], tuple[int, int]],
    gpus: tuple[int, int],
) -> tuple[int, int, str]:
    """The ratio, and with it the GPU budget and the bounds: (prefill, decode, what limited it)."""
    budget, pools = policy.coordination.gpu_budget, policy.pools
    prefill, decode = prefill_step.size, decode_step.size
    limits: set[str] = set()
    while True:
        bound = constrain(prefill, decode)
        over_budget = bool(budget) and bound[0] * gpus[0] + bound[1] * gpus[1] > budget
        over_bounds = bound[0] > pools.prefill.max or bound[1] > pools.decode.max
        grown_p, grown_d = prefill - sizes.prefill, decode - sizes.decode
        if not (over_budget or over_bounds) or (grown_p <= 0 and grown_d <= 0):
            break
        if grown_p >= grown_d:
            prefill -= 1
        else:
            decode -= 1
        limits.add(f"coordination.gpuBudget {budget}" if over_budget else "pools.max")
    limited = f"; limited by {' and '.join(sorted(limits))}" if limits else ""
    if bound == (sizes.prefill, sizes.decode):
        bound = _smaller_unit(sizes, prefill_step.floor, decode_step.floor, constrain) or bound
    if bound != (prefill, decode):
        limited += f"; the ratio makes {prefill}:{decode} into {bound[0]}:{bound[1]}"
    return *bound, limited


def _smaller_unit(
    sizes: PoolSizes,
    floor_p: int,
    floor_d: int,
    constrain: Callable[[int, int], tuple[int, int]],
) -> tuple[int, int] | None:
    """The next sizes down that keep the ratio, where one worker fewer in one pool can't."""
    for decode in range(sizes.decode - 1, floor_d - 1, -1):
        prefill, decode_held = constrain(sizes.prefill, decode)
        fewer = prefill <= sizes.prefill and decode_held < sizes.decode
        if fewer and prefill >= floor_p and decode_held >= floor_d:
            return prefill, decode_held
    return None


def _hold_seconds(policy: AutoscalingPolicySpec, sizes: PoolSizes) -> float:
    """Rent or buy: an idle worker is kept until its idle cost equals the cost of its restart."""
    hold = float(policy.scale_in.min_hold_seconds)
    if policy.scale_in.hold == HoldMode.RENT_OR_BUY:
        hold = max(hold, sizes.startup_seconds)
    return hold


def _withdraw(
    policy: AutoscalingPolicySpec, sizes: PoolSizes, state: ScalerState, now: float
) -> tuple[str, ScalerState]:
    """Why nothing may grow ("": it may), and until when that is remembered."""
    limit = policy.startup.pending_deadline_seconds
    if policy.startup.on_deadline != OnDeadline.WITHDRAW:
        return "", replace(state, no_growth_until=None)
    until = state.no_growth_until
    if sizes.oldest_pending_seconds > limit:
        # Without a pause the pods would be asked for again at once, for ever.
        until = now + limit
    if until is None or now >= until:
        return "", replace(state, no_growth_until=None)
    why = (
        f"pods were pending for more than {limit} s (startup.pendingDeadlineSeconds): growth is"
        " withdrawn and tried again after as long; add nodes or lower pools.max"
    )
    return why, replace(state, no_growth_until=until)


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
