"""The scaling decision, a pure function: from a situation and the time to sizes for both pools.

Each pool grows for its own cause (`need`). A pool shrinks by one at a time, only after its rules
hold for one worker fewer, and only after that was so for the hold time. A forecasting planner can
replace `decide`; everything else stays.
"""

from dataclasses import dataclass, field, replace

from tandem_operator.api.autoscaling_policy import (
    AutoscalingPolicySpec,
    CoordinationMode,
    HoldMode,
    OnDeadline,
    PoolBounds,
)
from tandem_operator.facts.scaling import ScalerState
from tandem_operator.pair import Pair, Role
from tandem_operator.plan.scale.need import (
    BACKLOG_SHARE,
    Need,
    Situation,
    Sizes,
    need_decode,
    need_prefill,
    seconds,
)


@dataclass(frozen=True)
class Decision:
    """Sizes to work towards, and one sentence for each pool that says why, changed or not.

    The flags become the conditions of the same names; their text is the message.
    """

    desired: Pair[int]
    because: Pair[str]
    state: ScalerState = field(default_factory=ScalerState)
    metrics_stale: bool = False
    slo_infeasible: str = ""
    gated_by_peer: str = ""
    capacity_unavailable: str = ""

    @property
    def sentence(self) -> str:
        """Why, for both pools."""
        return f"prefill: {self.because.prefill}; decode: {self.because.decode}"


@dataclass(frozen=True)
class _Shrinking:
    """When a pool may become smaller: after `hold` seconds of being too large, if `allowed`."""

    now: float
    hold: float
    allowed: bool


@dataclass(frozen=True)
class _Step:
    """Where a pool goes now; `floor` is how low a ratio may take it, which moves in whole units."""

    size: int
    because: str
    floor: int
    spare_since: float | None = None


def decide(at: Situation, now: float) -> Decision:
    """Sizes for both pools. `now` is a time of the clock of `at.state`."""
    policy, sizes, totals = at.policy, at.sizes, at.sizes.totals
    if at.signals.age_seconds > policy.signals.stale_seconds:
        return _hold(at)
    bounds = _bounds_now(at)
    needs = Pair(need_prefill(at, bounds.prefill.min), need_decode(at, bounds.decode.min))
    gated = _gate(at, needs)
    if gated:
        needs = Pair(Need(totals.prefill, gated), needs.decode)
    withdrawn, state = _withdraw(policy, sizes, at.state, now)
    if withdrawn:
        needs = needs.zip(sizes.pools).map(
            lambda both: Need(min(both[0].size, both[1].ready), withdrawn, both[0].spare)
        )
    hold = _hold_seconds(policy, sizes)
    shrinking = _Shrinking(now, hold, at.signals.settled and sizes.num_draining == 0)
    steps = Pair.build(
        lambda role: _settle(
            needs.of(role), totals.of(role), bounds.of(role), state.spare_since.of(role), shrinking
        )
    )
    steps = _one_drain(steps, totals, state)
    desired, limited = _coordinate(at, steps, bounds)
    return Decision(
        desired,
        steps.map(lambda step: f"{step.because}{limited}"),
        replace(state, spare_since=steps.map(lambda step: step.spare_since)),
        slo_infeasible=needs.prefill.infeasible or needs.decode.infeasible,
        gated_by_peer=gated,
        capacity_unavailable=withdrawn,
    )


def _one_drain(steps: Pair[_Step], totals: Pair[int], state: ScalerState) -> Pair[_Step]:
    """The steps, but only one pool shrinks: a later tick takes the other one."""
    if not all(step.size < total for step, total in steps.zip(totals)):
        return steps
    kept = replace(steps.prefill, size=totals.prefill, spare_since=state.spare_since.prefill)
    return Pair(kept, steps.decode)


def _hold(at: Situation) -> Decision:
    """Sizes without complete metrics: they are kept, but bounds and waking need no measurement."""
    bounds = _bounds_now(at)
    why = f"sizes are kept: no complete metrics for more than {at.policy.signals.stale_seconds} s"
    held = replace(at.state, spare_since=Pair(None, None))
    shrinking = _Shrinking(now=0.0, hold=0.0, allowed=at.sizes.num_draining == 0)
    totals = at.sizes.totals
    steps = totals.zip(bounds).map(
        lambda both: _settle(Need(both[0], why), both[0], both[1], None, shrinking)
    )
    steps = _one_drain(steps, totals, held)
    desired, limited = _coordinate(at, steps, bounds)
    because = steps.map(lambda step: f"{step.because}{limited}")
    return Decision(desired, because, held, metrics_stale=True)


def _bounds_now(at: Situation) -> Pair[PoolBounds]:
    """The bounds, with the floor that holds now: zero is for a service that is idle for long."""
    pools = at.policy.pools
    # Old figures don't say that nothing arrives; a request says that something does at any time.
    stale = at.signals.age_seconds > at.policy.signals.stale_seconds
    quiet = not at.signals.wanted if stale else at.signals.idle
    if quiet and _may_be_zero(at, measured=not stale):
        floors = Pair(0, 0)
    else:
        # Nobody serves without decode. Prefill may be zero, for decode prefills by itself, but only
        # while nothing arrives: without a worker there is no measurement that would raise it.
        prefill = pools.prefill.min if quiet else max(pools.prefill.min, 1)
        floors = Pair(prefill, max(pools.decode.min, 1))
    return pools.pair.zip(floors).map(lambda both: both[0].model_copy(update={"min": both[1]}))


def _may_be_zero(at: Situation, *, measured: bool) -> bool:
    """Whether a quiet service may have no workers: because it is at zero, or was idle for long."""
    to_zero, decode = at.policy.scale_to_zero, at.sizes.pools.decode
    if not to_zero.enabled:
        return False
    if decode.total == 0:
        return True  # whoever has just started to measure it knows no idle time
    # A service that was woken gets the whole time to serve, from when its workers are ready.
    idle = min(at.signals.idle_seconds, decode.age_seconds)
    return measured and decode.pending == 0 and idle >= to_zero.idle_seconds


def _gate(at: Situation, needs: Pair[Need]) -> str:
    """Why prefill must not grow before decode does; "": it may."""
    grows = all(need.size > total for need, total in needs.zip(at.sizes.totals))
    if (
        grows
        and at.policy.coordination.mode == CoordinationMode.BOTTLENECK
        and at.signals.prefill.queued_seconds < BACKLOG_SHARE * at.objectives.prefill
        and at.signals.decode.num_waiting > 0
    ):
        return "prefill waits for decode: requests have no room there, and no prompt is queued"
    return ""


def _settle(
    need: Need,
    current: int,
    bounds: PoolBounds,
    spare_since: float | None,
    shrinking: _Shrinking,
) -> _Step:
    """Bounds, step up, and the wait before a step down."""
    target = min(max(need.size, bounds.min), bounds.max)
    if target > current:
        why = need.because if need.size > current else f"below its minimum {bounds.min}"
        return _Step(min(target, current + bounds.max_step_up), why, current)
    if current > bounds.max:
        size = current - 1 if shrinking.allowed else current
        return _Step(size, f"above its maximum {bounds.max}", size)
    if target == current:
        return _Step(current, f"{need.because}{_at_bound(need, current, bounds)}", current)
    if not need.spare:
        return _Step(target, need.because, target)
    since = shrinking.now if spare_since is None else spare_since
    if shrinking.now - since < shrinking.hold:
        why = f"{need.because}; idle workers are kept for {seconds(shrinking.hold)}"
        return _Step(current, why, current, since)
    if not shrinking.allowed:
        why = f"{need.because}; waiting for a drain to end or for more measurements"
        return _Step(current, why, current, since)
    return _Step(current - 1, need.because, target, shrinking.now)


def _at_bound(need: Need, current: int, bounds: PoolBounds) -> str:
    if need.size > current:
        return f"; at its maximum {bounds.max}"
    return f"; at its minimum {bounds.min}" if need.spare else ""


def _coordinate(
    at: Situation, steps: Pair[_Step], bounds: Pair[PoolBounds]
) -> tuple[Pair[int], str]:
    """The ratio, and with it the GPU budget and the bounds. Returns sizes and what limited them."""
    budget, totals = at.policy.coordination.gpu_budget, at.sizes.totals
    wanted = steps.map(lambda step: step.size)
    limits: set[str] = set()
    while True:
        bound = at.constrain(wanted)
        over_budget = 0 < budget < sum(size * gpus for size, gpus in bound.zip(at.gpus))
        over_bounds = any(size > limit.max for size, limit in bound.zip(bounds))
        grown = wanted.zip(totals).map(lambda both: both[0] - both[1])
        if not (over_budget or over_bounds) or max(grown) <= 0:
            break
        most = Role.PREFILL if grown.prefill >= grown.decode else Role.DECODE
        wanted = wanted.put(most, wanted.of(most) - 1)
        limits.add(f"coordination.gpuBudget {budget}" if over_budget else "pools.max")
    limited = f"; limited by {' and '.join(sorted(limits))}" if limits else ""
    if bound == totals:
        bound = _smaller_unit(at, steps.map(lambda step: step.floor)) or bound
    if bound != wanted:
        before, after = (f"{sizes.prefill}:{sizes.decode}" for sizes in (wanted, bound))
        limited += f"; the ratio changes {before} to {after}"
    return bound, limited


def _smaller_unit(at: Situation, floors: Pair[int]) -> Pair[int] | None:
    """The next sizes down that keep the ratio, where one worker fewer in one pool can't."""
    totals = at.sizes.totals
    for decode in range(totals.decode - 1, floors.decode - 1, -1):
        held = at.constrain(Pair(totals.prefill, decode))
        fewer = held.prefill <= totals.prefill and held.decode < totals.decode
        if fewer and all(size >= floor for size, floor in held.zip(floors)):
            return held
    return None


def _hold_seconds(policy: AutoscalingPolicySpec, sizes: Sizes) -> float:
    """Rent or buy: an idle worker is kept until its idle cost equals the cost of its restart."""
    hold = float(policy.scale_in.min_hold_seconds)
    if policy.scale_in.hold == HoldMode.RENT_OR_BUY:
        hold = max(hold, sizes.startup_seconds)
    return hold


def _withdraw(
    policy: AutoscalingPolicySpec, sizes: Sizes, state: ScalerState, now: float
) -> tuple[str, ScalerState]:
    """Why nothing may grow ("": it may), and until when that is remembered."""
    limit = policy.startup.pending_deadline_seconds
    if policy.startup.on_deadline != OnDeadline.WITHDRAW:
        return "", replace(state, no_growth_until=None)
    until = state.no_growth_until
    if sizes.oldest_pending_seconds > limit:
        # Without a pause the same pods would be requested again at once, without end.
        until = now + limit
    if until is None or now >= until:
        return "", replace(state, no_growth_until=None)
    why = (
        f"pods were pending for more than {limit} s (startup.pendingDeadlineSeconds), so growth is"
        " withdrawn and tried again after the same time: add nodes or lower pools.max"
    )
    return why, replace(state, no_growth_until=until)
